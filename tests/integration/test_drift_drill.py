"""The drift drill: an engine is replaced by one that differs in one figure, and exactly that is found."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from harness.cli.main import cli
from harness.inventory.installed import Installed
from harness.maintain.recalibrate import recalibrate, survey
from harness.measure.events import Observer
from harness.options import Overrides
from harness.store.store import Store, read_record
from tests.support.gguf_file import write_gguf
from tests.support.stand_in import write_stand_in

CONTEXTS = "1024,2048,4096"
Command = Callable[..., dict[str, Any]]


def call(folder: Path, *arguments: str) -> dict[str, Any]:
    with contextlib.chdir(folder):
        done = CliRunner().invoke(cli, [*arguments, "--json"])
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, an engine ``b1``, and the calibration made with them."""
    folder = tmp_path_factory.mktemp("drill")
    write_gguf(folder / "small.gguf", train_context=8192)
    write_stand_in(folder / "b1")
    made = ("calibrate", "small.gguf", "--engine", "llama-server", "--gpus", "none", "--ctx", CONTEXTS)
    answer = call(folder, *made, "--engine-binary", "./b1", "--store", "store")
    assert answer["exit_code"] == 0, answer
    return folder


@pytest.fixture
def here(measured: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(measured, tmp_path / "drill"))


def upgrade(here: Path, **changes: Any) -> set[str]:
    """Put an engine ``b2`` in the place of ``b1``, measure what is stale, and return the figures that moved."""
    write_stand_in(here / "b2", version="b2", **changes)
    shutil.copytree(here / "store", here / "before")
    found = call(here, "recalibrate", "--stale", "--engine-binary", "./b2", "--store", "store")
    assert found["exit_code"] == 0, found
    (one,) = found["data"]["calibrations"]
    assert one["reasons"] == [{"name": "engine", "old": "b1", "new": "b2"}]
    shown = call(here, "diff", "before", "store")
    (pair,) = shown["data"]["calibrations"]
    assert pair == one["drift"]
    moved = {(figure["kind"], figure["name"]) for figure in pair["figures"] if figure["moved"]}
    assert shown["exit_code"] == (6 if moved else 0)
    # The band below the window is another line of the same parts.
    found_at_top = {name for kind, name in moved if kind != "band"}
    assert found_at_top or not moved
    return found_at_top


@pytest.mark.parametrize(
    ("changes", "moved"),
    [
        ({}, set()),
        ({"compute_per_token": 2048}, {"compute_gb_per_10k"}),
        ({"window_mib": 9.0}, {"fixed_cache_gb", "base_vram_gb"}),
        ({"hidden_mib": 12.0}, {"overhead_gb", "base_vram_gb"}),
        ({"decode_per_s": 30.0}, {"decode_tokens_per_s", "decode_tokens_per_s at 1536 tokens"}),
    ],
    ids=["nothing", "compute growth", "window cache", "larger base", "slower decode"],
)
def test_an_upgrade_is_found_to_have_moved_exactly_what_it_moved(here: Path, changes: dict[str, Any], moved: set[str]) -> None:
    assert upgrade(here, **changes) == moved


def test_nothing_is_stale_where_nothing_changed(here: Path) -> None:
    same = ("--engine-binary", "./b1", "--store", "store")
    (one,) = call(here, "recalibrate", "--stale", "--dry-run", *same)["data"]["calibrations"]
    assert (one["stale"], one["reasons"], one["unknown"]) == (False, [], [])
    assert call(here, "recalibrate", "--stale", *same)["data"]["calibrations"] == []
    assert len(list((here / "store" / "runs").glob("*/record.json"))) == 1


def test_other_weights_are_stale_and_absent_ones_are_unknown(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(here / "cache"))  # a file of these weights was seen nowhere else
    same = ("--engine-binary", "./b1", "--store", "store", "--dry-run")
    model = here / "small.gguf"
    write_gguf(model, train_context=8192, extra={"general.name": "another"})
    (one,) = call(here, "recalibrate", "--stale", *same)["data"]["calibrations"]
    assert [reason["name"] for reason in one["reasons"]] == ["model digest"]
    model.unlink()
    shutil.rmtree(here / "store" / "runs")  # the log in there names the model's path
    (one,) = call(here, "recalibrate", "--stale", "--engine-binary", "./none", *same[2:])["data"]["calibrations"]
    assert (one["stale"], set(one["unknown"])) == (False, {"engine", "model digest"})


def test_a_plan_and_settings_are_measured_again_as_they_were(here: Path) -> None:
    made = ("calibrate", "small.gguf", "--engine", "llama-server", "--gpus", "none", "--engine-binary", "./b1")
    settings = (
        "--num-parallel",
        "2",
        "--num-batch",
        "256",
        "--flash-attention",
        "on",
        "--env",
        "LLAMA_ARG_FIT_TARGET=512",
        "--no-speed",
    )
    assert call(here, *made, *settings, "--ctx", "1280,1536,3072", "--variant", "two", "--store", "other")["errors"] == []
    (one,) = call(here, "recalibrate", "small", "--engine-binary", "./b1", "--store", "other")["data"]["calibrations"]
    assert (one["calibration"], one["drift"]["status"]) == ("llama-server/small@two", "same")
    again = read_record(here / one["record"])
    assert [(load.request.context, load.request.num_batch) for load in again.loads] == [(1280, 256), (1536, 256), (3072, 256)]
    assert (again.settings.num_parallel, again.settings.flash_attention, again.settings.env) == (
        2,
        "enabled",
        {"LLAMA_ARG_FIT_TARGET": "512"},
    )
    assert len(list((here / "other" / "runs").glob("*/record.json"))) == 2  # the old record stays


def test_one_that_fails_stops_no_other_and_keeps_its_calibration(here: Path) -> None:
    store = here / "store" / "llama-server"
    before = (store / "small.yaml").read_text()
    (store / "gone.yaml").write_text(
        before.replace("llama-server/small", "llama-server/gone").replace("small.gguf", "gone.gguf")
    )
    text = re.sub(r"sha256:\w{64}", f"sha256:{0:064}", (store / "gone.yaml").read_text()).splitlines()  # weights of nowhere
    (store / "gone.yaml").write_text("\n".join("  run: null" if line.startswith("  run:") else line for line in text))
    kept = (store / "gone.yaml").read_text()
    write_stand_in(here / "b2", version="b2")
    answer = call(here, "recalibrate", "--stale", "--engine-binary", "./b2", "--store", "store")
    assert answer["exit_code"] == 66
    status = {one["calibration"]: one["status"] for one in answer["data"]["calibrations"]}
    assert status == {"llama-server/gone": "failed", "llama-server/small": "done"}
    assert (store / "gone.yaml").read_text() == kept
    assert "'b2'" in (store / "small.yaml").read_text()


class Interrupts(Observer):
    """Presses Ctrl-C at the first load of the second calibration."""

    def __init__(self) -> None:
        self.calibrations = 0

    def say(self, text: str) -> None:
        self.calibrations += text.startswith("[")

    def phase(self, title: str, step: int, steps: int) -> None:
        if self.calibrations == 2:
            raise KeyboardInterrupt


class Hears(Observer):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_an_interrupted_recalibration_goes_on_where_it_was(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    folder = here / "store" / "llama-server"
    shutil.copy(here / "small.gguf", here / "twin.gguf")
    text = (folder / "small.yaml").read_text()
    (folder / "twin.yaml").write_text(
        text.replace("llama-server/small'", "llama-server/twin'").replace("small.gguf", "twin.gguf")
    )
    store, given = Store(here / "store"), Overrides(engine_binary="./b1")

    def again(observer: Observer) -> list[str]:
        targets = survey(store, (), Installed(store, given, here), None, observer.warn)
        assert len(targets) == 2
        return [one.status for one in recalibrate(targets, store, Installed(store, given, here), observer, asked=("all",))]

    with pytest.raises(KeyboardInterrupt):
        again(Interrupts())
    twin = (folder / "twin.yaml").read_text()
    small = (folder / "small.yaml").read_text()
    assert small != text
    hears = Hears()
    assert again(hears) == ["done-before", "done"]
    assert (folder / "small.yaml").read_text() == small
    assert (folder / "twin.yaml").read_text() != twin
    assert any("done before the interruption" in line for line in hears.said)
    assert not list((here / "store" / "runs").glob("*.json"))  # it came to its end: the next one begins anew
