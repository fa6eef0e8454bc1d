"""What is decided before an engine starts, and what is made of its log afterwards."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import msgspec
import pytest

from harness.engines.registry import policy_of
from harness.errors import NotPermittedError, OffloadLikelyError, UnknownVerdictError, UsageError
from harness.inventory.machine import LocalMachine
from harness.model.calibration import Calibration
from harness.model.facts import DeviceFacts
from harness.options import Allowed, RunOptions
from harness.prediction.verification import describe_placement, disagreement
from harness.serving import server
from harness.serving.calibration_lookup import read_question
from harness.serving.check import Assessment, check
from harness.serving.server import OnOffload, completed, decide, request_of
from harness.store.store import Store
from harness.units import GIB, MIB
from tests.support.calibrations import made_up, on_host, store_of
from tests.support.records import facts
from tests.support.rules import judge
from tests.support.vllm_artifacts import vllm_calibration

RULES = policy_of("llama-server")


def judged(folder: Path, spec: str, gib: float, calibration: Calibration | None = None) -> Assessment:
    store = store_of(folder, calibration or made_up())
    return check([read_question(spec, None)], store, LocalMachine(), available=(round(gib * GIB),)).models[0]


@pytest.mark.parametrize(
    ("spec", "way", "outcome"),
    [
        ("made-up@8192", "refuse", 8192),
        ("made-up@65536", "warn", 65536),
        ("made-up@65536", "refuse", OffloadLikelyError),
        ("nobody@4096", "warn", 4096),
        ("nobody@4096", "refuse", UnknownVerdictError),
        ("nobody@4096", "shrink", UnknownVerdictError),
        ("made-up@200000", "refuse", UnknownVerdictError),
    ],
)
def test_what_would_spill_or_is_unknown_starts_only_where_that_is_wanted(
    tmp_path: Path, spec: str, way: str, outcome: int | type[Exception]
) -> None:
    said = judged(tmp_path, spec, 6)
    if isinstance(outcome, int):
        assert decide(said, cast("OnOffload", way)) == outcome
    else:
        with pytest.raises(outcome):
            decide(said, cast("OnOffload", way))


def test_shrinking_takes_the_largest_context_that_fits_and_no_other(tmp_path: Path) -> None:
    context = decide(judged(tmp_path, "made-up@65536", 6), "shrink")
    assert judge(made_up(), context, 1, (6 * GIB,)).verdict == "fits"
    assert judge(made_up(), context + 256, 1, (6 * GIB,)).verdict == "offload"
    with pytest.raises(OffloadLikelyError):
        decide(judged(tmp_path, "made-up@65536", 3), "shrink")


def test_what_others_measured_starts_in_whatever_sandbox_there_is(tmp_path: Path) -> None:
    weights = tmp_path / "made-up.gguf"
    weights.touch()
    measured = of_others(made_up(), {})
    machine = msgspec.structs.replace(measured.metadata.machine, sandbox="unknown", meter="import")
    imported = msgspec.structs.replace(measured, metadata=msgspec.structs.replace(measured.metadata, machine=machine))
    for calibration, sandbox in ((measured, "process"), (imported, "auto")):
        said = judged(tmp_path, f"{weights}@8192", 6, calibration)
        assert completed(RunOptions(model=str(weights)), said, Store(tmp_path)).sandbox == sandbox


#: SHA-256 of the weights that these tests lay down.
EMPTY_FILE = f"sha256:{hashlib.sha256().hexdigest()}"


def of_others(calibration: Calibration, env: dict[str, str], **engine: str) -> Calibration:
    metadata = calibration.metadata
    settings = msgspec.structs.replace(metadata.settings, env=env)
    machine = msgspec.structs.replace(metadata.machine, sandbox="docker" if engine else metadata.machine.sandbox)
    version = msgspec.structs.replace(metadata.engine, **engine)
    model = msgspec.structs.replace(metadata.model, digest=EMPTY_FILE)
    changed = msgspec.structs.replace(metadata, settings=settings, machine=machine, engine=version, model=model)
    return msgspec.structs.replace(calibration, metadata=changed)


def test_a_calibration_of_others_hands_the_engine_settings_alone(tmp_path: Path) -> None:
    weights = tmp_path / "made-up.gguf"
    weights.touch()
    options = RunOptions(model=str(weights))

    def env_of(env: dict[str, str], given: RunOptions = options) -> dict[str, str]:
        return completed(given, judged(tmp_path, f"{weights}@8192", 6, of_others(made_up(), env)), Store(tmp_path)).env

    assert env_of({"LLAMA_ARG_FIT_TARGET": "512"}) == {"LLAMA_ARG_FIT_TARGET": "512"}
    for name, value in (("LD_PRELOAD", "/tmp/x.so"), ("LLAMA_ARG_LOG_FILE", "/home/u/.bashrc")):
        with pytest.raises(NotPermittedError, match=f"{name}='{value}'"):
            env_of({name: value})
        allowed = msgspec.structs.replace(options, allowed=Allowed(env=frozenset({name})))
        assert env_of({name: value}, allowed) == {name: value}
    with pytest.raises(UsageError, match="GH_TOKEN"):
        env_of({"GH_TOKEN": "(redacted)"})


def test_an_image_is_started_by_the_digest_that_was_recorded(tmp_path: Path) -> None:
    digest = f"sha256:{'0' * 64}"
    weights = tmp_path / "made-up.gguf"
    weights.touch()

    def image_of(image: str, allowed: Allowed) -> str | None:
        theirs = of_others(made_up(), {}, image=image, image_digest=digest)
        options = RunOptions(model=str(weights), allowed=allowed)
        return completed(options, judged(tmp_path, f"{weights}@8192", 6, theirs), Store(tmp_path)).image

    assert image_of("harness-llama-server:b1", Allowed()) == f"harness-llama-server:b1@{digest}"
    with pytest.raises(NotPermittedError, match="evil/server"):
        image_of("evil/server:b1", Allowed())
    assert image_of("evil/server:b1", Allowed(image=True)) == f"evil/server:b1@{digest}"


def test_each_engine_is_asked_for_the_load_that_was_judged(tmp_path: Path) -> None:
    assert request_of(judged(tmp_path, "made-up@8192", 24), 8192, 1).num_batch == 512
    store = Store(tmp_path)
    store.write(store.path_of("vllm", "acme/tern-8b"), vllm_calibration())
    (said,) = check([read_question("acme/tern-8b@8192", None)], store, LocalMachine(), available=(79 * GIB,)).models
    request = request_of(said, 8192, 1)
    assert request.kv_cache_bytes == 1_077_936_128  # what `harness allocate` says for the same question
    assert request.utilization is not None


def test_what_was_foreseen_is_no_disagreement() -> None:
    fits = judge(made_up(), 8192, 1, (24 * GIB,))
    offload = judge(made_up(), 65536, 1, (round(5.5 * GIB),))
    kept = offload.layers_offloaded or 0
    assert disagreement(fits, facts(8192), RULES) is None
    assert disagreement(offload, facts(65536, layers_offloaded=kept + 2), RULES) is None
    unknown = judge(made_up(), 8192, 1, None)
    assert disagreement(unknown, facts(8192, layers_offloaded=3), RULES) is None


def test_what_came_differently_is_said_in_its_own_words() -> None:
    fits = judge(made_up(), 8192, 1, (24 * GIB,))
    offload = judge(made_up(), 65536, 1, (round(5.5 * GIB),))
    kept = offload.layers_offloaded or 0
    assert (
        disagreement(fits, facts(8192, layers_offloaded=20), RULES)
        == "predicted: fits; observed: only 20 of 29 layers are on the GPU"
    )
    assert "7 layers overflow" in str(disagreement(fits, facts(8192, layers_overflowing=7), RULES))
    assert "everything is on the GPU" in str(disagreement(offload, facts(65536), RULES))
    assert f"and {kept - 3} did" in str(disagreement(offload, facts(65536, layers_offloaded=kept - 3), RULES))
    host = judge(on_host(made_up()), 8192, 1, (24 * GIB,))
    assert "weights lie on a GPU" in str(disagreement(host, facts(8192), RULES))


def test_the_log_is_told_in_words() -> None:
    assert describe_placement(facts(8192, layers_offloaded=21), "gpu") == "21 of 29 layers are on the GPU"
    assert "7 of them with experts on the host" in describe_placement(facts(8192, layers_overflowing=7), "gpu")
    on_cpu = msgspec.structs.replace(facts(8192), devices={"CPU": DeviceFacts(kind="host", weights_bytes=MIB)})
    assert describe_placement(on_cpu, "host") == "everything is in host memory"


@pytest.mark.parametrize("name", ["gemma3:270m", "org/model:7b", "a b", "ü", "..", "%"])
def test_a_served_model_of_any_name_has_a_folder(tmp_path: Path, name: str) -> None:
    session = SimpleNamespace(engine=SimpleNamespace(name="llama-server"), request=SimpleNamespace(stem=name))
    with server._folder(Store(tmp_path), session) as folder:  # type: ignore[arg-type]
        assert folder.parent == tmp_path / "runs"
    assert not folder.exists(), "nothing was kept"
