"""Releases of the engine that comes from PyPI, each in an environment of its own, kept in the cache."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

from harness.engines.llama_server.embedded import PROGRAM
from harness.engines.llama_server.xllamacpp_server import PACKAGE
from harness.errors import UnavailableError, UsageError


def releases() -> tuple[str, ...]:
    """All releases that the package index has, as it lists them.

    Raises:
        UnavailableError: it does not answer.
    """
    pip = [sys.executable, "-m", "pip", "index", "versions", PACKAGE, "--disable-pip-version-check"]
    done = subprocess.run(pip, capture_output=True, text=True, check=False)
    match = re.search(r"^Available versions: (.*)$", done.stdout, re.MULTILINE)
    if match is None:
        raise UnavailableError(f"the package index names no release of {PACKAGE}", code="no-releases")
    return tuple(match[1].replace(" ", "").split(","))


def binary_of(release: str, cache: Path) -> Path:
    """A program that starts this release; it is installed once, below ``cache``.

    Raises:
        UsageError: no version. UnavailableError: it cannot be installed here.
    """
    if not re.fullmatch(r"\d[\d.]{0,30}", release):
        raise UsageError(f"{release!r} is not a release of {PACKAGE}")
    folder = cache / "engines" / f"{PACKAGE}-{release}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)], check=True)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--disable-pip-version-check"]
        # The first ones import two packages that they do not require.
        extra = ["orjson", "msgspec"] if release.startswith("0.") else []
        done = subprocess.run(
            [*pip, "--only-binary", ":all:", f"{PACKAGE}=={release}", *extra], check=False, capture_output=True, text=True
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
            raise UnavailableError(f"{PACKAGE} {release} cannot be installed here: {last}", code="no-such-release")
        (folder / "ready").touch()
    binary = folder / "llama-server"
    binary.write_text(f'#!/bin/sh\nexec {shlex.join([str(python), "-I", str(PROGRAM)])} "$@"\n')
    binary.chmod(0o755)
    return binary
