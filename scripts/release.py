"""Build a release into dist/ and try it: `make release`.

The sdist and the wheel are built twice from the last commit and have to be the same byte for byte. What is in them is checked,
and that the sdist builds the same wheel. They are then installed into fresh environments (every Python from 3.11 to 3.14 that
is here, with pip and uv, with and without extras), and their `harness` is run outside the checkout. Beside them: a bill of
materials (CycloneDX) of the locked requirements, the section of the changelog, and checksums. `--images` also builds the
container images for x86-64 and aarch64 (needs Docker, and for the other architecture qemu's binfmt). Nothing is uploaded;
what could not be tried is listed at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import uuid
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]
OUT: Final = ROOT / "dist"
GOLDEN: Final = ROOT / "tests" / "golden" / "llama-server" / "b11434-cuda-h100" / "mid-8b" / "mid-8b.yaml"
PYTHONS: Final = ("3.11", "3.12", "3.13", "3.14")
PLATFORMS: Final = ("linux/amd64", "linux/arm64")
#: What each image is asked, and its status.
IMAGES: Final = {"harness.Dockerfile": (["doctor"], 0), "llama-server.Dockerfile": (["--version"], 0)}
#: What a fresh installation must answer, and its status. The store has one calibration, of a GPU with 80 GB.
COMMANDS: Final = (
    (("--version",), 0),
    (("list",), 0),
    (("check", "mid-8b@8k", "--available", "24GiB"), 0),
    (("check", "nothing@8k", "--available", "24GiB"), 4),
    (("show", "qwen2.5:0.5b"), 66),
    (("help", "calibrate"), 0),
)
#: What `harness report` answers with its extra, and without; and the modules of the others.
REPORT: Final = (("report", "-o", "report.html"), 0, 69)
EXTRAS: Final = {"report": "plotly", "exporter": "prometheus_client", "hub": "huggingface_hub", "mcp": "mcp"}
#: Files without which an installed harness does not do what it says.
NEEDED: Final = (
    "harness/py.typed",
    "harness/data/models/catalog.yaml",
    "harness/data/images/pins.yaml",
    "harness/report/assets/page.css",
    "harness/report/assets/page.js",
    "harness/report/assets/planner.js",
)
#: Nothing of a machine or of a build goes into a release.
JUNK: Final = re.compile(r"(^|/)(\.venv|\.git|\.hypothesis|__pycache__|[^/]*_cache|build|dist|runs)(/|$)|\.(pyc|part|lock\.d)$")


def run(*words: str | Path, cwd: Path = ROOT, status: int = 0, **env: str) -> str:
    """What a program prints; an exception where its status is another."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HARNESS_", "PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(one) for one in words], cwd=cwd, env={**clean, **env}, capture_output=True, text=True, check=False
    )
    if done.returncode != status:
        raise SystemExit(f"{' '.join(map(str, words))}: status {done.returncode}, not {status}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def committed(folder: Path) -> str:
    """Put the files of the last commit into a folder; the time of the commit, seconds since 1970."""
    archive = subprocess.run(["git", "archive", "--format=tar", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder, filter="data")
    return run("git", "log", "-1", "--format=%ct").strip()


def build() -> tuple[str, list[Path]]:
    """The version, and the files of the release: sdist and wheel, built twice, and once more from the sdist."""
    shutil.rmtree(OUT, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="harness-release-") as place:
        source, again, unpacked = (Path(place) / name for name in ("source", "again", "unpacked"))
        epoch = committed(source)
        for target in (OUT, again):
            run(sys.executable, "-m", "hatchling", "build", "-d", target, cwd=source, SOURCE_DATE_EPOCH=epoch)
        files = [*sorted(OUT.glob("*.tar.gz")), *sorted(OUT.glob("*.whl"))]
        if [file.suffix for file in files] != [".gz", ".whl"]:
            raise SystemExit(f"an sdist and a wheel are expected, not {[file.name for file in files]}")
        for file in files:
            if file.read_bytes() != (again / file.name).read_bytes():
                raise SystemExit(f"{file.name}: two builds of one commit differ")
        sdist, wheel = files
        with tarfile.open(sdist) as tar:
            tar.extractall(unpacked, filter="data")
        (folder,) = unpacked.iterdir()
        run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", unpacked, cwd=folder, SOURCE_DATE_EPOCH=epoch)
        if (unpacked / wheel.name).read_bytes() != wheel.read_bytes():
            raise SystemExit(f"{sdist.name} builds another wheel than the checkout")
    version = wheel.name.split("-")[1]
    print(f"ok  {sdist.name} and {wheel.name}: the same in two builds, and the wheel from the sdist")
    return version, files


def check_contents(version: str, files: Sequence[Path]) -> None:
    """Refuse a release that lacks a file, or has one that is none of its own."""
    sdist, wheel = files
    with zipfile.ZipFile(wheel) as archive:
        inside = archive.namelist()
        about = f"llm_memory_harness-{version}.dist-info"
        metadata = archive.read(f"{about}/METADATA").decode()
    with tarfile.open(sdist) as tar:
        source = [member.name.partition("/")[2] for member in tar.getmembers() if member.isfile()]
    tracked = set(run("git", "ls-tree", "-r", "--name-only", "HEAD").splitlines())
    wrong = [name for name in inside if not name.startswith(("harness/", f"{about}/")) or JUNK.search(name)]
    wrong += [name for name in source if name not in tracked | {"PKG-INFO"} or JUNK.search(name)]
    missing = [name for name in (*NEEDED, f"{about}/licenses/LICENSE") if name not in inside]
    missing += [name for name in tracked if name.startswith("harness/") and name not in inside]
    missing += [name for name in ("LICENSE", "README.md", "CHANGELOG.md", "pyproject.toml") if name not in source]
    for field in (f"Version: {version}", "License-Expression: MIT", "Requires-Python: >=3.11"):
        missing += [] if f"\n{field}\n" in metadata else [field]
    if wrong or missing:
        raise SystemExit(f"in the release, and not of it: {wrong}; missing: {missing}")
    print(f"ok  contents: {len(inside)} files in the wheel, {len(source)} in the sdist, licence and data among them")


def interpreter(version: str) -> str | None:
    """A Python of this version that runs: the one on PATH, else one that pyenv or uv has installed."""
    home = Path.home()
    installed = [
        *home.glob(f".pyenv/versions/{version}.*/bin/python"),
        *home.glob(f".local/share/uv/python/cpython-{version}.*/bin/python"),
    ]
    for python in filter(None, (shutil.which(f"python{version}"), *map(str, sorted(installed)))):
        if subprocess.run([python, "--version"], capture_output=True, check=False).returncode == 0:
            return python
    return None


def uv_program() -> str | None:
    """Uv from PATH, or beside the Python that runs this."""
    return shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))


def installers(python: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The ways to install into an environment that was just made."""
    run(python, "-m", "venv", folder / "pip")
    yield "pip", [str(folder / "pip" / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if (uv := uv_program()) is not None:
        run(uv, "venv", "--quiet", "--python", python, folder / "uv")
        yield "uv", [uv, "pip", "install", "--quiet", "--python", str(folder / "uv" / "bin" / "python")]


def try_out(file: Path, version: str, python: str, extras: Sequence[str]) -> None:
    """Install a file and run what it installs, in an empty folder, with a store of one calibration."""
    extra = f"[{','.join(extras)}]" if extras else ""
    with tempfile.TemporaryDirectory(prefix="harness-release-") as place:
        for name, install in installers(python, Path(place)):
            run(*install, f"{file}{extra}")
            away = Path(place) / f"away-{name}"
            store = away / "store"
            (store / "llama-server").mkdir(parents=True)
            shutil.copy(GOLDEN, store / "llama-server")
            program = Path(place) / name / "bin" / "harness"
            report, present, absent = REPORT
            for words, status in (*COMMANDS, (report, present if "report" in extras else absent)):
                said = run(program, *words, cwd=away, status=status, HARNESS_STORE=str(store))
                if "make setup" in said or (words == ("--version",) and version not in said):
                    raise SystemExit(f"{file.name} with Python {python}: {' '.join(words)} says {said}")
            modules = ", ".join(["harness", *(EXTRAS[one] for one in extras)])
            where = run(program.parent / "python", "-c", f"import {modules}; print(harness.__file__)", cwd=away)
            if not where.startswith(place):
                raise SystemExit(f"{file.name}: the checkout was tried, not the installation: {where}")
            print(f"ok  {file.name}{extra}  {run(python, '--version').strip()}  {name}", flush=True)


def bill_of_materials(version: str, wheel: Path) -> dict[str, Any]:
    """The locked requirements, with which the release is tested, as a CycloneDX 1.5 document."""
    components, text = [], (ROOT / "requirements.lock").read_text(encoding="utf-8")
    for name, release, rest in re.findall(r"^([A-Za-z0-9._-]+)==([^ ;\\\n]+)([^\n]*(?:\n {4}[^\n]*)*)", text, re.MULTILINE):
        hashes = [{"alg": "SHA-256", "content": digest} for digest in re.findall(r"sha256:([0-9a-f]{64})", rest)]
        purl = f"pkg:pypi/{name}@{release}"
        files = [{"type": "distribution", "url": f"https://pypi.org/project/{name}/{release}/", "hashes": hashes}]
        components.append(
            {"type": "library", "bom-ref": purl, "name": name, "version": release, "purl": purl, "externalReferences": files}
        )
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    name = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"]
    about = {"type": "application", "name": name, "version": version, "licenses": [{"license": {"id": "MIT"}}]}
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, digest)}",
        "version": 1,
        "metadata": {"component": {**about, "hashes": [{"alg": "SHA-256", "content": digest}]}},
        "components": components,
    }


def changes(version: str) -> str:
    """The section of the changelog: of this version, else what is not released yet."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## \[([^\]]+)\][^\n]*\n(.*?)(?=^## \[|\Z)", text, re.MULTILINE | re.DOTALL))
    return str(sections.get(version) or sections["Unreleased"]).strip() + "\n"


def images(version: str, base: str | None) -> Iterator[str]:
    """Build the images of each architecture and run them; what could not be done, in words."""
    if subprocess.run(["docker", "version"], capture_output=True, check=False).returncode:
        yield "container images: no Docker daemon answers"
        return
    for file, (command, status) in IMAGES.items():
        for platform in PLATFORMS:
            tag = f"{file.partition('.')[0]}:{version}-{platform.partition('/')[2]}"
            build = ["docker", "build", "--platform", platform, "-f", f"images/{file}", "-t", tag, "."]
            build += ["--build-arg", f"BASE={base}"] if base else []
            done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                yield f"image {tag}: {(done.stderr.strip() or done.stdout.strip()).splitlines()[-1]}"
                continue
            made = run("docker", "image", "inspect", "--format", "{{.Os}}/{{.Architecture}}", tag).strip()
            if made != platform:  # Docker's old builder takes a base of this machine's architecture without a word
                run("docker", "image", "rm", tag)
                yield f"image {tag}: the base image is for {made}"
                continue
            run("docker", "run", "--rm", "--platform", platform, tag, *command, status=status)
            print(f"ok  image {tag}", flush=True)


def main() -> None:
    """Build, try, and write what goes with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", action="store_true", help="build the container images for both architectures, too")
    parser.add_argument("--base", help="image with Python and pip for both (python:3.12-slim-bookworm)")
    arguments = parser.parse_args()
    left = [] if run("git", "status", "--porcelain") == "" else ["changes that are not committed are not in it"]
    version, files = build()
    check_contents(version, files)
    for asked in PYTHONS:
        if (python := interpreter(asked)) is None:
            left.append(f"Python {asked} is not here: not tried")
            continue
        sdist, wheel = files
        for file, extras in ((sdist, ()), (wheel, ()), (wheel, tuple(EXTRAS))):
            try_out(file, version, python, extras)
    if uv_program() is None:
        left.append("uv is not here: installed with pip alone (.venv/bin/python -m pip install uv)")
    bill = json.dumps(bill_of_materials(version, files[1]), indent=1)
    (OUT / "sbom.cdx.json").write_text(f"{bill}\n", encoding="utf-8")
    (OUT / "CHANGES.md").write_text(changes(version), encoding="utf-8")
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in sorted(OUT.iterdir())]
    (OUT / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")
    left += (
        list(images(version, arguments.base)) if arguments.images else ["container images were not asked for (ARGS=--images)"]
    )
    print(f"{version} is in {OUT.relative_to(ROOT)}/: {', '.join(file.name for file in sorted(OUT.iterdir()))}")
    print("It is on no package index; its name there will be llm-memory-harness.", *left, sep="\n- ")


if __name__ == "__main__":
    main()
