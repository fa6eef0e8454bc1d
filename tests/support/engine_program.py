"""A small program in the role of an engine; standard library only, so that it runs in any image with a Python.

usage: engine_program.py SCENARIO [ARGUMENT…]
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

ME = [sys.executable, str(Path(__file__).resolve())]


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"environment": dict(os.environ), "cwd": str(Path.cwd())}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def serve(host: str, port: str) -> None:
    """Answer every GET with the environment, until told to end."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = HTTPServer((host, int(port)), Answers)
    say("ready")
    server.serve_forever()


def environment() -> None:
    """Print every variable, and end."""
    for name, value in os.environ.items():
        say(f"{name}={value}")


def reach(host: str, port: str) -> None:
    """Say whether something listens there, and again whenever that changes."""
    said = ""
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
            now = "reached"
        except OSError:
            now = "out of reach"
        if now != said:
            say(now)
        said = now
        time.sleep(0.1)


def sleep() -> None:
    while True:
        time.sleep(60)


def family() -> None:
    """A child, a grandchild, and one that detaches: a double fork into a session of its own."""
    subprocess.Popen([*ME, "parent"])
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            say("detached up")
            sleep()
        os._exit(0)
    os.wait()
    sleep()


def parent() -> None:
    subprocess.Popen([*ME, "announce", "grandchild up"])
    sleep()


def announce(text: str) -> None:
    say(text)
    sleep()


def burst(count: str) -> None:
    """Many lines as fast as they go, on both streams, then how long it took, in seconds."""
    begin = time.monotonic()
    for number in range(int(count)):
        (sys.stdout if number % 2 else sys.stderr).write(f"line {number} of a burst, with some words to make it long\n")
    say(f"took {time.monotonic() - begin:.3f}")


def flood(megabytes: str) -> None:
    """A log of that size in lines of 1 KiB, each with its number."""
    for number in range(int(megabytes) << 10):
        sys.stdout.write(f"{number:08d} {'x' * 1014}\n")


def read(path: str) -> None:
    """Print a file."""
    say(Path(path).read_text())


def raw() -> None:
    """Bytes that are no text, and an unfinished line."""
    sys.stdout.buffer.write(b"a\xff\xfe\x00b\r\x1b[31m\n" + b"x" * 40_000 + b"\nunfinished")
    sys.stdout.flush()


def leave(code: str) -> None:
    sys.stderr.write("going\n")
    sys.exit(int(code))


def abort() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stubborn() -> None:
    """Ignore every polite request to end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say("ready")
    sleep()


def secret(name: str) -> None:
    """Print where a secret lies, its mode and its content."""
    path = Path(os.environ.get("HARNESS_SECRETS", "/run/secrets"), name)
    say(json.dumps({"path": str(path), "mode": oct(path.stat().st_mode & 0o777), "content": path.read_text()}))
    sleep()


def hold(size: str) -> None:
    """Take memory and keep it."""
    block = bytearray(int(size))
    block[::4096] = b"x" * len(block[::4096])
    say("holding")
    sleep()


if __name__ == "__main__":
    scenario = globals()[sys.argv[1]]
    scenario(*sys.argv[2:])
