"""When an engine that was killed did not fit, and when nothing says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.engines.base import KILLED, OUT_OF_MEMORY
from harness.errors import EngineError
from harness.measure.kills import KillWatch, expected_bytes
from harness.model.record import LoadRequest
from harness.units import GIB, MIB
from tests.support.fakes import Heard, World, calibrate, only_record
from tests.support.records import load
from tests.support.true_model import TrueModel

DIED = EngineError("llama-server process has terminated: signal: killed", code=KILLED)


def proc(folder: Path, kills: int, available: int = 8 * GIB) -> Path:
    (folder / "vmstat").write_text(f"nr_free_pages 1\noom_kill {kills}\n")
    (folder / "meminfo").write_text(f"MemAvailable: {available // 1024} kB\n")
    return folder


@pytest.mark.parametrize(
    ("kills", "held", "needed", "outcome"),
    [
        (3, GIB, None, "failed"),
        (4, None, None, "wont-fit"),
        (3, 7 * GIB, None, "wont-fit"),
        (3, GIB, 9 * GIB, "wont-fit"),
        (3, GIB, 2 * GIB, "failed"),
    ],
    ids=["nothing", "the kernel says so", "it held all", "it needs more than there was", "it needs less"],
)
def test_a_kill_is_a_matter_of_memory_only_with_evidence(
    tmp_path: Path, kills: int, held: int | None, needed: int | None, outcome: str
) -> None:
    watch = KillWatch(proc(tmp_path, 3))
    proc(tmp_path, kills)
    assert watch.outcome(DIED, held, needed)[0] == outcome


def test_a_container_that_docker_saw_run_out_of_memory_is_evidence_and_a_crash_is_an_error(tmp_path: Path) -> None:
    watch = KillWatch(proc(tmp_path, 0))
    assert watch.outcome(EngineError("too much", code=OUT_OF_MEMORY), None, None) == ("wont-fit", "too much")
    with pytest.raises(EngineError, match="panic"):
        watch.outcome(EngineError("panic", code="engine-ended"), 9 * GIB, None)


def test_what_a_load_takes_is_read_off_the_loads_before_it() -> None:
    made = [load(8192), load(16384)]
    third = load(32768)
    assert third.busy is not None
    assert expected_bytes(made, third.request) == pytest.approx(third.busy.total_bytes, rel=1e-6)
    assert expected_bytes(made, LoadRequest(context=32768, num_batch=2048)) is None
    assert expected_bytes(made[:1], third.request) is None


@pytest.mark.parametrize("persistent", [True, False])
def test_a_load_that_was_killed_is_made_once_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, persistent: bool) -> None:
    model = TrueModel(weights=400 * MIB, overhead=40 * MIB, kv_per_cell=12_288)
    world = World(model, engine="ollama" if persistent else "llama-server", persistent=persistent, target="host")
    left = [1]

    def die() -> None:
        if left.pop():
            left.append(0)
            world.end(137)

    world.plots["load 2048"] = die
    heard = Heard()
    calibration = calibrate(world, monkeypatch, tmp_path, heard, num_batch=512).calibration
    outcomes = [(one.request.context, one.outcome) for one in only_record(tmp_path).loads]
    assert outcomes == [(1024, "ok"), (2048, "failed"), (2048, "ok"), (4096, "ok")]
    (said,) = [text for text in heard.warnings if "made again" in text]
    assert "SIGKILL" in said
    assert said.count("2,048 tokens") == 1
    assert [one.context for one in calibration.metadata.quality.loads] == [1024, 2048, 4096]
