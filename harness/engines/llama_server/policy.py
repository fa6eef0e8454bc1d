"""What llama-server decides: llama.cpp's fit places layers, and one batch holds at every context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

from harness.engines.policy import LLAMA_MEMORY, LLAMA_PLACING, Policy
from harness.engines.settings import asked_flash
from harness.model.start_command import StartCommand
from harness.prediction.host import server_caches
from harness.prediction.rules import SERVER_CACHES, Growth, fit_reserve
from harness.prediction.settings import AskedSettings

if TYPE_CHECKING:
    from harness.model.calibration import Calibration
    from harness.prediction.memory import Prediction
    from harness.prediction.verdict import Verdict

#: The program of the embedded one, which Python runs.
PROGRAM: Final = "xllamacpp_server.py"
#: The variable for the name under which it answers (common/arg.cpp).
ALIAS: Final = "LLAMA_ARG_ALIAS"
#: Named like llama.cpp's own variables; ``--override-kv`` has none there, so it is passed on as the flag.
OVERRIDE_KV: Final = "LLAMA_ARG_OVERRIDE_KV"


_FLASH: Final = {
    **dict.fromkeys(("on", "1", "true", "enabled"), "enabled"),
    **dict.fromkeys(("off", "0", "false", "disabled"), "disabled"),
}


class LlamaServerPolicy(Policy):
    """llama-server's decisions."""

    name = "llama-server"
    title = "llama-server"
    has_dry_runs = True
    loads_files = True
    name_variables = (ALIAS,)
    memory_variables = (*LLAMA_PLACING, *LLAMA_MEMORY)
    placing_variables = frozenset(LLAMA_PLACING)
    slots_variable = "LLAMA_ARG_N_PARALLEL"

    def runs(self, words: Sequence[str]) -> bool:
        """By its program; Ollama starts one too, from its own folder."""
        if any(word.rpartition("/")[2] == PROGRAM for word in words[1:3]):
            return True
        return words[0].rpartition("/")[2] == "llama-server" and "/ollama/" not in words[0]

    def settings_by(self, env: Mapping[str, str]) -> AskedSettings:
        """``LLAMA_ARG_CACHE_TYPE_K`` and ``_V`` (f16 where one is unset), ``_FLASH_ATTN``, ``_UBATCH``."""
        kinds = [env.get(f"LLAMA_ARG_CACHE_TYPE_{one}") for one in "KV"]
        types = [kind or self.default_cache_type for kind in kinds]
        batch = env.get("LLAMA_ARG_UBATCH", "")
        return AskedSettings(
            kv_cache_type=None if not any(kinds) else types[0] if types[0] == types[1] else "/".join(types),
            flash_attention=_FLASH.get(env.get("LLAMA_ARG_FLASH_ATTN", "").lower()),
            num_batch=int(batch) if batch.isdecimal() else None,
        )

    def serve_environment(self, model: str, context: int) -> dict[str, str]:
        """The name under which it answers."""
        return {ALIAS: model}

    def start(self, calibration: Calibration, verdict: Verdict, available: tuple[int, ...]) -> StartCommand:
        """Every option that decides about memory is named; placement is left to its fit, as it was judged."""
        metadata = calibration.metadata
        settings, slots = metadata.settings, verdict.num_parallel
        batch = calibration.band_for(verdict.context, settings.num_batch, slots).num_batch
        options = {"ctx-size": str(verdict.context * slots), "parallel": str(slots)}
        if batch is not None:
            options |= {"batch-size": str(max(batch, 2048)), "ubatch-size": str(batch)}
        options["flash-attn"] = asked_flash(settings.flash_attention)
        key, _, value = settings.kv_cache_type.partition("/")
        options |= {"cache-type-k": key, "cache-type-v": value or key}
        if OVERRIDE_KV in settings.env:  # it has no variable there
            options["override-kv"] = settings.env[OVERRIDE_KV]
        if metadata.machine.target == "host":
            options |= {"device": "none", "n-gpu-layers": "0", "fit": "off"}
        return StartCommand(
            program=("llama-server",),
            arguments=tuple(word for name, value in options.items() for word in (f"--{name}", value)),
            model_option="--model",
            port=8080,
            port_option="--port",
            variables={name: value for name, value in settings.env.items() if name != OVERRIDE_KV},
            preset=options,
            formats=("llama-server",),
        )

    def may_grow(self, calibration: Calibration, needed: Prediction, env: Mapping[str, str]) -> Growth | None:
        """Prompt cache and checkpoints, which are off while host memory is measured."""
        return Growth(most=server_caches(calibration, needed, env), what=SERVER_CACHES)

    def reserve_bytes(self, version: str | None, env: dict[str, str], projector_bytes: int = 0) -> int | None:
        """``--fit-target`` (``LLAMA_ARG_FIT_TARGET``, MiB); nothing is kept free with ``LLAMA_ARG_FIT=off``."""
        return fit_reserve(env)
