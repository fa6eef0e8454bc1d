"""Who else used the GPU during a run, and a meter that sees nothing, or another GPU."""

from __future__ import annotations

from pathlib import Path

from harness.errors import UntrustedError
from harness.fit.observations import spill_reason
from harness.logs.pci import device_addresses
from harness.model.record import Load, Machine, Record, Target
from harness.units import format_size


def interference_notes(record: Record) -> tuple[str, ...]:
    """One note for each process that was not the engine's and held memory of the GPU, with when it was seen."""
    seen: dict[int, dict[str, int | None]] = {}
    for when, occupancy in (("before", record.before), ("after", record.after)):
        for pid, size in (occupancy.processes if occupancy is not None else {}).items():
            seen.setdefault(pid, {})[when] = size
    for load in record.loads:
        for pid, size in (load.trace.other_processes if load.trace is not None else {}).items():
            most = seen.get(pid, {}).get("during")
            seen.setdefault(pid, {})["during"] = size if size is None else max(size, most or 0)

    def amount(size: int | None) -> str:
        return "an unknown size" if size is None else format_size(size)

    return tuple(
        f"another process used the GPU: process {pid}, "
        + ", ".join(f"{amount(times[when])} {when}" for when in ("before", "during", "after") if when in times)
        for pid, times in sorted(seen.items())
    )


def refuse_blind(load: Load, target: Target) -> None:
    """End a run whose meter gave no figure at any time of a load that lay on the target: the next ones would be no better.

    Raises:
        UntrustedError: with the meter's own reason.
    """
    plateau, trace = load.busy or load.idle, load.trace
    if plateau is None or plateau.total_bytes is not None or trace is None or trace.peak_bytes is not None:
        return
    if load.outcome != "ok" or load.facts is None or spill_reason(load.facts, target, ready=True) is not None:
        return
    why = plateau.reason or "no reading"
    raise UntrustedError(
        f"the meter {trace.meter} sees nothing: {why}", hint="what it needs: harness doctor", code="no-reading"
    )


def refuse_unwatched(load: Load, machine: Machine, folder: Path) -> None:
    """End a run whose engine says that it uses another GPU than the meter reads.

    For the meter ``drm`` alone: its GPUs were found by vendor and size, as an engine's list has no addresses. Its log has.

    Raises:
        UntrustedError: naming both.
    """
    if machine.meter != "drm" or load.log is None:
        return
    try:
        log = (folder / load.log).read_bytes()[load.log_start : load.log_end]
    except OSError:
        return
    used, watched = set(device_addresses(log).values()), {gpu.uuid for gpu in machine.gpus}
    if other := sorted(used - watched):
        raise UntrustedError(
            f"the engine uses GPU {', '.join(other)}, and the meter reads {', '.join(sorted(filter(None, watched)))}",
            hint="name the engine's device with --gpus, as harness doctor lists them",
            code="other-gpu",
        )
