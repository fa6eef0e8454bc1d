"""What action.yml runs: a guard on calibrations, and the answer to a pull request that upgrades an engine.

    python3 scripts/action.py requirements             what pip installs, with hashes: the lock less what developers need
    python3 scripts/action.py guard                    check every model on the named card
    python3 scripts/action.py measure                  measure what the pull request made stale, and write the comment
    python3 scripts/action.py comment FILE             post it, or put it in the place of the one that is there

Standard library alone. Inputs are environment variables, as action.yml sets them: no value of a pull request is ever part of a
script. The status is harness's own: 0, 3 (would be offloaded), 4 (not calibrated); 77 for a pull request of a fork.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parents[1]
#: Finds the comment of an earlier run.
MARKER: Final = "<!-- harness -->"
STORE: Final = Path("models/calibrations")
#: GitHub's longest comment.
LONGEST: Final = 65_000
_NAME: Final = re.compile(r"^([a-z0-9][a-z0-9._-]*)", re.MULTILINE)


def requirements() -> str:
    """The entries of requirements.lock that the project itself and its build need, by the comments that say who needs them."""
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    entries = {
        match[1]: entry
        for entry in re.split(r"\n(?=[a-z0-9])", (HERE / "requirements.lock").read_text(encoding="utf-8"))
        if (match := _NAME.match(entry))
    }
    wanted = {match[1].replace("_", "-") for one in project["dependencies"] if (match := _NAME.match(one.lower()))} | {
        "hatchling"
    }
    while True:
        more = {name for name, entry in entries.items() if name not in wanted and wanted & _needed_by(entry)}
        if not more:
            return "\n".join(entries[name].rstrip() for name in entries if name in wanted) + "\n"
        wanted |= more


def _needed_by(entry: str) -> set[str]:
    comment = entry.partition("# via")[2]
    return set(re.findall(r"[a-z0-9][a-z0-9._-]*", comment))


def main(arguments: list[str]) -> int:
    """Run one of the commands."""
    verb = arguments[0] if arguments else ""
    if verb == "requirements":
        sys.stdout.write(requirements())
        return 0
    if verb == "guard":
        return guard()
    if verb == "measure":
        return measure()
    if verb == "comment" and len(arguments) == 2:
        return comment(Path(arguments[1]))
    sys.stderr.write(__doc__ or "")
    return 2


def guard() -> int:
    """Check every model on its own, or all together; the worst status is the job's."""
    models = wanted_models()
    if not models:
        say("error", "no model is named: give `models` or `models-file`", None)
        return 2
    groups = [models] if os.environ.get("ACTION_TOGETHER") == "true" else [[one] for one in models]
    rows, worst = [], 0
    for group in groups:
        status, data, errors = harness("check", *group, *given("--available", "ACTION_CARD"))
        worst = max(worst, status if status in (0, 3, 4) else 9)
        for error in errors:
            say("error", f"{' '.join(group)}: {error['message']}", None)
        for one in data.get("models", ()):
            level = {"fits": "notice", "offload": "error"}.get(one["verdict"], "error")
            if level != "notice":
                say(level, f"{words(one)}", place(one["id"], one["variant"]))
            rows.append(f"| {cell(one['model'])} | {one['context']:,} | {cell(words(one))} |")
        if len(group) > 1 and data:
            rows.append(f"| together | | {cell(data['verdict'])} |")
        if not data:
            rows.append(f"| {cell(' '.join(group))} | | not understood |")
    card = os.environ.get("ACTION_CARD") or "what is free here"
    summary(f"### harness: {cell(card)}\n\n| model | context | verdict |\n| --- | ---: | --- |\n" + "\n".join(rows) + "\n")
    return {9: 1}.get(worst, worst)


def words(one: dict[str, Any]) -> str:
    """The verdict of one model in a sentence."""
    needs = f"needs {gib(one['required_bytes'])}, {gib(one['available_bytes'])} are there"
    if one["verdict"] == "fits":
        return f"fits: {needs}"
    if one["verdict"] == "unknown":
        return f"unknown: {one['reason']}" + (f" ({one['advice']})" if one["advice"] else "")
    most = f"; the largest context that fits is {one['max_context']:,}" if one["max_context"] else ""
    layers = f", {one['layers_offloaded']} of {one['layers_total']} layers stay on the GPU" if one["layers_total"] else ""
    return f"CPU offload likely at {one['context']:,} tokens: {needs}{layers}{most}"


def measure() -> int:
    """Measure what is stale and write what moved, which verdicts flip and what was not measured to the comment's file."""
    if is_fork():
        say("error", "a pull request of a fork is not run on a machine with a GPU", None)
        return 77
    before = Path(tempfile.mkdtemp(prefix="harness-before-"))
    subprocess.run(["git", "archive", "--format=tar", "-o", str(before / "old.tar"), "HEAD", str(STORE)], check=True)
    subprocess.run(["tar", "-xf", str(before / "old.tar"), "-C", str(before)], check=True)
    status, data, errors = harness("recalibrate", "--stale", *shlex.split(os.environ.get("ACTION_ARGS", "")))
    failed = {one["calibration"]: one["error"]["message"] for one in data.get("calibrations", ()) if one.get("error")}
    if errors and not failed:
        failed = {"harness": errors[0]["message"]}
    for key, message in failed.items():
        say("warning", f"{key} was not measured: {message}", place(key, None) if "/" in key else None)
    drifted = subprocess.run(
        [program(), "diff", f"HEAD:{STORE}", str(STORE), "--markdown"], capture_output=True, text=True, check=False
    )
    if drifted.returncode not in (0, 6):
        say("error", drifted.stderr.strip(), None)
        return drifted.returncode
    parts = [MARKER, f"### harness: {cell(bumps())}", "", drifted.stdout.strip()]
    flips, lines = verdicts(before / STORE)
    if lines:
        parts += ["", f"#### Verdicts on {cell(os.environ.get('ACTION_CARD') or 'the card here')}: {flips} flip", "", *lines]
    if failed:
        parts += ["", "#### Failed", "", *(f"- {cell(key)}: {cell(message)}" for key, message in failed.items())]
    text = "\n".join(parts)
    text = text if len(text) < LONGEST else text[:LONGEST] + "\n\n… (cut)"
    Path(os.environ["ACTION_COMMENT"]).write_text(text + "\n", encoding="utf-8")
    summary(text)
    return 0 if status in (0, 6) else status


def bumps() -> str:
    """What the pull request changes in images/pins.yaml, one by one: its merge commit is checked out, so HEAD~1 is the base."""
    shown = subprocess.run(["git", "show", "HEAD~1:images/pins.yaml"], capture_output=True, text=True, check=False)
    old, pins = pinned(shown.stdout), Path("images/pins.yaml")
    new = pinned(pins.read_text(encoding="utf-8")) if pins.is_file() else {}
    found = [f"{name} {old.get(name, 'unpinned')} → {image}" for name, image in new.items() if old.get(name) != image]
    return "; ".join(found) or "no image has changed"


def pinned(text: str) -> dict[str, str]:
    """Engines and images of images/pins.yaml."""
    return dict(re.findall(r"^([a-z0-9-]+): *'([^']*)'", text, re.MULTILINE))


def verdicts(before: Path) -> tuple[int, list[str]]:
    """Which models had another verdict with the calibrations of before: how many, and a line of a table for each."""
    lines, flips = [], 0
    for spec in wanted_models():
        answers = [
            harness("check", spec, "--store", str(store), *given("--available", "ACTION_CARD")) for store in (before, STORE)
        ]
        known = [data["models"][0] if data.get("models") else None for _, data, _ in answers]
        old, new = (one["verdict"] if one else "unknown" for one in known)
        flips += old != new
        need = " → ".join(gib(one["required_bytes"]) if one else "unknown" for one in known)
        lines.append(f"| {cell(spec)} | {old if old == new else f'**{old} → {new}**'} | {need} |")
        if old != new and known[1]:
            say("warning", f"{spec}: {old} → {new}", place(known[1]["id"], known[1]["variant"]))
    table = ["| model | verdict | memory |", "| --- | --- | ---: |"]
    return flips, [*table, *lines] if lines else []


def comment(file: Path) -> int:
    """One comment a pull request: the one that carries the marker is replaced."""
    text = file.read_text(encoding="utf-8")
    number = event().get("pull_request", {}).get("number")
    if number is None:
        say("notice", "no pull request: the comment is in the job's summary", None)
        return 0
    place_ = f"repos/{os.environ['GITHUB_REPOSITORY']}/issues"
    listed = subprocess.run(
        ["gh", "api", "--paginate", f"{place_}/{number}/comments", "--jq", ".[] | {id, body, user: .user.type}"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = [json.loads(line) for line in listed.stdout.splitlines() if line.strip()]
    own = [one["id"] for one in found if one["user"] == "Bot" and str(one["body"]).startswith(MARKER)]
    where = ["--method", "PATCH", f"{place_}/comments/{own[0]}"] if own else ["--method", "POST", f"{place_}/{number}/comments"]
    subprocess.run(["gh", "api", *where, "--input", "-"], input=json.dumps({"body": text}), text=True, check=True)
    return 0


def is_fork() -> bool:
    """Whether the pull request comes from another repository."""
    pull = event().get("pull_request")
    if not pull:
        return False
    head = (pull.get("head") or {}).get("repo") or {}
    return head.get("full_name") != os.environ.get("GITHUB_REPOSITORY")


def event() -> dict[str, Any]:
    """What started the job."""
    path = os.environ.get("GITHUB_EVENT_PATH")
    found: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8")) if path and Path(path).is_file() else {}
    return found


def wanted_models() -> list[str]:
    """``MODEL@CTX`` of the input and of a file, where ``#`` begins a comment."""
    found = os.environ.get("ACTION_MODELS", "").split()
    file = os.environ.get("ACTION_MODELS_FILE")
    if file:
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            found += line.partition("#")[0].split()
    return found


def program() -> str:
    """harness, as it was installed."""
    return os.environ.get("ACTION_PROGRAM") or "harness"


def harness(*arguments: str) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
    """Status, data and errors of one command; its progress goes to the log."""
    done = subprocess.run([program(), *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        return done.returncode or 1, {}, [{"message": f"harness {arguments[0]} printed no document"}]
    return done.returncode, answer["data"], answer["errors"]


def given(option: str, variable: str) -> list[str]:
    """An option with its value, where there is one."""
    return [option, os.environ[variable]] if os.environ.get(variable) else []


def place(identity: str | None, variant: str | None) -> str | None:
    """The file of a calibration, for an annotation."""
    return None if identity is None else f"{STORE}/{identity}{f'@{variant}' if variant else ''}.yaml"


def say(level: str, text: str, file: str | None) -> None:
    """An annotation of GitHub's (a line of the log elsewhere); one line, whatever the text holds."""
    escaped = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    where = f" file={file.replace('%', '%25').replace(',', '%2C').replace(':', '%3A')}" if file else ""
    sys.stdout.write(f"::{level}{where}::{escaped}\n")
    sys.stdout.flush()


def summary(text: str) -> None:
    """Add to the job's summary."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    if path:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(text + "\n")


def gib(size: float | None) -> str:
    """A size for people."""
    return "unknown" if size is None else f"{size / 2**30:.2f} GiB"


def cell(text: object) -> str:
    """Text of others as text: no cell, link, mention or markup; a space of no width parts what a forge makes a link of."""
    escaped = re.sub(r"([\\`*_{}\[\]<>#|~@!&])", r"\\\1", " ".join(str(text).split()))
    return re.sub(r"(?<=:)(?=//)|(?<=[wW]{3})(?=\.)|(?<=[@#])", "\u200b", escaped)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
