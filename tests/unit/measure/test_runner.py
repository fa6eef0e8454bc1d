"""The runner, driven through ``harness.calibrate`` with an engine, a sandbox and a meter in memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness.engines.base import DryRunEnd, Source
from harness.engines.registry import policy_of
from harness.errors import (
    BusyError,
    CannotWriteError,
    EngineError,
    HarnessError,
    UnavailableError,
    UntrustedError,
    UsageError,
)
from harness.measure.dry_runs import measure_splits
from harness.measure.speed import no_host_speed
from harness.measure.timing import CpuWatch, busy_before, prompts_to_time
from harness.meters.sampler import Sampler
from harness.model.record import Gpu, Load, LoadOutcome, LoadRequest, Machine, Speed
from harness.prediction.memory import predict
from harness.store.store import Store
from harness.units import GIB, MIB
from tests.support.fakes import HOLDER, FakeEngine, Heard, World, breakdown, calibrate, only_record
from tests.support.records import load as made
from tests.support.records import record
from tests.support.true_model import TrueModel

MODEL = TrueModel(weights=400 * MIB, overhead=40 * MIB, kv_per_cell=12_288)


@pytest.fixture
def on_host() -> World:
    """llama-server in a process: each load is a start; the target is host memory."""
    return World(MODEL)


@pytest.fixture
def on_gpu() -> World:
    """The same on a GPU that the driver's meter sees."""
    return World(MODEL, target="gpu")


@pytest.fixture
def persistent() -> World:
    """Ollama in a container on a GPU: one start for all loads, which it chooses the batch of."""
    return World(
        MODEL,
        engine="ollama",
        persistent=True,
        sandbox="docker",
        target="gpu",
        version="0.33.0",
        limits=((4096, 512), (32768, 1024), (1 << 30, 2048)),
    )


def refused(kind: type[HarnessError], world: World, patch: pytest.MonkeyPatch, folder: Path, **options: Any) -> HarnessError:
    """What a calibration is refused with; nothing runs afterwards, and there is no artifact."""
    with pytest.raises(kind) as caught:
        calibrate(world, patch, folder, **options)
    assert world.running is None or world.running.status is not None
    assert list(Store(folder).paths()) == []
    return caught.value


# -- what a run does, in its order --------------------------------------------------------------------------------------


def test_each_load_of_an_engine_that_serves_one_is_a_start_of_its_own(
    on_host: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = calibrate(on_host, monkeypatch, tmp_path)
    one = ["start", "load {}", "poll", "stop"]
    expected = [step.format(context) for context in (1024, 2048, 4096) for step in one]
    assert on_host.events == [*expected, "close meter", "close sandbox"]
    for context in (1024, 3000, 100_000):
        assert predict(result.calibration, context).total_bytes == pytest.approx(MODEL.truth(context, 512), rel=0.002)
    record = only_record(tmp_path)
    assert (record.status, record.machine.target, record.engine.version) == ("complete", "host", "b10434")
    assert [load.log for load in record.loads] == ["engine-0.log", "engine-1.log", "engine-2.log"]
    assert all((result.record.parent / str(load.log)).stat().st_size == load.log_end for load in record.loads)
    assert Store(tmp_path).read(result.artifact) == result.calibration


def test_on_a_gpu_memory_counts_after_a_prompt_of_two_batches(
    on_gpu: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's pools grow at the first real batch; a prompt leaves room in the context."""
    result = calibrate(on_gpu, monkeypatch, tmp_path, contexts=(512, 2048, 4096))
    assert on_gpu.events[0] == "baseline"
    assert [event for event in on_gpu.events if event.startswith("read")] == ["read 504", "read 1024", "read 1024"]
    for load in only_record(tmp_path).loads[:3]:
        assert load.idle.total_bytes < load.busy.total_bytes == MODEL.truth(load.request.context, 512)
        assert [mark.phase for mark in load.trace.marks] == ["load", "idle", "prompt", "busy"]
        assert load.left_bytes == 0
    breakdown = result.calibration.metadata.breakdown_gb
    assert breakdown.overhead == pytest.approx(40 / 1024, abs=0.0002)


def test_dry_runs_follow_the_loads_of_llama_server_and_fill_the_grid(
    on_gpu: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = calibrate(on_gpu, monkeypatch, tmp_path)
    runs = [load for load in only_record(tmp_path).loads if load.request.purpose == "dry-run"]
    assert 0 < len(runs) <= 6
    assert {load.reason for load in runs} == {None}
    assert len(result.calibration.metadata.placement.split_compute) == len(runs)
    loads = [event for event in on_gpu.events if event.startswith("load")]
    assert [event.endswith("dry-run") for event in loads] == [False] * 3 + [True] * len(runs)
    calibrate(on_gpu, monkeypatch, tmp_path / "batch", num_batch=1024, contexts=(2048, 4096, 8192))
    assert {load.request.num_batch for load in only_record(tmp_path / "batch").loads} == {1024}, "dry runs too"


@pytest.mark.parametrize(("ending", "events"), [("printed", ["stop"]), ("ready", ["poll", "stop"])])
def test_a_dry_run_is_ended_when_its_engine_says_that_it_may_be(
    on_gpu: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: DryRunEnd, events: list[str]
) -> None:
    """With a remote device a server is ended between two calls."""
    on_gpu.dry_runs_end = ending
    calibrate(on_gpu, monkeypatch, tmp_path)
    assert {load.outcome for load in only_record(tmp_path).loads} == {"ok"}
    at = [index for index, event in enumerate(on_gpu.events) if event.endswith("dry-run")]
    for index in at:
        following = on_gpu.events[index + 1 :]
        until = next(place for place, event in enumerate(following) if event in ("start", "close meter"))
        assert following[:until] == events


def test_the_kinds_of_layers_that_a_dry_run_names_cost_no_further_run(
    on_gpu: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan without them differs from the one with them, and its first run is made already."""
    kinds = "r" * 12 + "f" * 4
    on_gpu.layer_kinds = kinds
    result = calibrate(on_gpu, monkeypatch, tmp_path)
    assert result.calibration.metadata.placement.layer_kinds == kinds
    assert len(result.calibration.metadata.placement.split_compute) == 10


def test_a_dry_run_that_printed_before_memory_ran_out_is_one(
    on_gpu: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a remote device the server loads, at the largest context of the model too."""

    def end() -> None:
        on_gpu.write(breakdown(on_gpu.model, LoadRequest(context=131_072, purpose="dry-run", gpu_layers=2), ""))
        on_gpu.end(1)

    on_gpu.dry_runs_end = "ready"
    on_gpu.plots["load 131072 dry-run"] = end
    calibrate(on_gpu, monkeypatch, tmp_path)
    assert {load.outcome for load in only_record(tmp_path).loads} == {"ok"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [("", "the engine ended"), ("error: no such device\n", "no such device")],
    ids=["silent", "with a reason"],
)
def test_a_dry_run_that_says_nothing_costs_nothing(
    on_gpu: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    def end() -> None:
        on_gpu.write(text)
        on_gpu.end(1)

    on_gpu.plots["load 131072 dry-run"] = end
    result = calibrate(on_gpu, monkeypatch, tmp_path)
    failed = [load for load in only_record(tmp_path).loads if load.outcome == "failed"]
    assert failed
    assert all(load.request.purpose == "dry-run" and reason in load.reason for load in failed)
    assert result.calibration.metadata.quality.max_error == 0.0


def test_an_engine_that_stays_is_started_once_and_unloads_each_model(
    persistent: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = calibrate(persistent, monkeypatch, tmp_path, contexts=(8192, 16384, 32768))
    assert [event for event in persistent.events if event != "poll"] == [
        "baseline", "start", "prepare",
        "load 4096", "read 1024", "unload",
        "load 16384", "read 2048", "unload",
        "load 8192", "read 4096", "unload",
        "load 16384", "read 4096", "unload",
        "load 32768", "read 4096", "unload",
        "stop", "close meter", "close sandbox",
    ]  # fmt: skip
    record = only_record(tmp_path)
    assert [(load.request.context, load.request.num_batch) for load in record.loads] == [
        (4096, 512), (16384, 1024), (8192, 2048), (16384, 2048), (32768, 2048),
    ]  # fmt: skip
    spans = [(load.log_start, load.log_end) for load in record.loads]
    assert all(end == start for (_, end), (start, _) in pairwise(spans))
    bands = [(band.up_to, band.num_batch) for band in result.calibration.metadata.bands]
    assert bands == [(4096, 512), (32768, 1024), (131_072, 2048)]


def test_what_only_a_started_engine_knows_is_in_the_record(
    persistent: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_of = calibrate(persistent, monkeypatch, tmp_path, num_batch=512).calibration.metadata.engine
    assert (record_of.version, record_of.image, record_of.image_digest) == ("0.33.0", "fake:1", f"sha256:{'f0' * 32}")


def test_speed_is_timed_under_the_engines_defaults_and_then_with_nothing_on_the_gpu(
    on_gpu: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("harness.meters.host.available_memory", lambda: 16 * GIB)
    heard = Heard()
    result = calibrate(on_gpu, monkeypatch, tmp_path, heard, speed=True)
    performance = result.calibration.metadata.performance
    assert (performance.decode_tokens_per_s, performance.host_decode_tokens_per_s) == (60.0, 6.0)
    assert [load.request.purpose for load in only_record(tmp_path).loads][-2:] == ["speed", "host-speed"]
    assert heard.phases[-3:] == ["speed", "speed on the host alone", "fit"]
    steps = len(heard.phases)
    assert heard.steps == [(number, steps) for number in range(1, steps + 1)], "each step is counted, and none is left out"
    begin = on_gpu.events.index("load 4096 speed")
    timed = [event for event in on_gpu.events[begin:] if event.startswith("read")]
    assert timed == ["read 64"] * 2 + ["read 1536"] + ["read 16"] * 2


def test_on_the_host_an_engine_that_stays_is_started_again_for_its_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes its memory repeatable makes it slow."""
    world = World(MODEL, engine="ollama", persistent=True, sandbox="docker", target="host", version="0.33.0")
    result = calibrate(world, monkeypatch, tmp_path, speed=True)
    starts = [event for event in world.events if event in ("start", "stop", "load 4096 speed")]
    assert starts == ["start", "stop", "start", "load 4096 speed", "stop"]
    assert result.calibration.metadata.performance.host_decode_tokens_per_s == 60.0


def test_a_bend_between_the_loads_is_measured_on_both_sides(
    on_host: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without flash attention compute buffers may bend: here they take half a mebibyte more at one of three contexts."""
    on_host.model = msgspec.structs.replace(MODEL, flash_attention=False)
    size = on_host.model.compute(16384, 512) / MIB
    on_host.extra[16384] = MIB // 2
    on_host.log_edits[16384] = lambda text: text.replace(f"{size:8.2f} MiB", f"{size + 0.5:8.2f} MiB")
    calibrate(on_host, monkeypatch, tmp_path, contexts=(8192, 16384, 32768))
    assert [load.request.context for load in only_record(tmp_path).loads] == [8192, 16384, 32768, 4096, 24576]


@pytest.mark.parametrize(("context", "batch"), [(4096, 2048), (1024, 1024)])
def test_an_embedding_model_reads_its_prompt_in_one_batch(
    on_host: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, context: int, batch: int
) -> None:
    on_host.embedding = True
    calibrate(on_host, monkeypatch, tmp_path, contexts=(context, 2 * context))
    assert {load.request.num_batch for load in only_record(tmp_path).loads} == {batch}


def test_secrets_of_the_environment_are_not_in_the_record(
    on_host: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {"HF_TOKEN": "hf_abc", "LLAMA_ARG_CACHE_REUSE": "1"}
    result = calibrate(on_host, monkeypatch, tmp_path, env=env)
    assert only_record(tmp_path).settings.env == {"HF_TOKEN": "(redacted)", "LLAMA_ARG_CACHE_REUSE": "1"}
    assert "hf_abc" not in result.record.read_text() + result.artifact.read_text()


# -- loads that do not fit ----------------------------------------------------------------------------------------------


def test_where_a_context_does_not_fit_larger_ones_are_skipped_and_smaller_ones_tried(
    on_host: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host.capacity = MODEL.truth(2048, 512)
    result = calibrate(on_host, monkeypatch, tmp_path, contexts=(2048, 4096, 8192))
    loads = [(load.request.context, load.outcome) for load in only_record(tmp_path).loads]
    assert loads == [(2048, "ok"), (4096, "wont-fit"), (8192, "skipped"), (1024, "ok"), (1536, "ok")]
    assert result.calibration.metadata.quality.max_error is not None
    assert "load 8192" not in on_host.events


def test_with_two_contexts_that_fit_the_one_between_is_tried(
    on_host: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_host.capacity = MODEL.truth(4096, 512)
    calibrate(on_host, monkeypatch, tmp_path, contexts=(1024, 4096, 8192))
    loads = [(load.request.context, load.outcome) for load in only_record(tmp_path).loads]
    assert loads == [(1024, "ok"), (4096, "ok"), (8192, "wont-fit"), (2560, "ok")]


def test_a_context_that_does_not_fit_is_not_tried_with_a_larger_batch(
    persistent: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    persistent.capacity = MODEL.truth(16384, 1024) - 1
    calibrate(persistent, monkeypatch, tmp_path, contexts=(4096, 8192, 16384))
    assert persistent.events.count("load 16384") == 1
    loads = [
        (load.request.context, load.request.num_batch) for load in only_record(tmp_path).loads if load.outcome == "skipped"
    ]
    assert loads == [(16384, 2048)]


def test_where_nothing_fits_there_is_nothing_to_fit(on_host: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_host.capacity = 0
    assert refused(UntrustedError, on_host, monkeypatch, tmp_path).code == "no-points"
    assert {load.outcome for load in only_record(tmp_path).loads} == {"wont-fit", "skipped"}


def test_a_persistent_engine_that_ended_at_a_load_is_started_again_for_the_next(
    persistent: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    persistent.capacity = MODEL.truth(2048, 512)
    calibrate(persistent, monkeypatch, tmp_path, contexts=(2048, 4096), num_batch=512)
    assert persistent.events.count("start") == 2
    assert persistent.events.count("prepare") == 2


# -- what goes wrong ----------------------------------------------------------------------------------------------------


def test_an_engine_that_dies_while_loading_ends_the_run_with_its_last_lines(
    on_host: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die() -> None:
        on_host.write("ggml_cuda_init: \x1b[31mno kernel image\x1b[0m\nlast words\n")
        on_host.end(134)

    on_host.plots["load 2048"] = die
    error = refused(EngineError, on_host, monkeypatch, tmp_path)
    assert isinstance(error, EngineError)
    assert (error.code, error.exit_code, error.tail[-1]) == ("engine-ended", 70, "last words")
    assert not any("\x1b" in line for line in error.tail)
    assert "134" in error.message
    record = only_record(tmp_path)
    assert (record.status, [load.request.context for load in record.loads]) == ("partial", [1024])
    assert on_host.events[-2:] == ["close meter", "close sandbox"]


@pytest.mark.parametrize(
    ("status", "words"), [(132, "illegal instruction"), (137, "(SIGKILL)"), (143, "(SIGTERM)"), (1, "ended with status 1")]
)
def test_how_an_engine_ended_is_said(
    on_host: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, words: str
) -> None:
    on_host.plots["load 1024"] = lambda: on_host.end(status)
    assert words in refused(EngineError, on_host, monkeypatch, tmp_path).message


def test_an_engine_that_never_answers_is_given_up(on_host: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngine, "ready", lambda *_: False)
    error = refused(BusyError, on_host, monkeypatch, tmp_path, timeout=0.01)
    assert (error.code, error.exit_code) == ("engine-timeout", 75)
    assert only_record(tmp_path).status == "partial"


def test_a_request_without_an_answer_is_explained_by_the_engines_end(
    persistent: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    persistent.plots["load 2048"] = lambda: persistent.end(139)
    error = refused(EngineError, persistent, monkeypatch, tmp_path, num_batch=512)
    assert (error.code, "139" in error.message) == ("engine-ended", True)


def test_an_engine_that_ends_while_its_memory_settles_ends_the_run(
    on_gpu: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu.plots["read 1024"] = lambda: on_gpu.end(1)
    assert refused(EngineError, on_gpu, monkeypatch, tmp_path).code == "engine-ended"


def test_a_meter_that_reads_nothing_ends_the_run_after_its_first_load(
    on_gpu: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu.blind = "the driver does not permit it"
    settle = Sampler.settle
    monkeypatch.setattr(  # the time is up after a reading
        Sampler, "settle", lambda self, _, **__: settle(self, 0.0, alive=lambda: self.read_once() is not None)
    )
    error = refused(UntrustedError, on_gpu, monkeypatch, tmp_path)
    assert (error.code, error.exit_code) == ("no-reading", 5)
    assert "does not permit it" in error.message
    record = only_record(tmp_path)
    assert (record.status, len(record.loads)) == ("partial", 1)


def test_a_meter_that_breaks_voids_the_run(on_host: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> int:
        raise OSError("no such process")

    monkeypatch.setattr(on_host, "memory", broken)
    assert refused(UntrustedError, on_host, monkeypatch, tmp_path).code == "sampler-died"


EDITS: dict[str, tuple[Callable[[str], str], str]] = {
    "another batch": (lambda text: re.sub(r"n_ubatch +=.*", "n_ubatch = 256", text), "batch 256, not 512"),
    "no log": (lambda _: "", "no log was read"),
    "layers missing": (lambda text: text.replace("17/17", "12/17"), "only 12 of 17 layers"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_load_whose_log_is_doubtful_is_no_point(
    on_gpu: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: str
) -> None:
    change, words = EDITS[edit]
    on_gpu.log_edits[4096] = change
    result = calibrate(on_gpu, monkeypatch, tmp_path, contexts=(1024, 2048, 4096))
    quality = result.calibration.metadata.quality
    assert 4096 not in [load.context for load in quality.loads]
    assert words in " ".join(quality.notes)


def test_a_server_that_answered_is_ready_whatever_its_log_says(
    on_gpu: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu.log_edits[4096] = lambda text: text.replace("srv  llama_server: model loaded\n", "")
    result = calibrate(on_gpu, monkeypatch, tmp_path, contexts=(1024, 2048, 4096))
    assert [load.context for load in result.calibration.metadata.quality.loads] == [1024, 2048, 4096]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("moment", ["start", "load 2048", "read 1024", "poll"])
def test_an_interrupted_run_ends_its_engine_and_keeps_a_partial_record(
    on_gpu: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, interrupt: type[BaseException]
) -> None:
    def stop_here() -> None:
        raise interrupt

    on_gpu.plots[moment] = stop_here
    with pytest.raises(interrupt):
        calibrate(on_gpu, monkeypatch, tmp_path)
    assert only_record(tmp_path).status == "partial"
    assert list(Store(tmp_path).paths()) == []
    assert on_gpu.events[-2:] == ["close meter", "close sandbox"]
    assert on_gpu.running is not None
    assert on_gpu.running.status is not None


def test_an_overhead_that_moves_is_not_trusted_and_the_record_is_complete(
    on_gpu: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu.extra[2048] = 9 * MIB
    error = refused(UntrustedError, on_gpu, monkeypatch, tmp_path)
    assert (error.code, error.exit_code) == ("overhead-moves", 5)
    assert only_record(tmp_path).status == "complete"


def test_another_user_of_the_gpu_who_moves_is_noted_where_figures_are_by_process(
    on_gpu: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu.others = {1: 500 * MIB}
    on_gpu.plots["read 1024"] = lambda: on_gpu.others.update({1: 600 * MIB})
    heard = Heard()
    calibration = calibrate(on_gpu, monkeypatch, tmp_path, heard, contexts=(1024, 2048, 4096)).calibration
    assert any("process 1 by 100.0 MiB" in note for note in calibration.metadata.quality.notes)
    record = only_record(tmp_path)
    assert record.before.processes == {1: 500 * MIB}
    assert record.after.processes == {1: 600 * MIB}
    assert any("process 1" in text for text in heard.warnings)


@pytest.mark.parametrize(("moved", "repeats"), [(16 * MIB, 0), (16 * MIB + 1, 1)])
def test_the_rise_of_a_gpu_is_measured_again_at_once_where_another_process_moved(
    on_gpu: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: int, repeats: int
) -> None:
    on_gpu.basis, on_gpu.others = "device-delta", {1: 500 * MIB}
    on_gpu.plots["read 1024"] = lambda: on_gpu.others.update({1: 500 * MIB + moved})
    heard = Heard()
    calibration = calibrate(on_gpu, monkeypatch, tmp_path, heard).calibration
    outcomes = [load.outcome for load in only_record(tmp_path).loads if load.request.purpose == "point"]
    assert outcomes == ["ok", *["failed"] * repeats, "ok", "ok"]
    assert sum("this load is made again" in text for text in heard.warnings) == repeats
    assert calibration.metadata.quality.max_error is not None


def test_a_gpu_that_is_never_quiet_ends_the_run_at_the_load(
    on_gpu: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_gpu.basis, on_gpu.others = "device-delta", {1: 500 * MIB}
    on_gpu.plots["read 1024"] = lambda: on_gpu.others.update({1: on_gpu.others[1] + GIB})
    error = refused(UntrustedError, on_gpu, monkeypatch, tmp_path)
    assert (error.code, error.exit_code) == ("stranger-moved", 5)
    assert [load.outcome for load in only_record(tmp_path).loads] == ["ok", "failed", "failed", "failed"]


def test_memory_that_does_not_come_back_is_noted(on_gpu: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.measure.load.RETURN", 0.0)
    on_gpu.plots["stop"] = lambda: setattr(on_gpu, "left", 64 * MIB)
    result = calibrate(on_gpu, monkeypatch, tmp_path)
    assert {load.left_bytes for load in only_record(tmp_path).loads[:3]} == {64 * MIB}
    assert "still held 64.0 MiB" in " ".join(result.calibration.metadata.quality.notes)


def test_a_model_whose_processes_stay_after_an_unload_ends_the_run(
    persistent: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stays() -> None:
        assert persistent.running is not None
        monkeypatch.setattr(persistent.running, "pids", lambda: frozenset({HOLDER}))

    persistent.plots["unload"] = stays
    monkeypatch.setattr("harness.measure.load.UNLOAD", 0.0)
    assert refused(EngineError, persistent, monkeypatch, tmp_path, num_batch=512).code == "still-loaded"


# -- speed is optional --------------------------------------------------------------------------------------------------


def test_a_speed_that_fails_costs_nothing_that_was_measured(
    on_host: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise EngineError("the prompt was refused")

    on_host.plots["read 64"] = fail
    result = calibrate(on_host, monkeypatch, tmp_path, speed=True)
    assert result.calibration.metadata.performance.decode_tokens_per_s is None
    assert "the prompt was refused" in " ".join(result.calibration.metadata.quality.notes)


def test_a_speed_load_that_does_not_fit_costs_nothing_either(
    on_host: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room() -> None:
        on_host.write("failed to allocate buffer\n")
        on_host.end(1)

    on_host.plots["load 4096 speed"] = no_room
    result = calibrate(on_host, monkeypatch, tmp_path, speed=True)
    assert "could not allocate" in " ".join(result.calibration.metadata.quality.notes)


def test_an_engine_that_dies_while_it_is_timed_costs_nothing_that_was_measured(
    on_host: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die() -> None:
        on_host.end(139)
        raise EngineError("no answer", code="no-answer")

    on_host.plots["read 64"] = die
    result = calibrate(on_host, monkeypatch, tmp_path, speed=True)
    assert result.calibration.metadata.performance.decode_tokens_per_s is None
    assert "speed not measured: the engine ended with status 139" in " ".join(result.calibration.metadata.quality.notes)
    assert only_record(tmp_path).status == "complete"


def test_a_dry_run_that_finds_its_device_gone_costs_nothing_that_was_measured(
    on_host: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise UnavailableError("the device is gone")

    monkeypatch.setattr("harness.measure.calibrate.measure_splits", gone)
    result = calibrate(on_host, monkeypatch, tmp_path)
    assert "dry runs not measured: the device is gone" in result.calibration.metadata.quality.notes


@pytest.mark.parametrize(("available", "measured"), [(1000 * MIB, True), (999 * MIB, False), (None, False)])
def test_weights_are_put_on_the_host_if_they_take_60_percent_of_what_is_available_at_most(
    monkeypatch: pytest.MonkeyPatch, available: int | None, measured: bool
) -> None:
    monkeypatch.setattr("harness.meters.host.available_memory", lambda: available)
    source = FakeEngine(World(msgspec.structs.replace(MODEL, weights=17 * 600 * MIB // 16))).resolve("made-up", None)  # type: ignore[arg-type]
    assert (no_host_speed(policy_of("llama-server"), source) is None) == measured


class Cpu:
    """A CPU of which others take a share."""

    def __init__(self, share: float | None = None) -> None:
        self.share = share

    def by_others(self) -> float | None:
        return self.share


def timed(
    prompts: tuple[int, ...],
    rates: list[float],
    *,
    others: float | None = None,
    on_host: bool = False,
    read: float = 1000.0,
    seconds: int = 1,
) -> list[int]:
    """The prompts that are timed: each timing takes so many ``seconds``, and decodes at one of the ``rates`` in turn."""
    speeds: list[Speed] = []
    clock = iter(range(0, 100_000, seconds))
    asked = prompts_to_time(prompts, speeds, Cpu(others), on_host=on_host, clock=lambda: next(clock))  # type: ignore[arg-type]
    made = []
    for prompt in asked:
        made.append(prompt)
        rate = rates[(len(made) - 1) % len(rates)]
        speeds.append(Speed(prompt_tokens=prompt, prompt_tokens_per_s=read, decode_tokens=48, decode_tokens_per_s=rate))
    return made


def test_a_prompt_that_would_take_more_than_a_minute_is_not_timed() -> None:
    """2 tokens a second read 120 in a minute."""
    assert timed((16, 120), [10.0], read=2.0) == [16, 16, 120]
    assert timed((16, 121, 16), [10.0], read=2.0) == [16, 16]


@pytest.mark.parametrize(
    ("rates", "repeats"),
    [
        pytest.param([10.0, 10.2], 2, id="two within 2.4 % have a bound of 15 %"),
        pytest.param([10.0, 10.3], 3, id="two that differ by more are asked once more"),
        pytest.param([10.0, 11.0, 10.5], 3, id="three within 15 % have a bound of 30 %"),
        pytest.param([10.0, 20.0, 40.0, 20.0, 20.0, 20.0, 20.0, 20.0], 8, id="six of eight are alike"),
    ],
)
def test_a_prompt_is_timed_until_its_speed_has_a_bound(rates: list[float], repeats: int) -> None:
    assert timed((64, 1536), rates) == [64] * repeats + [1536]


def test_timings_that_never_agree_end_after_two_minutes_or_ten_seconds_of_a_busy_cpu() -> None:
    """What gives no speed is not asked for a longer prompt."""
    wild = [10.0, 40.0, 80.0, 160.0, 320.0]
    assert len(timed((64, 1536), wild, seconds=4)) == pytest.approx(120 / 4, abs=2)
    assert len(timed((64, 1536), wild, seconds=4, others=0.5)) == pytest.approx(10 / 4, abs=2)
    assert set(timed((64, 1536), wild, seconds=4)) == {64}


@pytest.mark.parametrize(
    ("shares", "watched", "timed"),
    [
        pytest.param([0.3], 0, True, id="half is others'"),
        pytest.param([None, 0.9, 0.4], 2, True, id="a burst passes"),
        pytest.param([0.9] * 12, 12, False, id="busy for three seconds"),
        pytest.param([None] * 12, 12, True, id="no share can be told"),
    ],
)
def test_a_host_that_others_keep_busy_is_not_timed(shares: list[float | None], watched: int, timed: bool) -> None:
    """One prompt took 100 s beside seven other users of two CPUs, and gave no speed."""
    slept: list[float] = []
    left = iter(shares)
    cpu = Cpu()
    cpu.by_others = lambda: next(left)  # type: ignore[method-assign]
    why = busy_before(cpu, slept.append)  # type: ignore[arg-type]
    assert (len(slept), why is None) == (watched, timed)
    assert timed or why == "other processes took 90% of the CPU before it was to be timed"


def test_on_the_host_timing_ends_when_others_have_taken_more_than_ten_seconds_allow() -> None:
    """Half of the CPU for three seconds is 15 % of ten: no speed would be given even if the others ended now."""
    wild = [10.0, 40.0, 80.0, 160.0, 320.0]
    assert len(timed((64, 1536), wild, others=0.5)) == pytest.approx(10, abs=1)
    assert len(timed((64, 1536), wild, others=0.5, on_host=True)) == pytest.approx(3, abs=1)
    assert len(timed((64, 1536), wild, others=0.16, on_host=True)) == pytest.approx(9, abs=1)


@pytest.mark.parametrize(
    ("busy", "total", "own", "share"),
    [
        pytest.param(8.0, 10.0, 3.0, 0.5, id="half of ten CPU seconds"),
        pytest.param(3.0, 10.0, 3.1, 0.0, id="the engine's alone"),
        pytest.param(0.4, 0.4, 0.0, None, id="forty milliseconds on ten CPUs: a tick of each"),
    ],
)
def test_the_share_that_others_take_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, busy: float, total: float, own: float, share: float | None
) -> None:
    machine, owned = iter([(100.0, 400.0), (100.0 + busy, 400.0 + total)]), iter([7.0, 7.0 + own])
    monkeypatch.setattr("harness.measure.timing._machine", lambda: next(machine))
    monkeypatch.setattr("harness.measure.timing._own", lambda _: next(owned))
    assert CpuWatch(frozenset).by_others() == share


def test_a_slow_prompt_is_timed_once_and_a_longer_one_follows_only_where_its_speed_would_be_given() -> None:
    assert timed((64, 1536), [5.0], seconds=6) == [64, 1536]
    assert timed((64, 1536), [5.0], seconds=6, others=0.5, on_host=True) == [64]
    assert timed((64, 1536), [5.0], seconds=6, others=0.5) == [64, 1536], "on a GPU others of the CPU do not decide"


def test_the_seconds_of_a_run_add_up(on_host: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = calibrate(on_host, monkeypatch, tmp_path)
    assert sum(result.spent.values()) == pytest.approx(result.seconds, abs=0.01)
    assert result.spent["loads"] > 0


# -- before anything starts ---------------------------------------------------------------------------------------------


def test_a_context_beyond_the_training_is_refused_before_anything_starts(
    on_host: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refused(UsageError, on_host, monkeypatch, tmp_path, contexts=(1024, 131_073))
    assert error.code == "beyond-training"
    assert on_host.events == []


@pytest.mark.parametrize(
    ("changes", "options", "differs"),
    [
        ({}, {"num_parallel": 2}, "settings"),
        ({}, {"env": {"LLAMA_ARG_CACHE_REUSE": "1"}}, "settings"),
        ({}, {"kv_cache_type": "q8_0"}, "KV cache type"),
        ({}, {"flash_attention": "off"}, "flash attention"),
        ({}, {"num_batch": 256}, "physical batch"),
        ({"digest": f"sha256:{'b' * 64}"}, {}, "model digest"),
        ({"target": "gpu"}, {}, "GPU, target"),
    ],
)
def test_a_calibration_of_something_else_is_not_overwritten(
    on_host: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    options: dict[str, Any],
    differs: str,
) -> None:
    before = calibrate(on_host, monkeypatch, tmp_path).artifact.read_bytes()
    other = World(MODEL)
    for name, value in changes.items():
        setattr(other, name, value)

    with pytest.raises(CannotWriteError, match=f"of another {differs}") as caught:
        calibrate(other, monkeypatch, tmp_path, **options)

    assert (caught.value.code, caught.value.exit_code) == ("would-overwrite", 73)
    assert "start" not in other.events
    assert (tmp_path / "llama-server" / "made-up.yaml").read_bytes() == before
    variant = calibrate(other, monkeypatch, tmp_path, variant="other", **options)
    assert variant.artifact.name == "made-up@other.yaml"
    assert calibrate(other, monkeypatch, tmp_path, force=True, **options).artifact.read_bytes() != before
    assert len(list((tmp_path / "runs").iterdir())) == 3


def test_the_same_again_takes_its_place(on_host: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = calibrate(on_host, monkeypatch, tmp_path)
    assert calibrate(World(MODEL), monkeypatch, tmp_path).artifact == first.artifact
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_without_flash_attention_the_prompt_fills_the_context(
    on_gpu: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's pool then grows with the tokens in the cache."""
    on_gpu.model = msgspec.structs.replace(MODEL, flash_attention=False)
    calibrate(on_gpu, monkeypatch, tmp_path, contexts=(2048, 4096, 65_536))
    assert [event for event in on_gpu.events if event.startswith("read")][:3] == ["read 2040", "read 4088", "read 32768"]
    assert [load.prompt_tokens for load in only_record(tmp_path).loads[:3]] == [2040, 4088, 32_768]


class TwoDevices:
    """A runner of an engine on two devices; a dry run takes ten seconds."""

    def __init__(self, patch: pytest.MonkeyPatch, outcome: LoadOutcome = "ok") -> None:
        self.engine, self.observer, self.clock = FakeEngine(World(MODEL)), Heard(), 0.0
        self.outcome: LoadOutcome = outcome
        patch.setattr("harness.measure.dry_runs.dry_run", self.make)

    def now(self) -> float:
        return self.clock

    def make(self, _runner: object, _source: object, request: LoadRequest) -> Load:
        self.clock += 10
        return Load(request=request, outcome=self.outcome, started=self.clock - 10, ended=self.clock)

    def split(self) -> tuple[list[Load], str | None]:
        loads: list[Load] = []
        machine = Machine(target="gpu", sandbox="process", meter="nvml", gpus=(Gpu(name="A"), Gpu(name="B")))
        known = msgspec.structs.replace(record(made(8192)), machine=machine)
        return loads, measure_splits(self, Source(model=known.model), known, loads.append)  # type: ignore[arg-type]


@pytest.mark.parametrize(("outcome", "why"), [("ok", "90 s were over"), ("failed", "the last one failed")])
def test_splits_over_devices_for_which_there_was_no_time_are_said(
    monkeypatch: pytest.MonkeyPatch, outcome: LoadOutcome, why: str
) -> None:
    loads, note = TwoDevices(monkeypatch, outcome).split()
    layouts = {load.request.split for load in loads if load.request.split}
    assert note is not None
    assert f"dry runs of {len(layouts)} of " in note
    assert why in note
