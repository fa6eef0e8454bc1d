"""What each engine is started with where only the header of a model is here."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from harness.engines.base import Options, Source
from harness.engines.registry import policy_of, recipe_of
from harness.errors import UnavailableError
from harness.model.record import LoadRequest, Model
from harness.sandboxes.base import Site

SITE = Site(sandbox="process", host="127.0.0.1", port=1)


def test_vllm_makes_weights_of_its_own() -> None:
    engine, options = recipe_of("vllm"), Options(engine="vllm", sandbox="process")
    source = Source(model=Model(name="org/name"), own_name="org/name")
    request = LoadRequest(context=4096, utilization=0.5)
    assert "--load-format" not in engine.launch(source, request, options, SITE).argv
    dummy = engine.launch(msgspec.structs.replace(source, weights="header"), request, options, SITE).argv
    assert dummy[dummy.index("--load-format") + 1] == "dummy"
    assert policy_of("vllm").dummy_weights


def test_what_plans_a_load_sees_no_gpu_and_allocates_nothing(tmp_path: Path) -> None:
    launch = recipe_of("llama-server").planning(
        tmp_path / "x.gguf", LoadRequest(context=4096, num_batch=256), Options(kv_cache_type="q8_0", num_parallel=2)
    )
    if launch is None:
        pytest.skip("the embedded engine does not run on this CPU, or is not installed")
    assert "--no-alloc" in launch.argv
    assert launch.env["CUDA_VISIBLE_DEVICES"] == ""
    words = " ".join(launch.argv)
    assert "-c 8192 -np 2" in words
    assert "-ub 256" in words
    assert "-ctk q8_0 -ctv q8_0" in words


def test_an_engine_that_cannot_do_without_weights_says_so() -> None:
    with pytest.raises(UnavailableError, match="from its header"):
        recipe_of("vllm").from_header(None, Options())  # type: ignore[arg-type]
