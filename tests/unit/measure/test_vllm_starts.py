"""vLLM's starts, driven through ``harness.calibrate`` in memory: one by share, one by bytes, and again after a failed one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from harness.engines.base import Options, Source
from harness.errors import EngineError, HarnessError, NotFoundError, NotPermittedError, UntrustedError
from harness.model.record import LoadRequest, Model, Reported
from harness.units import GIB, MIB
from tests.support.fakes import FakeEngine, World, calibrate, only_record
from tests.support.true_model import TrueModel

if TYPE_CHECKING:
    import httpx

#: What the model takes beside its KV cache, and what the machine has.
BESIDE, TOTAL = GIB, 16 * GIB
BLOCK = 2 * MIB
CONFIG = (
    "(EngineCore pid=7) INFO 10-06 17:00:05 [core.py:121] Initializing a V1 LLM engine (v0.31.0) with config: "
    "model='acme/Tern-8B', dtype=torch.bfloat16, max_seq_len={context}, tensor_parallel_size=1, kv_cache_dtype=auto\n"
)
COMPILED = "(EngineCore pid=7) INFO 10-06 17:00:20 [backends.py:1] Compiling a graph for compile range (1, 8192) takes 9.1 s\n"
GENERIC = "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}\n"


def started(context: int, cache: int) -> str:
    """The log of a start that came up with a cache of so many bytes."""
    tokens = cache // BLOCK * 16
    return CONFIG.format(context=context) + "".join(
        (
            "(Worker pid=8) INFO 10-06 17:00:11 [model_runner.py:407] Model loading took 0.50 GiB memory and 5.42 seconds\n",
            f"(Worker pid=8) INFO 10-06 17:00:33 [cpu_worker.py:260] Auto set ({cache / GIB:.2f}/16.00) GiB for KV cache",
            f" on node 0, with {(cache + BESIDE) / GIB:.2f} GiB requested memory for the worker.",
            f" {BESIDE / GIB:.2f} GiB memory was consumed by non-kv usages.\n",
            f"(EngineCore pid=7) INFO 10-06 17:00:33 [kv_cache_utils.py:1] GPU KV cache size: {tokens:,} tokens, "
            f"Maximum concurrency for {context:,} tokens per request: {tokens / context:.2f}x\n",
            "(APIServer pid=1) INFO:     Application startup complete.\n",
        )
    )


class VllmWorld(World):
    """A machine on which vLLM starts; ``failures`` are the root causes that its next starts print."""

    def __init__(self) -> None:
        super().__init__(TrueModel(weights=2 * GIB, overhead=0, kv_per_cell=1), engine="vllm", version="0.31.0")
        self.failures: list[str] = []
        self.compiles = False

    def cache(self, request: LoadRequest) -> int:
        if request.kv_cache_bytes is not None:
            return request.kv_cache_bytes
        return round((request.utilization or 0.0) * TOTAL) - GIB

    def memory(self) -> int:
        return 0 if self.loaded is None else BESIDE + self.cache(self.loaded) // BLOCK * BLOCK

    def load_model(self, request: LoadRequest) -> None:
        given = "bytes" if request.kv_cache_bytes is not None else request.utilization
        self.happen(f"load {request.context} {given}")
        if self.failures:
            self.write(CONFIG.format(context=request.context) + self.failures.pop(0) + GENERIC)
            self.end(1)
            return
        self.loaded = request
        self.write(started(request.context, self.cache(request)) + (COMPILED if self.compiles else ""))
        self.compiles = False


class FakeVllm(FakeEngine):
    """The recipe, whose server answers from the world."""

    sandboxes = ("process",)
    world: VllmWorld

    def resolve(self, name: str, options: Options) -> Source:
        return Source(model=Model(name=name, train_context=32768), own_name="acme/Tern-8B")

    def load(self, client: httpx.Client, source: Source, request: LoadRequest, options: Options) -> Reported:
        number = self.world.cache(request) // BLOCK
        each = -(-request.context // 16)
        return Reported(
            version="0.31.0", block_size=16, num_blocks=number, context=request.context, max_concurrency=number / each
        )

    def unload(self, client: httpx.Client, source: Source, options: Options) -> None:
        """Nothing: it ends with the process."""


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> VllmWorld:
    monkeypatch.setattr("tests.support.fakes.FakeEngine", FakeVllm)
    return VllmWorld()


def loads(world: VllmWorld) -> list[str]:
    return [event.removeprefix("load ") for event in world.events if event.startswith("load ")]


def test_the_longest_context_is_started_by_share_and_the_shortest_by_bytes(
    world: VllmWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = calibrate(world, monkeypatch, tmp_path, contexts=(2048, 8192))
    assert loads(world) == ["8192 0.25", "2048 bytes"]
    blocks = result.calibration.metadata.kv_blocks
    assert blocks is not None
    assert (blocks.size, blocks.bytes, blocks.fixed, blocks.per_block) == (16, BLOCK, 0, 1)
    second = only_record(tmp_path).loads[1].request
    least = 2048 // 16 + 1  # one sequence, and the block that is never used
    assert least * BLOCK <= second.kv_cache_bytes < (least + 2) * BLOCK


def test_one_context_is_halved_for_the_second_start(world: VllmWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrate(world, monkeypatch, tmp_path, contexts=(8192,))
    assert loads(world) == ["8192 0.25", "4096 bytes"]


TOO_SMALL = (
    "(EngineCore pid=7) ValueError: To serve at least one request with the model's max seq len (8192), (1.25 GiB KV cache is "
    "needed, which is larger than the available KV cache memory (0.50 GiB). Based on the available memory, the "
    "estimated maximum model length is 3000. Try increasing gpu_memory_utilization.\n"
)
TOO_LITTLE = (
    "(EngineCore pid=7) ValueError: Available memory on node 0 (3.20/16.00 GiB) on startup is less than desired CPU memory "
    "utilization (0.25, 4.00 GiB). Decrease it.\n"
)
MOVED = "(EngineCore pid=7) AssertionError: Error in memory profiling. Initial free memory 9.1 GiB, current 9.9 GiB.\n"
TOO_LONG = (
    "(EngineCore pid=7)   Value error, User-specified max_model_len (8192) is greater than the derived max_model_len "
    "(max_position_embeddings=4096)\n"
)


@pytest.mark.parametrize(
    ("failure", "again"),
    [
        (TOO_SMALL, "2816 0.25"),  # whole blocks below what the engine has estimated
        (TOO_LITTLE, "8192 0.18"),  # the share that is free, less 2 %
        (MOVED, "8192 0.25"),
        (TOO_LONG, "4096 0.25"),
    ],
    ids=["cache too small", "too little free", "memory moved", "too long"],
)
def test_a_failed_start_is_made_again_with_what_it_has_said(
    world: VllmWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str, again: str
) -> None:
    world.failures = [failure]
    calibrate(world, monkeypatch, tmp_path, contexts=(2048, 8192))
    assert loads(world) == ["8192 0.25", again, "2048 bytes"]
    assert [load.outcome for load in only_record(tmp_path).loads] == ["wont-fit", "ok", "ok"]


def test_what_fails_four_times_is_given_up(world: VllmWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world.failures = [MOVED] * 9
    with pytest.raises(UntrustedError) as caught:
        calibrate(world, monkeypatch, tmp_path, contexts=(2048, 8192))
    assert caught.value.code == "no-points"
    assert loads(world) == ["8192 0.25"] * 4


def test_out_of_memory_is_not_tried_again(world: VllmWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world.failures = ["(EngineCore pid=7) torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.16 GiB.\n"]
    with pytest.raises(UntrustedError):
        calibrate(world, monkeypatch, tmp_path, contexts=(2048, 8192))
    assert loads(world) == ["8192 0.25"]


@pytest.mark.parametrize(
    ("failure", "kind", "code"),
    [
        ("OSError: You are trying to access a gated repo.\n", NotPermittedError, "gated-model"),
        (
            "OSError: a/b is not a local folder and is not a valid model identifier\n",
            NotFoundError,
            "no-such-model",
        ),
        ("(EngineCore pid=7) KeyError: 'layers.0.mlp.experts'\n", EngineError, "engine-ended"),
    ],
)
def test_a_start_that_no_other_setting_helps_ends_the_run(
    world: VllmWorld,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: str,
    kind: type[HarnessError],
    code: str,
) -> None:
    world.failures = [failure]
    with pytest.raises(kind) as caught:
        calibrate(world, monkeypatch, tmp_path, contexts=(2048, 8192))
    assert caught.value.code == code
    assert only_record(tmp_path).status == "partial"


def test_a_start_that_compiled_is_measured_once_more(world: VllmWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes memory that a start from the cache does not."""
    world.compiles = True
    calibrate(world, monkeypatch, tmp_path, contexts=(2048, 8192))
    assert loads(world) == ["8192 0.25", "8192 0.25", "2048 bytes"]


def test_speed_is_timed_under_the_last_start(world: VllmWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = calibrate(world, monkeypatch, tmp_path, contexts=(2048, 8192), speed=True)
    assert loads(world) == ["8192 0.25", "2048 bytes", "2048 bytes"]
    assert result.calibration.metadata.performance.decode_tokens_per_s == 60.0
