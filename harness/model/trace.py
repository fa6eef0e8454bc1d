"""Memory over time, as a meter saw it."""

from __future__ import annotations

from typing import Final, Literal

import msgspec

from harness.units import MIB

#: A device that is this close to its baseline, bytes, has come back to it.
BASELINE_TOLERANCE: Final = 16 * MIB

#: ``import``: a figure that was measured elsewhere.
MeterName = Literal["nvml", "drm", "host", "log", "import"]
#: What one reading of a meter may be off, bytes: NVML counts in steps of 2 MiB; a log has two decimals of MiB, a few parts.
READING_ERROR: Final[dict[str, int]] = {"nvml": 2 * MIB, "drm": 2 * MIB, "import": MIB, "host": MIB // 4, "log": MIB // 20}


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One look at the memory of an engine's processes.

    ``total_bytes`` is ``None`` where the meter could not read, and ``reason`` then says why. ``devices`` holds bytes by
    device (UUID) where the meter can tell; ``other_processes`` are other users of the devices, PID to bytes or ``None``.
    ``listed`` is false where the list of processes could not be read, so that ``other_processes`` is empty. ``basis`` tells a
    per-process figure from a device-wide difference (``reason`` then says why there is no figure by process) and from a log.
    """

    total_bytes: int | None
    reason: str | None = None
    devices: dict[str, int] = {}
    other_processes: dict[int, int | None] = msgspec.field(default_factory=dict, name="strangers")
    listed: bool = True
    basis: Literal["process", "device-delta", "logged"] = "process"


class Occupancy(msgspec.Struct, frozen=True, kw_only=True):
    """What devices hold at one moment, whoever holds it.

    ``devices`` maps UUIDs to bytes in use (total less free); a device that does not say is left out. ``processes`` maps the
    PIDs that the driver names to their bytes, ``None`` where it gives none.
    """

    devices: dict[str, int] = {}
    processes: dict[int, int | None] = {}


class Sample(msgspec.Struct, frozen=True, array_like=True):
    """Seconds since the start of the trace, and bytes (``None``: no reading)."""

    seconds: float
    total_bytes: int | None


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """Seconds since the start of the trace, and the phase that began then."""

    seconds: float
    phase: str


class MemoryTrace(msgspec.Struct, frozen=True, kw_only=True):
    """Samples of one meter over one load, thinned for storage; ``peak_bytes`` is over every reading taken.

    ``other_processes`` are other users of the devices at any time of the trace: PID to its largest bytes, ``None`` unknown;
    ``moved`` are those that came, went, grew or shrank meanwhile, PID to the bytes of it, ``None`` unknown.
    ``device_peak_bytes`` is the most by which the devices as a whole rose above their baseline, read faster than
    processes can be; ``accounted_peak_bytes`` the driver's own record of each process's largest use, added up, where
    its accounting mode is on.
    """

    meter: MeterName
    samples: tuple[Sample, ...] = ()
    marks: tuple[Mark, ...] = ()
    peak_bytes: int | None = None
    readings: int = 0
    failures: dict[str, int] = {}
    other_processes: dict[int, int | None] = msgspec.field(default_factory=dict, name="strangers")
    moved: dict[int, int | None] = {}
    device_peak_bytes: int | None = None
    accounted_peak_bytes: int | None = None


class Plateau(msgspec.Struct, frozen=True, kw_only=True):
    """A steady stretch of a trace: the median, its spread (max - min) and the number of readings; bytes."""

    total_bytes: int | None
    spread_bytes: int | None = None
    readings: int = 0
    reason: str | None = None
    devices: dict[str, int] = {}
    basis: Literal["process", "device-delta", "logged"] = "process"
