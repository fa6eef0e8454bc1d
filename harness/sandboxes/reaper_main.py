"""The reaper's own program: the engine's parent, which outlives harness only to clean up after it.

Started by :mod:`harness.sandboxes.reaper` as ``python -I -S reaper_main.py SOCKET_FD OWNER_PID``. It imports nothing
but the standard library, so that it starts in milliseconds, stays small, and still works when the environment that
harness ran in is broken or gone. It takes orders and gives answers as JSON lines over the socket; the end of the
socket, or of the owner, is the order to end everything. One engine at a time: whatever descends from the reaper is
that engine's.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from typing import Any, Final, NoReturn

# linux/prctl.h
PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36

#: How long an engine may take to end politely once harness is gone, seconds.
ORPHAN_GRACE: Final = 1.0
#: How long a killed process may stay (a driver can hold one in an uninterruptible sleep), seconds.
KILL_LIMIT: Final = 10.0
#: A create that harness had under way when it died may still bring a container: list until none came for this long.
QUIET: Final = 3.0
#: How long to try to remove containers (the daemon may be restarting); the sweep at the next start does the rest.
REMOVE_LIMIT: Final = 60.0
#: How long a daemon may take over one answer, seconds.
ANSWER_LIMIT: Final = 10.0
#: A wait that is longer has no end, seconds.
_NEVER: Final = 1e6
#: Added to the engine's OOM score, so that the kernel takes the engine before harness.
OOM_SCORE: Final = "500"

#: Where folders of secrets are made (mode 0700): in memory, else where a reboot empties; and their names.
SECRET_PLACES: Final = ("/dev/shm", "/tmp")  # noqa: S108
SECRETS_PREFIX: Final = "harness-secrets-"
#: Where homes of engines are made (mode 0700): on the disk that keeps files over a reboot, as an engine may write gigabytes.
HOME_PLACES: Final = ("/var/tmp", "/tmp")  # noqa: S108
HOME_PREFIX: Final = "harness-private-"
FOLDERS: Final = {"secrets": (SECRET_PLACES, SECRETS_PREFIX), "home": (HOME_PLACES, HOME_PREFIX)}

Order = dict[str, Any]


class ReaperProcess:
    """Obeys one owner over ``link``; every descendant of this process belongs to the engine ``root``."""

    def __init__(self, link: socket.socket, owner: int) -> None:
        self.link = link
        self.owner = owner
        self.root: int | None = None
        self.status: int | None = None
        self.kill_at: float | None = None
        self.closing = False
        self.containers: tuple[str, str] | None = None
        self.folders: list[str] = []
        self._buffer = b""

    def run(self) -> None:
        """Serve until the owner is gone or closes the link; then end everything."""
        wakeup, signalled = os.pipe()
        os.set_blocking(wakeup, False)
        os.set_blocking(signalled, False)
        signal.set_wakeup_fd(signalled, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        # A terminal's Ctrl-C and hang-up are for harness, which says by the link what it wants.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: self.close())
        ending = select.poll()
        ending.register(wakeup, select.POLLIN)
        listening = select.poll()
        listening.register(wakeup, select.POLLIN)
        listening.register(self.link, select.POLLIN)
        # The link alone would miss the owner's death where a forked child of the owner holds a copy of the other end.
        with contextlib.suppress(OSError):
            listening.register(os.pidfd_open(self.owner), select.POLLIN)
        if os.getppid() != self.owner:
            return
        self.answer({"event": "ready", "number": 0})
        while not (self.closing and self.root is None):
            for fd, _ in (ending if self.closing else listening).poll(self._patience()):
                if fd == wakeup:
                    os.read(wakeup, 4096)
                elif fd == self.link.fileno():
                    self._receive()
                else:
                    self.close()
            self._advance()
        self._forget_folders()
        if self.containers is not None:
            remove_containers(*self.containers)

    def close(self) -> None:
        """Take no more orders; end the engine, with a short graceful shutdown."""
        self.closing = True
        self.end(ORPHAN_GRACE)

    def end(self, grace: float) -> None:
        """Ask the engine to end; after ``grace`` seconds it is killed."""
        if self.root is None:
            return
        if self.kill_at is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.root, signal.SIGTERM)
        at = time.monotonic() + grace
        self.kill_at = at if self.kill_at is None else min(at, self.kill_at)

    def answer(self, event: Order) -> None:
        """Tell the owner; an owner that is gone is noticed elsewhere."""
        with contextlib.suppress(OSError):
            self.link.sendall(json.dumps(event).encode() + b"\n")

    def obey(self, order: Order) -> None:
        """Carry out one order."""
        if order["order"] == "spawn":
            self.answer({"number": order["number"], **self._spawn(order)})
        elif order["order"] == "watch":
            self.containers = (order["socket"], order["label"]) if order["socket"] else None
            self.answer({"number": order["number"], "event": "watching"})
        elif order["order"] == "end" and order["pid"] == self.root:
            self.end(order["grace"])

    def _patience(self) -> float | None:
        """Milliseconds until the next deadline."""
        return None if self.kill_at is None else max(0.0, (self.kill_at - time.monotonic()) * 1000)

    def _receive(self) -> None:
        try:
            data = self.link.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        for line in lines:
            self.obey(json.loads(line))

    def _advance(self) -> None:
        """Collect the dead; once the engine's first process is one of them, or its grace is over, end the rest."""
        self._collect()
        if self.root is None:
            return
        if self.status is None and (self.kill_at is None or time.monotonic() < self.kill_at):
            return
        left = self._kill_all()
        self._forget_folders()
        self.answer({"event": "exited", "pid": self.root, "status": self.status, "left": left})
        self.root = self.status = self.kill_at = None

    def _collect(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == self.root:
                    code = os.waitstatus_to_exitcode(found[1])
                    self.status = 128 - code if code < 0 else code

    def _kill_all(self) -> list[int]:
        """Kill every descendant, whatever group or session it moved to; the PIDs that would not go."""
        limit = time.monotonic() + KILL_LIMIT
        while alive := descendants(os.getpid()):
            if time.monotonic() > limit:
                return sorted(alive)
            for pid in alive:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            self._collect()
            time.sleep(0.002)
        return []

    def _spawn(self, order: Order) -> Order:
        if self.root is not None:
            return {"event": "failed", "stage": "busy", "errno": 0}
        for asked in order["folders"]:
            try:
                self.folders.append(write_folder(order, **asked))
            except OSError as error:
                self._forget_folders()
                return {"event": "failed", "stage": asked["kind"], "errno": error.errno}
        report, failures = os.pipe()
        pid = os.fork()
        if pid == 0:
            become(order, failures, os.getppid())
        os.close(failures)
        with os.fdopen(report, "rb") as stream:
            failure = stream.read()  # ends when the program has taken over, or with the reason why it has not
        if failure:
            os.waitpid(pid, 0)
            self._forget_folders()
            stage, errno = json.loads(failure)
            return {"event": "failed", "stage": stage, "errno": errno}
        self.root = pid
        return {"event": "spawned", "pid": pid, "folders": self.folders}

    def _forget_folders(self) -> None:
        for folder in self.folders:
            remove_folder(folder)
        self.folders = []


def write_folder(order: Order, kind: str, files: dict[str, str], links: dict[str, str], at: str, variable: str | None) -> str:
    """A private folder with files of mode 0400 and links, by path in it; its path.

    It bears the mark of harness, so that whoever clears up can tell whose it is. In the order's environment its path takes the
    place of ``at``, and stands in ``variable``.
    """
    places, prefix = FOLDERS[kind]
    place = next((path for path in places if os.access(path, os.W_OK | os.X_OK)), "/")
    folder = f"{place}/{prefix}{os.urandom(8).hex()}"
    os.mkdir(folder, 0o700)  # noqa: PTH102 - pathlib costs start-up time
    try:
        for name, content in {order["mark"]: order["owner"], **files}.items():
            os.makedirs(os.path.dirname(f"{folder}/{name}"), exist_ok=True)  # noqa: PTH103, PTH120 - as above
            file = os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o400)
            os.write(file, content.encode("utf-8", "surrogateescape"))
            os.close(file)
        for name, target in links.items():
            os.makedirs(os.path.dirname(f"{folder}/{name}"), exist_ok=True)  # noqa: PTH103, PTH120 - as above
            os.symlink(target, f"{folder}/{name}")  # noqa: PTH211 - as above
    except OSError:
        remove_folder(folder)
        raise
    order["env"] = {name: value.replace(at, folder) for name, value in order["env"].items()}
    if variable is not None:
        order["env"][variable] = folder
    return folder


def remove_folder(folder: str) -> None:
    """Remove a private folder; what its links lead to stays."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def become(order: Order, failures: int, reaper: int) -> NoReturn:
    """In the forked child: turn into the engine, or write ``[stage, errno]`` to ``failures``."""
    stage = "log"
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.setsid()
        # Should the reaper itself be killed, the kernel ends the engine.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != reaper:
            os._exit(127)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as score:  # noqa: PTH123 - pathlib costs start-up time
            score.write(OOM_SCORE)
        null = os.open(os.devnull, os.O_RDONLY)
        for number, source in enumerate((null, log, log)):
            os.dup2(source, number)
        if order.get("memory_limit"):
            resource.setrlimit(resource.RLIMIT_DATA, (order["memory_limit"], order["memory_limit"]))
        stage = "folder"
        os.chdir(order["cwd"])
        stage = "program"
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)  # what is ignored stays ignored across exec
        os.execve(order["argv"][0], order["argv"], order["env"])  # noqa: S606 - no shell is what we want
    except OSError as error:
        os.write(failures, json.dumps([stage, error.errno]).encode())
    finally:
        os._exit(127)


def descendants(ancestor: int) -> set[int]:
    """PIDs of all processes below ``ancestor``, from the parents named in ``/proc/PID/stat``."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):  # noqa: PTH208 - pathlib costs start-up time
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:  # noqa: PTH123 - as above
                # "PID (NAME) STATE PPID …", and NAME may hold anything (proc_pid_stat(5)).
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue  # it went away
        children.setdefault(parent, []).append(int(name))
    found: set[int] = set()
    todo = [ancestor]
    while todo:
        below = children.get(todo.pop(), [])
        todo += below
        found.update(below)
    return found


class TimedSocket(socket.socket):
    """A Unix connection on which no wait lasts beyond a point in time (``time.monotonic``), however slowly bytes come."""

    def __init__(self, deadline: Callable[[], float]) -> None:
        super().__init__(socket.AF_UNIX)
        self._deadline = deadline

    def connect(self, address: Any) -> None:
        """Connect in time."""
        self._hurry()
        super().connect(address)

    def recv_into(self, *args: Any, **kwargs: Any) -> int:
        """Receive in time; what reads from this socket as from a file comes here."""
        self._hurry()
        return super().recv_into(*args, **kwargs)

    def sendall(self, *args: Any, **kwargs: Any) -> None:
        """Send in time."""
        self._hurry()
        super().sendall(*args, **kwargs)

    def _hurry(self) -> None:
        left = self._deadline() - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        self.settimeout(left if left < _NEVER else None)


def remove_containers(path: str, label: str) -> None:
    """Remove every container that bears ``label`` (``key=value``) through the Docker socket at ``path``, and then its networks.

    Speaks the Engine API itself (``GET /containers/json``, ``DELETE /containers/ID``, ``GET /networks``,
    ``DELETE /networks/ID``): the last line of defence should need no library.
    """
    from http.client import HTTPConnection, HTTPException
    from urllib.parse import quote

    class Daemon(HTTPConnection):
        def connect(self) -> None:
            until = time.monotonic() + ANSWER_LIMIT
            self.sock = TimedSocket(lambda: until)
            self.sock.connect(path)

    def ask(method: str, target: str) -> bytes:
        connection = Daemon("localhost")
        with contextlib.closing(connection):
            connection.request(method, target)
            return connection.getresponse().read()

    labelled = "filters=" + quote(json.dumps({"label": [label]}))
    limit = time.monotonic() + REMOVE_LIMIT
    quiet_until = time.monotonic() + QUIET
    while time.monotonic() < min(limit, quiet_until):
        try:
            found = json.loads(ask("GET", f"/containers/json?all=1&{labelled}"))
            for container in found:
                ask("DELETE", f"/containers/{container['Id']}?force=1&v=1")
        except (OSError, HTTPException, ValueError, TypeError, KeyError):
            found = None  # the daemon is away, or answers nonsense: try until the limit
        if found is None or found:
            quiet_until = time.monotonic() + QUIET
        time.sleep(0.1)
    with contextlib.suppress(OSError, HTTPException, ValueError, TypeError, KeyError):
        for network in json.loads(ask("GET", f"/networks?{labelled}")):
            ask("DELETE", f"/networks/{network['Id']}")


def main() -> None:
    """Take the socket that harness left open, adopt what engines leave behind, and serve."""
    link = socket.socket(fileno=int(sys.argv[1]))
    link.set_inheritable(False)
    # Processes that an engine detaches (double fork, own session) become children of the reaper and are found.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    ReaperProcess(link, int(sys.argv[2])).run()


if __name__ == "__main__":
    main()
