"""The command that would answer a question that no calibration answers."""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path

from harness.engines.registry import policy_of
from harness.errors import HarnessError
from harness.inventory.weights import of_its_weights, path_of
from harness.model.calibration import Calibration
from harness.serving.calibration_lookup import CalibrationFilter, CalibrationMatch
from harness.store.store import Store
from harness.text import word_of


def calibrating(
    model: str,
    wanted: CalibrationFilter,
    store: Store | None,
    contexts: str | None = None,
    like: CalibrationMatch | None = None,
) -> str:
    """The command that calibrates what a question is about, by the file of its weights where that is known.

    Settings of their own, and other weights than are filed under the name, get a variant of their own; ``like`` is measured
    again with its own settings.
    """
    own = None if like is None else like.calibration.metadata.settings
    cache = own.asked_cache_type if own and own.asked_cache_type not in (None, "auto", "f16") else None
    flash = wanted.flash_attention or (own.flash_attention if own and own.flash_attention == "disabled" else None)
    settings = {
        "--kv-cache-type": wanted.kv_cache_type or cache,
        "--flash-attention": {"enabled": "on", "disabled": "off"}.get(flash or ""),
        "--num-batch": None if wanted.num_batch is None else str(wanted.num_batch),
    }
    given = {option: value for option, value in settings.items() if value is not None}
    source, engine, words = _reached(model, wanted, store)
    words += [] if like else [word_of(f"{option[2:4]}-{value}") for option, value in given.items()]
    variant = wanted.variant or (like.variant if like else None) or "-".join(words) or None
    options = {"--ctx": contexts, "--engine": engine, **given, "--variant": variant}
    return f"harness calibrate {shlex.quote(source)}" + "".join(
        f" {option} {shlex.quote(value)}" for option, value in options.items() if value is not None
    )


def _reached(model: str, wanted: CalibrationFilter, store: Store | None) -> tuple[str, str | None, list[str]]:
    """What ``harness calibrate`` takes for a model that a question names, its engine, and words of a variant that it needs."""
    known: list[tuple[Path, Calibration]] = []
    base, _, variant = model.rpartition("@")
    engine, path, name = wanted.engine, path_of(model), model
    with suppress(HarnessError):
        if store is not None and not (known := store.find(model, engine)) and base and (known := store.find(base, engine)):
            return (*_reached(base, wanted, store)[:2], [] if wanted.variant else [variant])
        if path is not None:
            name = str(path) if "@" in model else model
            if path.is_file() and isinstance(of_its_weights(model, known), str):
                from harness.inventory.digests import cached_sha256

                return name, engine, [cached_sha256(path.resolve())[7:15]]
        elif known and store is not None:
            from harness.inventory.installed import Installed
            from harness.options import Overrides

            calibration = known[0][1]
            name, finder = calibration.metadata.model.name, Installed(store, Overrides(), Path.cwd())
            engine = engine or (None if policy_of(calibration.engine).loads_files else calibration.engine)
            if policy_of(calibration.engine).loads_files and name not in finder.catalog.models:
                name = str(finder.model_path(calibration) or name)
    return name, engine, []
