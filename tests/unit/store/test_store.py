"""Calibrations on disk: whole or not at all, under their own name, refused when damaged or newer."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
import yaml

from harness.engines.base import Source
from harness.errors import (
    BadInputError,
    BusyError,
    CannotWriteError,
    ConfigError,
    NotFoundError,
    NotPermittedError,
    UsageError,
)
from harness.fit.constants import fit_record
from harness.measure.overwrite import refuse_overwrite
from harness.model.calibration import Calibration, artifact_name, json_schema, to_document
from harness.model.facts import LoadFacts
from harness.model.record import Machine, Settings
from harness.model.validation import from_document
from harness.store.store import Store, model_stem, read_record, schema_text, variant_of
from harness.store.yaml import parse_calibration, parse_yaml, read_calibration, to_yaml
from tests.support.calibrations import made_up, store_of
from tests.support.gguf_file import write_gguf
from tests.support.records import load, record


@pytest.fixture
def calibration() -> Calibration:
    return fit_record(record(load(8192), load(16384), load(32768)))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "calibrations")


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("qwen2.5:0.5b", "qwen2.5-0.5b"),
        ("library/qwen", "library--qwen"),
        ("a b", "a%20b"),
        ("../../etc/passwd", "..--..--etc--passwd"),
        ("..", "%2E%2E"),
        ("naïve", "na%C3%AFve"),
        ("x'\"y", "x%27%22y"),
        ("a\nb", "a%0Ab"),
    ],
)
def test_names_become_safe_file_names(name: str, stem: str) -> None:
    assert artifact_name(name) == stem


def test_an_artifact_comes_back_as_it_was_written(store: Store, calibration: Calibration) -> None:
    path = store.path_of("llama-server", "made-up")
    store.write(path, calibration)
    assert store.read(path) == calibration
    assert to_yaml(store.read(path)).encode() == path.read_bytes()
    assert [entry.name for entry in path.parent.iterdir()] == ["made-up.yaml"]


def test_every_string_of_an_artifact_is_quoted(calibration: Calibration) -> None:
    hostile = msgspec.structs.replace(
        calibration,
        metadata=msgspec.structs.replace(
            calibration.metadata, model=msgspec.structs.replace(calibration.metadata.model, name="no: [1]\n\x1b&x 'q'")
        ),
    )
    text = to_yaml(hostile)
    assert yaml.safe_load(text) == json.loads(json.dumps(to_document(hostile)))
    assert "\x1b" not in text
    assert "run: '20261124T000000Z-llama-server-made-up'" in text
    with pytest.raises(BadInputError, match="control characters"):  # one line may not look like two, nor move a cursor
        parse_calibration(text.encode(), "it")


def test_artifacts_obey_the_published_schema(calibration: Calibration) -> None:
    jsonschema.validate(json.loads(json.dumps(to_document(calibration))), json_schema())


def test_the_published_schema_is_the_code_s() -> None:
    published = Path(__file__).parents[3] / "models" / "calibration.schema.json"
    assert published.read_text() == schema_text(), "run: make schema"


def test_a_newer_schema_is_refused(calibration: Calibration) -> None:
    document = to_document(calibration)
    document["metadata"]["schema_version"] = 99
    with pytest.raises(ConfigError, match="newer") as caught:
        from_document(document)
    assert caught.value.exit_code == 78


@pytest.mark.parametrize("text", ["", "[]", "id: 1", "{", "\x00", "id: 'x'\nengine: 'ollama'\n", "a: &a [*a]"])
def test_a_damaged_artifact_is_refused(store: Store, text: str) -> None:
    path = store.path_of("ollama", "x")
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(BadInputError) as caught:
        store.read(path)
    assert caught.value.exit_code == 65


def test_a_file_of_another_model_is_refused(store: Store, calibration: Calibration) -> None:
    path = store.path_of("llama-server", "other")
    store.write(path, calibration)
    with pytest.raises(BadInputError, match="made-up"):
        store.read(path)


def test_a_name_that_two_engines_have_needs_an_engine(store: Store, calibration: Calibration) -> None:
    store.write(store.path_of("llama-server", "made-up"), calibration)
    other = msgspec.structs.replace(calibration, id="ollama/made-up", engine="ollama")
    store.write(store.path_of("ollama", "made-up"), other)
    with pytest.raises(UsageError, match="llama-server/made-up"):
        store.find("made-up")
    assert [found.id for _, found in store.find("made-up", "ollama")] == ["ollama/made-up"]
    assert [found.id for _, found in store.find("ollama/made-up")] == ["ollama/made-up"]


def test_an_artifact_is_held_by_one_calibration(store: Store) -> None:
    path = store.path_of("ollama", "x")
    path.parent.mkdir(parents=True)
    with store.lock(path):
        with pytest.raises(BusyError) as caught, store.lock(path):
            pass
        assert caught.value.exit_code == 75
    with store.lock(path):
        pass


def test_a_store_that_cannot_be_written_is_found_before_measuring(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CannotWriteError) as caught:
        Store(tmp_path / "file").check_writable(tmp_path / "file" / "ollama" / "x.yaml")
    assert caught.value.exit_code == 73


def test_a_calibration_of_other_settings_is_not_overwritten(store: Store, calibration: Calibration) -> None:
    path = store.path_of("llama-server", "made-up")
    source = Source(model=calibration.metadata.model)
    machine, settings = calibration.metadata.machine, calibration.metadata.settings
    refuse_overwrite(path, source, settings, machine, store)
    store.write(path, calibration)
    refuse_overwrite(path, source, settings, machine, store)
    for changed in (
        *(Settings(kv_cache_type="q8_0"), Settings(num_parallel=2), Settings(env={"A": "b"})),
        Settings(num_batch=2048),
    ):
        with pytest.raises(CannotWriteError) as caught:
            refuse_overwrite(path, source, changed, machine, store)
        assert caught.value.exit_code == 73
    with pytest.raises(CannotWriteError, match="target"):
        refuse_overwrite(path, source, settings, Machine(target="host", sandbox="process", meter="host"), store)


def test_what_was_left_to_the_engine_is_compared_once_a_load_tells_it(store: Store, calibration: Calibration) -> None:
    """A plain calibration does not replace one with ``--flash-attention off`` or ``--num-batch 4096``."""
    path = store.path_of("llama-server", "made-up")
    metadata = calibration.metadata
    plain = msgspec.structs.replace(metadata.settings, num_batch=None, flash_attention=None)
    source = Source(model=metadata.model)
    chosen = LoadFacts(engine="llama-server", dialect="llama.cpp", flash_attention="enabled", num_batch=512)
    store.write(path, calibration)
    refuse_overwrite(path, source, plain, metadata.machine, store, chosen)
    for changed in ({"flash_attention": "disabled"}, {"num_batch": 4096}):
        facts = msgspec.structs.replace(chosen, **changed)
        with pytest.raises(CannotWriteError, match=r"flash attention|physical batch"):
            refuse_overwrite(path, source, plain, metadata.machine, store, facts)


def test_two_names_that_share_a_file_are_two_models(store: Store, calibration: Calibration) -> None:
    """``a:b`` and ``a-b``; the same weights under both are the same model."""
    path = store.path_of("llama-server", "made-up")
    metadata = calibration.metadata
    known = msgspec.structs.replace(metadata.model, digest=f"sha256:{'1' * 64}")
    metadata = msgspec.structs.replace(metadata, model=known)
    store.write(path, msgspec.structs.replace(calibration, metadata=metadata))
    renamed = msgspec.structs.replace(metadata.model, name="made:up", digest=None)
    with pytest.raises(CannotWriteError, match="the names share a file"):
        refuse_overwrite(path, Source(model=renamed), metadata.settings, metadata.machine, store)
    same = msgspec.structs.replace(renamed, digest=metadata.model.digest)
    refuse_overwrite(path, Source(model=same), metadata.settings, metadata.machine, store)


def test_a_record_comes_back_and_a_newer_one_is_refused(store: Store) -> None:
    run = record(load(8192), load(16384))
    path = store.write_record(run)
    assert read_record(path) == run
    assert read_record(path.parent) == run
    assert stat.S_ISREG(path.stat().st_mode)
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2', 1))
    with pytest.raises(ConfigError):
        read_record(path)


@pytest.mark.parametrize(
    "model", ["a/b:c", "..", "../../etc/passwd", 'it\'s "q"', "größe-模型", "a\nb", "-rf", "%41", "a@b", "x" * 120]
)
def test_any_name_is_one_file_of_its_engine_and_is_found_again(store: Store, calibration: Calibration, model: str) -> None:
    path = store.path_of("llama-server", model)
    assert path.resolve().parent == (store.root / "llama-server").resolve()
    mine = msgspec.structs.replace(calibration, id=f"llama-server/{artifact_name(model)}")
    store.write(path, mine)
    assert store.find(model) == [(path, mine)]


def test_an_artifact_cut_short_is_never_taken_for_a_whole_one(store: Store, calibration: Calibration) -> None:
    path = store.path_of("llama-server", "made-up")
    store.write(path, calibration)
    text = path.read_bytes()
    for length in range(0, len(text) - 60, 97):
        path.write_bytes(text[:length])
        with pytest.raises(BadInputError):
            store.read(path)


@pytest.mark.parametrize("when", ["yesterday", "zzzz", "2026-13-01T00:00:00Z", ""])
def test_a_date_that_is_none_is_refused(store: Store, calibration: Calibration, when: str) -> None:
    """By its date a calibration is newer than another, and exports name it."""
    path = store.path_of("llama-server", "made-up")
    store.write(path, calibration)
    path.write_text(
        path.read_text().replace(f"calibrated_at: '{calibration.metadata.calibrated_at}'", f"calibrated_at: '{when}'")
    )
    with pytest.raises(BadInputError, match="calibrated_at"):
        store.read(path)


def test_a_newer_schema_is_named_even_where_nothing_else_is_understood(store: Store) -> None:
    path = store.path_of("ollama", "x")
    path.parent.mkdir(parents=True)
    path.write_text("metadata: {schema_version: 2, entirely: new}")
    with pytest.raises(ConfigError, match="newer"):
        store.read(path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    store: Store, calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store.path_of("llama-server", "made-up")
    store.write(path, calibration)
    before = path.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CannotWriteError, match="No space left"):
        store.write(path, msgspec.structs.replace(calibration, id="llama-server/changed"))
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["made-up.yaml"]


@pytest.mark.parametrize("deep", [b"[", b"- ", b"? ", b"{a: "])
def test_what_would_end_the_yaml_library_is_refused_before_it(tmp_path: Path, deep: bytes) -> None:
    (tmp_path / "deep.yaml").write_bytes(deep * 100_000)
    with pytest.raises(BadInputError, match="nested"):
        read_calibration(tmp_path / "deep.yaml")


def test_yaml_is_utf_8_since_what_is_looked_for_in_it_is(tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_bytes(("- " * 100_000).encode("utf-16"))
    with pytest.raises(BadInputError, match="utf-8"):
        read_calibration(tmp_path / "deep.yaml")


def test_an_enormous_file_is_not_read_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(1 << 40)  # as sparse as a file can be
    with pytest.raises(BadInputError, match="exceeds 4 MiB"):
        read_calibration(tmp_path / "huge.yaml")


@pytest.mark.parametrize(
    ("pattern", "wrong"),
    [
        (r"base_vram_gb: [\d.]+", "base_vram_gb: .inf"),
        (r"compute: [\d.]+", "compute: .nan"),
        (r"total_gb: [\d.]+", "total_gb: 1.0e+300"),
        (r"  bands:\n(  - .*\n)+", "  bands: []\n"),
        (r"num_parallel: 1", "num_parallel: 0"),
        (r"num_parallel: 1", "num_parallel: 111111111"),
        (r"base_vram_gb: [\d.]+", "base_vram_gb: 0.0"),  # and another figure in the last band
        (r"decode_tokens_per_s: \S+", "decode_tokens_per_s: -5.0}"),
        (r"flash_attention: '\w+'", "flash_attention: 'sometimes'"),
        (r"kv_cache_type: 'f16'", "kv_cache_type: '../x'"),
        (r"name: '[^']*'", 'name: "1\\x0aFITS: all of it"'),
        (r"schema_version: 1", "schema_version: -1"),
        (r"max_error: \S+", "max_error: -1.0"),  # an interval of less than nothing
        (r"valid_to: \d+", "valid_to: 999999999999"),  # beyond the last band, and beyond what the model was trained on
        (r"valid_to:", "valid_to: 256\n    valid_to:"),
        (r"reserve_gb:", "expert_use: 5.0, reserve_gb:"),
        (r"reserve_gb:", "layer_kinds: 'zz', reserve_gb:"),
    ],
)
def test_figures_that_nothing_can_be_calculated_with_are_refused(calibration: Calibration, pattern: str, wrong: str) -> None:
    text = re.sub(pattern, lambda _: wrong, to_yaml(calibration), count=1)
    assert wrong in text
    with pytest.raises(BadInputError):
        parse_calibration(text.encode(), "it")


def test_a_line_below_its_own_loads_is_refused(calibration: Calibration) -> None:
    made, metadata = calibration, calibration.metadata
    first, *others = metadata.quality.loads
    for factor, refused in ((1.02, False), (1.03, True), (0.5, False)):
        load = msgspec.structs.replace(first, total_gb=first.total_gb * factor)
        quality = msgspec.structs.replace(metadata.quality, loads=(load, *others))
        text = to_yaml(msgspec.structs.replace(made, metadata=msgspec.structs.replace(metadata, quality=quality)))
        if refused:
            with pytest.raises(BadInputError, match="its line says"):
                parse_calibration(text.encode(), "it")
        else:
            parse_calibration(text.encode(), "it")


def test_variants_lie_beside_the_default_and_are_plain_words(store: Store, calibration: Calibration) -> None:
    plain, variant = store.path_of("llama-server", "made-up"), store.path_of("llama-server", "made-up", "q8")
    for path in (plain, variant):
        store.write(path, calibration)
    assert variant.name == "made-up@q8.yaml"
    assert [path for path, _ in store.find("made-up")] == [plain, variant]
    for word in ("", "a/b", "../x", "a b", "ü"):
        with pytest.raises(UsageError):
            store.path_of("llama-server", "made-up", word)


def test_a_store_that_may_not_be_read_is_not_an_empty_one(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.find("made-up") == []
    (store.root / "llama-server").mkdir(parents=True)

    def forbidden(_folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(NotPermittedError):
        Store(store.root).find("made-up")


def test_a_file_is_no_empty_store(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(UsageError):
        Store(tmp_path / "store").find("made-up")


def test_a_folder_is_listed_once_for_any_number_of_models_and_again_when_it_has_changed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[Path] = []
    scan = os.scandir

    def counted(folder: Path) -> Any:
        if Path(folder) != store.root:
            listed.append(folder)
        return scan(folder)

    for name in ("a", "b", "c"):
        store.write(store.path_of("llama-server", name), made_up(name))
    monkeypatch.setattr(os, "scandir", counted)
    assert [len(store.find(name)) for name in ("a", "b", "c", "d")] == [1, 1, 1, 0]
    assert len(listed) == len(set(listed))
    other = Store(store.root)
    other.write(other.path_of("llama-server", "a", "q8"), made_up("a"))
    assert [variant_of(path) for path, _ in store.find("a")] == [None, "q8"]


@pytest.mark.parametrize("model", ["a b", "café", "library/qwen:7b", "100%"])
def test_every_id_that_is_printed_finds_its_calibration(store: Store, calibration: Calibration, model: str) -> None:
    calibration = msgspec.structs.replace(calibration, id=f"llama-server/{artifact_name(model)}")
    store.write(store.path_of("llama-server", model), calibration)
    for name in (model, calibration.id, f"llama-server/{model}"):
        assert [found.id for _, found in store.find(name)] == [calibration.id]


def test_the_path_of_a_gguf_finds_the_calibration_of_its_stem(store: Store, calibration: Calibration) -> None:
    store.write(store.path_of("llama-server", "made-up"), calibration)
    assert [found.id for _, found in store.find("/somewhere/made-up.gguf")] == ["llama-server/made-up"]


@pytest.mark.parametrize("value", [1e-6, 1e-5, 0.1, 12.0, 1234567.25])
def test_numbers_stay_numbers_of_six_decimals(calibration: Calibration, value: float) -> None:
    constants = msgspec.structs.replace(calibration.constants, base_vram_gb=value)
    back = yaml.safe_load(to_yaml(msgspec.structs.replace(calibration, constants=constants)))["constants"]["base_vram_gb"]
    assert isinstance(back, float)
    assert back == value


@pytest.mark.parametrize("run", ["../../etc", "/etc", "..", ".", "a/b", "", "a\nb", "x" * 300])
def test_a_run_has_a_plain_name(store: Store, run: str) -> None:
    with pytest.raises(NotFoundError):
        store.run_folder(run)


@pytest.mark.parametrize(
    "change",
    [
        {"loads": [{"request": {"context": 0}, "outcome": "ok"}]},
        {"loads": [{"request": {"context": 8192, "num_batch": -1}, "outcome": "ok"}]},
        {"loads": [{"request": {"context": 8192}, "outcome": "ok", "log_start": 1 << 60}]},
        {"loads": [{"request": {"context": 8192}, "outcome": "ok", "started": 1e300}]},
        {"engine": {"version": "1\nFITS: all of it"}},
        {"run": "a\x1b[2Jb"},
        {"seconds": 1e400},
        {"reserve_bytes": 10**17},
    ],
)
def test_a_record_of_absurd_figures_is_refused(store: Store, change: dict[str, Any]) -> None:
    path = store.write_record(record(load(8192), load(16384), load(32768)))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(BadInputError):
        read_record(path)


@pytest.mark.parametrize(
    "text",
    [
        "a: &x [1]\nb: *x",
        "a: !!python/name:os.system",
        "a: !!timestamp x",
        f"a: {'9' * 5000}",
        "a: 9223372036854775808",
        "a: .nan",
        "a: 1e999",
        "[" * 100 + "]" * 100,
        "a: 'x",
        "? [1]\n: 2",
        "a: 1\nb: 2\na: 1",
        "\x00",
    ],
)
def test_yaml_is_plain_values_within_limits(text: str) -> None:
    with pytest.raises(BadInputError):
        parse_yaml(text.encode(), "it")


def test_dates_are_texts_and_numbers_are_as_they_are_written() -> None:
    text = b"a: 2026-01-01\nb: 1:30\nc: 010\nd: 1e-05\ne: on\nf: ~\ng: 0x10\nh: '1'\ni: -3.5"
    found = parse_yaml(text, "it")
    assert found == {"a": "2026-01-01", "b": "1:30", "c": 10, "d": 1e-05, "e": True, "f": None, "g": 16, "h": "1", "i": -3.5}


def test_a_blob_is_filed_under_the_name_in_its_header_and_found_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    blob = write_gguf(tmp_path / "blobs" / f"sha256-{'ab' * 32}", extra={"general.name": "Tiny Llama"})
    assert model_stem(str(blob)) == "Tiny-Llama-F32"
    shelf = store_of(tmp_path / "store", made_up("Tiny-Llama-F32"))
    assert [path.stem for path, _ in shelf.find(str(blob))] == ["Tiny-Llama-F32"]
    nameless = write_gguf(tmp_path / "blobs" / f"sha256-{'cd' * 32}")
    assert model_stem(str(nameless)) == nameless.name
    assert model_stem("/models/big-00001-of-00003.gguf") == "big"
