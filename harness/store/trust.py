"""The trust boundary: what was typed, and what was read.

Typed is what the user gave: flags, the environment, the ``harness.toml`` of their own project. Read is everything else:
calibrations, records, plans, logs, headers. What was read may decide about figures, and about settings on a list
(:mod:`harness.engines.settings`). Whatever else it would hand to an engine (other variables, an image, a place of weights) is
refused unless the user allows it by name.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec

from harness.engines.settings import ARGUMENTS, REDACTED, is_setting, shown_env, unknown_options
from harness.errors import NotPermittedError, UsageError
from harness.model.calibration import Calibration, artifact_name
from harness.model.record import EngineVersion, Settings
from harness.options import Allowed
from harness.sandboxes.container_config import repository
from harness.store.catalog import find_catalog, pinned_image, read_catalog

#: Registries of model names that need no question: the engine's own, and the Hugging Face hub.
_HUBS: Final = ("registry.ollama.ai", "ollama.com", "hf.co", "huggingface.co")
_CODE: Final = "untrusted-file"


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that a file asks for and may not set. ``option`` allows it."""

    what: str
    value: str
    option: str


def refused_variables(env: Mapping[str, str]) -> tuple[Refusal, ...]:
    """Variables that a file may not set. One that was redacted carries no value, and is none of them."""
    return tuple(
        Refusal(what=name, value=value, option=f"--allow-env {name}")
        for name, value in env.items()
        if not is_redacted(name, value) and not is_setting(name, value)
    )


def is_redacted(name: str, value: str) -> bool:
    """Whether a value was left out when it was written, so that only the user can give it."""
    if name == ARGUMENTS:
        return REDACTED in value and not unknown_options(value)
    return value == REDACTED


def refusals(calibration: Calibration, pinned: str | None, named: str | None = None) -> tuple[Refusal, ...]:
    """Everything that a calibration asks for and may not set.

    ``pinned`` is the image that is pinned here for its engine, ``named`` what the catalog here calls its model.
    """
    return tuple(_refusals(calibration, pinned, named))


def _refusals(calibration: Calibration, pinned: str | None, named: str | None) -> Iterator[Refusal]:
    metadata = calibration.metadata
    yield from refused_variables(metadata.settings.env)
    vllm = metadata.settings.vllm
    if vllm is not None and ARGUMENTS not in metadata.settings.env:  # what was asked to be added to a command line
        yield from refused_variables({ARGUMENTS: shlex.join(vllm.arguments)})
    if metadata.machine.sandbox == "docker" and not is_known_image(metadata.engine, pinned):
        yield Refusal(what="image", value=metadata.engine.image or "none", option="--allow-image")
    place = place_of_weights(calibration, named)
    if place is not None:
        yield Refusal(what="weights", value=place, option="--allow-model")


def is_known_image(engine: EngineVersion, pinned: str | None) -> bool:
    """Whether an image is the pinned one, or another of its repository that is named by its digest."""
    if engine.image is None or pinned is None:
        return False
    if engine.image == pinned:
        return True
    return engine.image_digest is not None and repository(engine.image) == repository(pinned)


def place_of_weights(calibration: Calibration, named: str | None = None) -> str | None:
    """Where a calibration takes weights from that its name does not say: a folder, another model, a foreign registry."""
    metadata = calibration.metadata
    name, own = metadata.model.name, metadata.settings.own_model
    if own is not None and own not in (name, named):
        return own
    host, _, rest = name.partition("/")
    if rest.count("/") and ("." in host or ":" in host or host == "localhost") and host not in _HUBS:
        return name
    stem = name.removesuffix(".gguf").rpartition("/")[2] if name.endswith(".gguf") else name
    return None if artifact_name(stem) == calibration.id.partition("/")[2] else name


def is_own_folder(calibration: Calibration) -> bool:
    """Whether a model was measured from a local folder that has its own name, so that a line that names it shows where."""
    own = calibration.metadata.settings.own_model or ""
    return own.startswith("/") and artifact_name(own.rstrip("/").rpartition("/")[2]) == calibration.id.partition("/")[2]


def require(found: tuple[Refusal, ...], allowed: Allowed, where: str) -> None:
    """Raise unless everything that a file asks for is allowed.

    Raises:
        NotPermittedError: something is not; the message shows each with its value, the hint how to allow it.
    """
    options = {f"--allow-{kind}" for kind in ("image", "model", "binary") if getattr(allowed, kind)}
    options |= {f"--allow-env {name}" for name in allowed.env}
    left = [one for one in found if one.option not in options]
    if left:
        asked = ", ".join(f"{one.what}={one.value!r}" for one in left)
        raise NotPermittedError(
            f"{where} asks for what a file may not set: {asked}",
            hint=f"if you know who wrote it and why: {' '.join(dict.fromkeys(one.option for one in left))}",
            code=_CODE,
        )


def handed_env(settings: Settings, typed: Mapping[str, str], where: str) -> dict[str, str]:
    """The variables of a calibration with those that the user typed over them; call :func:`require` first.

    Raises:
        UsageError: one was redacted when it was written, and the user has not given it.
    """
    env = {**settings.env, **typed}
    missing = [name for name, value in env.items() if is_redacted(name, value)]
    if missing:
        raise UsageError(
            f"{where} was measured with {', '.join(missing)}, whose value is not recorded",
            hint=" ".join(f"--env {name}=…" for name in missing),
            code="no-secret",
        )
    return env


def by_digest(engine: EngineVersion) -> str | None:
    """The image of a calibration, named by the digest that was recorded."""
    if engine.image is None or engine.image_digest is None or "@" in engine.image:
        return engine.image
    return f"{engine.image}@{engine.image_digest}"


def asked_by(calibration: Calibration, here: Path) -> tuple[Refusal, ...]:
    """Everything that a calibration asks for and may not set."""
    entry = read_catalog(find_catalog(here)).models.get(calibration.metadata.model.name)
    return refusals(calibration, pinned_image(calibration.engine, here), entry.name_for(calibration.engine) if entry else None)


def refuse(
    calibration: Calibration,
    here: Path,
    allowed: Allowed,
    where: str,
    *,
    env: Collection[str] = (),
    typed: Collection[str] = (),
) -> None:
    """Refuse to hand an engine what a file may not set, unless it is allowed, or the user typed something in its place.

    ``env`` are names of variables that the user gave, ``typed`` the kinds of other things (``image``, ``weights``).

    Raises:
        NotPermittedError: something is left.
    """
    found = asked_by(calibration, here)
    require(tuple(one for one in found if one.what not in {*env, *typed}), allowed, where)


def handed(model: str | None, image: str | None, env: Mapping[str, str]) -> str:
    """What an engine is handed of a calibration, for the user to see."""
    words = [f"model {model}", *([f"image {image}"] if image else [])]
    return ", ".join([*words, *(f"{name}={value}" for name, value in sorted(shown_env(dict(env)).items()))])
