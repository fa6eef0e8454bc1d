"""``harness diff``: files, stores and git revisions; exit status, text, JSON and the text of a pull request."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from harness.cli.main import cli
from harness.fit.constants import fit_record
from harness.model.calibration import Calibration
from harness.store.store import Store
from harness.store.yaml import to_yaml
from tests.support import records
from tests.support.records import load, record

OLD = fit_record(record(*(load(context) for context in (8192, 16384, 32768))))
#: An engine that takes 512 MiB more than before.
NEW = fit_record(record(*(load(context, overhead=records.OVERHEAD + (512 << 20)) for context in (8192, 16384, 32768))))
#: The same figures by a newer build.
SAME = msgspec.structs.replace(
    OLD, metadata=msgspec.structs.replace(OLD.metadata, engine=msgspec.structs.replace(OLD.metadata.engine, version="b2"))
)


def harness(here: Path, *arguments: str) -> Result:
    with contextlib.chdir(here):
        return CliRunner().invoke(cli, arguments)


def diff(here: Path, *arguments: str) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(harness(here, "diff", *arguments, "--json").stdout)
    return answer


def shelf(root: Path, **calibrations: Calibration) -> Path:
    """A store; each calibration stands under its own name."""
    store = Store(root)
    for name, calibration in calibrations.items():
        store.write(store.path_of("llama-server", name), msgspec.structs.replace(calibration, id=f"llama-server/{name}"))
    return root


def test_two_files_that_differ_end_with_6_and_say_what_it_means(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(to_yaml(OLD))
    (tmp_path / "b.yaml").write_text(to_yaml(NEW))
    done = harness(tmp_path, "diff", "a.yaml", "b.yaml")
    assert done.exit_code == 6
    assert "  overhead" in done.stdout
    assert "  weights" not in done.stdout
    assert "largest context on a 6 GiB card: 22,528 → 4,608" in done.stdout
    assert harness(tmp_path, "diff", "a.yaml", "a.yaml").exit_code == 0


def test_stores_are_matched_by_name_and_show_what_is_new_and_gone(tmp_path: Path) -> None:
    before = shelf(tmp_path / "before", kept=OLD, grown=OLD, gone=OLD)
    after = shelf(tmp_path / "after", kept=SAME, grown=NEW, fresh=OLD)
    answer = diff(tmp_path, str(before), str(after))
    assert answer["exit_code"] == 6
    status = {one["calibration"]: one["status"] for one in answer["data"]["calibrations"]}
    assert status == {
        "llama-server/fresh": "added",
        "llama-server/gone": "removed",
        "llama-server/grown": "moved",
        "llama-server/kept": "same",
    }
    (kept,) = [one for one in answer["data"]["calibrations"] if one["calibration"].endswith("kept")]
    assert kept["changes"] == [{"name": "engine", "old": "b1", "new": "b2"}]
    # One engine's folder is a store too, and a file can be held against a store.
    assert diff(tmp_path, "before/llama-server", "after/llama-server")["data"] == answer["data"]
    assert diff(tmp_path, "before/llama-server/kept.yaml", "after")["exit_code"] == 0
    assert diff(tmp_path, "before/llama-server/gone.yaml", "after")["exit_code"] == 66


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_revisions_are_compared_with_what_lies_in_the_folder(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    shelf(tmp_path / "models/calibrations", kept=OLD, grown=OLD)
    git("add", ".")
    git("commit", "-qm", "first")
    shelf(tmp_path / "models/calibrations", kept=SAME, grown=NEW)
    answer = diff(tmp_path, "HEAD:models/calibrations", "models/calibrations")
    status = {one["calibration"]: one["status"] for one in answer["data"]["calibrations"]}
    assert status == {"llama-server/grown": "moved", "llama-server/kept": "same"}
    git("commit", "-qam", "second")
    file = "models/calibrations/llama-server/grown.yaml"
    assert diff(tmp_path, f"HEAD~1:{file}", f"HEAD:{file}")["exit_code"] == 6
    assert diff(tmp_path, "HEAD:models/calibrations/llama-server", "HEAD:models/calibrations/")["exit_code"] == 0
    for missing in ("HEAD~9:models", "HEAD:nothing", "nothing", "--upload-pack=x:y"):
        assert harness(tmp_path, "diff", "--", missing, "models/calibrations").exit_code in (2, 66), missing


def test_a_pull_request_text_leads_with_what_a_maintainer_decides_from(tmp_path: Path) -> None:
    before = shelf(tmp_path / "before", kept=OLD, grown=OLD)
    after = shelf(tmp_path / "after", kept=SAME, grown=NEW)
    done = harness(tmp_path, "diff", str(before), str(after), "--markdown")
    assert done.exit_code == 6
    lines = done.stdout.splitlines()
    assert lines[0] == "**1 of 2 calibrations that were measured again moved beyond the measurement error**"
    assert "- largest context on a 6 GiB card: 22,528 → 4,608" in lines
    assert "| overhead | 300.0 MiB | 812.0 MiB | +170.7% | ± 4.3 MiB |" in lines
    assert "- llama-server/kept (engine b1 → b2)" in lines


def test_names_of_others_are_text_and_no_markup(tmp_path: Path) -> None:
    evil = "a|b`<img src=x> @everyone [x](http://y)\n# title\x1b[31m"
    model = msgspec.structs.replace(NEW.metadata.model, name=evil)
    (tmp_path / "a.yaml").write_text(to_yaml(OLD))
    metadata = msgspec.structs.replace(NEW.metadata, model=model)
    (tmp_path / "b.yaml").write_text(to_yaml(msgspec.structs.replace(NEW, metadata=metadata)))
    text = harness(tmp_path, "diff", "a.yaml", "b.yaml", "--markdown").stdout
    assert "\x1b" not in text
    assert "\n# title" not in text
    assert "<img" not in text.replace("\\<", "")
    assert "@everyone" not in text
    assert "\x1b" not in harness(tmp_path, "diff", "a.yaml", "b.yaml").stdout
