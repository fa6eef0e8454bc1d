"""``harness merge --trust``: calibrations that others shared, where there is none of one's own.

Own before same card before same kind of card: what was measured here is never replaced, and one of another kind of machine is
never taken. Each file is checked first: its calibration has to follow from its record (:mod:`harness.maintain.share`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec

from harness.errors import HarnessError, NotFoundError, NotPermittedError
from harness.maintain.share import Shared, check
from harness.options import Allowed
from harness.store.store import Store
from harness.store.trust import refuse

#: How far a file may be from this machine: of the same card, or of the same kind of card.
Trust = Literal["card", "kind"]
_RANKS: Final[tuple[Trust, ...]] = ("card", "kind")
#: What a calibration of others says of itself.
NOTE: Final = "measured by others, on another machine"


class TakenFile(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one shared file.

    ``added``; ``own``: there is one of one's own; ``other``: a nearer or newer one was taken; ``far``: it is of another kind of
    machine, or farther than was asked for; ``refused``: it asks for what a file may not set; ``unreadable``.
    """

    source: str
    target: str | None
    action: Literal["added", "own", "other", "far", "refused", "unreadable"]
    reason: str | None = None


def rank(shared: Shared, cards: Sequence[str]) -> Trust | None:
    """How near a shared calibration is to a machine with these cards (none: host memory); ``None``: it is not.

    The same kind is a card of the same maker, measured by the same meter; there is no such thing for host memory, whose heap is
    the same wherever the engine is.
    """
    machine = shared.calibration.metadata.machine
    if machine.target == "host":
        return None if cards else "card"
    names = [gpu.name for gpu in machine.gpus]
    if not names or not cards:
        return None
    if all(name in cards for name in names):
        return "card"
    makers = {name.partition(" ")[0] for name in names}
    return "kind" if len(names) == 1 and makers == {cards[0].partition(" ")[0]} else None


def take(
    store: Store, sources: Sequence[Path], cards: Sequence[str], least: Trust, here: Path, allowed: Allowed | None = None
) -> Iterator[TakenFile]:
    """Take shared files into a store where it has no calibration of the model: the nearest, then the newest.

    Args:
        store: one's own.
        sources: folders of shared files, or files.
        cards: names of the cards here; empty for host memory.
        least: the farthest that is taken.
        here: whose pins and catalog say what is known.
        allowed: what the calibrations may set beyond the list.

    Raises:
        NotFoundError: no shared file is there.
    """
    paths = [path for source in sources for path in ([source] if source.is_file() else sorted(source.rglob("*.json")))]
    if not paths:
        raise NotFoundError(f"no shared calibrations in {', '.join(map(str, sources))}", code="no-such-store")
    near: dict[str, list[tuple[int, str, Path, Shared]]] = {}
    for path in paths:
        try:
            shared = check(path)
            refuse(shared.calibration, here, allowed or Allowed(), path.name)
        except NotPermittedError as error:
            yield TakenFile(source=str(path), target=None, action="refused", reason=f"{error.message}; {error.hint}")
            continue
        except HarnessError as error:
            yield TakenFile(source=str(path), target=None, action="unreadable", reason=error.message)
            continue
        level = rank(shared, cards)
        if level is None or _RANKS.index(level) > _RANKS.index(least):
            yield TakenFile(source=str(path), target=None, action="far", reason=_machine(shared))
            continue
        when = shared.calibration.metadata.calibrated_at
        near.setdefault(shared.calibration.id, []).append((_RANKS.index(level), when, path, shared))
    own = store.ids()
    for identity, some in near.items():
        some.sort(key=lambda one: one[1], reverse=True)
        some.sort(key=lambda one: one[0])
        for number, (_, _, path, shared) in enumerate(some):
            if identity in own:
                yield TakenFile(source=str(path), target=None, action="own")
            elif number:
                yield TakenFile(source=str(path), target=None, action="other")
            else:
                yield _written(store, path, shared)


def _written(store: Store, path: Path, shared: Shared) -> TakenFile:
    metadata = shared.calibration.metadata
    quality = msgspec.structs.replace(metadata.quality, notes=(*metadata.quality.notes, f"{NOTE}: {_machine(shared)}"))
    calibration = msgspec.structs.replace(
        shared.calibration, metadata=msgspec.structs.replace(metadata, quality=quality, run=None)
    )
    engine, _, stem = calibration.id.partition("/")
    target = store.root / engine / f"{stem}.yaml"
    store.write(target, calibration)
    return TakenFile(source=str(path), target=str(target), action="added", reason=_machine(shared))


def _machine(shared: Shared) -> str:
    return shared.calibration.metadata.machine.devices()
