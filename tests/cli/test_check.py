"""``harness check`` as a guard in front of a start: status, sentence, one document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.units import GIB
from tests.support.calibrations import made_up, on_host, store_of
from tests.support.command import Command, Done
from tests.support.fake_nvml import FakeDriver, compile_library
from tests.support.vllm_artifacts import vllm_calibration


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capfd)


def data(done: Done) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["exit_code"] == done.returncode
    assert document["errors"] == []
    found: dict[str, Any] = document["data"]
    return found


def test_each_verdict_has_its_status_and_its_figures(run: Command, tmp_path: Path) -> None:
    store_of(tmp_path / "store", made_up())
    fits = run("check", "made-up@8192", "--available", "24GiB", "--json")
    assert fits.returncode == 0
    answer = data(fits)
    assert answer["verdict"] == "fits"
    assert answer["required_bytes"] + answer["reserve_bytes"] <= answer["available_bytes"] == 24 * GIB
    spills = run("check", "llama-server/made-up", "--ctx", "65536", "--available", "5632", "--json")
    assert spills.returncode == 3
    answer = data(spills)
    assert answer["short_bytes"] == answer["required_bytes"] + answer["reserve_bytes"] - answer["available_bytes"]
    assert answer["layers_offloaded"] < answer["layers_total"] == 29
    assert answer["decode_tokens_per_s"] < 60
    unknown = run("check", "nobody@8192", "--available", "24g", "--json")
    assert unknown.returncode == 4
    assert data(unknown)["required_bytes"] is None
    assert set(data(unknown)) == set(answer)


def test_the_warning_stands_on_standard_output_without_colours(run: Command, tmp_path: Path) -> None:
    store_of(tmp_path / "store", made_up())
    done = run("check", "made-up@65536", HARNESS_AVAILABLE="5632")
    assert done.returncode == 3
    assert "WARNING: CPU OFFLOAD LIKELY: needs 6,331.0 MiB and keeps 1,024.0 MiB free" in done.stdout
    assert "\x1b" not in done.stdout
    uncalibrated = run("check", "nobody@8192")
    assert uncalibrated.returncode == 4
    assert "UNCALIBRATED" in uncalibrated.stdout
    assert "harness calibrate nobody" in uncalibrated.stdout


def test_several_models_have_their_figures_in_their_own_entries(run: Command, tmp_path: Path) -> None:
    store_of(tmp_path / "store", made_up(), made_up("second"))
    answer = data(run("check", "made-up@8192", "second", "--ctx", "4096", "--available", "8GiB", "--json"))
    assert answer["verdict"] == "offload"
    assert answer["required_bytes"] is None
    assert [(one["model"], one["context"], one["fate"]) for one in answer["models"]] == [
        ("made-up", 8192, "resident"), ("second", 4096, "offload"),
    ]  # fmt: skip


@pytest.mark.requires("gcc")
def test_the_driver_is_asked_what_is_free(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_of(tmp_path / "store", made_up())
    driver = FakeDriver(compile_library(tmp_path), tmp_path / "state", monkeypatch)
    driver.holds(used=20 * GIB)
    done = run("check", "made-up@8192", "--json", "--gpu", "0")
    assert done.returncode == 3
    assert data(done)["available_bytes"] == 4 * GIB
    both = run("check", "made-up@8192", "--explain")
    assert both.returncode == 0, "the other card is empty"
    assert "GPU1: " in both.stdout
    assert "NVIDIA Test A" in run("check", "made-up@8192").stdout


def test_bad_input_is_usage_and_a_damaged_file_is_bad_input(run: Command, tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", on_host(made_up()))
    for wrong in (("made-up",), ("made-up@0",), ("made-up@1", "--available", "lots"), ("made-up", "--ctx", "-3"), ()):
        assert run("check", *wrong).returncode == 2, wrong
    store.path_of("llama-server", "made-up").write_text("{")
    assert run("check", "made-up@1").returncode == 65
    store.path_of("llama-server", "made-up").write_text("metadata: {schema_version: 99}")
    assert run("check", "made-up@1").returncode == 78


def test_settings_of_calibrate_in_the_file_are_not_in_the_way(run: Command, tmp_path: Path) -> None:
    store_of(tmp_path / "store", on_host(made_up()))
    (tmp_path / "harness.toml").write_text('engine = "auto"\nctx = "4096,8192"\navailable = "24GiB"\n')
    assert data(run("check", "made-up@8192", "--json"))["available_bytes"] == 24 * GIB


def test_a_store_of_any_size_is_not_read(run: Command, tmp_path: Path) -> None:
    store = store_of(tmp_path / "store", made_up())
    for number in range(50):
        store.path_of("llama-server", f"other-{number}").write_text("{ not even YAML")
    assert run("check", "made-up@8192", "--available", "24g").returncode == 0


@pytest.mark.parametrize(
    "words",
    [
        ("check", "made-up@8192", "--num-parallel", "300"),
        ("plan", "made-up", "--num-parallel", "300"),
        ("plan", "--num-parallel", "300"),
        ("predict", "made-up@8192", "--num-parallel", "300"),
        ("tune", "made-up", "--slots", "300"),
        ("export", "llama-server", "made-up", "--slots", "300"),
        ("calibrate", "made-up", "--num-parallel", "300", "--engine", "llama-server", "--dry-run"),
        ("serve", "made-up@8192", "--num-parallel", "300", "--engine", "llama-server", "--", "true"),
    ],
)
def test_more_slots_than_an_engine_can_have_is_a_usage_error(run: Command, tmp_path: Path, words: tuple[str, ...]) -> None:
    store_of(tmp_path / "store", made_up())
    available = ("--available", "9999GiB") if words[0] not in ("calibrate", "serve") else ()
    done = run(words[0], *available, *words[1:])
    assert done.returncode == 2, done.stdout
    assert "llama-server has at most 256 slots, not 300" in done.stderr


def test_as_many_slots_as_an_engine_can_have_are_judged(run: Command, tmp_path: Path) -> None:
    store_of(tmp_path / "store", made_up())
    answers = [run("check", "made-up@512", "--available", "999GiB", "--num-parallel", count) for count in ("256", "257")]
    assert [answer.returncode for answer in answers] == [0, 2]


def test_vllm_may_have_as_many_sequences_as_it_was_calibrated_for(run: Command, tmp_path: Path) -> None:
    store_of(tmp_path / "store", vllm_calibration(max_num_seqs=300))
    words = ("check", "vllm/acme--tern-8b@1024", "--available", "80GiB", "--num-parallel")
    assert run(*words, "300").returncode == 0
    assert run(*words, "301").returncode == 4
