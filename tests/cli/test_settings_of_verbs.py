"""A verb answers about what it was asked, or not at all: an option, its variable and its key are never passed over.

What a setting changes is either calculated (and marked so), taken from a variant that has it, or refused with 4.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import harness
from harness.errors import UnknownVerdictError, UsageError
from harness.headers import planning
from harness.inventory.machine import LocalMachine
from harness.model.gpu import LocalGpu
from harness.prediction.settings import AskedSettings, derive
from harness.store.store import Store
from tests.support.calibrations import on_host, store_of, with_settings
from tests.support.command import Command
from tests.support.gguf_file import write_gguf
from tests.support.vllm_artifacts import vllm_calibration
from tests.unit.prediction.test_tuning import MADE_UP

#: A question of each verb, and with which option it has the setting of each name.
QUESTIONS = {
    "check": "check made-up@8192",
    "plan": "plan made-up",
    "predict": "predict made-up@8192",
    "tune": "tune made-up@8192",
    "export": "export llama-server made-up",
    "serve": "serve made-up@8192 --on-offload refuse",
    "allocate": "allocate acme/tern-8b@8192",
}
OPTIONS = {("tune", "num_parallel"): "slots", ("export", "num_parallel"): "slots", ("allocate", "num_parallel"): "concurrency"}
#: Settings, and whether they follow from the calibration.
SETTINGS = [
    ("num_parallel", 9, True),
    ("kv_cache_type", "q8_0", True),
    ("kv_cache_type", "f32", False),
    ("kv_cache_type", "fp8", False),
    ("flash_attention", "off", False),
    ("num_batch", 4096, False),
    ("available", "5632MiB", True),
]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    store_of(tmp_path / "store", MADE_UP)
    vllm = vllm_calibration()
    Store(tmp_path / "store").write(tmp_path / "store/vllm/acme--tern-8b.yaml", vllm)
    return Command(tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize("verb", QUESTIONS)
@pytest.mark.parametrize(("name", "value", "follows"), SETTINGS)
def test_no_verb_passes_over_a_setting(
    run: Command, tmp_path: Path, verb: str, name: str, value: object, *, follows: bool
) -> None:
    """By its option, its variable or its key: the same answer, about it; 4 where nothing follows for it."""
    words = QUESTIONS[verb].split()
    words += [] if name == "available" else ["--available", "79GiB" if verb == "allocate" else "24GiB"]
    without = run(*words)
    option = OPTIONS.get((verb, name), name).replace("_", "-")
    typed = run(*words, f"--{option}", str(value))
    variable = run(*words, **{f"HARNESS_{name.upper()}": str(value)})
    (tmp_path / "harness.toml").write_text(f"{name} = {value!r}\n")
    assert typed == variable == run(*words)
    if not follows or (verb, name) == ("allocate", "kv_cache_type"):
        assert (typed.returncode, "figures do not hold" in typed.stdout + typed.stderr) == (4, verb != "allocate"), typed
    else:
        assert typed != without
    if value == "q8_0" and verb != "allocate":
        assert "derived" in typed.stdout + typed.stderr


@pytest.mark.parametrize("verb", [*QUESTIONS, "estimate", "bisect"])
def test_an_empty_variable_that_an_answer_depends_on_is_refused(run: Command, verb: str) -> None:
    words = {"estimate": "estimate x.gguf", "bisect": "bisect x --good 1 --bad 2", **QUESTIONS}[verb].split()
    for name in ("NUM_PARALLEL", "KV_CACHE_TYPE", "FLASH_ATTENTION", "NUM_BATCH", *(() if verb == "allocate" else ("ENGINE",))):
        done = run(*words, **{f"HARNESS_{name}": ""})
        assert (done.returncode, f"HARNESS_{name} is empty" in done.stderr) == (2, True), done


def test_an_estimate_is_of_the_cache_and_the_batch_that_are_set(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"llama.embedding_length": 512, "llama.attention.head_count": 8, "llama.attention.head_count_kv": 2}
    write_gguf(tmp_path / "new.gguf", train_context=16_384, extra=shape)
    monkeypatch.setattr(planning.Planner, "_run", lambda *_: None)  # by the formula: no engine is needed
    words = ("estimate", "new.gguf@4096", "--available", "24GiB", "--json")
    figures = [
        json.loads(done.stdout)["data"]["rows"]
        for done in (run(*words), run(*words, HARNESS_KV_CACHE_TYPE="q8_0"), run(*words, HARNESS_NUM_BATCH="2048"))
    ]
    assert [rows[0]["kv_cache_type"] for rows in figures] == ["f16", "q8_0", "f16"]
    sizes = [rows[0]["contexts"][0]["required_bytes"] for rows in figures]
    assert sizes[1] < sizes[0] < sizes[2]


def test_predict_answers_about_a_cache_of_another_type_and_says_that_it_was_calculated(run: Command) -> None:
    measured = json.loads(run("predict", "made-up@8k", "--json").stdout)["data"]
    done = run("predict", "made-up@8k", "--json", HARNESS_KV_CACHE_TYPE="q8_0")
    derived = json.loads(done.stdout)["data"]
    assert (measured["source"], derived["source"]) == ("measured", "derived")
    assert derived["context_cache_bytes"] == pytest.approx(measured["context_cache_bytes"] * 34 / 64)
    assert derived["uncertainty_bytes"] > measured["uncertainty_bytes"]
    text = run("predict", "made-up@8k", "--kv-cache-type", "q8_0")
    assert "made-up (derived) at 8,192 tokens" in text.stdout
    assert "derived: KV cache q8_0 from f16" in text.stderr


def test_predict_takes_the_variant_that_has_the_settings_whatever_card_it_is_of(run: Command, tmp_path: Path) -> None:
    store_of(tmp_path / "store", small=with_settings(MADE_UP, kv_cache_type="q8_0"))
    asked = json.loads(run("predict", "made-up@8k", "--kv-cache-type", "q8_0", "--json").stdout)["data"]
    assert asked["source"] == "measured"
    assert "made-up@small at" in run("predict", "made-up@8k", "--kv-cache-type", "q8_0").stdout
    assert "made-up at" in run("predict", "made-up@8k").stdout


def test_the_only_calibration_of_a_model_answers_for_no_other_settings(run: Command, tmp_path: Path) -> None:
    store_of(tmp_path / "lone", small=with_settings(MADE_UP, kv_cache_type="q8_0"))
    done = run("predict", "made-up@8k", "--flash-attention", "off", "--store", "lone")
    assert (done.returncode, done.stdout) == (4, "")
    assert "made-up@small was calibrated with flash attention enabled, not disabled: its figures do not hold" in done.stderr
    assert "harness calibrate made-up --flash-attention off --variant fl-off --store lone" in done.stderr
    assert run("predict", "made-up@8k", "--store", "lone").returncode == 0


def test_predict_judges_the_hosts_side_by_the_host_memory_that_is_given(run: Command, tmp_path: Path) -> None:
    words = ("predict", "made-up@8k", "--available", "4GiB", "--host-available")
    short = run(*words, "100MiB")
    assert (short.returncode, "host memory lacks" in short.stdout) == (0, True), short
    assert "lacks" not in run(*words, "64GiB").stdout
    assert "with 4,096.0 MiB free and 64.0 GiB of host memory: 17 of 29 layers stay on the GPU" in run(*words, "64GiB").stdout
    store_of(tmp_path / "store", on_host(MADE_UP))
    assert "\nUNKNOWN: calibrated in host memory" in run("predict", "made-up@8k", "--available", "24GiB,24GiB").stdout
    for verb, status in (("check", 3), ("predict", 0)):
        done = run(verb, "made-up@8k", "--available", "24GiB", "--host-available", "100MiB")
        assert (done.returncode, "does not fit" in done.stdout or "CPU OFFLOAD LIKELY" in done.stdout) == (status, True), done


def test_a_cache_type_of_another_engine_is_another_cache(run: Command) -> None:
    """It has no ggml block, so nothing had compared it: a calibration of f16 said FITS of it."""
    for verb in ("check", "predict", "plan"):
        done = run(verb, "made-up@8192", "--kv-cache-type", "fp8", "--available", "24GiB")
        assert (done.returncode, "KV cache f16, not fp8" in done.stdout + done.stderr) == (4, True), done


def test_a_program_predicts_as_the_command_line_does(tmp_path: Path) -> None:
    store_of(tmp_path, MADE_UP)
    for model in ("made-up", MADE_UP):
        found = harness.predict(model, 8192, kv_cache_type="q8_0", store=tmp_path)
        assert (found.source, found.warnings) == ("derived", ("derived: KV cache q8_0 from f16, by the sizes of their blocks",))
        assert harness.predict(model, 8192, store=tmp_path).source == "measured"
        assert harness.predict(model, 8192, num_parallel=4, store=tmp_path).source == "derived"
        for settings in ({"flash_attention": "disabled"}, {"num_batch": 4096}, {"kv_cache_type": "f32"}):
            with pytest.raises(UnknownVerdictError, match="was calibrated with"):
                harness.predict(model, 8192, store=tmp_path, **settings)
        with pytest.raises(UsageError, match="not a KV cache type"):
            harness.predict(model, 8192, kv_cache_type="q8", store=tmp_path)


def test_a_cache_of_the_models_own_type_is_the_one_that_is_asked_for_as_auto() -> None:
    """A log of vLLM calls it `bfloat16`; where it was calibrated with `auto`, `kv_cache_type = "auto"` is answered."""
    own = with_settings(MADE_UP, kv_cache_type="bfloat16")
    obstacles = [
        derive(calibration, AskedSettings(kv_cache_type="auto"), ggml_caches=ggml).obstacles
        for calibration, ggml in ((own, False), (own, True), (with_settings(MADE_UP, kv_cache_type="fp8"), False))
    ]
    assert [bool(one) for one in obstacles] == [False, True, True]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--gpus none", "calibrated on NVIDIA Test A, and --gpus none leaves it in host memory"),
        ("--env LLAMA_ARG_N_GPU_LAYERS=10", "not calibrated with LLAMA_ARG_N_GPU_LAYERS=10 of this start"),
        ("--env LLAMA_ARG_FLASH_ATTN=off", "calibrated with flash attention enabled, not disabled"),
        ("--env LLAMA_ARG_N_PARALLEL=8", "LLAMA_ARG_N_PARALLEL=8 of this start"),
    ],
)
def test_a_start_is_judged_with_its_own_variables_and_gpus(run: Command, given: str, said: str) -> None:
    words = ("serve", "made-up@8192", "--available", "24GiB", *given.split())
    refused = run(*words, "--on-offload", "refuse")
    assert (refused.returncode, said in refused.stderr, "FITS" in refused.stderr) == (4, True, False), refused
    assert f"hint: harness calibrate made-up {given}" in refused.stderr
    started = run(*words)  # as before, with what the calibration says of how it is started, after a warning
    assert (said in started.stderr, "the weights of made-up were not found" in started.stderr) == (True, True), started


@pytest.mark.parametrize("given", ["--n-cpu-moe 2", "--gpu-layers 10 --available 24GiB,24GiB"])
def test_no_context_is_said_to_fit_with_layers_placed_so_that_nothing_is_known(run: Command, given: str) -> None:
    """What fits by the engine's own rule is no answer about layers that are placed by hand."""
    words = (*given.split(), *(() if "--available" in given else ("--available", "24GiB")), "--json")
    checked = json.loads(run("check", "made-up@8192", *words).stdout)["data"]
    assert (checked["verdict"], checked["max_context"]) == ("unknown", None)
    (row,) = json.loads(run("plan", "made-up", *words).stdout)["data"]["memories"][0]["models"]
    assert (row["verdict"], row["largest_context"], bool(row["reason"])) == ("unknown", None, True)


def test_what_a_start_is_not_handed_has_no_say_in_it(run: Command) -> None:
    done = run("serve", "made-up@8192", "--available", "24GiB", "--on-offload", "refuse", LLAMA_ARG_N_GPU_LAYERS="10")
    assert "FITS" in done.stderr


def test_several_gpus_are_in_view_where_several_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    four = tuple(LocalGpu(key=str(index), name="T", uuid=f"GPU-{index}") for index in range(4))
    monkeypatch.setattr("harness.meters.nvml.gpus", lambda: four)
    assert LocalMachine("0, GPU-2").nvidia == (four[0], four[2])
    assert "there is no GPU 0,7" in str(LocalMachine("0,7").nvidia)
