"""The one way to wait for something that says nothing by itself."""

from __future__ import annotations

from collections.abc import Callable


def poll(until: Callable[[], bool], *, limit: float, every: float = 0.05, alive: Callable[[], object] = lambda: None) -> bool:
    """Ask ``until`` every ``every`` seconds, at least once, until it holds or ``limit`` seconds have passed; whether it held.

    Args:
        until: what is waited for.
        limit: seconds.
        every: seconds.
        alive: called after each "no"; raises where there is nothing left to wait for. Its error is passed on, as that of
            ``until`` is.
    """
    from tenacity import Retrying, retry_if_result, stop_after_delay, wait_fixed

    def ask() -> bool:
        if until():
            return True
        alive()
        return False

    retrying = Retrying(
        retry=retry_if_result(lambda held: not held),
        stop=stop_after_delay(limit),
        wait=wait_fixed(every),
        retry_error_callback=lambda _: False,
    )
    return retrying(ask)
