"""What is set here counts in a question that leaves it open: by a server that runs, else by this environment."""

from __future__ import annotations

import msgspec
import pytest

from harness.engines.running import RunningServer
from harness.inventory.machine import LocalMachine
from harness.model.calibration import Calibration
from harness.prediction.settings import AskedSettings
from harness.serving.surroundings import as_set_here, settings_here
from tests.support.calibrations import made_up, with_settings, with_version

Found = tuple[AskedSettings, tuple[str, ...]]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalMachine, "gpus_of", lambda *_: ())
    monkeypatch.setattr(LocalMachine, "running", lambda *_: ())


def here(
    monkeypatch: pytest.MonkeyPatch,
    env: dict[str, str],
    asked: AskedSettings | None = None,
    calibration: Calibration | None = None,
) -> Found:
    """What is found of a question where ``LLAMA_ARG_…`` variables are set."""
    monkeypatch.setattr(LocalMachine, "environment", {f"LLAMA_ARG_{name}": value for name, value in env.items()})
    return settings_here(calibration or made_up(), asked or AskedSettings(), LocalMachine())


@pytest.mark.parametrize(("slots", "asked", "named"), [("4", None, True), ("2", 1, True), ("4", 4, False), ("2", 4, False)])
def test_more_slots_than_were_asked_about_are_no_answer(
    monkeypatch: pytest.MonkeyPatch, slots: str, asked: int | None, named: bool
) -> None:
    _, obstacles = here(monkeypatch, {"N_PARALLEL": slots}, AskedSettings(num_parallel=asked))
    said = f"LLAMA_ARG_N_PARALLEL={slots} of this environment (ask with --num-parallel {slots})"
    assert obstacles == ((said,) if named else ())


def test_a_placement_that_is_asked_for_takes_the_place_of_one_that_is_set_and_of_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = {"N_GPU_LAYERS": "10", "SPLIT_MODE": "row"}
    layers, mode = "LLAMA_ARG_N_GPU_LAYERS=10 of this environment", "LLAMA_ARG_SPLIT_MODE=row of this environment"
    assert here(monkeypatch, env)[1] == (layers, mode)
    assert here(monkeypatch, env, AskedSettings(placed=True))[1] == (mode,)


def test_what_was_calibrated_so_is_no_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    row = with_settings(made_up(), env={"LLAMA_ARG_SPLIT_MODE": "row"})
    assert here(monkeypatch, {"SPLIT_MODE": "row"}, calibration=row)[1] == ()
    assert here(monkeypatch, {"SPLIT_MODE": "none"}, calibration=row)[1] == ("LLAMA_ARG_SPLIT_MODE=none of this environment",)


def test_a_setting_that_is_asked_for_wins_over_one_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"CACHE_TYPE_K": "q8_0", "CACHE_TYPE_V": "q8_0", "FLASH_ATTN": "off", "UBATCH": "2048"}
    open_, _ = here(monkeypatch, env)
    assert (open_.kv_cache_type, open_.flash_attention, open_.num_batch) == ("q8_0", "disabled", 2048)
    asked = AskedSettings(kv_cache_type="f16", flash_attention="enabled", num_batch=512)
    assert here(monkeypatch, env, asked)[0] == asked


def test_a_server_that_runs_counts_and_this_environment_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"LLAMA_ARG_CACHE_TYPE_K": "q4_0", "LLAMA_ARG_N_PARALLEL": "8"}
    server = RunningServer(pid=1, port=8080, settings=settings, readable=True)
    for readable, cache, slots in ((True, "q4_0/f16", 8), (False, "q8_0/f16", 2)):
        one = RunningServer(pid=1, port=8080, settings=server.settings, readable=readable)
        monkeypatch.setattr(LocalMachine, "running", lambda *_, one=one: (one,))
        found, obstacles = here(monkeypatch, {"CACHE_TYPE_K": "q8_0", "N_PARALLEL": "2"})
        assert found.kv_cache_type == cache
        assert [f"={slots} of" in said for said in obstacles] == [True]


def test_what_was_calibrated_with_stays_where_no_server_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    made = with_settings(with_version(made_up(), "0.33.0"), env={"OLLAMA_SCHED_SPREAD": "1"})
    made = msgspec.structs.replace(made, engine="ollama", id="ollama/made-up")
    monkeypatch.setattr(LocalMachine, "environment", {})
    assert as_set_here(made, LocalMachine()).metadata.settings.env == {"OLLAMA_SCHED_SPREAD": "1"}
    server = RunningServer(pid=1, port=11434, settings={"OLLAMA_MAX_LOADED_MODELS": "2"}, readable=True)
    monkeypatch.setattr(LocalMachine, "running", lambda *_: (server,))
    assert as_set_here(made, LocalMachine()).metadata.settings.env == {"OLLAMA_MAX_LOADED_MODELS": "2"}
