"""A command of the user's in the foreground, and signal forwarding."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from harness.errors import EngineError, NotFoundError, NotPermittedError
from harness.measure.events import Observer

#: linux/prctl.h
_PR_SET_PDEATHSIG: Final = 1
#: How often a running command and the engine behind it are looked at, seconds.
_TICK: Final = 0.2
#: How long a command may take to end after SIGTERM, seconds.
_GRACE: Final = 10.0


def find_command(argv: tuple[str, ...]) -> tuple[str, ...]:
    """The command with the path of its program, before anything is started for it.

    Raises:
        NotFoundError: there is no such program.
    """
    program = shutil.which(argv[0])
    if program is None:
        raise NotFoundError(f"there is no program {argv[0]!r}", code="no-such-command")
    return (program, *argv[1:])


def run_command(
    argv: tuple[str, ...],
    env: dict[str, str],
    check_engine: Callable[[], None],
    observer: Observer,
    *,
    stdout: int | None = None,
) -> int:
    """Run a command with ``env`` added to ours; its exit status, 128 + signal for a killed one.

    ``check_engine`` raises an EngineError where the engine behind it has ended: that is said, once, and the command goes on.

    The command has our terminal and process group, so Ctrl-C reaches it from there, and we wait for what it makes of it. A
    SIGINT that came to us alone is passed on. Whatever else ends us ends the command first; should we be killed, the kernel
    ends it (SIGTERM).

    Raises:
        NotPermittedError: it cannot be run.
    """
    interrupts: list[int] = []
    with _sigint(lambda number, _frame: interrupts.append(number)):
        try:
            command = subprocess.Popen(argv, env={**os.environ, **env}, stdout=stdout, preexec_fn=_dies_with(os.getpid()))
        except OSError as error:
            raise NotPermittedError(f"{argv[0]!r} cannot be run: {error.strerror}") from error
        try:
            return _wait(command, check_engine, interrupts, observer)
        except BaseException:
            _end(command)
            raise


def _dies_with(parent: int) -> Callable[[], None] | None:
    """What the forked child does before it becomes the command; nothing outside the main thread, whose end would count."""
    if threading.current_thread() is not threading.main_thread():
        return None
    libc = ctypes.CDLL(None)

    def bind() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)

    return bind


def _wait(command: subprocess.Popen[bytes], check_engine: Callable[[], None], interrupts: list[int], observer: Observer) -> int:
    passed, ended = 0, False
    while True:
        try:
            status = command.wait(timeout=_TICK)
        except subprocess.TimeoutExpired:
            status = None
        if status is not None:
            return 128 - status if status < 0 else status
        while passed < len(interrupts):
            passed += 1
            if not _in_foreground():
                command.send_signal(signal.SIGINT)
        if not ended:
            try:
                check_engine()
            except EngineError as error:
                ended = True
                observer.warn(f"{error.message}, and the command goes on without it")


def _in_foreground() -> bool:
    """Whether a terminal sends its Ctrl-C to our whole process group, and so to the command as well."""
    try:
        descriptor = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(descriptor)


@contextmanager
def _sigint(handler: Callable[[int, object], object]) -> Iterator[None]:
    """Our handler of SIGINT, in the main thread; a started program gets the default one, unlike with SIG_IGN."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _end(command: subprocess.Popen[bytes]) -> None:
    command.terminate()
    try:
        command.wait(timeout=_GRACE)
    except subprocess.TimeoutExpired:
        command.kill()
        command.wait()
