"""vLLM measured end to end: a stand-in for its server, through both sandboxes, and every way in which a start can fail."""

from __future__ import annotations

import contextlib
import json
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import jsonschema
import pytest

from harness.engines.vllm.recipe import CACHE_VOLUME, WEIGHTS_VOLUME
from harness.errors import EngineError, HarnessError, NotFoundError, NotPermittedError, OffloadLikelyError, UsageError
from harness.inventory.installed import Installed
from harness.maintain.recalibrate import rerun_options, survey
from harness.maintain.refit import refit
from harness.measure.calibrate import Session
from harness.measure.events import Observer
from harness.measure.prepare import prepare
from harness.model.calibration import Calibration, json_schema, to_document
from harness.options import Allowed, Overrides, RunOptions
from harness.prediction.allocation import Deployment
from harness.serving.allocate import answer
from harness.serving.calibration_lookup import CheckRequest
from harness.serving.server import serve
from harness.store.store import Store
from harness.store.yaml import to_yaml
from tests.support.places import marked_processes
from tests.support.vllm_program import GIB, MIB

PROGRAM = Path(__file__).parents[1] / "support" / "vllm_program.py"
#: The stand-in's model is a folder, and an artifact may not name one by itself.
OWN_FOLDER = Allowed(model=True)
PLACES = [pytest.param("process"), pytest.param("docker", marks=pytest.mark.requires("docker"))]

Opened = Callable[..., Session]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tern-1b"
    folder.mkdir()
    config = {"architectures": ["TernForCausalLM"], "max_position_embeddings": 32768, "num_hidden_layers": 4}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def opened(model: Path, tmp_path: Path) -> Opened:
    """A session that would calibrate the stand-in on host memory."""
    binary = tmp_path / "vllm"
    binary.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{PROGRAM}" "$@"\n')
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)

    def open_session(
        place: str = "process",
        name: str | None = None,
        env: dict[str, str] | None = None,
        speed: bool = False,
        **machine: object,
    ) -> Session:
        options = RunOptions(
            model=name or str(model),
            engine="vllm",
            sandbox="docker" if place == "docker" else "process",
            contexts=(1024, 4096),
            gpus="none",
            engine_binary=None if place == "docker" else str(binary),
            image=_image() if place == "docker" else None,
            env={"STAND_IN": json.dumps(machine), **(env or {})},
            timeout=200,
            speed=speed,
        )
        return prepare(options, Store(tmp_path / "store"), tmp_path)

    return open_session


def _image() -> str:
    import docker

    from tests.support.images import python_image

    with contextlib.closing(docker.from_env()) as client:
        return python_image(client, PROGRAM, "vllm")


@pytest.fixture
def kept_volumes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Volumes for weights and compiled graphs stay after a run; those that were not there before go again."""
    if "docker" not in request.node.callspec.params.values():
        yield
        return
    import docker

    with contextlib.closing(docker.from_env()) as client:
        names = {WEIGHTS_VOLUME, CACHE_VOLUME} - {volume.name for volume in client.volumes.list()}
        yield
        for volume in client.volumes.list():
            if volume.name in names:
                volume.remove()


def calibrated(session: Session) -> Calibration:
    return session.calibrate(Observer()).calibration


@pytest.mark.usefixtures("kept_volumes")
@pytest.mark.parametrize("place", PLACES)
def test_a_calibration_holds_the_blocks_of_the_cache_exactly(opened: Opened, place: str) -> None:
    session = opened(place, speed=True)
    result = session.calibrate(Observer())
    metadata = result.calibration.metadata
    assert metadata.kv_blocks is not None
    assert (metadata.kv_blocks.size, metadata.kv_blocks.bytes, metadata.kv_blocks.fixed) == (128, 512 * 1024, 0)
    assert result.calibration.constants.kv_cache_gb_per_10k == round(4096 * 10_000 / GIB, 6)
    assert (metadata.engine.version, metadata.settings.vllm and metadata.settings.vllm.dtype) == ("0.32.0", "bfloat16")
    assert metadata.quality.max_error is not None
    jsonschema.validate(json.loads(json.dumps(to_document(result.calibration))), json_schema())
    # The record alone gives the same artifact again.
    record, again = refit(result.record.parent)
    assert to_yaml(again) == result.artifact.read_text()
    assert [load.request.kv_cache_bytes is not None for load in record.loads if load.request.purpose == "point"] == [
        False,
        True,
    ]


def test_the_flags_of_an_allocation_start_it_and_one_block_less_does_not(opened: Opened, tmp_path: Path) -> None:
    session = opened()
    session.calibrate(Observer())
    granted = answer(session.store, "tern-1b", 8192, 1, Deployment(), available=(GIB,)).allocation
    runner = Starts(session, tmp_path)
    assert runner.status("--kv-cache-memory-bytes", granted.blocks * granted.block_bytes, granted.context) is None
    assert runner.status("--kv-cache-memory-bytes", granted.kv_cache_bytes, granted.context) is None
    assert runner.status("--kv-cache-memory-bytes", (granted.blocks - 1) * granted.block_bytes, granted.context) == 1


def test_a_served_model_gets_exactly_what_its_context_needs(opened: Opened, tmp_path: Path) -> None:
    session = opened()
    session.calibrate(Observer())
    options = RunOptions(
        model="tern-1b",
        engine="vllm",
        gpus="none",
        engine_binary=session.options.engine_binary,
        timeout=200,
        env=session.options.env,
        allowed=OWN_FOLDER,
    )
    question = CheckRequest(model="vllm/tern-1b", context=8192)
    with serve(question, options, session.store, on_offload="refuse", available=(GIB,)) as server:
        assert server.facts is not None
        assert server.facts.vllm is not None
        assert (server.facts.vllm.max_model_len, server.facts.vllm.kv_tokens) == (8192, 66 * 128)
        assert (server.observed_placement, server.disagreement) == ("the KV cache holds 8,448 tokens", None)
        assert httpx.get(f"{server.endpoint}/health", trust_env=False, timeout=200).status_code == httpx.codes.OK
    with pytest.raises(OffloadLikelyError), serve(question, options, session.store, on_offload="refuse", available=(64 * MIB,)):
        pass


def test_an_artifact_is_measured_again_as_it_was(opened: Opened, model: Path) -> None:
    session = opened(env={"VLLM_ARGS": "--dtype bfloat16"})
    session.calibrate(Observer())
    finder = Installed(
        session.store,
        Overrides(engine_binary=session.options.engine_binary, env=session.options.env, allowed=OWN_FOLDER),
        model.parent,
    )
    (target,) = survey(session.store, [], finder, None, print)
    options = rerun_options(target, finder)
    assert (options.model, options.engine, options.sandbox, options.gpus) == (str(model), "vllm", "process", "none")
    assert (options.contexts, options.kv_cache_type, options.env["VLLM_ARGS"]) == ((4096, 1024), None, "--dtype bfloat16")
    again = prepare(options, session.store, model.parent)
    assert again.artifact == target.path


class Starts:
    """Starts of the stand-in with other flags."""

    def __init__(self, session: Session, folder: Path) -> None:
        self.session, self.folder = session, folder

    def status(self, flag: str, value: int, context: int) -> int | None:
        """The exit status of a start; ``None`` where it became ready."""
        import os
        import subprocess

        words = [sys.executable, str(PROGRAM), "serve", "m", "--host", "127.0.0.1", "--port", "0"]
        words += ["--max-model-len", str(context), "--max-num-seqs", "8", flag, str(value), "--gpu-memory-utilization", "0.1"]
        env = {**os.environ, **self.session.options.env}
        with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if "startup complete" in line:
                    process.terminate()
                    process.wait()
                    return None
            return process.wait()


def test_a_hybrid_model_takes_blocks_whatever_its_length(opened: Opened) -> None:
    blocks = calibrated(opened(groups=3, fixed=5)).metadata.kv_blocks
    assert blocks is not None
    assert (blocks.per_block, blocks.fixed, blocks.bytes) == (3, 5, 512 * 1024)


def test_a_share_that_is_not_free_and_a_length_that_is_too_long_are_corrected_once(opened: Opened) -> None:
    # A quarter of the memory is not free, and what is leaves room for less than 4096 tokens.
    session = opened(free=90 * MIB, consumed=60 * MIB, block_bytes=MIB)
    metadata = calibrated(session).metadata
    assert metadata.quality.valid_to == 32768
    assert max(load.context for load in metadata.quality.loads) < 4096
    assert len(metadata.quality.notes) >= 2


def test_a_length_beyond_the_model_is_corrected_where_nobody_knew_it(opened: Opened) -> None:
    metadata = calibrated(opened(name="acme/short-1b", model_context=2048)).metadata
    assert sorted({load.context for load in metadata.quality.loads}) == [1024, 2048]


FAILURES = {
    "gated": (NotPermittedError, "gated-model"),
    "not found": (NotFoundError, "no-such-model"),
    "unsupported": (EngineError, "unsupported-model"),
    "dies when ready": (EngineError, "engine-ended"),
}


@pytest.mark.parametrize("mode", FAILURES)
def test_a_start_that_fails_says_why_and_leaves_nothing(opened: Opened, mode: str) -> None:
    kind, code = FAILURES[mode]
    session = opened(env={"HARNESS_TEST_MARK": mode.replace(" ", "-") + "-vllm"}, speed=True, mode=mode)
    with pytest.raises(HarnessError) as failed:
        calibrated(session)
    assert (type(failed.value), failed.value.code) == (kind, code)
    assert marked_processes(mode.replace(" ", "-") + "-vllm") == []
    assert list(session.store.runs()), "the record is kept"
    assert not list(session.store.paths())


def test_a_start_that_dies_while_its_speed_is_timed_keeps_what_was_measured(opened: Opened) -> None:
    session = opened(env={"HARNESS_TEST_MARK": "first-prompt-vllm"}, speed=True, mode="dies at the first prompt")
    metadata = calibrated(session).metadata
    assert metadata.performance.decode_tokens_per_s is None
    assert any("speed" in note for note in metadata.quality.notes)
    assert marked_processes("first-prompt-vllm") == []


def test_an_engine_that_stays_silent_is_ended_at_the_deadline(opened: Opened) -> None:
    import msgspec

    session = opened(env={"HARNESS_TEST_MARK": "silent-vllm"}, mode="silent")
    session = msgspec.structs.replace(session, options=msgspec.structs.replace(session.options, timeout=1.0))
    with pytest.raises(HarnessError) as failed:
        calibrated(session)
    assert failed.value.code == "engine-timeout"
    assert marked_processes("silent-vllm") == []


@pytest.mark.usefixtures("kept_volumes")
@pytest.mark.parametrize("place", PLACES)
def test_a_token_reaches_the_engine_as_a_file_and_nothing_else(
    opened: Opened, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = "hf_thisIsASecret"
    monkeypatch.setenv("HF_TOKEN", token)
    session = opened(place, name="acme/tern-1b", env={"HF_TOKEN": token} if place == "process" else {})
    calibrated(session)
    logs = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    assert any("token file of 16 characters, mode 0o400" in path.read_text() for path in logs if path.suffix == ".log")
    assert not [path for path in logs if token in path.read_text()]


@pytest.mark.parametrize("words", ["--port 1", "--api-key x", "--hf-token=x", "'"])
def test_options_that_are_set_here_or_would_show_a_secret_are_refused(opened: Opened, words: str) -> None:
    session = opened(env={"VLLM_ARGS": words})
    with pytest.raises(UsageError):
        session.calibrate(Observer())


def test_a_model_that_cannot_be_reached_is_refused_before_anything_starts(opened: Opened, tmp_path: Path) -> None:
    for name in ("/no/such/folder", str(tmp_path), "model.gguf", "a/b/c"):
        with pytest.raises(NotFoundError):
            opened(name=name)
