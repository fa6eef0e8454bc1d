"""Where versions of an engine come from (tags of its image, releases of the embedded one), and what starts each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from harness.engines.registry import CONTAINED, EMBEDDED, release_binary, releases_of
from harness.errors import NotFoundError
from harness.sandboxes.container_config import repository
from harness.store.catalog import cache_folder, pinned_image


class VersionSource(NamedTuple):
    """``versions`` lists them, ``option`` is what starts one of them."""

    engine: str
    versions: Callable[[], Sequence[str]]
    option: Callable[[str], dict[str, str]]


def source(engine: str, image: str | None, here: Path, *, wheels: bool) -> VersionSource:
    """The versions of an engine; ``image`` names another repository than the pinned one.

    Raises:
        NotFoundError: no image is pinned for it.
    """
    if wheels:
        name = EMBEDDED if engine == "auto" else engine
        return VersionSource(
            name,
            lambda: releases_of(name),
            lambda version: {"engine_binary": str(release_binary(name, version, cache_folder()))},
        )
    from harness.maintain.tags import tags

    name = CONTAINED if engine == "auto" else engine
    pinned = image or pinned_image(name, here)
    if pinned is None:
        raise NotFoundError(f"no image is pinned for {name}", hint="--image REPOSITORY", code="no-image")
    place = repository(pinned)
    return VersionSource(name, lambda: tags(place), lambda version: {"image": f"{place}:{version}"})
