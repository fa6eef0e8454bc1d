"""Calibrations and runs on disk: atomic, versioned, one folder.

Layout: ``<store>/<engine>/<name>[@<variant>].yaml`` and ``<store>/runs/<run>/{record.json,*.log}``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath
from typing import Final

import msgspec

from harness.engines.registry import BUILT_IN, is_engine, name_in_file
from harness.errors import (
    BadInputError,
    BusyError,
    CannotWriteError,
    ConfigError,
    HarnessError,
    NotFoundError,
    NotPermittedError,
    UsageError,
)
from harness.model.calibration import Calibration, artifact_name, json_schema, to_document
from harness.model.domains import unsound
from harness.model.facts import EngineName
from harness.model.record import RECORD_VERSION, Record
from harness.model.validation import from_document
from harness.store.config import variable
from harness.store.run_folder import read_plain, whole_file
from harness.store.yaml import read_calibration, to_yaml
from harness.text import written
from harness.units import is_context

RUNS: Final = "runs"
_STEM: Final = re.compile(r"[A-Za-z0-9._%-]*[A-Za-z0-9_%-][A-Za-z0-9._%-]*")
_VARIANT: Final = re.compile(r"[A-Za-z0-9._-]+")
#: How llama.cpp names the parts of a model (``llama_split_path``).
_PART: Final = re.compile(r"-\d{5}-of-\d{5}$")
_BLOB: Final = re.compile(r"(?:^|/)sha256-[0-9a-f]{64}$")
_RUN: Final = re.compile(r"[A-Za-z0-9@%._+-]{1,255}", re.ASCII)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file or nothing, readable by everybody that the umask allows.

    Raises:
        CannotWriteError: the folder is read-only or the disk is full.
    """
    with whole_file(path) as file:
        file.write(data)


class StoreEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One artifact of a store."""

    path: Path
    calibration: Calibration

    @property
    def variant(self) -> str | None:
        """The variant's name; ``None`` for the default file."""
        return variant_of(self.path)

    @property
    def key(self) -> str:
        """``engine/name`` or ``engine/name@variant``."""
        return key_of(self.calibration, self.path)


def variant_of(path: PurePath) -> str | None:
    """The variant that an artifact's file is named after; ``None`` for the default file."""
    return path.stem.partition("@")[2] or None


def stem_of(path: PurePath) -> str:
    """The name of the model in an artifact's file name."""
    return path.stem.partition("@")[0]


def key_of(calibration: Calibration, path: PurePath) -> str:
    """The id of a calibration, with the variant of its file."""
    variant = variant_of(path)
    return f"{calibration.id}@{variant}" if variant else calibration.id


class Store:
    """One store on disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._listed: dict[Path, tuple[int, dict[str, list[str]]]] = {}

    def path_of(self, engine: str, model: str, variant: str | None = None) -> Path:
        """Where the artifact of a model is, whether it exists or not."""
        if not is_engine(engine):
            raise UsageError(f"unknown engine: {engine!r}")
        if variant is not None and not _VARIANT.fullmatch(variant):
            raise UsageError(f"a variant is letters, digits, '.', '_' and '-': {variant!r}")
        name = artifact_name(model)
        if len(name) > 200:
            raise UsageError("the model's name is too long for a file name")
        return self.root / engine / f"{name}{f'@{variant}' if variant else ''}.yaml"

    def _engines(self) -> list[EngineName]:
        """Harness's engines, and others that have a folder here: of no folder, no package's metadata is read."""
        try:
            folders = [folder.name for folder in self.root.iterdir() if folder.is_dir()]
        except NotADirectoryError as error:
            raise UsageError(f"{self.root} is a file; a store is a folder", hint="--store DIR", code="no-store") from error
        except PermissionError as error:
            raise NotPermittedError(f"{self.root} cannot be read: {error.strerror}") from error
        except FileNotFoundError:
            folders = []
        return [*BUILT_IN, *(name for name in sorted(folders) if name not in BUILT_IN and name != RUNS and is_engine(name))]

    def paths(self) -> Iterator[Path]:
        """All artifacts, in name order."""
        for engine in sorted(self._engines()):
            yield from sorted((self.root / engine).glob("*.yaml"))

    def ids(self) -> list[str]:
        """Ids of all calibrations, in name order; of variants once."""
        return list(dict.fromkeys(f"{path.parent.name}/{stem_of(path)}" for path in self.paths()))

    def entries(self, warn: Callable[[str], None]) -> Iterator[StoreEntry]:
        """All artifacts that can be read, in name order; ``warn`` hears why another cannot."""
        for path in self.paths():
            try:
                yield StoreEntry(path=path, calibration=self.read(path))
            except HarnessError as error:
                warn(error.message)

    def read(self, path: Path) -> Calibration:
        """One artifact of this store, checked to stand under its own name.

        Raises:
            BadInputError: the file belongs to another model.
        """
        calibration = read_calibration(path)
        expected = f"{path.parent.name}/{stem_of(path)}"
        if calibration.id != expected:
            raise BadInputError(f"{path} holds the calibration of {calibration.id}, not of {expected}", code="other-model")
        return calibration

    def find(self, name: str, engine: str | None = None) -> list[tuple[Path, Calibration]]:
        """Artifacts (with their variants) that answer to a model's name or id; cheap in a store of any size.

        ``NAME@VARIANT`` is that variant alone, where no model has that whole name, and ``NAME@CTX`` any of them.

        Raises:
            UsageError: several engines have that name and none was chosen. NotPermittedError: the store may not be read.
        """
        if not name:
            raise UsageError("'' names no model", code="bad-name")
        head, _, tail = name.partition("/")
        by_id = bool(tail) and head in self._engines()
        if by_id:
            engines, stem = [head], tail
            if engine is not None and engine != head:
                raise UsageError(f"{name} is an id of {head}, not of {engine}")
        else:
            engines, stem = ([engine] if engine else self._engines()), name
        stems = dict.fromkeys(map(artifact_name, (stem, model_stem(stem))))
        if by_id and _STEM.fullmatch(stem):
            stems = {stem: None, **stems}  # an id holds the file's name as it is
        found: dict[str, list[Path]] = {}
        for one in engines:
            for candidate in stems:
                paths = self._variants(one, candidate)
                if paths:
                    found[one] = paths
                    break
        base, at, variant = name.rpartition("@")
        if at and not found:
            known = self.find(base, engine)
            named = [one for one in known if variant_of(one[0]) == variant]
            return named or (known if is_context(variant) else [])
        if len(found) > 1:
            ids = ", ".join(f"{one}/{stem_of(paths[0])}" for one, paths in found.items())
            raise UsageError(
                f"several engines have {name!r}: {ids}",
                hint="choose one with --engine, or give the id",
                code="ambiguous",
            )
        return [(path, self.read(path)) for paths in found.values() for path in paths]

    def missing(self, name: str) -> str:
        """What to say of a name that no calibration answers to, with those that are written almost so."""
        from difflib import get_close_matches

        keys = {f"{path.parent.name}/{path.stem}": path for path in self.paths()}
        names = {**{path.stem: key for key, path in keys.items()}, **{key: key for key in keys}}
        typed = artifact_name(name)
        close = get_close_matches(typed, names, n=3, cutoff=0.75) or [one for one in names if one.startswith(f"{typed}-")][:3]
        near = dict.fromkeys(names[one] for one in close)
        meant = f" (did you mean {' or '.join(map(written, near))}?)" if near else ""
        return f"{name} has no calibration in {self.root}{meant}"

    @staticmethod
    def names_variant(name: str, found: Sequence[tuple[Path, Calibration]]) -> bool:
        """Whether a name that found these artifacts was ``NAME@VARIANT``, so that nothing is left to choose."""
        return len(found) == 1 and variant_of(found[0][0]) is not None and name.endswith(f"@{variant_of(found[0][0])}")

    def _variants(self, engine: str, stem: str) -> list[Path]:
        folder = self.root / engine
        try:
            return [folder / name for name in self._listing(folder).get(stem, ())]
        except PermissionError as error:
            raise NotPermittedError(f"{folder} cannot be read: {error.strerror}") from error
        except OSError:
            return []  # no folder

    def _listing(self, folder: Path) -> dict[str, list[str]]:
        """Names of artifacts by their stem, the default first; read again when the folder has changed."""
        changed = folder.stat().st_mtime_ns
        known = self._listed.get(folder)
        if known is None or known[0] != changed:
            found: dict[str, list[str]] = {}
            for name in sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(".yaml")):
                found.setdefault(stem_of(PurePath(name)), []).append(name)
            for names in found.values():
                names.sort(key=lambda name: "@" in name)
            known = self._listed[folder] = changed, found
        return known[1]

    def write(self, path: Path, calibration: Calibration) -> None:
        """Write an artifact, whole or not at all, and only one that can be read again.

        Raises:
            BadInputError: its figures contradict each other. CannotWriteError: it cannot be written.
        """
        self._listed.clear()
        from_document(to_document(calibration), str(path))
        write_atomically(path, to_yaml(calibration).encode())

    def check_writable(self, path: Path) -> None:
        """Find out before measuring whether the artifact could be written.

        Raises:
            CannotWriteError: it could not.
        """
        probe = path.with_name(f".{path.stem}.probe")
        write_atomically(probe, b"probe\n")
        with suppress(OSError):
            probe.unlink()

    @contextmanager
    def lock(self, path: Path) -> Iterator[None]:
        """Hold an artifact for one calibration.

        Raises:
            BusyError: another calibration holds it.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(str(path.with_name(f".{path.stem}.lock")), timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise BusyError(f"another calibration of {path.stem} is running", code="artifact-locked") from error
        except OSError as error:
            raise CannotWriteError(f"{path.parent} cannot be written: {error.strerror}") from error
        try:
            yield
        finally:
            lock.release()  # the file stays: were it removed, two others could hold locks on different files

    def run_folder(self, run: str) -> Path:
        """The folder of a run.

        Raises:
            NotFoundError: no run can have that name.
        """
        if not _RUN.fullmatch(run) or set(run) <= {"."}:
            raise NotFoundError(f"no such run: {run}", code="no-such-run", hint=f"runs are the folders in {self.root / RUNS}")
        return self.root / RUNS / run

    def write_record(self, record: Record) -> Path:
        """Write a run's record (again); logs lie beside it already."""
        path = self.run_folder(record.run) / "record.json"
        write_atomically(path, msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n")
        return path

    def runs(self) -> Iterator[Path]:
        """Folders of all runs, oldest first; links to folders elsewhere are none."""
        yield from sorted(path.parent for path in (self.root / RUNS).glob("*/record.json") if not path.parent.is_symlink())


def model_stem(name: str) -> str:
    """The name under which a model is filed: of a GGUF path the stem of its files, of a folder's its name.

    A blob of Ollama's is named after its digest: its name is the one in its header, with the quantisation.
    """
    if name.endswith(".gguf"):
        return _PART.sub("", Path(name).stem)
    if not name.startswith(("/", "./", "../", "~")):
        return name
    path = from_home(name).resolve()
    if is_blob(name) and path.is_file():
        return name_in_file(path) or path.name
    return path.name


def from_home(name: str) -> Path:
    """A path with its ``~`` or ``~USER`` resolved.

    Raises:
        NotFoundError: there is no such user.
    """
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise NotFoundError(f"{name}: there is no user {name.partition('/')[0][1:]}", hint="write the whole path") from error


def is_blob(name: str) -> bool:
    """Whether a path is that of a blob, as Ollama keeps weights: ``blobs/sha256-…``."""
    return _BLOB.search(name) is not None


def read_record(path: Path) -> Record:
    """Read a record from its file or its run's folder.

    Raises:
        NotFoundError: there is none. BadInputError: damaged. ConfigError: a newer schema.
    """
    file = path / "record.json" if path.is_dir() else path
    try:
        data = read_plain(file, _LARGEST_RECORD + 1)
    except NotFoundError as error:
        raise NotFoundError(f"no such run: {path}", code="no-such-run") from error
    if len(data) > _LARGEST_RECORD:
        raise BadInputError(f"{file} exceeds {_LARGEST_RECORD >> 20} MiB", code="bad-record")
    try:
        version = msgspec.json.decode(data, type=_Version).schema_version
        if version > RECORD_VERSION:
            raise ConfigError(f"{file}: record schema {version} is newer than {RECORD_VERSION}", code="newer-schema")
        record = msgspec.json.decode(data, type=Record)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadInputError(f"{file} is not a record: {error}", code="bad-record") from error
    written = (record.id, record.run, record.model, record.engine, record.settings, record.machine)
    why = unsound(msgspec.to_builtins(written)) or unsound(msgspec.to_builtins(record), texts=False)
    if why is not None:
        raise BadInputError(f"{file} is not a record: {why}", code="bad-record")
    return record


#: Records hold samples of memory of some loads, bytes.
_LARGEST_RECORD: Final = 256 << 20


class _Version(msgspec.Struct):
    schema_version: int


def schema_text() -> str:
    """``models/calibration.schema.json``, generated."""
    return msgspec.json.format(msgspec.json.encode(json_schema(), order="sorted"), indent=2).decode() + "\n"


def default_root(environment: dict[str, str], here: Path) -> Path:
    """The store: ``HARNESS_STORE``, or ``models/calibrations`` of the nearest project, or the user's data folder.

    Raises:
        UsageError: ``HARNESS_STORE`` is empty.
    """
    if configured := variable(environment, "HARNESS_STORE"):
        return Path(configured)
    for folder in (here, *here.parents):
        if (folder / "harness.toml").is_file() or (folder / "models" / "catalog.yaml").is_file():
            return folder / "models" / "calibrations"
    import platformdirs

    return Path(platformdirs.user_data_dir("harness", appauthor=False)) / "calibrations"
