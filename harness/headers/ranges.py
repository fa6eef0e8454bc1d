"""The first bytes of a file behind https, by range requests (RFC 9110, section 14): resumable, retried, bounded.

What is fetched doubles with each request, so that never more than twice the header is read. A redirect leads to https (or stays
with the server that sent it), and takes no header of authorization to another server. Proxies of the environment are honoured.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final
from urllib.parse import urljoin, urlsplit

from harness.errors import BadInputError, BusyError, NotFoundError, NotPermittedError, UnavailableError, UsageError
from harness.text import one_line
from harness.units import format_size

if TYPE_CHECKING:
    import httpx

#: Bytes of the first request, and of a later one at most.
FIRST: Final = 64 << 10
LARGEST: Final = 4 << 20
#: Requests for one stretch before it is given up; seconds that one may take; redirects that are followed.
ATTEMPTS: Final = 5
DEADLINE: Final = 60.0
REDIRECTS: Final = 5
#: What no file is larger than, bytes.
_MOST: Final = 1 << 45
_RANGE: Final = re.compile(r"bytes (\d{1,20})-(\d{1,20})/(\d{1,20})", re.ASCII)
_LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
_AGAIN: Final = (408, 425, 429, 500, 502, 503, 504)


class _AgainError(UnavailableError):
    """A request that may succeed when it is made again."""


def shown(url: str) -> str:
    """A URL for people: without user, password and query, which may hold a signature."""
    parts = urlsplit(url)
    return one_line(f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}", 200)


def check_url(url: str) -> None:
    """Refuse a URL that is no https; plain http is for servers of this machine alone.

    Raises:
        UsageError: it is none.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise UsageError(f"{one_line(url, 200)} is not a URL: {error}", code="bad-url") from error
    if parts.scheme not in ("http", "https") or not parts.hostname or any(not one.isprintable() for one in url):
        raise UsageError(f"{one_line(url, 200)} is not an https URL", code="bad-url")
    if parts.username or parts.password:
        raise UsageError(f"{shown(url)}: a URL with a user or a password in it is not taken", code="bad-url")
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        raise UsageError(f"{shown(url)}: headers are read by https only", hint="write https://", code="bad-url")


def _secure(url: str) -> bool:
    return urlsplit(url).scheme == "https"


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


class Ranges:
    """A remote file that is read from front to back; everything that was read is kept in ``data``.

    ``begin`` is what an earlier try has left, of the version that ``version`` names (an ETag, or a date). ``size`` is known
    after the first request.
    """

    #: What to do where its server cannot be reached.
    unreachable = "check the network and its proxy (HTTPS_PROXY), or give the path of a .gguf file"

    def __init__(
        self,
        client: httpx.Client,
        url: str,
        headers: Mapping[str, str] | None = None,
        *,
        begin: bytes = b"",
        version: str | None = None,
        wait: float = 0.2,
    ) -> None:
        check_url(url)
        self.client, self.url, self.wait = client, url, wait
        self.headers = dict(headers or {})
        self.data = bytearray(begin)
        self.version = version
        self.size: int | None = None
        #: Bytes that came over the network.
        self.fetched = 0
        self._position = 0

    def open(self) -> int:
        """Ask for the size of the file; its first stretch comes with it.

        Raises:
            HarnessError: as :meth:`read`.
        """
        while self.size is None:
            self._fetch()
        return self.size

    def tell(self) -> int:
        """Where the next byte is read."""
        return self._position

    def seek(self, count: int, whence: int = 1, /) -> int:
        """Skip bytes."""
        if whence != 1 or count < 0:
            raise ValueError("it is read from front to back")
        self._fill(self._position + count)
        self._position = min(self._position + count, len(self.data))
        return self._position

    def read(self, count: int, /) -> bytes:
        """So many bytes; fewer at the end.

        Raises:
            NotFoundError, NotPermittedError: the server says so. BadInputError: the file is another one now, or its answer is
            nonsense. UnavailableError: it knows no ranges, or cannot be reached. BusyError: it is too slow.
        """
        self._fill(self._position + count)
        found = bytes(memoryview(self.data)[self._position : self._position + count])
        self._position += len(found)
        return found

    def _fill(self, end: int) -> None:
        size = self.open()
        while len(self.data) < min(end, size):
            self._fetch()

    def _fetch(self) -> None:
        from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential, wait_random

        attempts = Retrying(
            retry=retry_if_exception_type(_AgainError),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(multiplier=self.wait, max=10.0) + wait_random(0.0, self.wait / 2),
            reraise=True,
        )
        attempts(self._once)

    def _once(self) -> None:
        """One request; what came of a broken answer is kept, and the next one goes on behind it."""
        start = len(self.data)
        wanted = max(FIRST, min(start, LARGEST))
        if self.size is not None:
            wanted = min(wanted, self.size - start)
        headers = {"range": f"bytes={start}-{start + wanted - 1}", "accept-encoding": "identity"}
        if start and self.version is not None:
            headers["if-range"] = self.version
        with self._answer(headers) as answer:
            self._check(answer, start)
            self._take(answer, wanted)

    @contextmanager
    def _answer(self, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        """The answer behind all redirects; what breaks it until it has been read is said here."""
        import httpx

        where = shown(self.url)
        try:
            with self._redirected(headers) as answer:
                yield answer
        except httpx.TimeoutException as error:
            raise _AgainError(f"{where} does not answer in time", code="source-slow") from error
        except httpx.HTTPError as error:
            raise _AgainError(
                f"{where} cannot be reached: {one_line(str(error)) or type(error).__name__}",
                hint=self.unreachable,
                code="source-unreachable",
            ) from error

    @contextmanager
    def _redirected(self, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        url, more = self.url, self.headers
        for _ in range(REDIRECTS + 1):
            with self.client.stream("GET", url, headers={**more, **headers}, follow_redirects=False) as answer:
                target = answer.headers.get("location")
                if not answer.is_redirect or target is None:
                    yield answer
                    return
            following = urljoin(url, target)
            if _origin(following) != _origin(url):
                if not _secure(following):
                    raise BadInputError(
                        f"{shown(url)} leads to {shown(following)}, which is not https: not followed", code="bad-redirect"
                    )
                more = {}  # a token is for the server that it was given for
            url = following
        raise BadInputError(f"{shown(self.url)} redirects too many times", code="bad-redirect")

    def _check(self, answer: httpx.Response, start: int) -> None:
        """Raise unless the answer is the stretch that was asked for; learn the size and the version from it."""
        where, status = shown(self.url), answer.status_code
        if status in _AGAIN:
            raise _AgainError(f"{where} answers {status}", hint="try again later", code="source-unreachable")
        if status in (401, 403):
            raise NotPermittedError(
                f"{where} is not public ({status})",
                hint="it may need a token, or the licence may have to be accepted on its page",
                code="source-denied",
            )
        if status in (404, 410):
            raise NotFoundError(f"there is nothing at {where} ({status})", code="no-such-source")
        if status == 416 and self.size is None and start:
            del self.data[:]  # another file than the one that was begun
            self.version = None
            raise _AgainError(f"{where} is shorter than what was read of it before", code="bad-source")
        if status == 200 and start and self.version is not None:
            del self.data[:]
            self.version = None
            raise _AgainError(f"{where} changed while it was read", code="bad-source")
        if status == 200:
            size = answer.headers.get("content-length", "")
            much = f" (all of it: {format_size(int(size))})" if size.isdigit() and len(size) < 16 else ""
            raise UnavailableError(
                f"{where} sends whole files only{much}: its server does not support ranges",
                hint="download the file by other means, and give its path",
                code="no-ranges",
            )
        found = _RANGE.fullmatch(answer.headers.get("content-range", ""))
        if status != 206 or found is None or int(found[1]) != start or not 0 < int(found[3]) <= _MOST:
            raise BadInputError(f"{where} gives an invalid answer to a range request ({status})", code="bad-source")
        size_now, version = int(found[3]), answer.headers.get("etag") or answer.headers.get("last-modified")
        if version is not None and version.startswith("W/"):
            version = None  # a weak validator names no bytes
        if start and (self.size not in (None, size_now) or version != self.version):
            raise BadInputError(f"{where} changed while it was read", hint="try again", code="bad-source")
        self.size, self.version = size_now, version

    def _take(self, answer: httpx.Response, wanted: int) -> None:
        begin, end = time.monotonic(), min(len(self.data) + wanted, self.size or 0)
        for block in answer.iter_raw(1 << 16):
            self.fetched += len(block)
            self.data += block[: end - len(self.data)]
            if len(self.data) >= end:
                return  # whatever else it sends is not read
            if time.monotonic() - begin > DEADLINE:
                raise BusyError(
                    f"{shown(self.url)} is too slow: {len(self.data)} bytes so far",
                    hint="the next try goes on where this one ended",
                    code="source-slow",
                )
        raise _AgainError(f"{shown(self.url)} ends in the middle of an answer", code="source-unreachable")


def open_client() -> httpx.Client:
    """A client for sources of headers."""
    import httpx

    return httpx.Client(timeout=20.0, headers={"user-agent": "llm-memory-harness"})


def fetch_small(client: httpx.Client, url: str, headers: Mapping[str, str] | None = None, *, most: int = 1 << 20) -> bytes:
    """A small document as a whole, by the same rules; ``most`` is its largest size in bytes.

    Raises:
        HarnessError: as :meth:`Ranges.read`; BadInputError: it is larger.
    """
    whole = Document(client, url, headers)
    return whole.get(most)


class Document(Ranges):
    """A small document: a server may send it as a whole."""

    unreachable = "check the network and its proxy (HTTPS_PROXY)"

    def get(self, most: int) -> bytes:
        """All of it."""
        self._most = most
        self._fetch()
        return bytes(self.data)

    def _once(self) -> None:
        import httpx

        where = shown(self.url)
        del self.data[:]
        with self._answer({}) as answer:
            if answer.status_code != httpx.codes.OK:
                self._check(answer, 0)
            begin = time.monotonic()
            for block in answer.iter_bytes(1 << 16):
                self.data += block
                if len(self.data) > self._most:
                    raise BadInputError(f"{where} is larger than it can be", code="bad-source")
                if time.monotonic() - begin > DEADLINE:
                    raise BusyError(f"{where} is too slow", code="source-slow")
