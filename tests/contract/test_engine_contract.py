"""What every recipe promises, tried on the engine itself (Ollama: on the stand-in, which starts the real llama-server)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from harness.engines import gguf
from harness.engines.base import NO_ANSWER, Engine, Options, Source
from harness.engines.registry import policy_of, recipe_of
from harness.errors import EngineError, HarnessError
from harness.logs import parse_log
from harness.model.record import LoadRequest
from harness.sandboxes.base import GpuRequest, Site
from harness.sandboxes.process import ProcessSandbox
from harness.sandboxes.reaper import Reaper
from tests.support.models import write_tiny_llama
from tests.support.ollama import registry, standin
from tests.support.waiting import until

REQUEST = LoadRequest(context=2048, num_batch=512)
OPTIONS = Options(target="host", gpus=GpuRequest(mode="none"), timeout=30.0)
ENGINES = ("llama-server", "ollama", "vllm")


class Loaded(NamedTuple):
    engine: Engine
    source: Source
    client: httpx.Client
    log: Path


def quiet(what: str, done: float, total: float | None) -> None:
    """Progress that nobody watches."""


@contextlib.contextmanager
def llama_server(folder: Path) -> Iterator[Loaded]:
    engine = recipe_of("llama-server")
    source = engine.resolve(str(registry() / "tiny.gguf"), OPTIONS)
    with Reaper() as reaper, contextlib.closing(ProcessSandbox(reaper)) as sandbox:
        site = sandbox.site()
        running = sandbox.start(engine.launch(source, REQUEST, OPTIONS, site), site, folder / "log")
        with httpx.Client(base_url=running.endpoint, trust_env=False, timeout=30.0) as client:
            assert engine.ready(client) in (True, False), "not yet, and no error"
            until(lambda: engine.ready(client), "llama-server")
            yield Loaded(engine, source, client, folder / "log")


@contextlib.contextmanager
def ollama(folder: Path, binary: Path) -> Iterator[Loaded]:
    engine = recipe_of("ollama")
    with standin(folder, STANDIN_ENGINE=str(binary)) as client:
        source = engine.prepare(client, engine.resolve("tiny", OPTIONS), OPTIONS, quiet)
        yield Loaded(engine, source, client, folder / "log")


@pytest.fixture(scope="module", params=["llama-server", "ollama"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, engine_bin: Path) -> Iterator[Loaded]:
    folder = tmp_path_factory.mktemp("engine")
    place = llama_server(folder) if request.param == "llama-server" else ollama(folder, engine_bin)
    with place as opened:
        opened.engine.load(opened.client, opened.source, REQUEST, OPTIONS)
        yield opened


@pytest.mark.requires("embedded")
def test_a_prompt_is_as_long_as_asked_and_timed_by_the_engine(loaded: Loaded) -> None:
    """Twice: nothing of the second prompt comes out of a cache."""
    for _ in range(2):
        speed = loaded.engine.generate(loaded.client, loaded.source, REQUEST, OPTIONS, 500, 16)
        assert speed.prompt_tokens == pytest.approx(500, rel=0.1)
        assert speed.decode_tokens == 16
        assert (speed.prompt_tokens_per_s or 0) > 0
        assert (speed.decode_tokens_per_s or 0) > 0


@pytest.mark.requires("embedded")
def test_the_log_tells_of_the_load_that_was_asked_for(loaded: Loaded) -> None:
    (facts,) = [one for one in parse_log(loaded.log.read_bytes()) if one.complete]
    assert facts.engine == loaded.engine.name
    assert (facts.context_cells, facts.num_batch, facts.parallel) == (REQUEST.context, REQUEST.num_batch, 1)


@pytest.mark.requires("embedded")
def test_a_running_engine_says_its_version(loaded: Loaded) -> None:
    assert loaded.engine.version(OPTIONS, loaded.client).version


@pytest.mark.parametrize("name", ENGINES)
def test_an_engine_that_is_not_there_is_not_ready_and_gives_no_answer(name: str, tmp_path: Path) -> None:
    engine = recipe_of(name)
    model = write_tiny_llama(tmp_path / "m.gguf") if name == "llama-server" else None
    source = Source(model=gguf.describe(gguf.Header(metadata={}, tensors=()), "m", None), path=model, own_name="m")
    with httpx.Client(base_url="http://127.0.0.1:1", trust_env=False, timeout=5.0) as client:
        assert not engine.ready(client)
        with pytest.raises(EngineError) as caught:
            engine.generate(client, source, REQUEST, OPTIONS, 16, 1)
    if name != "vllm":
        assert caught.value.code == NO_ANSWER


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("model", ["../../etc/passwd", "$(touch x)", "a b;c", "--help", "x\x00y"])
def test_a_hostile_name_is_refused_or_stays_one_argument(name: str, model: str, tmp_path: Path) -> None:
    """Nothing is evaluated, and no path leads out of where models lie: refused at once, or passed on as it is."""
    engine = recipe_of(name)
    site = Site(sandbox="docker", host="0.0.0.0", port=8080)
    refused = None
    try:
        launch = engine.launch(engine.resolve(model, OPTIONS), REQUEST, OPTIONS, site)
    except HarnessError as error:
        refused = error.exit_code
    assert refused in (2, 65, 66) if refused else model in launch.argv


@pytest.mark.parametrize("name", ENGINES)
def test_a_batch_rule_ascends(name: str) -> None:
    limits = policy_of(name).batch_limits(None)
    assert sorted(limits) == list(limits)
    assert sorted(batch for _, batch in limits) == [batch for _, batch in limits]
