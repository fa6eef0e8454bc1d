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
    )
    from harness.core.allocate import Allocation
    from harness.core.calibration import Calibration
    from harness.core.facts import LoadFacts
    from harness.core.predict import Prediction
    from harness.core.verdict import Verdict
    from harness.errors import HarnessError, OffloadLikelyError, UnknownVerdictError
    from harness.lifecycle import Server
    from harness.workflows.calibrate import Result
    from harness.workflows.guard import Check, Judged

__version__ = "0.1.0"
__all__ = [
    "Allocation",
    "Calibration",
    "Check",
    "HarnessError",
    "Judged",
    "LoadFacts",
    "OffloadLikelyError",
    "Prediction",
    "Result",
    "Server",
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
]
_HOMES: Final = {
    "Allocation": "harness.core.allocate",
    "Calibration": "harness.core.calibration",
    "Check": "harness.workflows.guard",
    "HarnessError": "harness.errors",
    "Judged": "harness.workflows.guard",
    "LoadFacts": "harness.core.facts",
    "OffloadLikelyError": "harness.errors",
    "Prediction": "harness.core.predict",
    "Result": "harness.workflows.calibrate",
    "Server": "harness.lifecycle",
    "UnknownVerdictError": "harness.errors",
    "Verdict": "harness.core.verdict",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "harness.api")), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
