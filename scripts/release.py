"""Build a release into build/release and try it: `make release`.

The sdist and the wheel are installed into fresh environments (every Python from 3.11 to 3.14 that is here, pip and uv, with and
without extras) and their `harness` is run outside the checkout. Beside them: a bill of materials (CycloneDX) of the locked
requirements, the section of the changelog, and checksums. Nothing is uploaded. `--images` also builds the container image for
x86-64 and aarch64 (needs docker buildx).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
OUT: Final = ROOT / "build" / "release"
PYTHONS: Final = ("python3.11", "python3.12", "python3.13", "python3.14")
EXTRAS: Final = ("", "[report]")
#: What a fresh installation must answer, and its status: an empty store knows no model.
COMMANDS: Final = (
    (("--version",), 0),
    (("list",), 0),
    (("check", "nothing@8k", "--available", "24GiB"), 4),
    (("help", "calibrate"), 0),
)


def run(*words: str | Path, cwd: Path = ROOT, status: int = 0, **env: str) -> str:
    """What a program prints; an exception where its status is another."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HARNESS_", "PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(one) for one in words], cwd=cwd, env={**clean, **env}, capture_output=True, text=True, check=False
    )
    if done.returncode != status:
        raise SystemExit(f"{' '.join(map(str, words))}: status {done.returncode}, not {status}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def build() -> tuple[str, list[Path]]:
    """The version, and the files of the release."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    run(sys.executable, "-m", "hatchling", "build", "-d", OUT)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    files = sorted(OUT.glob("*.whl")) + sorted(OUT.glob("*.tar.gz"))
    if len(files) != 2 or any(version not in file.name for file in files):
        raise SystemExit(f"a wheel and an sdist of {version} are expected, not {[file.name for file in files]}")
    return version, files


def installers(python: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The ways to install into an environment that was just made."""
    run(python, "-m", "venv", folder / "pip")
    yield "pip", [str(folder / "pip" / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if (uv := shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))) is not None:
        run(uv, "venv", "--quiet", "--python", python, folder / "uv")
        yield "uv", [uv, "pip", "install", "--quiet", "--python", str(folder / "uv" / "bin" / "python")]


def try_out(file: Path, version: str, python: str, extra: str) -> None:
    """Install a file and run what it installs, in an empty folder."""
    with tempfile.TemporaryDirectory(prefix="harness-release-") as place:
        for name, install in installers(python, Path(place)):
            run(*install, f"{file}{extra}")
            away = Path(place) / f"away-{name}"
            away.mkdir()
            program, store = Path(place) / name / "bin" / "harness", str(away / "store")
            for words, status in COMMANDS:
                said = run(program, *words, cwd=away, status=status, HARNESS_STORE=store)
                if "make setup" in said or (words == ("--version",) and version not in said):
                    raise SystemExit(f"{file.name} with {python}: {' '.join(words)} says {said}")
            where = run(program.parent / "python", "-c", "import harness; print(harness.__file__)", cwd=away)
            if not where.startswith(place):
                raise SystemExit(f"{file.name}: the checkout was tried, not the installation: {where}")
            print(f"ok  {file.name}{extra}  {python}  {name}", flush=True)


def bill_of_materials(version: str) -> dict[str, Any]:
    """The locked requirements as a CycloneDX document."""
    components, text = [], (ROOT / "requirements.lock").read_text(encoding="utf-8")
    for name, release, rest in re.findall(r"^([A-Za-z0-9._-]+)==([^ ;\\\n]+)([^\n]*(?:\n {4}[^\n]*)*)", text, re.M):
        hashes = [{"alg": "SHA-256", "content": digest} for digest in re.findall(r"sha256:([0-9a-f]{64})", rest)]
        components.append(
            {"type": "library", "name": name, "version": release, "purl": f"pkg:pypi/{name}@{release}", "hashes": hashes}
        )
    about = {"type": "application", "name": "llm-memory-harness", "version": version}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": about},
        "components": components,
    }


def changes(version: str) -> str:
    """The section of the changelog: of this version, else what is not released yet."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## \[([^\]]+)\][^\n]*\n(.*?)(?=^## \[|\Z)", text, re.M | re.S))
    return str(sections.get(version) or sections["Unreleased"]).strip() + "\n"


def main() -> None:
    """Build, try, and write what goes with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", action="store_true", help="build the container image for both architectures, too")
    arguments = parser.parse_args()
    version, files = build()
    here = [python for python in PYTHONS if shutil.which(python)]
    for python in here:
        for file in files:
            for extra in EXTRAS if file.suffix == ".whl" else EXTRAS[:1]:
                try_out(file, version, python, extra)
    (OUT / "sbom.cdx.json").write_text(json.dumps(bill_of_materials(version), indent=1) + "\n", encoding="utf-8")
    (OUT / "CHANGES.md").write_text(changes(version), encoding="utf-8")
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(OUT.iterdir())]
    (OUT / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    if arguments.images:
        platforms = ("--platform", "linux/amd64,linux/arm64")
        run("docker", "buildx", "build", *platforms, "-f", "images/harness.Dockerfile", "-t", f"harness:{version}", ".")
        print("ok  image for linux/amd64 and linux/arm64")
    missing = [python for python in PYTHONS if python not in here]
    print(
        f"{version} is in {OUT.relative_to(ROOT)}"
        + (f"; not tried, since they are not here: {', '.join(missing)}" if missing else "")
    )


if __name__ == "__main__":
    main()
