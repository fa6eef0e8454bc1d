"""Every way in which harness can refuse, with the exit status that scripts rely on.

Each class is one row of the exit-code table in ``docs/reference/exit-codes.md``. ``code`` is the stable identifier that
appears in ``--json``; ``hint`` says what to do next.
"""

from __future__ import annotations

import sys
from typing import ClassVar, Final

#: What to do where free memory cannot be read.
ADVICE: Final = "say what is free with --available, for example --available 24GiB"


class HarnessError(Exception):
    """Base of all expected failures; anything else that escapes is a bug in harness (exit 1)."""

    exit_code: ClassVar[int] = 1
    default_code: ClassVar[str] = "bug"

    def __init__(self, message: str, *, hint: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code or self.default_code


class UsageError(HarnessError):
    """The command line cannot mean what it says."""

    exit_code = 2
    default_code = "usage"


class OffloadLikelyError(HarnessError):
    """The model would be offloaded to the CPU, and the caller asked for a refusal."""

    exit_code = 3
    default_code = "offload"


class UnknownVerdictError(HarnessError):
    """There is no calibration that answers the question."""

    exit_code = 4
    default_code = "uncalibrated"


class UntrustedError(HarnessError):
    """Measured, but not to be trusted: the record is kept, no artifact is written."""

    exit_code = 5
    default_code = "untrusted"


class BadInputError(HarnessError):
    """A file or answer was read and not understood."""

    exit_code = 65
    default_code = "bad-input"


class NotFoundError(HarnessError):
    """A model, file, run or calibration does not exist here."""

    exit_code = 66
    default_code = "not-found"


class UnavailableError(HarnessError):
    """Docker, a GPU, an image, a library or a server is not there."""

    exit_code = 69
    default_code = "unavailable"


class EngineError(HarnessError):
    """The engine failed; ``tail`` holds its last log lines, control characters stripped."""

    exit_code = 70
    default_code = "engine-failed"

    def __init__(self, message: str, *, tail: tuple[str, ...] = (), hint: str | None = None, code: str | None = None) -> None:
        super().__init__(message, hint=hint, code=code)
        self.tail = tail


class WontFitError(EngineError):
    """The engine could not allocate a load: an observation, after which a plan shrinks."""

    default_code = "wont-fit"


class CannotWriteError(HarnessError):
    """The output cannot be written, or would overwrite something else."""

    exit_code = 73
    default_code = "cannot-write"


class BusyError(HarnessError):
    """Something is held by another process, or a deadline passed: trying again may help."""

    exit_code = 75
    default_code = "busy"


class NotPermittedError(HarnessError):
    """The operating system or the daemon said no."""

    exit_code = 77
    default_code = "not-permitted"


class ConfigError(HarnessError):
    """A configuration file is wrong, or a file has a schema newer than this program."""

    exit_code = 78
    default_code = "bad-config"


def refuse_other_systems() -> None:
    """Refuse what starts engines and reads their memory where that cannot be done.

    Raises:
        UnavailableError: this is not Linux.
    """
    if sys.platform != "linux":
        raise UnavailableError(
            f"engines are started and measured on Linux alone, and this is {sys.platform}",
            hint="calibrate on a Linux machine or in a virtual one; check, plan, predict and all that only read run here",
            code="not-linux",
        )
