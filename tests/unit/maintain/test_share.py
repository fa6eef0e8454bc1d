"""What is shared says whose it is in no string, and says the same as the calibration; what others propose is refitted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness.errors import BadInputError, HarnessError, NotFoundError, NotPermittedError
from harness.fit.constants import fit_record
from harness.maintain.community import NOTE, rank, take
from harness.maintain.refit import fitted
from harness.maintain.share import Shared, check, scrubbed, share
from harness.model.facts import DeviceFacts, Unread
from harness.model.record import EngineVersion, Gpu, Machine, Model, Record, Settings, VllmSettings
from harness.model.trace import MemoryTrace, Occupancy
from harness.store.store import Store, read_record
from tests.support.records import facts, load, record

ROOT = Path(__file__).parents[3]
DIGEST = f"sha256:{'ab' * 32}"
SECRET = "alice@build-7.corp.example:/home/alice/secret"


def full_of_secrets() -> Record:
    """A record in which every text that may hold something of its author's does."""
    seen = facts(
        8192, model=f"/home/{SECRET}.gguf", failure=SECRET, doubts=(), checked=(SECRET,), wrapping=(SECRET,),
        unread=Unread(count=2, samples=(SECRET,)), engine_version="b1",
    )  # fmt: skip
    devices = {**seen.devices, "RPC0[10.0.0.7:50052]": DeviceFacts(kind="gpu", address="10.0.0.7:50052", weights_bytes=0)}
    first = load(8192)
    first = msgspec.structs.replace(
        first, reason=SECRET, log=f"/home/{SECRET}.log", facts=msgspec.structs.replace(seen, devices=devices),
        trace=MemoryTrace(meter="nvml", other_processes={4711: 1}, failures={SECRET: 1}),
    )  # fmt: skip
    made = record(first, load(16384), load(32768))
    return msgspec.structs.replace(
        made,
        run=f"20261124T123456Z-{SECRET}",
        started_at="2026-11-24T12:34:56Z",
        ended_at="2026-11-24T12:35:56Z",
        model=Model(name="/home/alice/models/qwen.gguf", digest=DIGEST, architecture="qwen2", train_context=131072, layers=28),
        engine=EngineVersion(version="b1", image="registry.corp.example:5000/llama:b1", image_digest=DIGEST),
        settings=Settings(env={"LLAMA_ARG_FIT_TARGET": "512", "HF_TOKEN": "(redacted)", "OLLAMA_MODELS": f"/{SECRET}"}),
        machine=Machine(
            target="gpu",
            sandbox="process",
            meter="nvml",
            gpus=(Gpu(name="NVIDIA Test A", uuid="GPU-1234-5678", driver="580.95"),),
        ),
        before=Occupancy(devices={"GPU-1234-5678": 1}, processes={4711: 1}),
        notes=(SECRET,),
    )


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, one in value.items():
            yield from strings(key)
            yield from strings(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from strings(one)
    elif isinstance(value, str):
        yield value


def test_every_string_that_leaves() -> None:
    """The whole list: a new one in a record has to be looked at before it stands here."""
    left = scrubbed(full_of_secrets())
    keys = {field for kind in _structs(left) for field in (one.encode_name for one in msgspec.structs.fields(kind))}
    found = set(strings(msgspec.to_builtins(left))) - keys

    assert found == {
        "20261124T000000Z-llama-server-qwen", "2026-11-24T00:00:00Z", "0", "full",
        "llama-server/qwen", "llama-server", "qwen.gguf", DIGEST, "qwen2", "b1",
        "f16", "LLAMA_ARG_FIT_TARGET", "512",
        "gpu", "process", "nvml", "NVIDIA Test A", "580.95",
        "point", "ok", "llama.cpp", "enabled", "CPU_Mapped", "CUDA0", "RPC0", "host",
        "GPU0",
    }  # fmt: skip


def _structs(value: object) -> Iterator[type[msgspec.Struct]]:
    if isinstance(value, msgspec.Struct):
        yield type(value)
        for field in value.__struct_fields__:
            yield from _structs(getattr(value, field))
    elif isinstance(value, dict):
        for one in value.values():
            yield from _structs(one)
    elif isinstance(value, tuple):
        for one in value:
            yield from _structs(one)


@pytest.mark.parametrize("path", sorted((ROOT / "tests/golden").rglob("record.json")), ids=lambda path: path.parent.name)
def test_what_is_left_of_a_real_record_says_the_same(path: Path) -> None:
    whole = read_record(path.parent)
    left = scrubbed(whole)

    first, second = fitted(whole, "whole"), fitted(left, "left")
    assert (first.constants, first.metadata.bands, first.metadata.breakdown_gb) == (
        second.constants, second.metadata.bands, second.metadata.breakdown_gb,
    )  # fmt: skip
    assert scrubbed(left) == left
    text = msgspec.json.encode(left).decode()
    assert "GPU-" not in text
    assert "/home" not in text
    assert "/root" not in text


def test_variables_that_may_matter_are_not_left_out_in_silence() -> None:
    made = msgspec.structs.replace(full_of_secrets(), settings=Settings(env={"LD_PRELOAD": "(redacted)"}))
    with pytest.raises(NotPermittedError, match="was measured with LD_PRELOAD, which does not leave"):
        scrubbed(made)
    vllm = VllmSettings(model="/data/m", max_num_seqs=8, arguments=("--chat-template", "/home/alice/x"))
    with pytest.raises(NotPermittedError, match="VLLM_ARGS"):
        scrubbed(msgspec.structs.replace(made, settings=Settings(vllm=vllm)))


@pytest.mark.parametrize(
    ("image", "left"),
    [
        ("ollama/ollama:0.33.0", True), ("ollama/ollama@sha256:" + "a" * 64, True), ("registry.corp.example/x/y:1", False),
        ("localhost/own:1", False), ("host:5000/own:1", False),
    ],
)  # fmt: skip
def test_images_of_ones_own_registry_are_not_named(image: str, left: bool) -> None:
    made = msgspec.structs.replace(full_of_secrets(), engine=EngineVersion(version="b1", image=image, image_digest=DIGEST))
    engine = scrubbed(made).engine
    assert (engine.image, engine.image_digest) == ((image, DIGEST) if left else (None, None))


def shared_file(folder: Path, card: str = "NVIDIA Test A", day: str = "2026-11-24", name: str = "made-up") -> Path:
    made = msgspec.structs.replace(
        record(load(8192), load(16384), load(32768)), started_at=f"{day}T10:00:00Z", id=f"llama-server/{name}",
        model=Model(name=name, digest=DIGEST, train_context=131072, layers=28),
        machine=Machine(target="gpu", sandbox="process", meter="nvml", gpus=(Gpu(name=card),)),
    )  # fmt: skip
    left = scrubbed(made)
    shared = Shared(calibration=fitted(left, "x"), record=left)
    path = folder / shared.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(shared.encoded())
    return path


def test_a_calibration_is_shared_and_accepted(tmp_path: Path) -> None:
    shelf = Store(tmp_path / "store")
    made = record(load(8192), load(16384), load(32768))
    shelf.write_record(made)
    with pytest.raises(NotFoundError, match=r"the record of llama-server/made-up, run .*, is not in"):
        share(Store(tmp_path / "other"), fit_record(made))
    shared = share(shelf, fit_record(made))
    path = tmp_path / shared.name
    path.parent.mkdir()
    path.write_bytes(shared.encoded())

    assert shared.name == "llama-server/made-up@host.json" or shared.name.startswith("llama-server/made-up@")
    assert check(path).calibration.constants == fit_record(made).constants


def altered(path: Path, change: Any) -> Path:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda d: d["calibration"]["constants"].update(base_vram_gb=0.1),
            "not a calibration|contradicts|not what its record says",
        ),
        (lambda d: d["record"]["loads"][0]["busy"].update(total_bytes=1), "not what its record says|differs between loads"),
        (lambda d: d["record"].update(notes=["see http://evil.example"]), "contains more than may be shared"),
        (lambda d: d["record"]["settings"].update(env={"LD_PRELOAD": "/tmp/x"}), "LD_PRELOAD"),
        (lambda d: d["record"]["model"].update(name="a\u202eb"), "control characters"),
        (lambda d: d.update(more=1), "not a shared calibration"),
        (lambda d: d.pop("record"), "not a shared calibration"),
        (lambda d: d["record"]["model"].update(name="other"), "contains more|not what its record says|belongs at"),
    ],
)
def test_a_file_that_does_not_follow_from_its_record_is_refused(tmp_path: Path, change: Any, said: str) -> None:
    path = altered(shared_file(tmp_path), change)
    with pytest.raises(HarnessError, match=said):
        check(path)


def test_a_file_stands_under_its_own_name(tmp_path: Path) -> None:
    path = shared_file(tmp_path)
    moved = path.rename(path.with_name("made-up@NVIDIA-H100.json"))
    with pytest.raises(BadInputError, match=r"belongs at llama-server/made-up@NVIDIA-Test-A\.json"):
        check(moved)
    (tmp_path / "nonsense.json").write_text("[" * 5000)
    with pytest.raises(BadInputError):
        check(tmp_path / "nonsense.json")


def actions(store: Store, folder: Path, cards: tuple[str, ...], least: Any) -> dict[str, str]:
    return {Path(one.source).name: one.action for one in take(store, [folder], cards, least, folder)}


def test_own_before_the_same_card_before_the_same_kind(tmp_path: Path) -> None:
    folder = tmp_path / "community"
    shared_file(folder / "near")
    shared_file(folder / "near-newer", day="2026-11-26")
    shared_file(folder / "kind", card="NVIDIA Test B", day="2026-11-27")
    shared_file(folder / "far", card="AMD Test C")
    store = Store(tmp_path / "store")

    found = list(take(store, [folder], ("NVIDIA Test A",), "kind", folder))
    assert sorted((Path(one.source).parts[-3], one.action) for one in found) == [
        ("far", "far"), ("kind", "other"), ("near", "other"), ("near-newer", "added"),
    ]  # fmt: skip
    ((_, taken),) = store.find("made-up")
    assert taken.metadata.calibrated_at == "2026-11-26T00:00:00Z"
    assert taken.metadata.quality.notes[-1] == f"{NOTE}: NVIDIA Test A"
    again = {one.action for one in take(store, [folder], ("NVIDIA Test A",), "kind", folder)}
    assert again == {"own", "far"}, "what is here is never replaced"


def test_another_card_is_taken_only_where_that_is_asked_for(tmp_path: Path) -> None:
    shared_file(tmp_path / "community")
    cards = ("NVIDIA Test Z",)
    assert set(actions(Store(tmp_path / "a"), tmp_path / "community", cards, "card").values()) == {"far"}
    assert set(actions(Store(tmp_path / "b"), tmp_path / "community", cards, "kind").values()) == {"added"}
    assert set(actions(Store(tmp_path / "c"), tmp_path / "community", (), "kind").values()) == {"far"}
    with pytest.raises(NotFoundError, match="no shared calibrations"):
        actions(Store(tmp_path / "d"), tmp_path / "nothing", cards, "card")


def test_what_a_proposed_file_asks_for_is_refused(tmp_path: Path) -> None:
    path = shared_file(tmp_path / "community")
    altered(path, lambda d: d["record"]["engine"].update(image="evil/engine:1"))
    altered(path, lambda d: d["record"]["machine"].update(sandbox="docker"))
    found = msgspec.json.decode(path.read_bytes(), type=Shared)
    path.write_bytes(Shared(calibration=fitted(found.record, "x"), record=found.record).encoded())

    (one,) = take(Store(tmp_path / "store"), [tmp_path / "community"], ("NVIDIA Test A",), "card", tmp_path)
    assert (one.action, "evil/engine:1" in (one.reason or "")) == ("refused", True)


def test_ranks() -> None:
    left = scrubbed(full_of_secrets())
    shared = Shared(calibration=fitted(left, "x"), record=left)
    assert [rank(shared, cards) for cards in (("NVIDIA Test A",), ("NVIDIA Other",), ("AMD Other",), ())] == [
        "card", "kind", None, None,
    ]  # fmt: skip


def test_what_is_in_the_repository_is_accepted() -> None:
    for path in sorted((ROOT / "models/community").rglob("*.json")):
        check(path)
