"""The command line's contract: envelopes, exit codes, and answers to bad input."""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from harness.cli.output import CommandResult, finish
from harness.errors import EngineError
from harness.fit.constants import fit_record
from harness.store.store import Store
from harness.store.yaml import to_yaml
from tests.support.background import background, environment
from tests.support.command import Command
from tests.support.records import load, record

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def call(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "harness", *arguments],
            cwd=tmp_path,
            env=environment(tmp_path, **env),
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )

    return call


@pytest.fixture
def run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capfd)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    shelf = Store(tmp_path / "store")
    calibration = fit_record(record(load(8192), load(16384), load(32768)))
    shelf.write(shelf.path_of("llama-server", "made-up"), calibration)
    shelf.write_record(record(load(8192), load(16384), load(32768)))
    return shelf


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(done.stdout)
    assert set(answer) == {"version", "command", "status", "exit_code", "data", "errors"}
    assert answer["version"] == 1
    assert answer["exit_code"] == done.returncode
    assert answer["status"] == ("error" if answer["errors"] else "ok")
    return answer


def test_help_names_every_verb(run: Run) -> None:
    done = run("--help")
    assert done.returncode == 0
    for verb in ("calibrate", "predict", "show", "list", "parse", "fit", "doctor", "clean"):
        assert f"  {verb} " in done.stdout


@pytest.mark.usefixtures("store")
def test_predict_answers_with_parts_that_sum(run: Run) -> None:
    answer = document(run("predict", "made-up", "--ctx", "20000", "--json"))
    data = answer["data"]
    parts = ("weights_bytes", "fixed_cache_bytes", "context_cache_bytes", "compute_bytes", "overhead_bytes")
    assert sum(data[part] for part in parts) == data["total_bytes"]
    assert data["within_range"] is True
    beyond = document(run("predict", "llama-server/made-up", "--ctx", "200000", "--json"))
    assert beyond["data"]["within_range"] is False
    assert beyond["exit_code"] == 0


@pytest.mark.usefixtures("store")
def test_show_list_and_fit_carry_whole_artifacts(run: Run) -> None:
    shown = document(run("show", "made-up", "--json"))["data"]["calibration"]
    listed = document(run("list", "--json"))["data"]["calibrations"]
    fitted = document(run("fit", "20261124T000000Z-llama-server-made-up", "--json"))["data"]["calibration"]
    assert shown == fitted
    assert [one["id"] for one in listed] == ["llama-server/made-up"]
    assert listed[0]["constants"] == shown["constants"]


def test_fit_gives_the_same_bytes_as_the_artifact(run: Run, store: Store, tmp_path: Path) -> None:
    assert run("fit", "20261124T000000Z-llama-server-made-up", "-o", str(tmp_path / "again.yaml")).returncode == 0
    assert (tmp_path / "again.yaml").read_bytes() == store.path_of("llama-server", "made-up").read_bytes()
    assert to_yaml(store.find("made-up")[0][1]).encode() == (tmp_path / "again.yaml").read_bytes()


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("show", "nobody"), 66),
        (("show", "../../etc/passwd"), 66),
        (("show", "made-up", "--engine", "ollama"), 66),
        (("show", "made-up", "--variant", "none"), 66),
        (("predict", "made-up"), 2),
        (("predict", "made-up", "--ctx", "0"), 2),
        (("predict", "made-up", "--ctx", "-5"), 2),
        (("predict", "made-up", "--ctx", "many"), 2),
        (("fit", "no-such-run"), 66),
        (("parse", "no-such.log"), 66),
        (("parse", "."), 77),
        (("nonsense",), 2),
        (("calibrate", "qwen2.5", "--engine", "llama-server"), 66),
        (("calibrate", "nowhere.gguf", "--engine", "llama-server"), 66),
        (("calibrate", "a\x1b[31mb"), 2),
        (("calibrate", "x", "--engine", "llama-server", "--ctx", "8192,many"), 2),
        (("calibrate", "x", "--engine", "llama-server", "--env", "no-sign"), 2),
        (("calibrate", "x", "--engine", "llama-server", "--gpus", ","), 2),
    ],
)
def test_each_refusal_has_its_status_and_one_document(run: Run, arguments: tuple[str, ...], status: int) -> None:
    answer = document(run(*arguments, "--json"))
    assert answer["exit_code"] == status
    assert answer["errors"][0]["code"]
    plain = run(*arguments)
    assert plain.returncode == status
    assert plain.stderr.startswith("error: ") or "\nerror: " in plain.stderr
    assert "Traceback" not in plain.stderr
    assert "\x1b" not in plain.stderr


def test_a_model_that_cannot_be_reached_is_told_what_works(run: Run) -> None:
    done = run("calibrate", "qwen2.5", "--engine", "llama-server")
    assert done.returncode == 66
    assert "gemma3:270m" in done.stderr


def test_files_that_are_no_models_are_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("not a model")
    (tmp_path / "short.gguf").write_bytes(b"GGUF\x03\0\0\0")
    (tmp_path / "absurd.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 64)
    for name in ("text.gguf", "short.gguf", "absurd.gguf"):
        done = run("calibrate", name, "--engine", "llama-server", "--json")
        assert document(done)["exit_code"] == 65, name


def test_an_unknown_key_of_the_configuration_is_an_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "harness.toml").write_text('gpu = "all"\n')
    done = run("list", "--json")
    assert document(done)["exit_code"] == 78
    (tmp_path / "harness.toml").write_text("[[[")
    assert run("list").returncode == 78
    (tmp_path / "harness.toml").write_text('engine = "bogus"\n')
    answer = document(run("show", "made-up", "--json"))
    assert (answer["exit_code"], answer["errors"][0]["code"]) == (78, "bad-config")
    assert document(run("show", "made-up", "--engine", "bogus", "--json"))["exit_code"] == 2


def test_an_unknown_variable_is_a_warning(run: Run) -> None:
    done = run("list", HARNESS_MODLE="x")
    assert done.returncode == 0
    assert "HARNESS_MODLE" in done.stderr


def test_settings_come_from_the_file_and_doctor_says_so(run: Run, tmp_path: Path) -> None:
    (tmp_path / "harness.toml").write_text('gpus = "none"\n')
    data = document(run("doctor", "--json"))["data"]
    assert data["settings"]["gpus"] == {"value": "none", "from": str(tmp_path / "harness.toml")}
    assert {finding["subject"] for finding in data["findings"]} >= {"machine", "embedded engine", "Docker", "store"}


def test_parse_reads_standard_input(run: Run) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "harness", "parse", "-", "--json"],
        input=(Path(__file__).parents[1] / "golden/llama-server/b10434/host-8192.log").read_text(),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    (facts,) = document(done)["data"]["loads"]
    assert facts["devices"]["CPU"]["kind"] == "host"
    assert facts["context_cells"] == 8192


def test_a_damaged_calibration_does_not_hide_the_others(run: Run, store: Store) -> None:
    store.path_of("llama-server", "bad").write_text("{")
    done = run("list", "--json")
    assert [one["id"] for one in document(done)["data"]["calibrations"]] == ["llama-server/made-up"]
    assert "bad.yaml" in done.stderr


LONG = "x" * 10_000


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("check", LONG, "--ctx", "8192"), 4),
        (("show", LONG), 66),
        (("calibrate", LONG), 66),
        (("fit", LONG), 66),
        (("diff", LONG, LONG), 66),
        (("list", "--store", LONG), 66),
    ],
)
def test_a_name_longer_than_any_file_s_is_nobody_s(run: Run, arguments: tuple[str, ...], status: int) -> None:
    assert document(run(*arguments, "--json"))["exit_code"] == status


def test_a_bug_is_one_document_too(run_here: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_self: Store) -> None:
        raise RuntimeError("never meant to happen")

    monkeypatch.setattr(Store, "paths", broken)
    done = run_here("list", "--json")
    assert json.loads(done.stdout)["errors"][0]["code"] == "bug"
    assert done.returncode == 1
    assert "never meant to happen" in done.stderr


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("words", [("list",), ("list", "--json"), ("show", "made-up")])
def test_standard_output_may_be_closed_full_or_left(tmp_path: Path, words: tuple[str, ...]) -> None:
    call = shlex.join([sys.executable, "-m", "harness", *words, "--store", str(tmp_path / "store")])

    def status(redirected: str) -> int:
        script = f"set -o pipefail; {call} {redirected}"
        return subprocess.run(["bash", "-c", script], capture_output=True, timeout=200, check=False).returncode

    assert status("| true") == 0
    assert status(">&-") == 0
    assert status(">/dev/full") == 73


@pytest.mark.usefixtures("store")
def test_any_encoding_and_any_bytes_in_a_name_give_a_document(run: Run) -> None:
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    assert run("show", "made-up", **plain).returncode == 0
    answer = document(run("show", os.fsdecode(b"caf\xc3\xa9 \xff"), "--json"))
    assert answer["errors"][0]["code"] == "no-calibration"
    assert document(run("check", "gr\u00fcn@8192", "--json", **plain))["errors"][0]["code"] == "bad-name"


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(("env", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)])
@pytest.mark.parametrize("words", [("check", "made-up@8192", "--available", "24g"), ("nonsense",)])
def test_colours_are_for_terminals_that_want_them(
    tmp_path: Path, words: tuple[str, ...], env: dict[str, str], coloured: bool
) -> None:
    import pty

    ours, theirs = pty.openpty()
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HARNESS_") and key != "NO_COLOR"}
    call = [sys.executable, "-m", "harness", *words]
    own = {"TERM": "xterm", "HARNESS_STORE": str(tmp_path / "store"), **env}
    subprocess.run(call, env={**clean, **own}, stdout=theirs, stderr=theirs, timeout=200, check=False)
    os.close(theirs)
    text = os.read(ours, 1 << 16)
    os.close(ours)
    assert text
    assert (b"\x1b[" in text) is coloured


@pytest.mark.parametrize("as_json", [True, False])
def test_the_last_lines_of_an_engine_are_shown_beside_a_document_too(capsys: pytest.CaptureFixture[str], as_json: bool) -> None:
    error = EngineError("it ended", tail=("cudaMalloc\x1b[31m failed",))
    with pytest.raises(SystemExit) as end:
        finish(CommandResult(command="calibrate", as_json=as_json, failure=error))
    assert end.value.code == 70
    out, err = capsys.readouterr()
    assert "  | cudaMalloc\ufffd[31m failed\n" in err
    assert bool(out) is as_json


@pytest.mark.usefixtures("store")
def test_a_record_of_others_reads_no_files_but_its_own(run: Run, store: Store, tmp_path: Path) -> None:
    (path,) = [folder / "record.json" for folder in store.runs()]
    other = Path(__file__).parents[1] / "golden/llama-server/b10434/host-8192.log"
    made = json.loads(path.read_text())
    made["loads"][0] |= {"log": os.path.relpath(other, path.parent), "log_start": 0}
    path.write_text(json.dumps(made))
    before = store.path_of("llama-server", "made-up").read_bytes()
    assert run("fit", str(path), "-o", str(tmp_path / "again.yaml")).returncode == 0
    assert (tmp_path / "again.yaml").read_bytes() == before
    made["loads"][0] |= {"log": "engine-0.log", "log_start": -5}
    path.write_text(json.dumps(made))
    assert document(run("fit", str(path), "--json"))["exit_code"] == 65


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[socket.socket]:
    """A Docker daemon that accepts connections and says nothing."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "d.sock"))
        listener.listen()
        yield listener


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_a_signal_ends_it_whatever_hangs(tmp_path: Path, frozen: socket.socket, number: int, status: int) -> None:
    with background(tmp_path) as start:
        process = start("clean", "--json", DOCKER_HOST=f"unix://{tmp_path}/d.sock")
        link, _ = frozen.accept()
        process.send_signal(number)
        out, _ = process.communicate(timeout=200)
        link.close()
    assert process.returncode == status
    assert json.loads(out)["exit_code"] == status


@pytest.mark.parametrize("words", [("list",), ("nonsense",), ("show", "nothing", "--json")])
def test_where_no_stream_can_be_written_the_status_says_so(tmp_path: Path, words: tuple[str, ...]) -> None:
    call = shlex.join([sys.executable, "-m", "harness", *words])
    script = f"{call} >/dev/full 2>/dev/full"
    env = {**os.environ, "HARNESS_STORE": str(tmp_path)}
    assert subprocess.run(["bash", "-c", script], env=env, timeout=200, check=False).returncode == 73


def test_a_terminal_of_ascii_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    """Click takes an encoding that is called ASCII for a mistake, and writes UTF-8."""
    from harness.cli import main

    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    main._open_streams()
    click.echo("1 – 2 × 3 · █▒ …")
    assert raw.getvalue() == b"1 - 2 x 3 | #- ...\n"


@pytest.mark.parametrize("module", ["harness", "harness.cli.main"])
def test_a_module_that_python_is_told_to_run_runs(module: str) -> None:
    """With nothing behind it, the second had ended with 0 and said nothing, whatever was asked."""
    done = subprocess.run([sys.executable, "-m", module, "predictt"], capture_output=True, text=True, check=False)
    assert (done.returncode, "did you mean predict?" in done.stderr) == (2, True), done
