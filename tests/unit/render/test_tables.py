"""Tables and sentences at every width: nothing is cut, ids and figures least of all, and a pipe gets one line for each item."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from harness.engines.llama_server.recipe import LlamaServer
from harness.render.tables import Column, Fields, Table, columns_of, wrap
from tests.support.calibrations import made_up, store_of, with_settings
from tests.support.command import Command

WIDTHS = (40, 60, 80, 100, 140)
LONG = "qwen2.5-coder-14b-instruct-q4_k_m"
LOG = """\
build: 6000 (0123abcd) with cc for x86_64-linux-gnu
llama_model_loader: loaded meta data with 30 key-value pairs and 290 tensors from /models/m.gguf (version GGUF V3 (latest))
load_tensors: offloading 24 repeating layers to GPU
load_tensors: offloading output layer to GPU
load_tensors: offloaded 25/25 layers to GPU
load_tensors:        CUDA0 model buffer size =  4096.00 MiB
load_tensors:   CPU_Mapped model buffer size =   137.94 MiB
llama_kv_cache:      CUDA0 KV buffer size =   384.00 MiB
llama_context:      CUDA0 compute buffer size =   298.50 MiB
llama_context:  CUDA_Host compute buffer size =    17.76 MiB
main: server is listening on http://127.0.0.1:8080
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    other = with_settings(made_up(LONG), kv_cache_type="q8_0")
    root = tmp_path / "store"
    shelf = store_of(root, made_up(LONG), made_up("small"))
    shelf.write(shelf.path_of("llama-server", LONG, "kv-q8"), other)
    small = made_up("small")
    bands = tuple(msgspec.structs.replace(band, kv_cache_gb_per_10k=0.5) for band in small.metadata.bands)
    moved = msgspec.structs.replace(
        small,
        constants=msgspec.structs.replace(small.constants, kv_cache_gb_per_10k=0.5),
        metadata=msgspec.structs.replace(small.metadata, bands=bands),
    )
    store_of(tmp_path / "after", moved)
    monkeypatch.setattr(LlamaServer, "devices", lambda *_: ())  # doctor asks the engine itself
    (tmp_path / "log.txt").write_text(LOG)
    return Command(tmp_path, monkeypatch, capfd)


#: Each screen, with what stands on it whole at every width.
SCREENS = [
    (("list",), (f"llama-server/{LONG}", f"llama-server/{LONG}@kv-q8", "4,475.0 MiB", "29.000 KiB/token", "131,072")),
    (("show", "small"), ("llama-server/small", "4,475.0 MiB", "28.000 KiB/token", "1.000 KiB/token", "error 0.000%")),
    (("predict", "small", "--ctx", "8192"), ("4,707.0 MiB", "4,096.0 MiB", "224.0 MiB")),
    (("plan", "--available", "24GiB"), (LONG, "131,072", "8,187.0 MiB", "15.0 GiB")),
    (("check", "small@8192", "--available", "24GiB"), ("FITS:", "4,707 MiB", "1,024 MiB", "24,576 MiB", "18,845 MiB")),
    (("parse", "log.txt"), ("CUDA0", "4,096.0 MiB", "384.0 MiB", "298.5 MiB", "137.9 MiB")),
    (("doctor",), ("host memory:", "machine:")),
]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("arguments", "whole"), SCREENS, ids=lambda value: value[0] if isinstance(value, tuple) else "")
def test_a_screen_has_its_figures_whole_at_every_width(
    run: Command, arguments: tuple[str, ...], whole: tuple[str, ...], width: int
) -> None:
    done = run(*arguments, COLUMNS=str(width))
    assert done.returncode == 0, done.stderr
    assert "…" not in done.stdout
    for figure in whole:  # a sentence may go on in the next line, but no word is broken
        assert all(word in done.stdout.split() or word in done.stdout for word in figure.split()), figure
    long = [line for line in done.stdout.splitlines() if columns_of(line) > width]
    assert all(len(line.split()) <= 2 for line in long), "a line is longer than the screen only for one word, a path or an id"


@pytest.mark.parametrize("width", WIDTHS)
def test_a_drift_keeps_old_and_new_at_every_width(run: Command, width: int) -> None:
    done = run("diff", "store", "after", COLUMNS=str(width))
    assert done.returncode == 6
    assert "28.000 KiB/token" in done.stdout
    assert "52.429 KiB/token" in done.stdout
    assert max(map(columns_of, done.stdout.splitlines())) <= max(width, 60)


def test_a_pipe_gets_one_line_for_each_calibration_and_whole_ids(run: Command) -> None:
    heads, *lines = run("list").stdout.splitlines()
    assert [line.split()[0] for line in lines] == [f"llama-server/{LONG}", f"llama-server/{LONG}@kv-q8", "llama-server/small"]
    assert re.split(r" {2,}", heads)[0] == "id"
    assert not set("─│╭╰┃") & set("".join(lines))


def test_columns_that_are_alike_are_left_out_before_those_that_tell_rows_apart() -> None:
    columns = (Column("id", right=False), Column("engine", rank=1), Column("card", rank=2))
    table = Table(columns, [("a", "0.33.0", "A100"), ("b", "0.33.0", "H100")])
    assert list(table.lines(10)) == ["\x1b[2mid  card\x1b[0m", "a   A100", "b   H100"]
    assert [line.split()[-1] for line in table.lines(30)] == ["card\x1b[0m", "A100", "H100"]


def test_a_value_without_room_stands_below_its_label() -> None:
    plain = [re.sub(r"\x1b\[\d*m", "", line) for line in Fields((("settings", "1 slot · batch 512 · KV f16"),)).lines(24)]
    assert plain == ["  settings", "    1 slot · batch 512 ·", "    KV f16"]


def test_a_word_is_never_broken_and_wide_characters_count_twice() -> None:
    assert list(wrap("unbreakable", 4)) == ["unbreakable"]
    assert columns_of("模型") == 4
    assert list(wrap("模型 模型", 8)) == ["模型", "模型"]


def test_a_figure_keeps_its_unit() -> None:
    assert list(wrap("to spare: 1,154.0 MiB of 24 GiB", 16)) == ["to spare:", "1,154.0 MiB of", "24 GiB"]


def test_one_long_name_costs_the_other_rows_nothing() -> None:
    """It stands on a line of its own, and every figure in its column; a pipe has one line for each row."""
    long = "a-model-with-a-very-long-name"
    table = Table((Column("id", right=False), Column("base")), [("short", "1,024.0 MiB"), (long, "12.00 GiB")])
    plain = [re.sub(r"\x1b\[\d*m", "", line) for line in table.lines(30)]
    assert plain == ["id            base", "short  1,024.0 MiB", long, "         12.00 GiB"]
    assert len(list(table.lines(None))) == 3


def test_an_encoding_without_a_character_gets_a_stand_in() -> None:
    import codecs

    from harness.text import plain_characters

    codecs.register_error("harness", plain_characters)
    assert "1 – 2 × 3 · █▓░ …→ ✓".encode("ascii", "harness") == b"1 - 2 x 3 | #=. ...-> ?"


def test_a_hanging_line_in_colour_keeps_its_indent() -> None:
    from harness.render.style import paint
    from harness.render.tables import Hanging

    lines = [re.sub(r"\x1b\[\d*m", "", one) for one in Hanging(f"{paint('     ok', 'green')}  disk: 1 GiB free", 9).lines(18)]
    assert lines == ["     ok  disk:", "         1 GiB", "         free"]


def test_seconds_of_a_calibration_add_up_as_printed() -> None:
    from harness.render.calibrations import spent_text

    text = spent_text({"loads": 29.44, "memory readings": 1.06, "speed": 0.01, "other": 0.86})
    assert text == "31.4 s: loads 29.4, memory readings 1.1, other 0.9"
