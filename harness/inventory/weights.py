"""Whether a question is about the weights that a calibration is of: by their digest where they can be seen, else by name."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Literal, get_args

from harness.engines.registry import policy_of, stored_digest
from harness.errors import ConfigError, NotFoundError
from harness.model.calibration import Calibration
from harness.store.store import Store, from_home, is_blob
from harness.text import written

#: How the weights of an answer were identified: by their digest, by the calibration's own id, or by a name alone.
Identity = Literal["digest", "id", "name"]
_SHOWN = 19


def names_file(model: str) -> bool:
    """Whether a model is named by its GGUF file; nothing is opened."""
    return model.endswith(".gguf") or is_blob(model)


def path_of(model: str) -> Path | None:
    """The path by which a model is named, a file's or a folder's, without ``@VARIANT`` and ``@CTX``; ``None``: by its name.

    It need not exist: one that begins as a path does, or ends as a file of weights does, is none of a store's names.
    """
    head, plain = model, model.startswith(("/", "./", "../", "~"))
    while not names_file(head) and not (plain and from_home(head).exists()) and "@" in head:
        head = head.rpartition("@")[0]
    return from_home(head) if plain or names_file(head) else None


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
    if (path := path_of(model)) is not None:
        if path.is_file():
            from harness.inventory.digests import cached_sha256

            return _compared(model, cached_sha256(path.resolve()), known)
        _present(model, path)
        if not path.is_dir():
            return "name"  # ``FILE.gguf`` alone is what a calibration of one is called
        measured = calibration.metadata.settings.own_model
        if measured is not None and path.resolve() == Path(measured):
            return "name"
        return f"{model} is a folder, and what is calibrated under its name is {measured or calibration.metadata.model.name}"
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
    if path_of(model) is None:
        return found
    same = of_its_weights(model, found)
    if isinstance(same, str):
        raise NotFoundError(same, hint=f"ask by id: {written(found[0][1].id)}", code="other-weights")
    return same


def of_its_weights(model: str, found: list[tuple[Path, Calibration]]) -> list[tuple[Path, Calibration]] | str:
    """Those of a model's calibrations that are of its very weights; a text says why none is.

    Raises:
        NotFoundError: a path to a file that is not there.
    """
    if (path := path_of(model)) is not None:
        _present(model, path)
    said = [(one, identify(model, one[1])) for one in found]
    same = [one for one, identity in said if identity in get_args(Identity)]
    return said[0][1] if said and not same else same


def _present(model: str, path: Path) -> None:
    """Refuse a path to what is not there.

    Raises:
        NotFoundError: it is one.
    """
    if not path.exists() and model != path.name and "/" in model:
        raise NotFoundError(f"there is no file {model}", hint="give the id of a calibration to ask without its weights")


def _compared(model: str, seen: str, known: str | None) -> Identity | str:
    if known is None:
        return f"the calibration under the name of {model} does not say which weights it is of"
    if seen == known:
        return "digest"
    return f"{model} is {seen[:_SHOWN]}…, and what is calibrated under its name is {known[:_SHOWN]}…: other weights"
