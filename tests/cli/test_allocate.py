"""``harness allocate`` as it is typed: flags, JSON, compose, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import yaml
from click.testing import CliRunner, Result

from harness.cli.main import cli
from harness.model.calibration import Calibration
from harness.store.store import Store
from tests.support.vllm_artifacts import vllm_calibration


def run(store: Path, *words: str) -> Result:
    return CliRunner().invoke(cli, ["allocate", *words, "--store", str(store)])


@pytest.fixture
def store(tmp_path: Path) -> Path:
    def put(calibration: Calibration, variant: str | None = None) -> None:
        shelf = Store(tmp_path)
        shelf.write(shelf.path_of("vllm", "acme/tern-8b", variant), calibration)

    put(vllm_calibration())
    put(vllm_calibration(tensor_parallel=2), "two")
    return tmp_path


def test_the_command_line_can_be_pasted(store: Path) -> None:
    done = run(store, "acme/tern-8b", "--ctx", "8192", "--available", "79GiB")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith(
        "vllm serve acme/tern-8b --max-model-len 8192 --max-num-seqs 64 --kv-cache-memory-bytes 1077936128 "
    )
    assert "513 blocks of 16 tokens and 1 to spare" in done.stderr


def test_json_holds_figures_flags_and_the_service(store: Path) -> None:
    done = run(store, "acme/tern-8b", "--ctx", "8192", "--concurrency", "2", "--available", "79GiB", "--json")
    document = json.loads(done.stdout)
    data = document["data"]
    assert (document["command"], document["exit_code"], data["blocks"]) == ("allocate", 0, 1025)
    service = yaml.safe_load(data["compose"])["services"]["vllm"]
    assert service["command"] == ["--model", "acme/tern-8b", *data["flags"]]
    assert service["image"] == f"vllm/vllm-openai:v1@sha256:{'00' * 32}"
    assert service["ipc"] == "host"


def test_a_start_that_cannot_be_had_is_refused_with_what_can(store: Path) -> None:
    done = run(store, "acme/tern-8b", "--ctx", "131072", "--available", "24GiB", "--json")
    document = json.loads(done.stdout)
    assert (done.exit_code, document["errors"][0]["code"]) == (3, "does-not-fit")
    assert "largest context" in document["errors"][0]["hint"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--engine-version", "0.31.0"), "version 0.29.0, not 0.31.0"),
        (("--gpu-name", "Acme T9"), "GPU Acme T1, not Acme T9"),
        (("--dtype", "float16"), "dtype bfloat16, not float16"),
        (("--tensor-parallel", "4"), "tensor parallel 1, not 4"),
    ],
)
def test_what_was_not_calibrated_is_unknown(store: Path, words: tuple[str, ...], why: str) -> None:
    done = run(store, "acme/tern-8b", "--ctx", "8192", "--available", "79GiB", *words)
    assert done.exit_code == 4
    assert "UNCALIBRATED" in done.stderr
    assert why in done.stderr


def test_the_variant_that_matches_answers(store: Path) -> None:
    done = run(store, "acme/tern-8b", "--ctx", "8192", "--available", "79GiB,79GiB", "--tensor-parallel", "2")
    assert "--tensor-parallel-size 2" in done.stdout


def test_a_model_without_a_calibration_is_unknown(store: Path) -> None:
    done = run(store, "acme/unknown", "--ctx", "8192", "--available", "79GiB")
    assert (done.exit_code, "UNCALIBRATED" in done.stderr) == (4, True)


def test_check_says_that_vllm_would_not_start(store: Path) -> None:
    words = ["check", "vllm/acme/tern-8b@131072", "--available", "30GiB", "--store", str(store)]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 3
    assert "CPU OFFLOAD LIKELY" in done.output
    assert "vLLM does not start with this: it moves nothing to the CPU. Largest context that fits: 93" in done.output


def test_a_command_line_of_others_adds_no_code(tmp_path: Path) -> None:
    theirs = Store(tmp_path)
    theirs.write(theirs.path_of("vllm", "acme/tern-8b"), vllm_calibration(arguments=("--trust-remote-code",)))
    done = run(tmp_path, "acme/tern-8b", "--ctx", "8192", "--available", "79GiB")
    assert done.exit_code == 77
    assert "--trust-remote-code" in done.stderr
    assert "vllm serve" not in done.stdout
    assert run(tmp_path, "acme/tern-8b", "--ctx", "8192", "--available", "79GiB", "--allow-env", "VLLM_ARGS").exit_code == 0


@pytest.mark.parametrize(
    ("own", "name", "status"),
    [
        ("/srv/models/tern-8b", "tern-8b", 0),  # printed as it was measured; nothing is started
        ("/srv/models/another", "tern-8b", 77),
        ("evil/tern-8b", "tern-8b", 77),
    ],
)
def test_a_local_folder_is_printed_where_it_has_the_models_own_name(tmp_path: Path, own: str, name: str, status: int) -> None:
    made = vllm_calibration()
    metadata = made.metadata
    assert metadata.settings.vllm is not None
    settings = msgspec.structs.replace(metadata.settings, vllm=msgspec.structs.replace(metadata.settings.vllm, model=own))
    model = msgspec.structs.replace(metadata.model, name=name)
    changed = msgspec.structs.replace(metadata, settings=settings, model=model)
    theirs = Store(tmp_path)
    theirs.write(theirs.path_of("vllm", name), msgspec.structs.replace(made, id=f"vllm/{name}", metadata=changed))

    done = run(tmp_path, name, "--ctx", "8192", "--available", "79GiB")

    assert done.exit_code == status
    assert (own in done.stdout) is (status == 0)
    assert run(tmp_path, name, "--ctx", "8192", "--available", "79GiB", "--allow-model").exit_code == 0


def test_what_an_import_does_not_name_is_not_said_to_be_host_memory(tmp_path: Path) -> None:
    made = vllm_calibration()
    machine = msgspec.structs.replace(made.metadata.machine, gpus=(), meter="import", sandbox="unknown")
    made = msgspec.structs.replace(made, metadata=msgspec.structs.replace(made.metadata, machine=machine))
    shelf = Store(tmp_path)
    shelf.write(shelf.path_of("vllm", "acme/tern-8b"), made)
    done = run(tmp_path, "acme/tern-8b", "--ctx", "8192", "--available", "79GiB")
    assert "# imported from a log of vLLM 0.29.0 on a GPU that was not named" in done.stderr, done.stderr
    named = run(tmp_path, "acme/tern-8b", "--ctx", "8192", "--available", "79GiB", "--gpu-name", "Acme T1")
    assert (named.exit_code, "GPU that its log does not name, not Acme T1" in named.stderr) == (4, True), named.stderr
