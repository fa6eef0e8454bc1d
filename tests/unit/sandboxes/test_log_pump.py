"""An attached stream, taken apart and written down."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import CannotWriteError
from harness.sandboxes.base import Launch
from harness.sandboxes.log_pump import CutError, LogPump, hidden_values, read_frames, scrub_file, whole_lines


def frame(stream: int, payload: bytes) -> bytes:
    return struct.pack(">BxxxL", stream, len(payload)) + payload


class Source:
    """Hands out bytes in pieces of the given sizes."""

    def __init__(self, data: bytes, sizes: list[int]) -> None:
        self.data, self.sizes = data, sizes

    def receive(self, size: int) -> bytes:
        piece = min(size, self.sizes.pop(0)) if self.sizes else size
        head, self.data = self.data[:piece], self.data[piece:]
        return head


@given(
    st.lists(st.tuples(st.sampled_from([1, 2]), st.binary(max_size=40))),
    st.lists(st.integers(min_value=1, max_value=20)),
)
def test_every_byte_arrives_however_the_pieces_fall(frames: list[tuple[int, bytes]], sizes: list[int]) -> None:
    data = b"".join(frame(*one) for one in frames)

    got = list(read_frames(Source(data, sizes).receive))

    for stream in (1, 2):
        expected = b"".join(payload for number, payload in frames if number == stream)
        assert b"".join(payload for number, payload in got if number == stream) == expected


def test_a_stream_that_stops_inside_a_frame_is_known_to_be_cut() -> None:
    data = frame(1, b"whole\n") + frame(1, b"not whole\n")[:-3]

    with pytest.raises(CutError):
        list(read_frames(Source(data, []).receive))


def test_the_two_streams_do_not_tear_each_others_lines() -> None:
    """Frames end anywhere; the lines of stdout and stderr stay whole, and what is unfinished comes last."""
    frames = [(1, b"out 1\nou"), (2, b"err 1\ner"), (1, b"t 2\nend"), (2, b"r 2\n")]

    assert b"".join(whole_lines(iter(frames))) == b"out 1\nerr 1\nout 2\nerr 2\nend"


def test_a_line_without_an_end_is_not_held_for_ever() -> None:
    frames = iter([(1, b"x" * (1 << 20)), (1, b"x"), (1, b"y")])
    lines = whole_lines(frames)

    assert [len(next(lines)) for _ in range(2)] == [0, (1 << 20) + 1]


@pytest.mark.parametrize("whole", [True, False])
def test_the_pump_appends_and_says_whether_it_was_cut(tmp_path: Path, whole: bool) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"before\n")
    theirs, ours = socket.socketpair()
    with theirs:
        pump = LogPump(ours, log)
        theirs.sendall(frame(2, b"line\n") + frame(1, b"unfinished") + (b"" if whole else b"\1\0\0"))

    assert pump.finish(60) is whole
    assert pump.start == 7
    assert log.read_bytes() == b"before\nline\nunfinished"


def test_a_silent_stream_can_be_broken_off(tmp_path: Path) -> None:
    theirs, ours = socket.socketpair()
    with theirs:
        pump = LogPump(ours, tmp_path / "log")

        assert pump.finish(0.01) is False
        assert pump.cut


def test_a_log_that_cannot_be_written_closes_the_connection(tmp_path: Path) -> None:
    theirs, ours = socket.socketpair()
    with theirs, pytest.raises(CannotWriteError):
        LogPump(ours, tmp_path)

    assert ours.fileno() == -1


def test_what_is_secret_does_not_reach_the_file_and_others_cannot_read_it(tmp_path: Path) -> None:
    launch = Launch(argv=(), secrets={"hf_token": "hf_abcdefgh"}, hidden=("Bearer s3cr3t-s3cr3t", "short"), network=True)
    hidden = hidden_values(launch, {"HTTPS_PROXY": "http://user:passw0rd@proxy"})
    theirs, ours = socket.socketpair()
    with theirs:
        pump = LogPump(ours, tmp_path / "log", hidden)
        theirs.sendall(frame(1, b"hf_abc") + frame(1, b"defgh s3cr3t-s3cr3t\n") + frame(2, b"short http://a:b@c passw0rd\n"))
    assert pump.finish(60)
    assert (tmp_path / "log").read_bytes() == b"*********** *************\nshort http://***@c ********\n"
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_a_file_that_an_engine_wrote_itself_is_masked_where_it_stands(tmp_path: Path) -> None:
    log = tmp_path / "log"
    across = b"x" * ((1 << 20) - 4) + b"s3cr3t-s3cr3t"
    log.write_bytes(b"s3cr3t-s3cr3t" + across + across)
    scrub_file(log, 13, (b"s3cr3t-s3cr3t",))
    stars = b"*" * 13
    assert log.read_bytes() == b"s3cr3t-s3cr3t" + 2 * (across[:-13] + stars)
