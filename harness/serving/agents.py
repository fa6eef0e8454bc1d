"""``harness mcp``: the same answers for agents, over the Model Context Protocol on standard input and output.

Every answer says where its figures come from, in ``label``: ``measured``, ``derived`` (calculated from measured figures),
``estimated`` (not measured at all) or ``unknown``. Nothing is started, measured or written. What is asked is not trusted: no
file is read but headers of models, and nothing is fetched unless the user allowed that when the server was started.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from harness.errors import HarnessError, UnavailableError, UsageError
from harness.installation import install_hint
from harness.inventory.machine import LocalMachine
from harness.options import QueryOptions, TuneOptions, read_available
from harness.store.config import of_question
from harness.store.store import Store

if TYPE_CHECKING:
    from mcp.server import MCPServer

INSTRUCTIONS: Final = (
    "Measured memory of local models. Ask check before a model is started: it says whether it fits in memory, or would "
    "be offloaded to the CPU. Sizes are bytes, contexts tokens per slot. label says where figures come from: measured, "
    "derived, estimated or unknown; treat estimated as a guess, and unknown as no answer."
)
_LABELS: Final = {"measured": "measured", "derived": "derived", "estimated": "estimated", "formula": "estimated"}


class AgentTools:
    """The tools: arguments are those of the command line, answers its JSON documents with a label."""

    def __init__(self, store: Store, *, network: bool = False) -> None:
        self._store, self._network = store, network

    def _query(self, available: str | None, **given: Any) -> QueryOptions:
        """A question: what was given, else what ``HARNESS_…`` and ``harness.toml`` say, which the command line goes by, too."""
        given["available"] = read_available(available)
        said = {name: value for name, value in given.items() if value is not None}
        return QueryOptions(**of_question(dict(os.environ), Path.cwd(), said))

    def check(self, models: list[str], available: str | None = None, num_parallel: int | None = None) -> dict[str, Any]:
        """Will these models fit in memory, or be offloaded to the CPU?

        Args:
            models: each MODEL@CTX, for example qwen2.5:7b@8192; several are checked as running at once, in this order.
            available: free memory of each device, for example 24GiB or 24GiB,12GiB; left out, it is read from this machine.
            num_parallel: sequences at once; left out, as this machine is set, else 1.
        """
        from harness.serving.calibration_lookup import CalibrationFilter, read_question
        from harness.serving.check import check

        query = self._query(available, num_parallel=num_parallel, measured_only=True)
        found = check(
            [read_question(spec, None, query.num_parallel) for spec in models], self._store, LocalMachine(query.gpu),
            wanted=CalibrationFilter.of(query, surroundings=True), available=query.available, measured_only=True,
        ).to_json()  # fmt: skip
        each = [{**one, "label": _label(one)} for one in found["models"]]  # type: ignore[attr-defined]
        return {"verdict": found["verdict"], "label": _worst([one["label"] for one in each]), "models": each}

    def plan(self, models: list[str] | None = None, available: str | None = None, context: int = 8192) -> dict[str, Any]:
        """The largest context of each calibrated model that fits, its speed, and which models fit together.

        Args:
            models: names; left out, all that are calibrated.
            available: free memory of each device, for example 24GiB; left out, it is read from this machine.
            context: tokens per slot at which models are put together.
        """
        from harness.serving.calibration_lookup import CalibrationFilter
        from harness.serving.capacity import TOGETHER, plan

        query = self._query(available, ctx=context)
        found = plan(
            models or (), self._store, LocalMachine(query.gpu), wanted=CalibrationFilter.of(query, surroundings=True),
            num_parallel=query.num_parallel, available=query.available, context=query.ctx or TOGETHER, measured_only=True,
        )  # fmt: skip
        memories = [one.to_json() for one in found.memories]
        for memory in memories:
            for one in memory["models"]:  # type: ignore[attr-defined]
                one["label"] = "unknown" if one["verdict"] == "unknown" else _LABELS.get(str(one.get("source")), "measured")
        labels = [one["label"] for memory in memories for one in memory["models"]]  # type: ignore[attr-defined]
        return {"label": _worst(labels), "memories": memories}

    def tune(
        self,
        model: str,
        min_ctx: int | None = None,
        min_tokens_per_s: float | None = None,
        slots: int = 1,
        available: str | None = None,
    ) -> dict[str, Any]:
        """Settings of a model that make the most of a budget; where it does not fit, what would help, the cheapest first.

        Args:
            model: a name or an id.
            min_ctx: tokens per slot that have to fit.
            min_tokens_per_s: decode speed to reach; layers may then be on the host.
            slots: sequences at once.
            available: free memory of each device, for example 24GiB; left out, it is read from this machine.
        """
        from harness.prediction.tuning import Demand
        from harness.serving.calibration_lookup import CalibrationFilter
        from harness.serving.tuning import tune

        query = self._query(available)
        asked = TuneOptions(min_ctx=min_ctx, min_tokens_per_s=min_tokens_per_s, slots=slots)
        demand = Demand(context=asked.min_ctx, tokens_per_s=asked.min_tokens_per_s, num_parallel=asked.slots)
        wanted = CalibrationFilter.of(query)
        found = tune(model, self._store, LocalMachine(query.gpu), demand, wanted=wanted, available=query.available).to_json()
        settings = found["settings"]
        label = settings["source"] if isinstance(settings, dict) else "unknown" if not found["choices"] else "measured"
        return {"label": _LABELS.get(str(label), "unknown"), **found}

    def estimate(self, models: list[str], contexts: list[int] | None = None, available: str | None = None) -> dict[str, Any]:
        """What models would take that were not measured, from the header of their file; a guess, never a measurement.

        Args:
            models: paths of .gguf files; addresses and names of registries only where the server was started with --network.
            contexts: tokens per slot.
            available: free memory of each device, for example 24GiB.
        """
        from harness.serving.calibration_lookup import CalibrationFilter
        from harness.serving.check import is_address
        from harness.serving.estimate_table import estimates

        for model in models:
            if not self._network and (is_address(model) or not model.endswith(".gguf")):
                raise UsageError(f"{model}: only local .gguf files are read", hint="start the server with --network")
        query, asked = self._query(available), tuple(QueryOptions(ctx=one).ctx or 0 for one in contexts or ())
        found = estimates(
            models, self._store, LocalMachine(query.gpu), wanted=CalibrationFilter.of(query), contexts=asked,
            available=query.available,
            kv_cache_types=(query.kv_cache_type,) if query.kv_cache_type else (), num_parallel=query.num_parallel,
        )  # fmt: skip
        return {"label": "estimated", **msgspec.to_builtins(found)}


def _label(one: dict[str, Any]) -> str:
    return "unknown" if one["verdict"] == "unknown" else _LABELS.get(str(one["source"]), "unknown")


def _worst(labels: list[str]) -> str:
    return max(labels, key=("measured", "derived", "estimated", "unknown").index, default="unknown")


def _answering(tool: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A failure is an answer, too: unknown, with the reason and what to do."""

    @wraps(tool)
    def answer(*args: Any, **kwargs: Any) -> dict[str, Any]:
        try:
            return tool(*args, **kwargs)
        except HarnessError as error:
            return {"label": "unknown", "error": {"code": error.code, "message": error.message, "hint": error.hint}}

    return answer


def make_server(tools: AgentTools) -> MCPServer:
    """A server with the tools.

    Raises:
        UnavailableError: the package ``mcp`` is not installed.
    """
    try:
        from mcp.server import MCPServer
    except ImportError as error:
        raise UnavailableError("the package mcp is not installed", hint=install_hint("mcp"), code="no-mcp") from error
    from harness import __version__

    server = MCPServer("harness", instructions=INSTRUCTIONS, version=__version__, log_level="WARNING")
    for tool in (tools.check, tools.plan, tools.tune, tools.estimate):
        server.add_tool(_answering(tool))
    return server
