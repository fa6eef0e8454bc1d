"""Whether a question is about the weights that a calibration is of: by their digest where they can be seen, else by name."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args

from harness.engines.registry import policy_of, stored_digest
from harness.errors import ConfigError, NotFoundError
from harness.model.calibration import Calibration
from harness.store.store import Store, is_blob
from harness.text import written

#: How the weights of an answer were identified: by their digest, by the calibration's own id, or by a name alone.
Identity = Literal["digest", "id", "name"]
_SHOWN = 19


def names_file(model: str) -> bool:
    """Whether a model is named by its GGUF file; nothing is opened."""
    return model.endswith(".gguf") or is_blob(model)


def identify(model: str, calibration: Calibration) -> Identity | str:
    """How it is known that a model is the one of a calibration; a text (with a space in it) says that it is another.

    Args:
        model: a path, a name, or an id, as it was asked for.
        calibration: that the store has under it.

    Raises:
        NotFoundError: a path to a file that is not there.
    """
    if model.partition("@")[0] in (calibration.id, written(calibration.id)):
        return "id"
    known = calibration.metadata.model.digest
    path = Path(model).expanduser()
    if names_file(model):
        if path.is_file():
            from harness.inventory.digests import cached_sha256

            return _compared(model, cached_sha256(path.resolve()), known)
        _missing(model)
        return "name"
    own = calibration.metadata.model.name
    # names that share an artifact's file (a:b, a-b) are distinguished where the engine has both
    seen = stored_digest(calibration.engine, model.partition("@")[0]) or stored_digest(calibration.engine, own)
    if seen is None and known is not None and known == _pinned(model.partition("@")[0], calibration.engine):
        return "digest"
    return "name" if seen is None or known is None else _compared(model, seen, known)


def _pinned(name: str, engine: str) -> str | None:
    """The digest that the catalog pins of a name whose weights come with a package; ``None``: it does not."""
    from harness.store.catalog import find_catalog, read_catalog

    entry = None
    if policy_of(engine).loads_files:
        with suppress(ConfigError):  # a damaged catalog pins nothing
            entry = read_catalog(find_catalog(Path.cwd())).models.get(name)
    if entry is None or entry.gguf is None or entry.gguf.package is None or entry.gguf.sha256 is None:
        return None
    return f"sha256:{entry.gguf.sha256}"


def calibrations_of(store: Store, model: str, engine: str | None = None) -> list[tuple[Path, Calibration]]:
    """What a store has of a model; of a path, what is calibrated of that very file.

    Raises:
        NotFoundError: a path to no file, or to other weights than are calibrated under its name. Otherwise as
            :meth:`harness.store.store.Store.find`.
    """
    found = store.find(model, engine)
    if not names_file(model):
        return found
    if not found:
        _missing(model)
    said = [(one, identify(model, one[1])) for one in found]
    same = [one for one, identity in said if identity in get_args(Identity)]
    if said and not same:
        raise NotFoundError(said[0][1], hint=f"ask by id: {written(said[0][0][1].id)}", code="other-weights")
    return same


def _missing(model: str) -> None:
    """Refuse a path to a file that is not there.

    Raises:
        NotFoundError: it is one.
    """
    path = Path(model).expanduser()
    if path.parent != Path() and not path.is_file():
        raise NotFoundError(f"there is no file {model}", hint="give the id of a calibration to ask without its weights")


def _compared(model: str, seen: str, known: str | None) -> Identity | str:
    if known is None:
        return f"the calibration under the name of {model} does not say which weights it is of"
    if seen == known:
        return "digest"
    return f"{model} is {seen[:_SHOWN]}…, and what is calibrated under its name is {known[:_SHOWN]}…: other weights"
