"""What a recalibration asks for, and what it refuses to replace."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from harness.cli.main import cli
from harness.errors import CannotWriteError, NotPermittedError, UnavailableError, UsageError
from harness.fit.constants import fit_record
from harness.inventory.digests import cached_sha256
from harness.inventory.installed import Installed
from harness.maintain.recalibrate import SurveyedCalibration, refuse_other, rerun_options, survey
from harness.model.calibration import Calibration
from harness.model.record import EngineVersion, Gpu, LoadRequest, Machine, Model, Settings
from harness.options import Allowed, Overrides
from harness.prediction.staleness import Staleness
from harness.store.store import Store
from tests.support.records import load, record

IMAGE_DIGEST = f"sha256:{'a' * 64}"
CARD = Gpu(name="NVIDIA Card", uuid="GPU-1", memory_gb=12.0, driver="550.1")
OTHER = Gpu(name="NVIDIA Other", uuid="GPU-2", memory_gb=24.0, driver="550.1")


def made(*gpus: Gpu, settings: Settings | None = None, image: str | None = "ollama/ollama:0.33.0") -> Calibration:
    base = fit_record(record(load(8192), load(16384), load(32768)))
    metadata = msgspec.structs.replace(
        base.metadata,
        model=Model(name="qwen2.5:0.5b", digest=f"sha256:{'e' * 64}", train_context=131072),
        engine=EngineVersion(version="0.33.0", image=image, image_digest=IMAGE_DIGEST),
        machine=Machine(target="gpu", sandbox="docker", meter="nvml", gpus=gpus or (CARD,)),
        settings=settings or base.metadata.settings,
        run=None,
    )
    return msgspec.structs.replace(base, id="ollama/qwen2.5-0.5b", engine="ollama", metadata=metadata)


class Seen(Installed):
    """A finder that sees only these GPUs: no Docker daemon, no weights."""

    seen: tuple[Gpu, ...] | None = None
    running: str | None = None

    def gpus(self) -> tuple[Gpu, ...] | None:
        return self.seen

    def running_version(self, name: str) -> str | None:
        return self.running

    def _image_digest(self, reference: str) -> str | None:
        return None

    def model_digest(self, calibration: Calibration) -> str | None:
        return None


def finder_at(folder: Path, *gpus: Gpu, **given: Any) -> Installed:
    finder = Seen(Store(folder), Overrides(**given), folder)
    finder.seen = gpus or None
    return finder


def target(calibration: Calibration, variant: str = "") -> SurveyedCalibration:
    path = Path(f"ollama/qwen2.5-0.5b{variant}.yaml")
    return SurveyedCalibration(key=path.stem, path=path, calibration=calibration, age=Staleness(reasons=(), unknown=()))


def test_settings_plan_gpu_and_variant_are_asked_for_as_they_were(tmp_path: Path) -> None:
    settings = Settings(
        num_parallel=2, num_batch=512, kv_cache_type="q8_0", flash_attention="enabled", env={"OLLAMA_GPU_OVERHEAD": "1"}
    )
    options = rerun_options(target(made(settings=settings), "@two"), finder_at(tmp_path, OTHER, CARD))
    assert options.model == "qwen2.5:0.5b"
    assert (options.engine, options.sandbox, options.variant) == ("ollama", "docker", "two")
    assert options.loads == tuple(LoadRequest(context=context, num_batch=512) for context in (8192, 16384, 32768))
    assert (options.num_parallel, options.kv_cache_type, options.flash_attention) == (2, "q8_0", "on")
    assert (options.env, options.gpus, options.speed) == ({"OLLAMA_GPU_OVERHEAD": "1"}, "GPU-1", False)


def of_engine(calibration: Calibration, **changes: Any) -> Calibration:
    engine = msgspec.structs.replace(calibration.metadata.engine, **changes)
    return msgspec.structs.replace(calibration, metadata=msgspec.structs.replace(calibration.metadata, engine=engine))


def valid_to(calibration: Calibration, tokens: int) -> Calibration:
    quality = msgspec.structs.replace(calibration.metadata.quality, valid_to=tokens)
    return msgspec.structs.replace(calibration, metadata=msgspec.structs.replace(calibration.metadata, quality=quality))


@pytest.mark.parametrize(
    ("version", "range_", "batch"),
    [
        ("0.24.0", 131_072, None),  # 512 at every context was the engine's own choice
        ("0.33.0", 131_072, 512),  # beyond 4,096 it would have taken more, so it was asked for
        ("0.33.0", 4096, None),
    ],
)
def test_a_batch_is_asked_for_again_only_where_the_engine_had_not_chosen_it(
    tmp_path: Path, version: str, range_: int, batch: int | None
) -> None:
    one = target(valid_to(of_engine(made(), version=version), range_))
    options = rerun_options(one, finder_at(tmp_path, CARD))
    assert (options.num_batch, options.contexts) == (batch, (8192, 16384, 32768))


def test_a_dry_run_shows_the_batches_of_the_version_that_would_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(store.path_of("ollama", "qwen2.5:0.5b"), of_engine(made(image="ollama/ollama:0.24.0"), version="0.24.0"))

    def planned(image: str) -> list[tuple[int, int | None]]:
        (one,) = survey(store, (), finder_at(tmp_path, CARD, image=image), None, lambda _: None)
        return [(load.context, load.num_batch) for load in one.loads]

    assert planned("ollama/ollama:0.24.0") == [(8192, 512), (16_384, 512), (32_768, 512)]
    top = [(8192, 2048), (16_384, 2048), (32_768, 2048)]
    assert planned("ollama/ollama:0.33.0") == [(4096, 512), (16_384, 1024), *top]


def test_a_program_that_was_named_is_named_again_and_never_replaced_by_the_embedded_one(tmp_path: Path) -> None:
    calibration = of_engine(made(), named=True, image=None, image_digest=None)
    machine = Machine(target="host", sandbox="process", meter="host")
    calibration = msgspec.structs.replace(calibration, metadata=msgspec.structs.replace(calibration.metadata, machine=machine))
    with pytest.raises(UsageError, match="a calibration may not say which program is run") as refused:
        rerun_options(target(calibration), finder_at(tmp_path))
    assert refused.value.hint is not None
    assert "--engine-binary" in refused.value.hint
    assert finder_at(tmp_path).here(calibration).engine is None  # so it is not stale for another program's version
    assert rerun_options(target(calibration), finder_at(tmp_path, engine_binary="/opt/ollama")).engine_binary == "/opt/ollama"


def test_loads_beyond_the_range_are_a_reason_to_measure_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(store.path_of("ollama", "qwen2.5:0.5b"), valid_to(made(), 4096))
    (one,) = survey(store, (), finder_at(tmp_path, CARD), None, lambda _: None)
    assert [(reason.name, reason.old) for reason in one.age.reasons] == [("range", "4,096 tokens")]


def test_an_image_that_was_named_stays_the_one_to_compare_with(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/pins.yaml").write_text("ollama: 'ollama/ollama:0.34.0'\n")
    calibration = of_engine(made(image="ollama/ollama:0.24.0"), named=True)
    assert finder_at(tmp_path).image(calibration) == "ollama/ollama:0.24.0"
    assert finder_at(tmp_path, image="ollama/ollama:0.34.0").image(calibration) == "ollama/ollama:0.34.0"
    assert rerun_options(target(calibration), finder_at(tmp_path, CARD)).image == f"ollama/ollama:0.24.0@{IMAGE_DIGEST}"


def test_what_runs_here_comes_before_what_was_named_and_the_pin(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/pins.yaml").write_text("ollama: 'ollama/ollama:0.34.0'\n")
    calibration = of_engine(made(image="ollama/ollama:0.24.0"), version="0.24.0", named=True)

    def here(running: str | None) -> Seen:
        finder = Seen(Store(tmp_path), Overrides(), tmp_path)
        finder.running, finder.seen = running, (CARD,)
        return finder

    assert here(None).image(calibration) == "ollama/ollama:0.24.0"
    assert here("0.24.0").image(calibration) == "ollama/ollama:0.24.0"
    assert here("0.33.1").image(calibration) == "ollama/ollama:0.33.1"
    assert rerun_options(target(calibration), here("0.33.1")).image == "ollama/ollama:0.33.1"
    other = made(image="mine/ollama:patched")
    assert here("0.33.1").image(other) == "mine/ollama:patched", "the repository of a file is no server's"


def test_a_gpu_of_the_same_kind_stands_in_for_one_that_is_gone(tmp_path: Path) -> None:
    twin = msgspec.structs.replace(CARD, uuid="GPU-9")
    assert rerun_options(target(made()), finder_at(tmp_path, OTHER, twin)).gpus == "GPU-9"
    assert rerun_options(target(made()), finder_at(tmp_path, OTHER)).gpus == "all"
    assert rerun_options(target(made()), finder_at(tmp_path, CARD, gpus="1")).gpus == "1"


def test_a_secret_is_asked_for_and_never_measured_as_redacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = target(made(settings=Settings(env={"HF_TOKEN": "(redacted)"})))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UsageError, match="HF_TOKEN"):
        rerun_options(secret, finder_at(tmp_path, CARD))
    assert rerun_options(secret, finder_at(tmp_path, CARD, env={"HF_TOKEN": "x"})).env == {"HF_TOKEN": "x"}
    monkeypatch.setenv("HF_TOKEN", "mine")  # that a file names a variable is no leave to take it from the user
    with pytest.raises(UsageError, match="HF_TOKEN"):
        rerun_options(secret, finder_at(tmp_path, CARD))


def test_a_calibration_of_others_runs_no_code_and_starts_no_image(tmp_path: Path) -> None:
    preload = target(made(settings=Settings(env={"LD_PRELOAD": "/tmp/x.so"})))
    with pytest.raises(NotPermittedError, match="LD_PRELOAD=") as refused:
        rerun_options(preload, finder_at(tmp_path, CARD))
    assert refused.value.hint is not None
    assert "--allow-env LD_PRELOAD" in refused.value.hint
    env = rerun_options(preload, finder_at(tmp_path, CARD, allowed=Allowed(env=frozenset({"LD_PRELOAD"})))).env
    assert env == {"LD_PRELOAD": "/tmp/x.so"}
    assert rerun_options(preload, finder_at(tmp_path, CARD, env={"LD_PRELOAD": ""})).env == {"LD_PRELOAD": ""}
    image = target(made(image="evil/ollama:1"))
    with pytest.raises(NotPermittedError, match="evil/ollama"):
        rerun_options(image, finder_at(tmp_path, CARD))
    assert rerun_options(image, finder_at(tmp_path, CARD, image="mine/ollama:1")).image == "mine/ollama:1"
    allowed = rerun_options(image, finder_at(tmp_path, CARD, allowed=Allowed(image=True)))
    assert allowed.image == f"evil/ollama:1@{IMAGE_DIGEST}"  # by the digest that was recorded, not by its tag


def test_the_pinned_tag_replaces_only_an_image_of_its_repository(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/pins.yaml").write_text("ollama: 'ollama/ollama:0.34.0'\n")
    finder = finder_at(tmp_path)
    assert finder.image(made()) == "ollama/ollama:0.34.0"
    assert finder.image(made(image="docker.io/ollama/ollama@sha256:" + "0" * 64)) == "ollama/ollama:0.34.0"
    assert finder.image(made(image="mine/ollama:patched")) == "mine/ollama:patched"
    assert finder_at(tmp_path, image="mine/ollama:new").image(made()) == "mine/ollama:new"


def test_a_calibration_of_another_gpu_is_left_to_the_machine_where_it_answers(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(store.path_of("ollama", "qwen2.5:0.5b"), made(CARD))

    def found(*gpus: Gpu) -> dict[str, tuple[bool, str | None]]:
        targets = survey(store, (), finder_at(tmp_path, *gpus), None, lambda _: None)
        return {one.key.removeprefix("ollama/qwen2.5-0.5b"): (one.stale, one.answers) for one in targets}

    assert found(CARD) == {"": (False, None)}
    assert found(OTHER) == {"": (True, None)}  # the card was replaced, and nothing was measured on the new one
    store.write(store.path_of("ollama", "qwen2.5:0.5b", "other"), made(OTHER))
    assert found(OTHER) == {"": (False, "other"), "@other": (False, None)}
    assert found(CARD) == {"": (False, None), "@other": (False, "the default")}
    assert found() == {"": (False, None), "@other": (False, None)}


def test_figures_of_another_machine_are_not_replaced() -> None:
    def session(machine: Machine) -> Any:
        return SimpleNamespace(choice=SimpleNamespace(machine=lambda: machine))

    one = target(made())
    then = one.calibration.metadata.machine
    refuse_other(one, session(then), force=False)
    with pytest.raises(UnavailableError, match="on a GPU"):
        refuse_other(one, session(Machine(target="host", sandbox="docker", meter="host")), force=True)
    other = session(msgspec.structs.replace(then, gpus=(OTHER,)))
    with pytest.raises(CannotWriteError, match="NVIDIA Card, here NVIDIA Other"):
        refuse_other(one, other, force=False)
    refuse_other(one, other, force=True)


def test_a_digest_is_kept_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"one")
    first = cached_sha256(file)
    with monkeypatch.context() as patch:
        patch.setattr("harness.engines.gguf.sha256", lambda _path: pytest.fail("it was hashed again"))
        assert cached_sha256(file) == first
    file.write_bytes(b"another")
    assert cached_sha256(file) != first
    (tmp_path / "cache/digests.json").write_text("{")  # a damaged cache is none
    assert cached_sha256(file).startswith("sha256:")


def test_a_file_of_ones_own_is_found_where_its_digest_was_last_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ollama's log names a blob of a server that is gone, and the calibration a file without its folder."""
    monkeypatch.setenv("HARNESS_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "models" / "mine.gguf"
    file.parent.mkdir()
    file.write_bytes(b"weights")
    made_of = msgspec.structs.replace(made().metadata, model=Model(name="mine.gguf", digest=cached_sha256(file)))
    calibration = msgspec.structs.replace(made(), id="ollama/mine", metadata=made_of)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    assert finder_at(folder).model_path(calibration) == file
    file.write_bytes(b"others!")
    assert finder_at(folder).model_path(calibration) is None


def test_an_image_is_of_one_engine(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write(store.path_of("ollama", "qwen2.5:0.5b"), made())
    server = msgspec.structs.replace(made(), id="llama-server/qwen2.5-0.5b", engine="llama-server")
    store.write(store.path_of("llama-server", "qwen2.5:0.5b"), server)
    asked = ["recalibrate", "--dry-run", "--image", "ollama/ollama:0.34.0", "--store", str(tmp_path)]
    assert CliRunner().invoke(cli, asked).exit_code == 2
    done = CliRunner().invoke(cli, [*asked, "--engine", "ollama"])
    assert done.exit_code == 0
    assert "image: ollama/ollama:0.33.0 → ollama/ollama:0.34.0" in done.output
