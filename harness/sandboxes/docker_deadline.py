"""Connections of the Docker SDK that end at a point in time: its own timeout is of each read, and a daemon may drip."""

from __future__ import annotations

import socket
from collections.abc import Callable
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any

from harness.sandboxes.reaper_main import TimedSocket

if TYPE_CHECKING:
    from docker import APIClient


def mount(api: APIClient, path: str, deadline: Callable[[], float]) -> None:
    """Have a client talk through sockets that ask ``deadline`` (a ``time.monotonic`` value) before they wait."""
    from docker.transport import unixconn

    class Connection(unixconn.UnixHTTPConnection):
        def connect(self) -> None:
            self.sock = TimedSocket(deadline)
            self.sock.connect(self.unix_socket)

    class Pool(unixconn.UnixHTTPConnectionPool):
        def _new_conn(self) -> Any:
            return Connection(self.base_url, self.socket_path)

    class Adapter(unixconn.UnixHTTPAdapter):
        def get_connection(self, url: Any, proxies: Any = None) -> Any:
            with self.pools.lock:
                if url not in self.pools:
                    self.pools[url] = Pool(url, self.socket_path, self.timeout, maxsize=self.max_pool_size)
                return self.pools[url]

    adapter = Adapter(f"http+unix://{path}", api.timeout)
    api.mount("http+docker://", adapter)
    vars(api)["_custom_adapter"] = adapter  # what the SDK closes


def ping(path: str, deadline: float) -> str | None:
    """Ask a daemon whether it is there (``GET /_ping``); the version of its API.

    Raises:
        OSError: it is not, or does not answer by the deadline (TimeoutError).
    """

    class Connection(HTTPConnection):
        def connect(self) -> None:
            self.sock: socket.socket = TimedSocket(lambda: deadline)
            self.sock.connect(path)

    connection = Connection("docker")
    try:
        connection.request("GET", "/_ping")
        answer = connection.getresponse()
        answer.read(4096)
        return answer.getheader("Api-Version")
    finally:
        connection.close()
