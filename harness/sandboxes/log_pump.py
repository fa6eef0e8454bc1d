"""The complete output of a container, taken from a connection that was attached before it started.

Following ``docker logs`` loses lines in a burst, and the stored log replaces bytes that are no UTF-8; the attached
stream has every byte as the engine wrote it, whatever the log driver.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from harness.errors import CannotWriteError
from harness.sandboxes.base import Launch
from harness.text import mask

#: Frame header of an attached stream without a terminal: stream, three zero bytes, length (Engine API, "Attach").
_HEADER: Final = struct.Struct(">BxxxL")

#: A line is held back until it is whole, unless it is longer than this, bytes.
_LONG_LINE: Final = 1 << 20

#: Values shorter than this are in every log, and are no secrets, characters.
_SHORT: Final = 8
#: Two pieces of a file that is searched share so much, bytes.
_OVERLAP: Final = 4096
_PIECE: Final = 1 << 20

Receive = Callable[[int], bytes]


_PASSWORD: Final = re.compile(r"://[^\s/@:]*:([^\s/@]+)@")


class CutError(Exception):
    """The stream ended inside a frame, or with an error of the connection."""


def read_frames(receive: Receive) -> Iterator[tuple[int, bytes]]:
    """Stream number and payload of each frame, whose parts arrive as ``receive(size)`` gives them (``b""``: the end).

    Raises:
        CutError: the stream ended inside a frame.
    """
    while header := _exactly(receive, _HEADER.size, at_boundary=True):
        stream, left = _HEADER.unpack(header)
        while left:
            part = _exactly(receive, min(left, 1 << 16))
            left -= len(part)
            yield stream, part


def whole_lines(frames: Iterator[tuple[int, bytes]]) -> Iterator[bytes]:
    """The payloads in an order that tears no line: frames of stdout and stderr are cut anywhere, and alternate.

    What is unfinished when the frames end, in whatever way, comes last.
    """
    held: dict[int, bytes] = {}
    cut: CutError | None = None
    try:
        for stream, payload in frames:
            data = held.get(stream, b"") + payload
            end = data.rfind(b"\n") + 1
            if not end and len(data) > _LONG_LINE:
                end = len(data)
            held[stream] = data[end:]
            yield data[:end]
    except CutError as error:
        cut = error
    yield from held.values()
    if cut is not None:
        raise cut


def _exactly(receive: Receive, size: int, *, at_boundary: bool = False) -> bytes:
    data = b""
    while len(data) < size:
        try:
            part = receive(size - len(data))
        except OSError as error:
            raise CutError(str(error)) from error
        if not part:
            if at_boundary and not data:
                return b""
            raise CutError("the stream ended inside a frame")
        data += part
    return data


def open_log(log: Path) -> io.FileIO:
    """A log, opened to append: readable by its owner alone, for an engine may write anything into it."""
    return io.FileIO(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab")


def hidden_values(launch: Launch, proxies: Mapping[str, str] | None = None) -> tuple[bytes, ...]:
    """What must not stand in an engine's log: its secrets, hidden values, and passwords of the proxies that it is given."""
    values = [*launch.secrets.values(), *launch.hidden]
    if proxies is not None and launch.network:
        values += [
            found[1] for name, url in proxies.items() if name.lower().endswith("_proxy") for found in _PASSWORD.finditer(url)
        ]
    words = {word for value in values for word in (value, *value.split()) if len(word) >= _SHORT}
    return tuple(sorted((word.encode() for word in words), key=len, reverse=True))


def scrub_file(log: Path, start: int, hidden: tuple[bytes, ...]) -> None:
    """Mask secrets in a log from byte ``start`` on. Nothing moves: a record names its lines by their places."""
    try:
        with log.open("r+b") as file:
            at = start
            while True:
                file.seek(at)
                piece = file.read(_PIECE + _OVERLAP)
                masked = mask(piece, hidden)
                if masked != piece:
                    file.seek(at)
                    file.write(masked)
                if len(piece) <= _PIECE:
                    return
                at += _PIECE
    except OSError:
        return  # no log, or one that can no longer be written


class LogPump:
    """A thread that appends what arrives on an attached connection to a file until the stream ends."""

    def __init__(self, link: socket.socket, log: Path, hidden: tuple[bytes, ...] = ()) -> None:
        self._link = link
        self._log, self._hidden = log, hidden
        try:
            self._file = open_log(log)
        except OSError as error:
            link.close()
            raise CannotWriteError(f"cannot write the engine's log {log}: {error.strerror}") from error
        #: Where this engine's output begins in the file, bytes.
        self.start = self._file.tell()
        #: Why the stream is known not to be whole; ``None`` where it looks whole.
        self.cut: str | None = None
        self._thread = threading.Thread(target=self._run, name="harness-log", daemon=True)
        self._thread.start()

    def ended(self) -> bool:
        """Whether the stream has ended: with its container, or with the daemon."""
        return not self._thread.is_alive()

    def finish(self, timeout: float) -> bool:
        """Wait for the end of the stream; whether it came in time and the stream looks whole."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            self.cut = "the stream did not end with its container"
            self.close()
        return self.cut is None

    def close(self) -> None:
        """Break the connection off."""
        with contextlib.suppress(OSError):
            self._link.shutdown(socket.SHUT_RDWR)  # a close() alone would not wake a thread that waits in recv()
        self._thread.join(5)

    def scrub(self) -> None:
        """Mask what must not stand in the file, where another process wrote it."""
        scrub_file(self._log, self.start, self._hidden)

    def _run(self) -> None:
        try:
            with self._link, io.BufferedReader(socket.SocketIO(self._link, "r"), 1 << 20) as reader:
                for lines in whole_lines(read_frames(reader.read1)):
                    self._file.write(mask(lines, self._hidden))
        except (CutError, OSError, ValueError) as error:
            self.cut = str(error)
        finally:
            self._file.close()
