"""What ``harness calibrate`` finds out before it starts an engine. The engine here is a script that lists no devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from harness.sandboxes.locks import hold
from tests.support.background import environment
from tests.support.gguf_file import write_gguf


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    path = tmp_path / "llama-server"
    path.write_text('#!/bin/sh\necho "version: 1 (made-up)" >&2\n')
    path.chmod(0o755)
    return path


def calibrate(here: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-c", "from harness.cli.main import main; main()", "calibrate", *arguments, "--json"],
        cwd=here,
        env=environment(here, PYTHONSAFEPATH="1"),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert "Traceback" not in done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    assert document["exit_code"] == done.returncode
    return done.returncode, document


def plan(here: Path, binary: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    return calibrate(
        here, *arguments, "--engine", "llama-server", "--sandbox", "process", "--engine-binary", str(binary), "--dry-run"
    )


def test_a_plan_shrinks_to_the_training_context_and_writes_nothing(tmp_path: Path, binary: Path) -> None:
    model = write_gguf(tmp_path / "m.gguf", train_context=2048)
    status, document = plan(tmp_path, binary, str(model))
    assert status == 0
    assert [load["context"] for load in document["data"]["loads"]] == [512, 1024, 2048]
    assert not (tmp_path / "store").exists()


def test_a_context_beyond_the_training_context_is_a_usage_error(tmp_path: Path, binary: Path) -> None:
    model = write_gguf(tmp_path / "m.gguf", train_context=4096)
    status, document = plan(tmp_path, binary, str(model), "--ctx", "2048,8192")
    assert (status, document["errors"][0]["code"]) == (2, "beyond-training")
    assert "4096" in document["errors"][0]["hint"]


@pytest.mark.parametrize("ctx", ["0", "-1", "8k", "1.5", "8192,,4096", "99999999999999999999", "٣"])
def test_a_context_that_is_no_number_is_a_usage_error(tmp_path: Path, binary: Path, ctx: str) -> None:
    model = write_gguf(tmp_path / "m.gguf")
    assert plan(tmp_path, binary, str(model), f"--ctx={ctx}")[0] == 2


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ('it\'s "q".gguf', "it%27s%20%22q%22"),
        ("größe.gguf", "gr%C3%B6%C3%9Fe"),
        ("a:b.gguf", "a-b"),
        ("..x..gguf", "..x."),
        ("$(touch x)`id`;.gguf", "%24%28touch%20x%29%60id%60%3B"),
        ("[red]m[.gguf", "%5Bred%5Dm%5B"),
    ],
)
def test_any_file_name_survives_into_the_artifact_s(tmp_path: Path, binary: Path, name: str, stem: str) -> None:
    write_gguf(tmp_path / name)
    status, document = plan(tmp_path, binary, name)
    assert status == 0
    assert document["data"]["artifact"] == str(tmp_path / "store" / "llama-server" / f"{stem}.yaml")


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\x07.gguf", "a\u202eb"])
def test_control_characters_in_a_name_are_refused(tmp_path: Path, binary: Path, name: str) -> None:
    status, document = plan(tmp_path, binary, name)
    assert (status, document["errors"][0]["code"]) == (2, "bad-name")


def test_a_binary_that_is_not_there(tmp_path: Path) -> None:
    status, document = plan(tmp_path, tmp_path / "nowhere", str(write_gguf(tmp_path / "m.gguf")))
    assert (status, document["errors"][0]["code"]) == (66, "no-engine-binary")


def test_a_binary_that_is_not_executable(tmp_path: Path, binary: Path) -> None:
    binary.chmod(0o644)
    status, document = plan(tmp_path, binary, str(write_gguf(tmp_path / "m.gguf")))
    assert (status, document["errors"][0]["code"]) == (77, "not-executable")


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 3\n", "not a program", "#!/no/such/interpreter\n"])
def test_a_binary_that_does_not_run_is_an_engine_error(tmp_path: Path, binary: Path, text: str) -> None:
    binary.write_text(text)
    assert plan(tmp_path, binary, str(write_gguf(tmp_path / "m.gguf")))[0] == 70


def test_a_truncated_model(tmp_path: Path, binary: Path) -> None:
    model = write_gguf(tmp_path / "m.gguf")
    model.write_bytes(model.read_bytes()[:-100])
    status, document = plan(tmp_path, binary, str(model))
    assert (status, document["errors"][0]["code"]) == (65, "truncated-gguf")


def test_a_folder_is_no_model(tmp_path: Path, binary: Path) -> None:
    (tmp_path / "m.gguf").mkdir()
    assert plan(tmp_path, binary, "m.gguf")[0] == 65


@pytest.mark.parametrize("variant", ["a/b", "../x", "a b", ""])
def test_a_variant_is_a_plain_word(tmp_path: Path, binary: Path, variant: str) -> None:
    model = write_gguf(tmp_path / "m.gguf")
    assert plan(tmp_path, binary, str(model), f"--variant={variant}")[0] == 2


def test_an_unknown_model_is_told_what_works_here(tmp_path: Path) -> None:
    status, document = calibrate(tmp_path, "nobody/knows:it", "--engine", "llama-server")
    assert status == 66
    assert "gemma3:270m" in document["errors"][0]["hint"]


def test_a_catalog_with_an_unknown_key_is_refused(tmp_path: Path, binary: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "catalog.yaml").write_text("models: {x: {olama: 'x'}}")
    assert plan(tmp_path, binary, "x")[0] == 78


def test_a_store_that_is_a_file_is_found_before_measuring(tmp_path: Path, binary: Path) -> None:
    (tmp_path / "store").write_text("")
    model = write_gguf(tmp_path / "m.gguf")
    arguments = (str(model), "--engine", "llama-server", "--sandbox", "process", "--engine-binary", str(binary))
    status, _ = calibrate(tmp_path, *arguments)
    assert status == 73


def test_a_second_harness_on_the_same_gpu_is_busy_before_an_engine_starts(tmp_path: Path, binary: Path) -> None:
    model = write_gguf(tmp_path / "m.gguf")
    binary.write_text("#!/bin/sh\necho '  Vulkan0: Made-up GPU (2048 MiB, 2048 MiB free)'\n")
    arguments = (str(model), "--engine", "llama-server", "--sandbox", "process", "--engine-binary", str(binary))
    with hold(["Made-up GPU"]):
        status, document = calibrate(tmp_path, *arguments)
    assert (status, document["errors"][0]["code"]) == (75, "gpu-busy")
    assert f"process {os.getpid()}" in document["errors"][0]["message"]
    assert not list((tmp_path / "store").rglob("record.json"))
