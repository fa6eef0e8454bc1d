"""The pull of an image: its progress over all layers, and errors inside a stream that began well."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from harness.errors import CannotWriteError, NotFoundError
from harness.sandboxes.docker_client import Daemon

Event = dict[str, Any]


class Api:
    """The SDK's client of a daemon that answers a pull with these events."""

    def __init__(self, events: tuple[Event, ...]) -> None:
        self._events = events

    def pull(self, reference: str, *, stream: bool, decode: bool) -> Iterator[Event]:
        assert stream
        assert decode
        yield from self._events


def daemon(*events: Event) -> Daemon:
    """A daemon that is not asked whether it is there."""

    class Answering(Daemon):
        def _connect(self) -> Any:
            return Api(events)

    return Answering("unix:///nowhere")


def downloading(layer: str, done: int, total: int | None) -> Event:
    return {"id": layer, "status": "Downloading", "progressDetail": {"current": done, "total": total} if total else {}}


def test_progress_is_over_all_layers() -> None:
    seen: list[tuple[str, float, float | None]] = []
    events = (
        {"status": "Pulling from ollama/ollama", "id": "0.33.0"},
        downloading("a", 10, 100),
        downloading("b", 5, 900),
        downloading("a", 100, 100),
        downloading("c", 7, None),
        {"status": "Pull complete", "id": "a", "progressDetail": {}},
    )
    daemon(*events).pull("ollama/ollama:0.33.0", lambda *one: seen.append(one))
    what = "pull ollama/ollama:0.33.0"
    assert seen == [(what, 10, 100), (what, 15, 1000), (what, 105, 1000)]


@pytest.mark.parametrize(
    ("text", "kind"),
    [("manifest unknown", NotFoundError), ("write /var/lib/docker/tmp/x: no space left on device", CannotWriteError)],
)
def test_an_error_inside_the_stream_is_an_error(text: str, kind: type[Exception]) -> None:
    with pytest.raises(kind):
        daemon(downloading("a", 10, 100), {"error": text}).pull("ollama/ollama:0.33.0")
