"""Ctrl-C, SIGTERM and a terminal that goes away: everything is torn down in order, and within five seconds whatever hangs."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Final

from harness.cli.output import CommandResult, envelope

#: How long an orderly end may take, seconds. The reaper ends the engine of a process that does not wait for it.
LIMIT: Final = 4.0
#: A terminal that goes away tells it on POSIX alone.
_HANG_UP: Final = getattr(signal, "SIGHUP", signal.SIGTERM)
_ENDINGS: Final = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated"), _HANG_UP: (143, "terminated")}
_terminals: list[int] = []
_wakeups: list[int] = []


class Terminated(BaseException):
    """SIGTERM or SIGHUP, as an exception, so that everything is torn down in order."""


def hear(ended: CommandResult) -> None:
    """Listen to the three signals, those that were ignored before (``nohup``, a shell's background job) aside."""
    handlers = {signal.SIGINT: _interrupt, _HANG_UP: _hang_up, signal.SIGTERM: _terminate}
    _terminals[:] = [descriptor for descriptor in (0, 1, 2) if os.isatty(descriptor)]
    for number, handler in handlers.items():
        if number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)
    heard, wakeup = socket.socketpair()
    wakeup.setblocking(False)
    # The interpreter writes each signal's number there at once, even while the main thread hangs in a call.
    signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
    for earlier in _wakeups:  # of a command before this one, in the same process: its thread ends
        os.close(earlier)
    _wakeups[:] = [wakeup.detach()]
    threading.Thread(target=_watch, args=(heard, ended, handlers), name="harness-signals", daemon=True).start()


def _watch(heard: socket.socket, ended: CommandResult, handlers: dict[signal.Signals, object]) -> None:
    """In a thread: end the process some seconds after a signal that is ours to obey."""
    with heard:
        while numbers := heard.recv(64):
            for byte in numbers:
                number = signal.Signals(byte)
                if number in _ENDINGS and signal.getsignal(number) in (handlers[number], signal.SIG_IGN):
                    time.sleep(LIMIT)
                    _end(*_ENDINGS[number], ended)


def _end(status: int, word: str, ended: CommandResult) -> None:
    message = f"{word}; what did not answer within {LIMIT:.0f} s is ended by the process that guards it\n"
    try:
        os.write(2, message.encode())
        if ended.as_json:
            error = {"code": word, "message": word, "hint": None}
            os.write(1, envelope(ended.command, {}, status, (error,)).encode() + b"\n")
    finally:
        os._exit(status)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _terminate(_number: int, _frame: FrameType | None) -> None:
    for one in (signal.SIGTERM, _HANG_UP):
        signal.signal(one, signal.SIG_IGN)
    raise Terminated


def _hang_up(number: int, frame: FrameType | None) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in _terminals:  # the terminal is gone, and writing to it would be an error
        os.dup2(nowhere, descriptor)
    _terminate(number, frame)


def lose_streams() -> None:
    """Send standard output and error nowhere: neither can be written."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    sys.stdout = sys.stderr = os.fdopen(os.dup(nowhere), "w")  # what they still hold is lost with them
