"""What ``harness doctor`` finds: data."""

from __future__ import annotations

from typing import Literal

import msgspec

State = Literal["ok", "missing", "note"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at. ``code`` is stable; ``state`` is ``missing`` where a calibration would fail."""

    subject: str
    code: str
    state: State
    text: str
    hint: str | None = None


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """Whether a calibration works here: on what, or why not; ``next`` is what to do."""

    works: bool
    text: str
    next: str | None
