"""Two sides of a comparison: files, stores, or either as a git revision has it."""

from __future__ import annotations

import subprocess
from pathlib import Path, PurePosixPath

import msgspec

from harness.engines.registry import is_engine, policy_of
from harness.errors import NotFoundError, UnavailableError, UsageError
from harness.inventory.weights import calibrations_of
from harness.model.calibration import Calibration
from harness.prediction.drift import Drift, compare
from harness.store.store import Store, key_of, variant_of
from harness.store.yaml import parse_calibration, read_calibration


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """Calibrations by their place: ``engine/name`` or ``engine/name@variant``. ``single`` is one file."""

    name: str
    calibrations: dict[str, Calibration]
    single: bool


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """One calibration on both sides; ``None`` where a side has none, and then there is no drift either."""

    key: str
    old: Calibration | None
    new: Calibration | None
    drift: Drift | None


def pairs(old: Side, new: Side) -> list[Pair]:
    """Calibrations of both sides, matched by their place; of two files, the one with the other.

    Raises:
        NotFoundError: a file is compared with a store that has no calibration of its place.
    """
    if old.single and new.single:
        ((key, first),), ((_, second),) = old.calibrations.items(), new.calibrations.items()
        return [Pair(key=key, old=first, new=second, drift=drift_of(first, second))]
    keys = sorted({*old.calibrations, *new.calibrations})
    for one, other in ((old, new), (new, old)):
        if one.single:
            keys = list(one.calibrations)
            if keys[0] not in other.calibrations:
                raise NotFoundError(f"{other.name} has no calibration of {keys[0]}", code="no-calibration")
    return [_pair(key, old.calibrations.get(key), new.calibrations.get(key)) for key in keys]


def _pair(key: str, old: Calibration | None, new: Calibration | None) -> Pair:
    return Pair(key=key, old=old, new=new, drift=drift_of(old, new) if old is not None and new is not None else None)


def drift_of(old: Calibration, new: Calibration) -> Drift:
    """What moved from one calibration to another, by the rules of their engines."""
    return compare(old, new, (policy_of(old.engine), policy_of(new.engine)))


def read_side(text: str, store: Store | None = None) -> Side:
    """A file, a store's folder, a name or id of ``store``, or ``REVISION:PATH`` of either in the git repository of this folder.

    Raises:
        NotFoundError: there is no such thing. BadInputError, ConfigError: it is no calibration. UnavailableError: no git.
    """
    path = Path(text)
    if path.is_dir():
        return _store(text, path)
    if path.is_file():
        calibration = read_calibration(path)
        return Side(name=text, calibrations={key_of(calibration, path): calibration}, single=True)
    found = [] if store is None else calibrations_of(store, text)
    plain = [one for one in found if variant_of(one[0]) is None] or found
    if plain:
        return Side(name=text, calibrations={key_of(one, file): one for file, one in plain[:1]}, single=True)
    revision, colon, inside = text.partition(":")
    if not colon or not revision:
        known = (
            f"{store.missing(text)}, and no file or folder has that name"
            if store is not None
            else f"no such file or folder: {text}"
        )
        raise NotFoundError(known, code="no-such-file")
    return _revision(text, revision, inside)


def _store(name: str, folder: Path) -> Side:
    """A store, or one engine's folder of a store."""
    one = folder.resolve().name if is_engine(folder.resolve().name) else None
    store = Store(folder.resolve().parent if one else folder)
    paths = [path for path in store.paths() if one is None or path.parent.name == one]
    found = [(path, store.read(path)) for path in paths]
    return Side(name=name, calibrations={key_of(calibration, path): calibration for path, calibration in found}, single=False)


def _revision(name: str, revision: str, inside: str) -> Side:
    if revision.startswith("-"):
        raise UsageError(f"no git revision begins with '-': {revision}")
    commit = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}").decode().strip()
    if not commit:
        raise NotFoundError(f"no such file, folder or git revision: {name}", code="no-such-revision")
    at = f"{commit}:{inside.rstrip('/')}"
    kind = _git("cat-file", "-t", at).decode().strip()
    if kind == "blob":
        calibration = parse_calibration(_git("cat-file", "blob", at), name)
        return Side(name=name, calibrations={key_of(calibration, PurePosixPath(inside)): calibration}, single=True)
    if kind != "tree":
        raise NotFoundError(
            f"{revision} has no {inside or 'path'}", hint="paths count from the repository's top", code="no-such-file"
        )
    found = {}
    for line in _git("ls-tree", "-r", "-z", "--name-only", at).split(b"\0"):
        file = PurePosixPath(line.decode("utf-8", "surrogateescape"))
        engine = file.parent.name or PurePosixPath(inside).name
        if file.suffix == ".yaml" and is_engine(engine) and len(file.parts) <= 2:
            calibration = parse_calibration(_git("cat-file", "blob", f"{at}/{file}"), f"{revision}:{inside}/{file}")
            found[key_of(calibration, file)] = calibration
    return Side(name=name, calibrations=found, single=False)


def _git(*arguments: str) -> bytes:
    """What git prints; nothing where it fails."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, check=False, timeout=60)
    except FileNotFoundError as error:
        raise UnavailableError("git is not installed, and a revision was named", code="no-git") from error
    except subprocess.TimeoutExpired as error:
        raise UnavailableError("git does not answer", code="no-git") from error
    return done.stdout if done.returncode == 0 else b""
