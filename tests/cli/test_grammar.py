"""The grammar is the same in every verb: models, contexts, stores, and what a list prints can be typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harness.cli.main import COMMANDS
from harness.cli.output import gathered
from harness.units import parse_token_list, parse_tokens
from tests.support.calibrations import made_up, store_of, with_settings, with_version
from tests.support.command import Command


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    shelf = store_of(tmp_path / "store", made_up("plain"), made_up("other"))
    shelf.write(shelf.path_of("llama-server", "plain", "kv-q8"), with_settings(made_up("plain"), kv_cache_type="q8_0"))
    named = made_up("my%20model")
    shelf.write(shelf.path_of("llama-server", "my model"), named)
    return Command(tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize(
    "arguments",
    [
        ("show",), ("predict", "--ctx", "8k"), ("check", "--ctx", "8,192", "--available", "24GiB"),
        ("plan", "--available", "24GiB"), ("recalibrate", "--dry-run"), ("tune", "--available", "24GiB"), ("rm",),
    ],
    ids=lambda words: words[0],
)  # fmt: skip
def test_whatever_a_list_prints_can_be_typed_in_every_verb(run: Command, arguments: tuple[str, ...]) -> None:
    ids = run("list", "-q").stdout.splitlines()
    assert ids == [f"llama-server/{name}" for name in ("my model", "other", "plain", "plain@kv-q8")]
    verb, *options = arguments
    for key in ids:
        done = run(verb, key, *options, "--json")
        document = json.loads(done.stdout)
        assert document["errors"] == [], (key, document["errors"])


def test_a_variant_that_is_typed_is_the_one_that_answers(run: Command) -> None:
    shown = json.loads(run("show", "llama-server/plain@kv-q8", "--json").stdout)["data"]["calibration"]
    assert shown["metadata"]["settings"]["kv_cache_type"] == "q8_0"
    (judged,) = json.loads(run("check", "plain@kv-q8@8k", "--available", "24GiB", "--json").stdout)["data"]["models"]
    assert (judged["variant"], judged["context"]) == ("kv-q8", 8192)


@pytest.mark.parametrize("spelled", ["8192", "8k", "8K", "8,192", "8_192"])
def test_a_context_can_be_written_as_it_is_printed(run: Command, spelled: str) -> None:
    for words in (("predict", f"plain@{spelled}"), ("predict", "plain", "--ctx", spelled)):
        assert json.loads(run(*words, "--json").stdout)["data"]["context"] == 8192


def test_lists_of_contexts_tell_numbers_from_separators() -> None:
    assert parse_token_list("8k,32k,128k") == (8192, 32768, 131072)
    assert parse_token_list("8192,16384") == (8192, 16384)
    assert parse_token_list("8,192 16,384") == (8192, 16384)
    assert parse_token_list("512,1024") == (512, 1024)
    assert parse_token_list("8, 192") == (8, 192)
    assert parse_token_list("131,072 1,048,576") == (131072, 1048576)
    assert parse_token_list("512 768") == (512, 768)
    for text in ("0", "-1", "8.5k", "x", "8kk", "9" * 30):
        with pytest.raises(ValueError, match="a number of tokens is expected"):
            parse_tokens(text)


@pytest.mark.parametrize(("text", "one", "several"), [
    ("512,768", "512768", "512 768"),
    ("524,288,8192", "524288", "524 288"),
    ("256,512,768", "256512768", "256 512 768"),
])  # fmt: skip
def test_a_comma_that_may_mean_one_context_or_several_is_refused_with_both_spellings(text: str, one: str, several: str) -> None:
    with pytest.raises(ValueError, match=f"write {one} for one, '{several}' for {several.count(' ') + 1}"):
        parse_token_list(text)


@pytest.mark.parametrize("verb", ["bisect --good 1 --bad 2", "calibrate --dry-run", "estimate"])
def test_a_list_of_contexts_that_is_none_is_a_usage_error(run: Command, verb: str) -> None:
    """Bisect ended with a traceback."""
    for text in ("512,768", "x"):
        done = run(*verb.split(), "plain", "--ctx", text)
        assert (done.returncode, "--ctx" in done.stderr) == (2, True)


@pytest.mark.parametrize("verb", ["list", "plan", "recalibrate", "recalibrate --stale", "recalibrate --dry-run"])
def test_an_empty_store_is_said_in_one_way(run: Command, tmp_path: Path, verb: str) -> None:
    done = run(*verb.split(), "--store", str(tmp_path / "empty"))
    empty = tmp_path / "empty"
    assert done.stdout == f"no calibrations in {empty}; make one with: harness calibrate --store {empty}\n"


def test_doctor_says_that_a_store_is_read_only(run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, _: Path(path) != tmp_path / "store")
    found = {one["code"]: one["state"] for one in json.loads(run("doctor", "--json").stdout)["data"]["findings"]}
    assert found["store-read-only"] == "note"


def test_warnings_of_serve_repeat_the_store(run: Command, tmp_path: Path) -> None:
    store_of(tmp_path / "second", made_up("elsewhere"))
    store = ("--store", str(tmp_path / "second"))
    done = run("serve", "not-there:7b", "--ctx", "8k", *store, "--", "true")
    (warning,) = (line for line in done.stderr.splitlines() if line.startswith("warning: UNCALIBRATED"))
    assert warning.endswith(f"harness calibrate not-there:7b {' '.join(store)}")
    assert run("show", "not-there:7b", *store).stderr.endswith(f"harness calibrate not-there:7b {' '.join(store)}\n")


def test_whole_numbers_of_one_and_none_show_their_default(run: Command) -> None:
    """1 equals True and 0 equals False: their defaults were taken for those of switches."""
    text = " ".join(run("check", "--help").stdout.split())
    assert "--num-parallel N Slots: sequences at once. [default: 1;" in text


@pytest.mark.parametrize("place", ["before", "behind"])
def test_the_store_stands_before_the_verb_or_behind_it(run: Command, tmp_path: Path, place: str) -> None:
    store_of(tmp_path / "second", made_up("elsewhere"))
    asked = ("--store", "second", "list", "-q") if place == "before" else ("list", "-q", "--store", "second")
    assert run(*asked).stdout == "llama-server/elsewhere\n"


def test_a_hint_repeats_the_store_of_the_question(run: Command) -> None:
    done = run("predict", "absent@8k", "--store", "second")
    assert "hint: harness calibrate absent --store second" in done.stderr


def test_sentences_that_end_with_a_command_repeat_the_store_too(run: Command, tmp_path: Path) -> None:
    store_of(tmp_path / "second", with_version(made_up("elsewhere"), "b0"))
    assert run("check", "absent@8k", "--store", "second", "--available", "24GiB").stdout.endswith(
        "Calibrate it: harness calibrate absent --store second\n"
    )
    warned = run("check", "elsewhere@8k", "--store", "second", "--available", "24GiB").stderr
    assert warned == "" or warned.endswith("harness recalibrate llama-server/elsewhere --store second\n")


def test_one_warning_for_many_calibrations_of_an_older_engine() -> None:
    texts = [f"calibrated with e 1, here it is 2: harness recalibrate e/{name} --store s" for name in "abc"]
    assert list(gathered([texts[0], "another"])) == [texts[0], "another"]
    assert list(gathered(texts)) == ["3 calibrations were made with e 1, here it is 2: harness recalibrate --stale --store s"]


def test_a_file_is_printed_as_it_is_whatever_the_width(run: Command) -> None:
    narrow = run("export", "compose", "plain", "--available", "24GiB", COLUMNS="30")
    assert narrow.stdout == run("export", "compose", "plain", "--available", "24GiB").stdout


def test_an_option_of_one_value_is_not_given_twice(run: Command) -> None:
    done = run("predict", "plain", "--ctx", "8k", "--ctx", "16k")
    assert (done.returncode, done.stderr.splitlines()[0]) == (2, "error: --ctx is given more than once")


@pytest.mark.parametrize(("spec", "said"), [("made-up@8k@16k", "two contexts"), ("made-up@", "hint: made-up@8192")])
def test_one_model_has_one_context(run: Command, spec: str, said: str) -> None:
    done = run("check", spec, "--available", "24g")
    assert done.returncode == 2
    assert said in done.stderr


def test_a_file_that_is_not_there_is_said_so(run: Command) -> None:
    done = run("check", "./missing.gguf@8k", "--available", "24g")
    assert (done.returncode, "there is no file ./missing.gguf" in done.stderr) == (66, True)


def test_a_verb_that_is_almost_written_is_named(run: Command) -> None:
    assert "did you mean predict?" in run("predictt").stderr
    assert run("ls", "-q").stdout == run("list", "-q").stdout
    assert run("-V").stdout.startswith("harness")


@pytest.mark.parametrize("verb", [name for name in COMMANDS if name != "help"])
def test_every_verb_has_help_and_every_option_says_what_it_is(run: Command, verb: str) -> None:
    from harness.cli.main import cli

    text = run("help", verb).stdout
    assert text.startswith(f"Usage: harness {verb}")
    command = cli.get_command(None, verb)  # type: ignore[arg-type]
    assert command is not None
    mute = [one.opts[0] for one in command.params if one.param_type_name == "option" and not getattr(one, "help", None)]
    assert mute == []


def test_a_calibration_is_removed_and_renamed_by_its_id(run: Command, tmp_path: Path) -> None:
    assert run("rename", "plain@kv-q8", "plain@small").returncode == 0
    assert run("rename", "other", "third").stdout == "llama-server/other is now llama-server/third\n"
    assert run("rename", "third", "plain").returncode == 73
    assert run("rename", "third", "third@4k").returncode == 2
    assert run("rm", "plain").stdout.startswith("removed  llama-server/plain")
    assert run("list", "-q").stdout.splitlines() == [f"llama-server/{name}" for name in ("my model", "plain@small", "third")]
    assert json.loads(run("show", "third", "--json").stdout)["data"]["calibration"]["id"] == "llama-server/third"
    assert run("rm", "plain").returncode == 66, "a variant is removed by its own name alone"


def test_names_are_compared_and_paths_are_shown(run: Command) -> None:
    assert run("diff", "plain", "other", "--json").returncode == 0
    assert run("diff", "plain", "plain@kv-q8").returncode == 6
    assert "llama-server/plain@kv-q8" in run("show", "store/llama-server/plain@kv-q8.yaml").stdout


def test_completion_knows_models_and_verbs(run: Command) -> None:
    assert "_HARNESS_COMPLETE=bash_complete" in run("completion", "bash").stdout
    for shell in ("zsh", "fish"):
        assert "_HARNESS_COMPLETE" in run("completion", shell).stdout
    asked = {"_HARNESS_COMPLETE": "bash_complete", "COMP_CWORD": "2"}
    done = run(COMP_WORDS="harness check llama-server/pl", **asked)
    assert done.stdout.split() == ["plain,llama-server/plain", "plain,llama-server/plain@kv-q8"]


def test_verbose_says_where_settings_come_from(run: Command) -> None:
    assert "setting store = " in run("-v", "list", "-q").stderr


def test_quiet_lists_are_ids_alone(run: Command) -> None:
    assert run("plan", "--available", "24GiB", "-q").stdout.splitlines() == [
        "llama-server/my model", "llama-server/other", "llama-server/plain",
    ]  # fmt: skip
    assert run("recalibrate", "--dry-run", "-q").stdout.splitlines()[0] == "llama-server/my model"


@pytest.mark.parametrize("name", ["llama-server/not-there", "ollama/not-there", "not-there"])
def test_an_id_without_a_calibration_is_not_found(run: Command, name: str) -> None:
    """Ollama's other names were tried for ids of other engines: "NAME:latest is an id of llama-server, not of ollama", 2."""
    done = run("show", name)
    assert (done.returncode, f"{name} has no calibration" in done.stderr) == (66, True)
    assert run("check", f"{name}@8k", "--available", "24GiB").returncode == 4
