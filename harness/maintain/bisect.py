"""Which version of an engine changed a model's memory: a binary search, each step a small calibration.

Memory may have moved several times between two versions; what is found is one place where it did, between a version that
measures as the good one and one that does not.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec

from harness.errors import HarnessError, NotFoundError, UntrustedError, UsageError
from harness.maintain.diff import drift_of
from harness.measure.events import Observer
from harness.model.calibration import Calibration
from harness.options import RunOptions
from harness.prediction.drift import Drift
from harness.store.store import Store

#: Contexts of a step, tokens per slot: enough for a line and its error.
CONTEXTS: Final = (2048, 4096, 8192)
_PART: Final = re.compile(r"\d+|[A-Za-z]+")
#: What a tag has to look like (OCI distribution spec, ``<reference>``).
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")

#: Measures with one version.
Measure = Callable[[str], Calibration]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One version: ``moved`` says whether memory is another than with the good one, ``None`` that it could not be measured."""

    version: str
    moved: bool | None
    reason: str | None = None


class Bisection(msgspec.Struct, frozen=True, kw_only=True):
    """``last`` measures as the good version, ``first`` does not; ``drift`` is from the one to the other.

    Between them are only versions that were ``skipped``, since they could not be measured.
    """

    last: str
    first: str
    skipped: tuple[str, ...]
    steps: tuple[Step, ...]
    drift: Drift
    target: str


def ordered(versions: Sequence[str], good: str, bad: str) -> list[str]:
    """The versions from one to the other, both included, in their order; flavours and pre-releases of others are left out.

    Raises:
        UsageError: no version, or the good one is not before the bad one.
    """
    for one in (good, bad):
        if not _TAG.fullmatch(one):
            raise UsageError(f"{one!r} is not a version")
    flavour = _words(good) & _words(bad)
    alike = {one for one in versions if _TAG.fullmatch(one) and _words(one) == flavour and _key(one)} | {good, bad}
    inside = sorted((one for one in alike if _key(good) <= _key(one) <= _key(bad)), key=_key)
    if len(inside) < 2 or inside[0] != good or inside[-1] != bad:
        raise UsageError(f"{good} is not before {bad}", hint="name the older one with --good")
    return inside


def _words(version: str) -> frozenset[str]:
    """What a tag says beside its numbers: ``rocm``, ``rc``; a leading ``v`` or ``b`` says nothing."""
    return frozenset(part for part in _PART.findall(version) if not part.isdigit()) - {"v", "b"}


def _key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in _PART.findall(version) if part.isdigit())


def bisect(versions: Sequence[str], measure: Measure, observer: Observer) -> Bisection:
    """The place where memory moved, of versions in their order; a version that cannot be measured is passed over.

    Raises:
        NotFoundError: nothing moved between the first and the last. HarnessError: one of these two cannot be measured.
    """
    measured: dict[str, Calibration] = {}
    steps: list[Step] = []

    def step(version: str) -> bool | None:
        observer.say(f"measuring with {version}")
        try:
            measured[version] = measure(version)
        except (UsageError, KeyboardInterrupt):
            raise
        except HarnessError as error:
            if version in (versions[0], versions[-1]):
                raise
            steps.append(Step(version=version, moved=None, reason=error.message))
            observer.warn(f"{version} is passed over: {error.message}")
            return None
        moved = _moved(measured[versions[0]], measured[version])
        steps.append(Step(version=version, moved=moved))
        observer.say(f"{version}: {'another memory' if moved else 'as ' + versions[0]}")
        return moved

    step(versions[0])
    if not step(versions[-1]):
        raise NotFoundError(
            f"nothing moved beyond the measurement error between {versions[0]} and {versions[-1]}", code="nothing-moved"
        )
    low, high = 0, len(versions) - 1
    unknown: set[int] = set()
    while candidates := [index for index in range(low + 1, high) if index not in unknown]:
        middle = min(candidates, key=lambda index: abs(2 * index - low - high))
        moved = step(versions[middle])
        if moved is None:
            unknown.add(middle)
        elif moved:
            high = middle
        else:
            low = middle
    old, new = measured[versions[low]], measured[versions[high]]
    return Bisection(
        last=versions[low],
        first=versions[high],
        skipped=tuple(versions[low + 1 : high]),
        steps=tuple(steps),
        drift=drift_of(old, new),
        target=new.metadata.machine.target,
    )


def _moved(good: Calibration, other: Calibration) -> bool:
    """Whether memory moved: figures of speed do not count, and neither do settings that follow from the version."""
    return any(figure.moved for figure in drift_of(good, other).figures if figure.kind in ("constant", "part", "band"))


@contextmanager
def measuring(options: RunOptions, observer: Observer, with_version: Callable[[str], dict[str, str]]) -> Iterator[Measure]:
    """Calibrations of one model with versions of its engine, in a store that is removed afterwards.

    ``with_version`` gives the option that starts a version: an image, or a program.
    """
    from harness.measure.prepare import prepare

    with tempfile.TemporaryDirectory(prefix="harness-bisect-") as folder:

        def measure(version: str) -> Calibration:
            chosen = msgspec.structs.replace(options, **with_version(version))
            store = Store(Path(folder) / re.sub(r"[^A-Za-z0-9.-]", "-", version))
            try:
                return prepare(chosen, store, Path.cwd()).calibrate(observer).calibration
            except UntrustedError as error:
                raise HarnessError(f"measured, but not to be trusted: {error.message}", code=error.code) from error

        yield measure
