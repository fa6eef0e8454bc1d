"""A header over a network: every way in which a server can answer a request for a range."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from harness.errors import BadInputError, HarnessError, NotFoundError, NotPermittedError, UnavailableError, UsageError
from harness.headers import ranges
from harness.headers.ranges import FIRST, Ranges, check_url
from tests.support.range_server import RangeServer, range_server

DATA = bytes(range(256)) * 4096  # 1 MiB
PATH = "/model.gguf"


@pytest.fixture
def server() -> Iterator[RangeServer]:
    with range_server() as one:
        one.files[PATH] = DATA
        yield one


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with httpx.Client(trust_env=False, timeout=5.0) as one:
        yield one


def remote(server: RangeServer, client: httpx.Client, **options: object) -> Ranges:
    return Ranges(client, server.url + PATH, wait=0.001, **options)  # type: ignore[arg-type]


def test_no_more_than_twice_what_is_read_is_fetched(server: RangeServer, client: httpx.Client) -> None:
    for length in (1, FIRST, 3 * FIRST + 1, 700_000):
        server.sent = 0
        one = remote(server, client)
        assert one.read(length) == DATA[:length]
        assert one.fetched == server.sent <= max(2 * length, FIRST)


def test_it_is_read_as_a_file_is(server: RangeServer, client: httpx.Client) -> None:
    one = remote(server, client)
    assert one.open() == len(DATA)
    assert one.read(10) == DATA[:10]
    assert one.seek(200_000, 1) == 200_010
    assert one.read(6) == DATA[200_010:200_016]
    one.seek(len(DATA), 1)
    assert one.read(5) == b""


@pytest.mark.parametrize("fault", ["500", "503", "429", "truncated"])
def test_what_may_pass_is_tried_again(server: RangeServer, client: httpx.Client, fault: str) -> None:
    server.faults[PATH] = [fault, "", fault]
    assert remote(server, client).read(300_000) == DATA[:300_000]


@pytest.mark.parametrize(
    ("faults", "kind", "words"),
    [
        (["whole"], UnavailableError, "does not support ranges"),
        (["404"], NotFoundError, "nothing at"),
        (["401"], NotPermittedError, "is not public"),
        (["403"], NotPermittedError, "is not public"),
        (["416"], BadInputError, "invalid answer"),
        (["wrong-start"], BadInputError, "invalid answer"),
        (["500"] * ranges.ATTEMPTS, UnavailableError, "answers 500"),
        (["", "changed"], BadInputError, "changed while"),
        (["", "other-size"], BadInputError, "changed while"),
        (["http://example.org/model.gguf"], BadInputError, "not https"),
        (["/model.gguf"] * 20, BadInputError, "redirects too many times"),
    ],
)
def test_what_cannot_pass_ends_with_its_reason(
    server: RangeServer, client: httpx.Client, faults: list[str], kind: type[HarnessError], words: str
) -> None:
    server.faults[PATH] = faults
    with pytest.raises(kind, match=words) as caught:
        remote(server, client).read(FIRST + 1)
    assert server.url.removeprefix("http://") in caught.value.message


def test_what_it_sends_beyond_the_range_is_not_taken(server: RangeServer, client: httpx.Client) -> None:
    server.faults[PATH] = ["more"]
    assert remote(server, client).read(FIRST + 500) == DATA[: FIRST + 500]


def test_a_try_goes_on_where_the_last_one_ended(server: RangeServer, client: httpx.Client) -> None:
    first = remote(server, client)
    first.read(100_000)
    server.requests.clear()
    second = remote(server, client, begin=bytes(first.data), version=first.version)
    assert second.read(300_000) == DATA[:300_000]
    assert server.requests[0][1] == f"bytes={len(first.data)}-{2 * len(first.data) - 1}"


def test_of_another_version_nothing_is_kept(server: RangeServer, client: httpx.Client) -> None:
    server.faults[PATH] = ["whole"]  # If-Range does not hold: all of the new file
    one = remote(server, client, begin=b"?" * 1000, version='"old"')
    assert one.read(2000) == DATA[:2000]


def test_a_redirect_on_one_server_is_followed_and_a_token_stays_with_its_server(
    server: RangeServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files["/elsewhere.gguf"] = DATA
    server.faults[PATH] = ["/elsewhere.gguf"]
    with range_server() as other:
        other.files[PATH] = DATA
        one = Ranges(client, server.url + PATH, {"authorization": "Bearer secret"}, wait=0.001)
        assert one.read(10) == DATA[:10]
        assert [said for *_, said in server.requests] == ["Bearer secret"] * 2
        # To another server it would go by https alone; that this one speaks http is what the test replaces.
        monkeypatch.setattr(ranges, "_secure", lambda _: True)
        server.faults[PATH] = [other.url + PATH]
        one = Ranges(client, server.url + PATH, {"authorization": "Bearer secret"}, wait=0.001)
        assert one.read(10) == DATA[:10]
        assert [said for *_, said in other.requests] == [None]


def test_a_server_that_is_not_there_is_one_sentence(client: httpx.Client) -> None:
    with pytest.raises(UnavailableError, match="cannot be reached") as caught:
        Ranges(client, "http://127.0.0.1:1/model.gguf", wait=0.001).read(1)
    assert "\n" not in caught.value.message
    assert "proxy" in (caught.value.hint or "")


def test_a_slow_server_is_given_up(server: RangeServer, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "DEADLINE", -1.0)
    server.files[PATH] = DATA * 4
    one = remote(server, client)
    one.read(FIRST)  # one block arrives whole
    with pytest.raises(HarnessError, match="too slow"):
        one.read(3 * len(DATA))


@pytest.mark.parametrize(
    "url",
    ["ftp://a/b.gguf", "http://example.org/b.gguf", "https://user:pass@example.org/b.gguf", "https:///b", "https://a:x/b", "x"],
)
def test_only_https_is_a_source(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_url(url)
    assert "pass" not in caught.value.message.replace("password", "")
