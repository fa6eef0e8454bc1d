"""The pictures of the documentation, made anew: `make screenshots`.

Each terminal is a real run behind a pseudo-terminal of 100 columns, over the calibrations that were recorded on an H100
(`tests/golden`); the report is drawn by Chromium (Debian's, or the one that CHROMIUM names) through playwright.
"""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.terminal_theme import DIMMED_MONOKAI
from rich.text import Text

ROOT: Final = Path(__file__).resolve().parents[1]
IMAGES: Final = ROOT / "docs" / "images"
GOLDEN: Final = ROOT / "tests" / "golden" / "llama-server" / "b11434-cuda-h100"
COLUMNS: Final = 100
HARNESS: Final = str(Path(sys.executable).parent / "harness")


def terminal(words: list[str], store: Path) -> str:
    """What a command draws on a terminal, colours included; a line that was drawn over is left out."""
    inside, outside = pty.openpty()
    environment = {**os.environ, "HARNESS_STORE": str(store), "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    with subprocess.Popen([HARNESS, *words], stdout=outside, stderr=subprocess.DEVNULL, env=environment, cwd=ROOT) as process:
        os.close(outside)
        said = b""
        try:
            while block := os.read(inside, 65536):
                said += block
        except OSError:  # the other end is closed
            pass
        process.wait()
    os.close(inside)
    return said.decode().replace("\r\n", "\n")


def picture(name: str, commands: list[list[str]], store: Path) -> None:
    """A picture of several commands, one below the other."""
    console = Console(record=True, width=COLUMNS, file=Path(os.devnull).open("w", encoding="utf-8"), force_terminal=True)  # noqa: SIM115
    for words in commands:
        console.print(Text(f"$ harness {' '.join(words)}", style="bold"))
        console.print(Text.from_ansi(terminal(words, store)))
    console.save_svg(str(IMAGES / f"{name}.svg"), title="harness", theme=DIMMED_MONOKAI)


def page(store: Path, folder: Path) -> None:
    """A picture of the report."""
    from playwright.sync_api import sync_playwright

    target = folder / "report.html"
    subprocess.run([HARNESS, "report", "-o", target, "--store", str(store)], check=True, cwd=ROOT)
    with sync_playwright() as player:
        browser = player.chromium.launch(
            executable_path=os.environ.get("CHROMIUM") or shutil.which("chromium"), args=["--no-sandbox"]
        )
        view = browser.new_page(viewport={"width": 1100, "height": 900})
        view.goto(target.as_uri())
        view.wait_for_timeout(1500)
        view.screenshot(path=str(IMAGES / "report.png"))
        browser.close()


def main() -> None:
    """Take every picture."""
    with tempfile.TemporaryDirectory(prefix="harness-pictures-") as place:
        store = Path(place) / "store"
        (store / "llama-server").mkdir(parents=True)
        for name in ("small-1b", "mid-8b", "large-32b"):
            shutil.copy(GOLDEN / name / f"{name}.yaml", store / "llama-server")
        free = ["--available", "24GiB"]
        picture(
            "terminal",
            [["show", "mid-8b"], ["check", "mid-8b@32k", *free], ["check", "large-32b@64k", *free], ["plan", *free]],
            store,
        )
        page(store, Path(place))


if __name__ == "__main__":
    main()
