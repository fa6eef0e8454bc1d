"""The report as one file, without what names a person or a machine."""

from __future__ import annotations

import getpass
import io
import re
import socket
import sys
import tarfile
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
#: What goes into the file, by suffix; models and locks stay where they are.
KEPT: Final = frozenset({".json", ".md", ".log", ".yaml"})
_UUID: Final = re.compile(r"\b(GPU|MIG)-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


class Scrubber:
    """Replaces names of this machine, its user, its folders and its GPUs; the same GPU gets the same number everywhere."""

    def __init__(self, folder: Path) -> None:
        self._gpus: dict[str, str] = {}
        names = {str(folder): "WORK", str(folder.resolve()): "WORK", str(Path.cwd()): "HERE", str(Path.home()): "HOME"}
        names |= {str(ROOT): "CHECKOUT", sys.prefix: "PYTHON"}
        self._places = sorted(((old, new) for old, new in names.items() if len(old) > 1), key=lambda pair: -len(pair[0]))
        words = {socket.gethostname(): "HOST", _user(): "USER"}
        self._words = [
            (re.compile(rf"\b{re.escape(old)}\b"), new) for old, new in words.items() if len(old) > 2 and old != "root"
        ]

    def __call__(self, text: str) -> str:
        for old, new in self._places:
            text = text.replace(old, new)
        for pattern, new in self._words:
            text = pattern.sub(new, text)
        return _UUID.sub(self._gpu, text)

    def _gpu(self, match: re.Match[str]) -> str:
        number = self._gpus.setdefault(match[0], str(len(self._gpus) + 1))
        return f"{match[1]}-00000000-0000-0000-0000-{number:>012}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a UID without an entry in the user database
        return ""


def pack(folder: Path, output: Path) -> None:
    """Write every text file of ``folder`` into ``output``, a tar file; whole or not at all."""
    scrub = Scrubber(folder)
    part = output.with_name(output.name + ".part")
    with tarfile.open(part, "w:gz", compresslevel=6) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.suffix in KEPT:
                data = scrub(path.read_text(errors="replace")).encode()
                member = tarfile.TarInfo(f"gpu-report/{path.relative_to(folder)}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    part.replace(output)
