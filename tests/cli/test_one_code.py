"""The same thing has the same word and the same status, whatever verb is asked."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path

import pytest

from harness.inventory.digests import cached_sha256
from harness.model.record import Model
from tests.support.calibrations import made_up, on_host, store_of
from tests.support.command import Command

#: What is asked of one model, with all that a verb needs beside it.
VERDICTS = ("check", "plan", "export compose", "tune")
FIGURES = ("predict", "show", "recalibrate", "rm", "share")
OTHERS = ("serve", "allocate", "estimate", "calibrate", "parse", "import", "sweep", "fit")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    store_of(tmp_path / "store", on_host(made_up()))
    return Command(tmp_path, monkeypatch, capfd)


def said(run: Command, verb: str, *rest: str) -> tuple[int, str]:
    done = run(*verb.split(), *rest)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("verb", [*VERDICTS, *FIGURES, *OTHERS])
def test_an_empty_operand_is_a_usage_error(run: Command, verb: str) -> None:
    """An unset variable of a script: it stands for no model, no folder and no default."""
    status, text = said(run, verb, "")
    assert (status, " is empty" in text) == (2, True), text


def test_an_empty_variable_is_an_empty_operand(run: Command) -> None:
    """A CI job's `MODEL=$UNSET make calibrate` must not measure the default model, and replace its calibration."""
    done = run("calibrate", "--dry-run", HARNESS_MODEL="")
    assert (done.returncode, "HARNESS_MODEL is empty" in done.stderr) == (2, True), done
    assert run("show", "made-up", HARNESS_MODEL="").returncode == 0, "a model that is typed goes before the variable"


@pytest.mark.parametrize(
    ("verb", "name"),
    [
        *itertools.product(["check", "plan", "tune", "export compose", "predict", "estimate"], ["AVAILABLE", "STORE"]),
        *[("check", name) for name in ("NUM_PARALLEL", "KV_CACHE_TYPE", "FLASH_ATTENTION", "ENGINE")],
        *[("calibrate", name) for name in ("CTX", "GPUS", "IMAGE", "ENGINE_BINARY")],
    ],
)
def test_an_empty_variable_is_no_answer_about_something_else(run: Command, verb: str, name: str) -> None:
    """Taken as unset, `HARNESS_AVAILABLE=$CARD` of a job without CARD judges the memory of the machine that runs the job."""
    done = run(*verb.split(), "made-up", **{f"HARNESS_{name}": ""})
    assert (done.returncode, f"HARNESS_{name} is empty" in done.stderr, "unset it" in done.stderr) == (2, True, True), done


def test_what_is_typed_goes_before_an_empty_variable(run: Command, tmp_path: Path) -> None:
    assert run("check", "made-up@8192", "--available", "64GiB", HARNESS_AVAILABLE="").returncode == 0
    for words in (("list", "--store", "store"), ("--store", "store", "list")):
        done = run(*words, HARNESS_STORE="")
        assert (done.returncode, "made-up" in done.stdout) == (0, True), done


@pytest.mark.parametrize("verb", ["rename made-up", "diff made-up", "check made-up@8192"])
def test_an_empty_operand_behind_another_is_one_too(run: Command, tmp_path: Path, verb: str) -> None:
    assert said(run, verb, "")[0] == 2
    assert (tmp_path / "store" / "llama-server" / "made-up.yaml").exists()


@pytest.mark.parametrize("verb", [*VERDICTS, "predict", "serve", "estimate", "allocate"])
def test_an_empty_amount_of_memory_is_a_usage_error(run: Command, verb: str) -> None:
    status, text = said(run, verb, "made-up@8192", "--available", "")
    assert (status, "not a size: ''" in text) == (2, True), text


@pytest.mark.parametrize("verb", ["check", "plan", "serve", "export compose", "tune", "estimate", "calibrate"])
def test_an_unknown_value_of_a_setting_is_a_usage_error_with_the_known_ones(run: Command, verb: str) -> None:
    status, text = said(run, verb, "made-up", "--kv-cache-type", "q8")
    assert (status, "'q8' is not a KV cache type; known types: f32, f16" in text) == (2, True), text


@pytest.mark.parametrize(
    "path", ["/no/such/made-up.gguf", "/no/such/made-up.gguf@q8", "./made-up.gguf", "~/made-up", "/no/such/new"]
)
@pytest.mark.parametrize("verb", [*VERDICTS, *FIGURES[:-1], "serve", "allocate", "rename x", "diff made-up"])
def test_a_path_to_no_file_is_not_found_whatever_is_calibrated_under_its_name(
    run: Command, tmp_path: Path, verb: str, path: str
) -> None:
    default = tmp_path / "store" / "llama-server" / "made-up.yaml"
    default.with_name("made-up@q8.yaml").write_bytes(default.read_bytes())
    words = ("rename", path, "x") if verb == "rename x" else (*verb.split(), path)
    done = run(*words, *(("--ctx", "8192") if verb in ("check", "predict", "serve", "allocate") else ()))
    assert (done.returncode, f"there is no file {path}" in done.stderr) == (66, True), done.stderr
    assert default.exists()
    assert default.with_name("made-up@q8.yaml").exists()


def test_a_file_is_answered_for_by_the_variant_of_its_own_weights(run: Command, tmp_path: Path) -> None:
    """Two files of one name: each has its own figures, with the variant named or not, and none those of the other."""
    own = {}
    for name, layers in (("one", 20), ("two", 30)):
        path = tmp_path / name / "made-up.gguf"
        path.parent.mkdir()
        path.write_bytes(name.encode())
        digest = f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"
        own[name] = on_host(made_up(model=Model(name=path.name, digest=digest, train_context=131072, layers=layers)))
    store_of(tmp_path / "store", own["one"], two=own["two"])
    for name, layers in (("one", 20), ("two", 30)):
        mine = f"{name}/made-up.gguf"
        assert json.loads(run("show", mine, "--json").stdout)["data"]["calibration"]["metadata"]["model"]["layers"] == layers
        assert run("check", f"{mine}@8192", "--measured-only").returncode == 0
        assert run("predict", f"{mine}@8192", "--measured-only").returncode == 0
    for spelled in (("one/made-up.gguf@two",), ("one/made-up.gguf", "--variant", "two")):
        done = run("check", *spelled, "--ctx", "8192", "--measured-only")
        assert (done.returncode, "other weights" in done.stdout) == (4, True), done
        assert run("predict", *spelled, "--ctx", "8192", "--measured-only").returncode == 66


@pytest.mark.parametrize(
    ("question", "command"),
    [
        (("check", "m@8192", "--flash-attention", "off"), "m.gguf --flash-attention off --variant fl-off"),
        (("plan", "llama-server/m", "--num-batch", "1024"), "m.gguf --num-batch 1024 --variant nu-1024"),
        (("tune", "m", "--flash-attention", "off"), "m.gguf --flash-attention off --variant fl-off"),
        (("check", "m@new@8192"), "m.gguf --variant new"),
        (("check", "m@8192", "--variant", "new"), "m.gguf --variant new"),
        (("check", "other/m.gguf@8192", "--measured-only"), "other/m.gguf --variant d9298a10"),
    ],
)
def test_the_command_that_would_answer_names_the_file_and_overwrites_nothing(
    run: Command, tmp_path: Path, question: tuple[str, ...], command: str
) -> None:
    """A name of the store is none that an engine loads, and another file of that name needs a variant of its own."""
    for folder in (".", "other"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "m.gguf").write_bytes(folder.encode())
    model = Model(name="m.gguf", digest=cached_sha256(tmp_path / "m.gguf"), train_context=131072, layers=28)
    store_of(tmp_path / "store", on_host(made_up("m", model=model)))
    done = run(*question)
    where = "" if command.startswith("other/") else f"{tmp_path}/"
    said = done.stdout + done.stderr
    assert (done.returncode, f"harness calibrate {where}{command}\n" in said) == (4, True), said


@pytest.mark.parametrize("verb", ["show", "recalibrate", "rm", "rename", "predict --measured-only --ctx 8192"])
def test_a_file_with_other_weights_is_not_what_is_calibrated_under_its_name(run: Command, tmp_path: Path, verb: str) -> None:
    other = tmp_path / "made-up.gguf"
    other.write_bytes(b"GGUF other weights")
    head, *rest = verb.split()
    done = run(head, str(other), *rest, *(("x",) if verb == "rename" else ()))
    assert (done.returncode, "other weights" in done.stderr) == (66, True), done.stderr
    assert (tmp_path / "store" / "llama-server" / "made-up.yaml").exists()


@pytest.mark.parametrize("verb", VERDICTS)
def test_what_is_not_calibrated_is_unknown(run: Command, verb: str) -> None:
    status, text = said(run, verb, "unheard-of" + ("@8192" if verb == "check" else ""))
    assert (status, "UNCALIBRATED: unheard-of has no calibration in " in text) == (4, True), text


@pytest.mark.parametrize("verb", FIGURES[1:])
def test_figures_of_what_is_not_calibrated_are_not_found(run: Command, verb: str) -> None:
    status, text = said(run, verb, "unheard-of")
    assert (status, "unheard-of has no calibration in " in text) == (66, True), text


@pytest.mark.parametrize("verb", ["check", "export compose", "tune"])
def test_a_context_beyond_the_range_is_unknown(run: Command, verb: str) -> None:
    status, text = said(run, verb, "made-up@1000000")
    assert (status, "a context of 1,000,000 is beyond 131,072, the range of this calibration" in text) == (4, True), text


@pytest.mark.parametrize("verb", ["check", "export compose", "tune"])
def test_what_does_not_fit_ends_with_three(run: Command, verb: str) -> None:
    assert said(run, verb, "made-up@8192", "--available", "50MiB")[0] == 3
