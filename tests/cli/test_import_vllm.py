"""INFO logs of vLLM and one figure more: what becomes a calibration, what asks for which option, and what stays refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from harness.cli.main import cli
from harness.engines.registry import policy_of
from harness.model.calibration import Calibration
from harness.prediction.memory import predict
from harness.prediction.planner import planner_table
from harness.prediction.verdict import judge
from harness.store.store import Store
from harness.units import GIB, from_gib
from tests.support.planner_script import planner_script

CARD = 24564 << 20  # of nvidia-smi, bytes


def line(text: str) -> str:
    return f"(EngineCore_DP0 pid=7) INFO 10-06 17:00:11 [gpu_worker.py:298] {text}\n"


def log(
    version: str,
    tokens: int,
    times: float,
    *more: str,
    context: int = 8192,
    available: float | None = 10.39,
    arguments: str | None = "'model': 'acme/Tern-8B', 'max_model_len': 8192",
    graphs: str = "Graph capturing finished in 20 secs, took 1.18 GiB",
    config: str = "",
) -> str:
    """An INFO log of a start that came up: weights of 9.38 GiB, one worker."""
    given = (
        "" if arguments is None else f"(APIServer pid=1) INFO 10-06 17:00:00 [utils.py:233] non-default args: {{{arguments}}}\n"
    )
    return (
        given
        + line(
            f"Initializing a V1 LLM engine (v{version}) with config: model='acme/Tern-8B', dtype=torch.float16, "
            f"max_seq_len={context}, tensor_parallel_size=1, kv_cache_dtype=auto, enforce_eager=False{config}"
        )
        + line("Model loading took 9.38 GiB memory and 5.42 seconds")
        + "".join(map(line, more))
        + ("" if available is None else line(f"Available KV cache memory: {available} GiB"))
        + line(f"GPU KV cache size: {tokens:,} tokens")
        + line(f"Maximum concurrency for {context:,} tokens per request: {times:.2f}x")
        + line(graphs)
        + "(APIServer pid=1) INFO:     Application startup complete.\n"
    )


DENSE = log("0.13.0", 56736, 56736 / 8192)


def run(tmp_path: Path, text: str, *arguments: str) -> tuple[int, dict[str, Any]]:
    (tmp_path / "vllm.log").write_text(text, encoding="utf-8")
    store = ("--store", str(tmp_path / "store"), "--force")
    result = CliRunner().invoke(cli, ["import", str(tmp_path / "vllm.log"), "--json", *store, *arguments])
    return result.exit_code, json.loads(result.stdout)


def made(tmp_path: Path, text: str, *arguments: str) -> Calibration:
    code, answer = run(tmp_path, text, *arguments)
    assert code == 0, answer
    return Store(tmp_path / "store").read(Path(answer["data"]["artifact"]))


def refused(tmp_path: Path, text: str, *arguments: str) -> tuple[int, str, str, str]:
    code, answer = run(tmp_path, text, *arguments)
    assert not list((tmp_path / "store").rglob("*.yaml"))
    error = answer["errors"][0]
    return code, error["code"], error["message"], error["hint"] or ""


def check(tmp_path: Path, context: int, available: int) -> int:
    arguments = ["check", "acme/Tern-8B", "--ctx", str(context), "--available", f"{available / (1 << 20)}MiB"]
    return CliRunner().invoke(cli, [*arguments, "--store", str(tmp_path / "store")]).exit_code


def test_with_the_memory_of_the_gpu_an_info_log_gives_base_and_cache(tmp_path: Path) -> None:
    """Base is the share of the GPU less what the cache got, and the graphs lie on top of it until 0.19."""
    calibration = made(tmp_path, DENSE, "--gpu-memory", "24564MiB")
    budget = math.ceil(0.9 * CARD) - from_gib(10.39)
    assert from_gib(calibration.constants.base_vram_gb) == pytest.approx(budget + 1.18 * GIB, abs=0.011 * GIB)
    assert calibration.constants.kv_cache_gb_per_10k == pytest.approx(10.39 / 56736 * 10_000, rel=1e-3)
    assert calibration.metadata.kv_blocks is not None
    assert (calibration.metadata.kv_blocks.size, calibration.metadata.quality.valid_to) == (32, 8192)
    notes = " ".join(calibration.metadata.quality.notes)
    assert "0.9 (the default of vLLM 0.13.0: its options set none) of the 23.99 GiB of --gpu-memory" in notes
    assert "32 at most" in notes
    assert [check(tmp_path, 8192, size) for size in (CARD, 14 * GIB, 12 * GIB)] == [0, 3, 3]
    assert check(tmp_path, 16384, CARD) == 4


@pytest.mark.parametrize(
    ("version", "arguments", "said"),
    [
        ("0.19.0", "'model': 'm'", "0.9 (the default of vLLM 0.19.0"),
        ("0.20.0", "'model': 'm'", "0.92 (the default of vLLM 0.20.0"),
        ("0.25.1", "'model': 'm', 'gpu_memory_utilization': 0.87", "0.87 (as the log says)"),
    ],
)
def test_a_share_is_a_default_only_where_the_log_shows_that_none_was_set(
    tmp_path: Path, version: str, arguments: str, said: str
) -> None:
    text = log(version, 56736, 56736 / 8192, arguments=arguments)
    assert said in " ".join(made(tmp_path, text, "--gpu-memory", "24564MiB").metadata.quality.notes)


@pytest.mark.parametrize(
    ("text", "arguments", "code", "error", "message", "hint"),
    [
        (DENSE, (), 5, "log-lacks-figures", "what was requested of the GPU", "--gpu-memory SIZE"),
        (log("0.13.0", 56736, 6.93, arguments=None), (), 5, "log-lacks-figures", "which share of the GPU", "--total SIZE"),
        (
            log("0.13.0", 56736, 6.93, arguments=None), ("--gpu-memory", "24564MiB"), 5, "log-lacks-figures",
            "which share of the GPU", "--total SIZE",
        ),
        (log("0.8.5", 56736, 6.93, available=None), ("--gpu-memory", "24564MiB"), 5, "log-lacks-figures", "available", "0.9.1"),
        (
            DENSE.replace("Graph capturing finished", "Graphs"), ("--gpu-memory", "24564MiB"), 5, "log-lacks-figures",
            "CUDA graphs", "--total",
        ),
        (
            log("0.25.1", 56736, 6.93, "Initial free memory 23.1 GiB, reserved 10.39 GiB memory for KV Cache as specified by",
                available=None), ("--gpu-memory", "24564MiB"), 5, "log-lacks-figures", "given in bytes", "--total",
        ),
        (
            log("0.25.1", 56736, 6.93, arguments="'kv_cache_memory_bytes': 11156177510"), (), 5, "log-lacks-figures",
            "given in bytes", "--total",
        ),
        (
            log("0.13.0", 56736, 6.93).replace("kv_cache_dtype", "pipeline_parallel_size=2, kv_cache_dtype"),
            ("--gpu-memory", "24564MiB"), 5, "log-lacks-figures", "stage", "DEBUG",
        ),
        (DENSE, ("--gpu-memory", "16GiB"), 65, "gpu-memory-contradicts", "needed", "nvidia-smi"),
        (DENSE, ("--gpu-memory", "96GiB"), 5, "gpu-memory-contradicts", "no activation", "not the sum"),
        (DENSE, ("--gpu-memory", "24GB"), 2, "decimal-size", "decimal", "MiB"),
        (DENSE, ("--total", "19GiB"), 65, "total-too-small", "KV cache and weights", "a total is"),
        (
            log(
                "0.25.1", 56736, 6.93, "Estimated CUDA graph memory: 0.83 GiB total",
                "CUDA graph memory profiling is enabled (default since v0.21.0). The current --gpu-memory-utilization=0.9000 "
                "is equivalent to --gpu-memory-utilization=0.8647 without CUDA graph memory profiling.", arguments=None,
            ),
            ("--gpu-memory", "48GiB"), 65, "gpu-memory-contradicts", "23.31 GiB to 23.72 GiB", "nvidia-smi",
        ),
    ],
)  # fmt: skip
def test_what_a_log_lacks_is_named_with_the_option_that_tells_it_and_what_contradicts_it_is_refused(
    tmp_path: Path, text: str, arguments: tuple[str, ...], code: int, error: str, message: str, hint: str
) -> None:
    got = refused(tmp_path, text, *arguments)
    assert got[:2] == (code, error)
    assert message in got[2]
    assert hint in got[3]


def test_what_the_processes_held_answers_without_a_share(tmp_path: Path) -> None:
    for text in (
        log("0.13.0", 56736, 6.93, arguments=None),
        log("0.25.1", 56736, 6.93, arguments="'kv_cache_memory_bytes': 11156177510"),
    ):
        calibration = made(tmp_path, text, "--total", "22700MiB")
        fixed = calibration.metadata.breakdown_gb.fixed_cache or 0.0
        beside = from_gib(calibration.constants.base_vram_gb - fixed)
        assert beside == pytest.approx((22700 << 20) - 10.39 * GIB, abs=0.011 * GIB)


def test_a_log_that_states_the_gpu_needs_nothing_more_for_its_full_length(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden" / "vllm" / "0.28.0" / "v1-auto-fit.log"
    calibration = made(tmp_path, golden.read_text())
    blocks, (facts,) = calibration.metadata.kv_blocks, json.loads(golden.with_suffix(".json").read_text())["loads"]
    assert blocks is not None
    most = blocks.of_sequence(facts["max_model_len"]) * blocks.bytes
    assert most == pytest.approx(facts["workers"][0]["kv_available_bytes"] / facts["max_concurrency"], rel=0.006)


def test_the_memory_of_a_gpu_is_of_no_use_to_other_logs(tmp_path: Path) -> None:
    golden = Path(__file__).parents[1] / "golden" / "vllm" / "0.32.0-cpu" / "engine-0.log"
    assert refused(tmp_path, golden.read_text(), "--gpu-memory", "24GiB")[:2] == (2, "no-share")


PAGE, LENGTH, WINDOW_BLOCKS = 2 << 20, 8192, (1024 - 1 + 2048) // 16 + 1


def of_sequence(context: int) -> int:
    """Blocks of a model with one group of layers that keep everything and five of windows (kv_cache_utils.py)."""
    return -(-context // 16) + 5 * min(-(-context // 16), WINDOW_BLOCKS)


@pytest.mark.parametrize(
    ("version", "named"), [("0.25.1", ""), ("0.25.1", ", 'block_size': 16"), ("0.17.0", ""), ("0.17.0", ", 'block_size': 16")]
)
def test_a_model_with_windows_is_never_said_to_fit_where_it_does_not(tmp_path: Path, version: str, named: str) -> None:
    """Since 0.20 tokens are the concurrency times the length, so that its log reads like that of any other model."""
    number = 4 * GIB // PAGE
    times = number / of_sequence(LENGTH)
    tokens = number // 6 * 16 if version == "0.17.0" else int(times * LENGTH)
    text = log(version, tokens, times, available=4.0, arguments=f"'gpu_memory_utilization': 0.7, 'max_num_seqs': 4{named}")
    calibration = made(tmp_path, text, "--gpu-memory", "24564MiB")
    base = from_gib(calibration.constants.base_vram_gb - (calibration.metadata.breakdown_gb.fixed_cache or 0.0))
    assert calibration.metadata.of_one_length
    assert any("how the KV cache of one sequence grows" in note for note in calibration.metadata.quality.notes)
    whole, codes = of_sequence(LENGTH) * PAGE, set()
    for context in (512, 2048, 4096, LENGTH):
        needs = base + (of_sequence(context) + 1) * PAGE
        for free in range(base, base + 5 * GIB, GIB // 4):
            code = check(tmp_path, context, free)
            codes.add((context, code))
            assert code != 0 or free >= needs, (context, free)
            assert code != 3 or free <= base + 1.06 * whole * context / LENGTH + GIB, (context, free)
    assert {(2048, 0), (2048, 3), (2048, 4), (LENGTH, 0), (LENGTH, 3)} <= codes
    assert (LENGTH, 4) not in codes


#: Blocks of a sequence of ``context`` tokens, by what the layers of a model keep of them.
KEPT: dict[str, Callable[[int], int]] = {
    "every token": lambda context: -(-context // 16),
    "windows": of_sequence,
    "states": lambda context: -(-context // 16) + 40,
    "small states": lambda context: -(-context // 16) + 1,
    "windows alone": lambda context: min(-(-context // 16), WINDOW_BLOCKS),
}


def made_of_two(tmp_path: Path, kept: str, version: str, lengths: tuple[int, int], cache: float = 3.97) -> Calibration:
    """The calibration of two starts that differ in their length, as their INFO logs describe them."""
    paths = []
    for length in lengths:
        number = int(cache * GIB) // PAGE
        times = number / KEPT[kept](length)
        arguments = f"'max_model_len': {length}, 'gpu_memory_utilization': 0.7, 'max_num_seqs': 4"
        text = log(version, int(times * length), times, available=cache, arguments=arguments, context=length)
        paths.append(tmp_path / f"{length}.log")
        paths[-1].write_text(text, encoding="utf-8")
    store = ("--gpu-memory", "24564MiB", "--store", str(tmp_path / "store"), "--json")
    result = CliRunner().invoke(cli, ["import", *map(str, paths), *store])
    assert result.exit_code == 0, result.output
    return Store(tmp_path / "store").read(Path(json.loads(result.stdout)["data"]["artifact"]))


@pytest.mark.parametrize("lengths", [(2048, 8192), (8192, 2048), (4096, 32768), (1000, 8000), (8192, 12288)])
@pytest.mark.parametrize("kept", KEPT)
def test_two_logs_of_different_length_bound_every_length_from_above(
    tmp_path: Path, kept: str, lengths: tuple[int, int]
) -> None:
    """A window may end between them, so that no line through both is exact."""
    calibration = made_of_two(tmp_path, kept, "0.25.1", lengths)
    blocks, full = calibration.metadata.kv_blocks, max(lengths)
    assert blocks is not None
    assert calibration.metadata.bounded
    for context in (1, 16, 512, 1000, 2048, 3000, 4096, 6000, 8192, 12000, full):
        if context <= full:
            assert blocks.of_sequence(context) * blocks.bytes >= KEPT[kept](context) * PAGE, context
    assert blocks.of_sequence(full) * blocks.bytes <= 1.06 * KEPT[kept](full) * PAGE
    assert [predict(calibration, context).at_most for context in (300, min(lengths), full)] == [True, True, False]
    (note,) = (one for one in calibration.metadata.quality.notes if "how the KV cache" in one)
    assert kept == "small states" or ("take their share" in note) is (kept == "every token"), note
    assert ("do not show that it grows with the tokens alone" in note) is ("take their share" not in note), note


@pytest.mark.parametrize("version", ["0.25.1", "0.18.0"])
def test_where_every_token_is_kept_two_logs_are_exact_but_for_their_rounding(tmp_path: Path, version: str) -> None:
    calibration = made_of_two(tmp_path, "every token", version, (2048, 8192), cache=6.97)
    blocks = calibration.metadata.kv_blocks
    assert blocks is not None
    for context in (512, 2048, 4096, 8192):
        taken = blocks.of_sequence(context) * blocks.bytes
        assert taken <= (KEPT["every token"](context + 256) + 0.012 * KEPT["every token"](8192)) * PAGE, context
    base = from_gib(calibration.constants.base_vram_gb - (calibration.metadata.breakdown_gb.fixed_cache or 0.0))
    codes = [check(tmp_path, 2048, base + share * GIB // 8) for share in (8, 7, 1)]
    assert codes == [0, 0, 3], "one log of 8,192 tokens says 4 where 2,048 take a quarter of it"


def test_a_block_size_that_was_asked_for_does_not_make_a_model_with_windows_dense(tmp_path: Path) -> None:
    """Its tokens may be whole blocks by chance; the proportional cache of a short context is less than it takes."""
    times = 11360 / LENGTH
    text = log("0.25.1", 11360, times, available=4.0, arguments="'block_size': 16, 'gpu_memory_utilization': 0.7")
    blocks = made(tmp_path, text, "--gpu-memory", "24564MiB").metadata.kv_blocks
    assert blocks is not None
    assert blocks.of_sequence(1024) * blocks.bytes == pytest.approx(4.0 * GIB / times, rel=0.01)


def test_whole_sequences_alone_are_not_taken_for_blocks(tmp_path: Path) -> None:
    text = log("0.25.1", 8192 * 12, 12.0, available=4.0, arguments="'gpu_memory_utilization': 0.7")
    assert refused(tmp_path, text, "--gpu-memory", "24564MiB")[:2] == (5, "no-blocks")


def test_the_screen_says_that_the_cache_is_a_bound(tmp_path: Path) -> None:
    (tmp_path / "vllm.log").write_text(log("0.25.1", 11359, 1.39, available=4.0), encoding="utf-8")
    arguments = ["import", str(tmp_path / "vllm.log"), "--gpu-memory", "16GiB", "--store", str(tmp_path / "store")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    assert "at most for a sequence of up to 8,192 tokens" in result.output
    for context, bound in (("2048", True), ("8192", False)):
        shown = CliRunner().invoke(cli, ["predict", "acme/Tern-8B", "--ctx", context, "--store", str(tmp_path / "store")])
        assert ("an upper bound" in shown.output) is bound


@pytest.fixture
def bounded(tmp_path: Path) -> Path:
    """A store whose calibration is known for 8,192 tokens alone: 4 GiB of cache hold 1.39 of such sequences."""
    text = log("0.25.1", 11359, 1.39, available=4.0, arguments="'gpu_memory_utilization': 0.7")
    made(tmp_path, text, "--gpu-memory", "24564MiB")
    return tmp_path / "store"


def said(store: Path, *arguments: str) -> str:
    return CliRunner().invoke(cli, [*arguments, "--store", str(store)]).output


def may_fit(store: Path) -> str:
    """Free memory with which 2,048 tokens may fit, MiB: above their share of the cache, below that of the full length."""
    (path,) = store.rglob("*.yaml")
    calibration = Store(store).read(path)
    needed = predict(calibration, 2048).total_bytes
    return f"{(needed - GIB) >> 20}MiB"


def test_no_command_shows_a_bound_as_a_figure(bounded: Path) -> None:
    free, model = may_fit(bounded), "acme/Tern-8B"
    checked = CliRunner().invoke(cli, ["check", model, "--ctx", "2048", "--available", free, "--store", str(bounded)])
    assert checked.exit_code == 4
    assert "It needs at most" in " ".join(checked.output.split())
    predicted = said(bounded, "predict", model, "--ctx", "2048", "--available", free)
    assert "total, at most" in predicted
    assert "free: UNKNOWN, it may fit or not: 2,048 tokens take at most" in predicted
    assert ("beyond that, at most" in predicted, "good to" in predicted) == (True, False), "a bound has no side below it"
    assert "at most" in said(bounded, "show", model)
    assert "at most" in said(bounded, "list")
    assert "at most" not in said(bounded, "predict", model, "--ctx", "8192")
    exported = said(bounded, "export", "vllm", f"{model}@2048", "--available", "24564MiB")
    assert "2048 tokens: at most" in exported
    allocated = said(bounded, "allocate", model, "--ctx", "2048", "--available", "24564MiB")
    assert "to spare: at most" in allocated


def test_a_plan_and_an_export_say_that_their_figure_is_a_bound(bounded: Path) -> None:
    model, free = "acme/Tern-8B@2048", ("--available", "24564MiB")
    planned = said(bounded, "plan", model, "--available", may_fit(bounded)).splitlines()
    assert any(line.startswith("acme/Tern-8B ") and "  at most " in line for line in planned), "its row, not the remark below"
    for spec, warned in ((model, True), ("acme/Tern-8B@8192", False)):
        exported = CliRunner().invoke(cli, ["export", "vllm", spec, *free, "--store", str(bounded)])
        assert exported.exit_code == 0, exported.output
        assert ("acme/Tern-8B at 2,048 tokens takes at most what is set aside for it" in exported.stderr) is warned


@pytest.mark.parametrize("form", [(), ("--markdown",)])
def test_a_difference_says_which_side_is_a_bound(bounded: Path, tmp_path: Path, form: tuple[str, ...]) -> None:
    (bound,) = bounded.rglob("*.yaml")
    (exact := tmp_path / "exact").mkdir()
    made(exact, DENSE, "--gpu-memory", "24564MiB")
    (dense,) = exact.rglob("*.yaml")
    sides = {(bound, dense): "the old", (dense, bound): "the new", (dense, dense): None}
    for (old, new), who in sides.items():
        text = " ".join(said(bounded, "diff", str(old), str(new), *form).split())
        assert (f"base and KV cache of {who} calibration are bounds: at most these" in text) is (who is not None)
        assert ("at most" in text) is (who is not None), text


def test_an_allocation_by_a_bound_is_that_of_the_full_length(bounded: Path) -> None:
    """Never less than a sequence takes: that is not known, and the full length is more."""
    sizes = [
        json.loads(said(bounded, "allocate", "acme/Tern-8B", "--ctx", context, "--available", "24564MiB", "--json"))["data"]
        for context in ("512", "2048", "8192")
    ]
    assert len({size["kv_cache_bytes"] for size in sizes}) == 1
    assert sizes[0]["kv_cache_bytes"] >= 4 * GIB / 1.395


@pytest.mark.requires("quickjs")
def test_the_page_answers_as_check_does_where_the_cache_is_a_bound(bounded: Path) -> None:
    (path,) = bounded.rglob("*.yaml")
    calibration = Store(bounded).read(path)
    rules = policy_of("vllm")
    table = planner_table(calibration, rules)
    script = planner_script(table=table)
    words = set()
    for context in table.contexts:
        for free in range(10 * GIB, 24 * GIB, GIB // 8):
            page = json.loads(script.eval(f"JSON.stringify(planner.look(table, 1, 1, {context}, {free}))"))
            truth = judge(calibration, context, 1, (free,), rules)
            assert (page["verdict"], page["bounded"]) == (truth.verdict, context < 8192), (context, free)
            words.add(page["verdict"])
            assert not (page["verdict"] == "unknown" and page["short"])
    assert words == {"fits", "offload", "unknown"}


@pytest.mark.requires("quickjs")
def test_the_largest_context_of_the_page_is_none_that_only_may_fit(bounded: Path) -> None:
    """Not known where none fits and some may; else one that check says fits, and no larger one does."""
    (path,) = bounded.rglob("*.yaml")
    calibration = Store(bounded).read(path)
    rules = policy_of("vllm")
    table = planner_table(calibration, rules)
    script = planner_script(table=table)
    seen = set()
    for free in range(10 * GIB, 24 * GIB, GIB // 8):
        largest = json.loads(script.eval(f"JSON.stringify(planner.largest(table, 1, 1, {free}))"))
        words = {context: judge(calibration, context, 1, (free,), rules).verdict for context in table.contexts}
        fitting = [context for context, word in words.items() if word == "fits"]
        may = "unknown" in words.values()
        assert largest == (max(fitting) if fitting else None if may else 0), (free, words)
        seen.add(largest)
    assert seen == {0, None, 8192}


def test_plan_ends_with_zero_and_says_what_is_not_known_and_why(bounded: Path) -> None:
    """Where check ends with 4: its answer is a table, and the row says what is a bound."""
    free = may_fit(bounded)
    for context, why in (("2048", "2,048 tokens take at most the 3,235.0 MiB"), ("8192", "a shorter context may fit or not")):
        asked = ["plan", f"acme/Tern-8B@{context}", "--available", free, "--store", str(bounded)]
        planned = CliRunner().invoke(cli, asked)
        assert planned.exit_code == 0
        assert f"not known for acme/Tern-8B: {why}" in " ".join(planned.output.split())
        (memory,) = json.loads(CliRunner().invoke(cli, [*asked, "--json"]).stdout)["data"]["memories"]
        assert [(row["largest_context"], row["at_most"]) for row in memory["models"]] == [(None, context == "2048")]
