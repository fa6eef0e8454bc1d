"""One supervisor for everything that harness starts.

The reaper is a small process of its own (:mod:`harness.sandboxes.reaper_main`) that is started before any engine. It is
the engine's parent and holds one end of a socket; when harness ends in whatever way, ``kill -9`` included, the reaper
ends the engine, everything that the engine started, and the containers it was asked to watch.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import msgspec

from harness.errors import (
    BadInputError,
    BusyError,
    CannotWriteError,
    EngineError,
    HarnessError,
    NotFoundError,
    NotPermittedError,
)
from harness.ownership import MARK, this_process
from harness.sandboxes.base import PRIVATE, SECRETS, Home
from harness.sandboxes.reaper_main import remove_folder

if TYPE_CHECKING:
    import psutil

#: How long the reaper may take to answer an order, seconds (it starts in about 0.05; a loaded machine is slower).
ANSWER_LIMIT: Final = 30.0
#: How long closing waits for containers that the daemon does not let go, seconds; the reaper goes on without us.
CONTAINERS_LIMIT: Final = 5.0
#: Where an engine finds the folder that holds its secrets.
SECRETS_VARIABLE: Final = "HARNESS_SECRETS"
_PROGRAM: Final = Path(__file__).with_name("reaper_main.py")


class Reaper:
    """A context manager around the reaper process. Methods may be called from any thread.

    One engine at a time: every descendant of the reaper belongs to it.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._link: socket.socket | None = None
        self._listener: threading.Thread | None = None
        self._orders = threading.Lock()
        self._number = 0
        self._answers: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._exits: dict[int, int] = {}
        self._left: dict[int, list[int]] = {}
        self._engine: int | None = None
        self._seen: dict[int, psutil.Process] = {}
        self._folders: list[str] = []
        self._watching = False
        self._closing = False
        self._lost = False

    def __enter__(self) -> Reaper:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """PID of the reaper; ``None`` where none runs."""
        return self._process.pid if self._process else None

    def start(self) -> None:
        """Start the reaper; nothing happens where it runs already."""
        if self._process is not None:
            return
        self._closing = self._lost = False
        self._answers = queue.SimpleQueue()
        self._link, theirs = socket.socketpair()
        with theirs:
            # Its own session: a terminal's Ctrl-C does not reach it. No streams of ours: it must not hold a pipe open.
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-X", "utf8", _PROGRAM, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={},
                cwd="/",
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self._listener = threading.Thread(target=self._listen, args=(self._link,), name="harness-reaper", daemon=True)
        self._listener.start()
        self._await_answer(0)

    def spawn(
        self,
        argv: tuple[str, ...],
        *,
        env: dict[str, str],
        cwd: Path,
        log: Path,
        memory_limit: int | None = None,
        secrets: Mapping[str, str] | None = None,
        home: Home | None = None,
    ) -> int:
        """Start an engine as the reaper's child, in its own session, its output appended to ``log``; its PID.

        ``argv[0]`` is a path; ``env`` is the whole environment, and
        ``memory_limit`` the most private memory that each of its processes may map (RLIMIT_DATA, bytes). ``secrets`` are
        files in a private folder that the reaper removes, whatever happens to us; its path replaces
        ``/run/secrets`` in values of ``env``. ``home`` is another such folder, whose path replaces :data:`PRIVATE`.

        Raises:
            NotFoundError: there is no such program. NotPermittedError: it may not be run. CannotWriteError: the log
                cannot be opened. BusyError: an engine runs already. EngineError: anything else.
        """
        if any("\0" in text for text in (*argv, *env, *env.values())):
            raise BadInputError("an argument or a variable of the engine contains a NUL character")
        answer = self._ask(
            {
                "order": "spawn",
                "argv": [_utf8(word) for word in argv],
                "env": {_utf8(name): _utf8(value) for name, value in env.items()},
                "cwd": _utf8(str(cwd)),
                "log": _utf8(str(log.absolute())),
                "memory_limit": memory_limit,
                "folders": _private(secrets, home),
                "mark": MARK,
                "owner": msgspec.json.encode(this_process()).decode(),
            }
        )
        if answer["event"] != "spawned":
            raise _spawn_error(answer["stage"], answer["errno"], argv[0], cwd, log)
        pid: int = answer["pid"]
        self._folders = answer["folders"]
        self.pids()  # the processes to end, should the reaper be lost
        return pid

    def pids(self) -> frozenset[int]:
        """PIDs of the engine and all that it started, detached ones included."""
        import psutil

        if self._process is None or self._lost:
            return frozenset()
        try:
            found = psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return frozenset()
        with self._changed:
            self._seen = {one.pid: one for one in found}
        return frozenset(self._seen)

    def exit_status(self, pid: int) -> int | None:
        """The engine's exit status, 128 + signal for a killed one; ``None`` while it runs.

        Raises:
            EngineError: the reaper died (code ``supervision-lost``); the engine has been killed.
        """
        with self._changed:
            status = self._exits.get(pid)
        if status is None:
            self.check()
        return status

    def wait(self, pid: int, timeout: float) -> int | None:
        """As :meth:`exit_status`, after at most ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: pid in self._exits or self._lost, timeout)
        return self.exit_status(pid)

    def end(self, pid: int, timeout: float = 10.0) -> None:
        """End an engine and everything it started: politely, after ``timeout`` seconds by force.

        Raises:
            EngineError: some of its processes cannot be ended.
        """
        with self._changed:
            if pid in self._exits or self._lost or self._process is None:
                return
        with contextlib.suppress(EngineError):  # a reaper that is lost has been dealt with
            self._send({"order": "end", "pid": pid, "grace": timeout})
        with self._changed:
            over = self._changed.wait_for(lambda: pid in self._exits or self._lost, timeout + ANSWER_LIMIT)
            left = self._left.get(pid, [])
        if not over or left:
            raise EngineError(f"the engine's processes do not end: {', '.join(map(str, left)) or pid}")

    def watch_containers(self, socket_path: str, label: str) -> None:
        """From now on, remove the containers that bear ``label`` (``key=value``) if harness ends before unwatching."""
        self._ask({"order": "watch", "socket": socket_path, "label": label})
        self._watching = True

    def unwatch_containers(self) -> None:
        """The containers are gone: nothing to remove at the end."""
        if self._process is not None and not self._lost:
            self._ask({"order": "watch", "socket": "", "label": ""})
        self._watching = False

    def close(self) -> None:
        """End whatever runs, and the reaper; harmless when it has ended already."""
        process, link = self._process, self._link
        if process is None or link is None:
            return
        self._closing = True
        with contextlib.suppress(OSError):
            link.shutdown(socket.SHUT_WR)
        try:
            process.wait(CONTAINERS_LIMIT if self._watching else ANSWER_LIMIT)
        except subprocess.TimeoutExpired:
            if self._watching:
                threading.Thread(target=process.wait, name="harness-reaper-end", daemon=True).start()  # collects its end
            else:
                process.kill()
                process.wait()
                self._kill_seen()
        finally:
            self._process = None
            if self._listener is not None and process.returncode is not None:
                self._listener.join(ANSWER_LIMIT)  # it takes the last exit status
            link.close()

    def _send(self, order: dict[str, Any]) -> None:
        self.check()
        if self._link is None:
            raise RuntimeError("the reaper has not been started")
        with contextlib.suppress(OSError):  # the listener notices an end of the link
            self._link.sendall(json.dumps(order).encode() + b"\n")

    def _ask(self, order: dict[str, Any]) -> dict[str, Any]:
        with self._orders:
            self._number += 1
            self._send({**order, "number": self._number})
            return self._await_answer(self._number)

    def _await_answer(self, number: int) -> dict[str, Any]:
        while True:
            try:
                answer = self._answers.get(timeout=ANSWER_LIMIT)
            except queue.Empty:
                raise EngineError(f"the supervising process did not answer within {ANSWER_LIMIT:.0f} s") from None
            if answer is None:
                raise _lost()
            if answer["number"] == number:  # an order that was interrupted (Ctrl-C) leaves its answer behind
                return answer

    def check(self) -> None:
        """Raise if the reaper was killed: nothing guards the engine then.

        Raises:
            EngineError: it was (code ``supervision-lost``).
        """
        if self._lost:
            raise _lost()

    def _listen(self, link: socket.socket) -> None:
        """In a thread: take what the reaper says until it is gone."""
        with contextlib.suppress(OSError, ValueError), link.makefile("rb") as lines:
            for line in lines:
                event = json.loads(line)
                if event["event"] == "exited":
                    self._note_exit(event)
                    continue
                if event["event"] == "spawned":
                    with self._changed:
                        self._engine = event["pid"]
                        self._exits.pop(event["pid"], None)  # the PID of an earlier engine, given out again
                self._answers.put(event)
        if not self._closing:
            self._lost = True
            self._kill_seen()
        with self._changed:
            self._changed.notify_all()
        self._answers.put(None)

    def _note_exit(self, event: dict[str, Any]) -> None:
        with self._changed:
            self._exits[event["pid"]] = event["status"] if event["status"] is not None else 128 + 9
            self._left[event["pid"]] = event["left"]
            self._engine = None
            self._changed.notify_all()

    def _kill_seen(self) -> None:
        """Without the reaper: kill what it last had, and whatever shares the engine's session; remove its secrets."""
        import psutil

        for folder in self._folders:
            remove_folder(folder)

        targets = dict(self._seen)
        for one in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.Error):
                if self._engine is not None and os.getsid(one.pid) == self._engine:
                    targets[one.pid] = one
        for one in targets.values():
            with contextlib.suppress(psutil.Error):
                one.kill()  # psutil refuses where the PID has been given to another process


def _private(secrets: Mapping[str, str] | None, home: Home | None) -> list[dict[str, Any]]:
    """The private folders of an engine, as the reaper makes them."""
    found: list[dict[str, Any]] = []
    if secrets:
        found.append({"kind": "secrets", "files": dict(secrets), "links": {}, "at": SECRETS, "variable": SECRETS_VARIABLE})
    if home is not None:
        files = {name: data.decode("utf-8", "surrogateescape") for name, data in home.files.items()}
        links = {name: _utf8(target) for name, target in home.links.items()}
        found.append({"kind": "home", "files": files, "links": links, "at": PRIVATE, "variable": None})
    return found


def _utf8(text: str) -> str:
    """The reaper runs in UTF-8 mode whatever our locale: the same bytes as text there."""
    return os.fsencode(text).decode("utf-8", "surrogateescape")


def _lost() -> EngineError:
    return EngineError(
        "supervision lost: the process that guards the engine was killed, so the engine has been ended",
        hint="this run's measurements are void; was the machine out of memory?",
        code="supervision-lost",
    )


def _spawn_error(stage: str, number: int, program: str, cwd: Path, log: Path) -> HarnessError:
    why = os.strerror(number) if number else ""
    if stage == "busy":
        return BusyError("an engine runs already; one sandbox starts one at a time")
    if stage == "secrets":
        return CannotWriteError(f"cannot write the engine's secrets: {why}")
    if stage == "home":
        return CannotWriteError(f"the engine's private folder cannot be made: {why}", hint="make room in /var/tmp")
    if stage == "log":
        return CannotWriteError(f"cannot write the engine's log {log}: {why}")
    if stage == "folder":
        return NotFoundError(f"cannot start the engine in {cwd}: {why}")
    if number == errno.ENOENT:
        return NotFoundError(f"cannot run {program}: it, or the interpreter that it names, does not exist")
    if number in (errno.EACCES, errno.EPERM):
        return NotPermittedError(f"cannot run {program}: {why}")
    if number == errno.ENOEXEC:
        return EngineError(
            f"{program} was not built for this machine's processor ({platform.machine()})",
            hint="install the engine's build for it",
            code="engine-crashed",
        )
    return EngineError(f"cannot run {program}: {why}", code="engine-crashed")
