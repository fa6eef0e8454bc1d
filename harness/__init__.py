"""Measured GPU memory of local LLMs: calibrate once, then know what fits.

    import harness

    harness.require_fit("qwen2.5", ctx=32768)                 # raises before anything starts
    with harness.serve("qwen2.5", ctx=32768) as server:       # started clean, ended with the block
        print(server.endpoint)

Everything is loaded when it is first used. Sizes are bytes, contexts tokens per slot, speeds tokens per second; what is not
known is ``None``. Errors are subclasses of :class:`HarnessError`, with a ``message``, a ``hint`` and a stable ``code``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from harness.api import (
        allocate,
        calibrate,
        check,
        load_calibration,
        parse_log,
        predict,
        require_fit,
        serve,
        surroundings,
        tune,
    )
    from harness.errors import HarnessError, OffloadLikelyError, UnknownVerdictError
    from harness.measure.calibrate import Result
    from harness.model.calibration import Calibration
    from harness.model.facts import LoadFacts
    from harness.prediction.allocation import Allocation
    from harness.prediction.memory import Prediction
    from harness.prediction.verdict import Verdict
    from harness.serving.check import Assessment, Check
    from harness.serving.server import Server
    from harness.serving.tuning import Tuned

__version__ = "0.1.0"
__all__ = [
    "Allocation",
    "Assessment",
    "Calibration",
    "Check",
    "HarnessError",
    "LoadFacts",
    "OffloadLikelyError",
    "Prediction",
    "Result",
    "Server",
    "Tuned",
    "UnknownVerdictError",
    "Verdict",
    "allocate",
    "calibrate",
    "check",
    "load_calibration",
    "parse_log",
    "predict",
    "require_fit",
    "serve",
    "surroundings",
    "tune",
]
_HOMES: Final = {
    "Allocation": "harness.prediction.allocation",
    "Calibration": "harness.model.calibration",
    "Check": "harness.serving.check",
    "HarnessError": "harness.errors",
    "Assessment": "harness.serving.check",
    "LoadFacts": "harness.model.facts",
    "OffloadLikelyError": "harness.errors",
    "Prediction": "harness.prediction.memory",
    "Result": "harness.measure.calibrate",
    "Server": "harness.serving.server",
    "Tuned": "harness.serving.tuning",
    "UnknownVerdictError": "harness.errors",
    "Verdict": "harness.prediction.verdict",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "harness.api")), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
