"""A second Docker daemon that accepts requests for GPUs on a machine that has none.

The daemon gives a container "NVIDIA GPUs" when it finds a program ``nvidia-container-runtime-hook`` on its PATH; here
that program is a script that does nothing. The daemon runs in a network namespace of its own, for one reason: beside
another daemon in the same namespace it would take the first one's bridge, ``docker0``, away. What is to reach the ports of
its containers runs there too (:meth:`GpuDaemon.inside`).
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType


class GpuDaemon:
    """A context manager around the daemon and its folder. Needs root."""

    def __init__(self) -> None:
        # Short: the paths of the daemon's sockets may have 107 characters (unix(7)).
        self.folder = Path(tempfile.mkdtemp(prefix="harness-"))
        self.address = f"unix://{self.folder}/docker.sock"
        hook = self.folder / "bin" / "nvidia-container-runtime-hook"
        hook.parent.mkdir()
        hook.write_text("#!/bin/sh\nexit 0\n")
        hook.chmod(0o755)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> GpuDaemon:
        try:
            self.start()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.remove()

    def start(self) -> None:
        """Start it, and wait until it takes orders."""
        folder = self.folder
        with (folder / "dockerd.log").open("ab") as log:
            self._process = subprocess.Popen(
                ["unshare", "--net", sys.executable, __file__, "dockerd", "--data-root", f"{folder}/data",
                 "--exec-root", f"{folder}/exec", "--pidfile", f"{folder}/pid", "--host", self.address,
                 "--iptables=false", "--ip-masq=false"],
                env=os.environ | {"PATH": f"{folder}/bin:{os.environ['PATH']}"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        from tests.support.waiting import until

        try:
            until(self._answers, "an answer of the second daemon")
        except AssertionError as error:
            error.add_note((folder / "dockerd.log").read_text()[-2000:])
            raise

    def inside(self, *command: str) -> list[str]:
        """A command line that runs ``command`` in the daemon's network namespace."""
        assert self._process is not None
        return ["nsenter", f"--target={self._process.pid}", "--net", "--", *command]

    def kill(self) -> None:
        """End it as a crash would: what it has started stays."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(200)

    def remove(self) -> None:
        """End it, with all that it has started, and remove its folder."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            self._process.wait(200)
        # A daemon that was killed leaves its folder mounted on itself.
        subprocess.run(["umount", "--lazy", f"{self.folder}/data"], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _answers(self) -> bool:
        from harness.errors import HarnessError
        from harness.sandboxes.docker_client import Daemon

        try:
            Daemon(self.address).close()
        except HarnessError:
            return False
        return True


def loopback_up() -> None:
    """Switch the namespace's own 127.0.0.1 on (netdevice(7))."""
    up, get, put = 0x1, 0x8913, 0x8914
    with socket.socket() as any_socket:
        name, flags = struct.unpack("16sH", fcntl.ioctl(any_socket, get, struct.pack("16sH14x", b"lo", 0))[:18])
        fcntl.ioctl(any_socket, put, struct.pack("16sH14x", name, flags | up))


if __name__ == "__main__":
    loopback_up()
    os.execvp(sys.argv[1], sys.argv[1:])  # noqa: S606 - no shell is what we want
