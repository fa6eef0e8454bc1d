"""An option is declared once: everything that names options follows from it, and no value that cannot be gets further."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest

from harness.cli.context import load_settings
from harness.cli.main import COMMANDS
from harness.cli.main import cli as group
from harness.engines.settings import asked_flash, recorded_flash
from harness.errors import UsageError
from harness.options import (
    CalibrationOptions,
    Overrides,
    QueryOptions,
    RunOptions,
    declarations,
    read_available,
    settings,
    shared,
)
from harness.sweep.matrix import Cell, read_plan


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model": ""}, "--model"),
        ({"model": "a\x1b[31mb"}, "--model"),
        ({"engine": "tgi"}, "--engine.*ollama"),
        ({"sandbox": "chroot"}, "--sandbox.*docker, process"),
        ({"contexts": (8192, 0)}, "--ctx: 0 is out of range"),
        ({"contexts": ((1 << 31) + 1,)}, "--ctx"),
        ({"num_batch": 0}, "--num-batch"),
        ({"num_parallel": 4097}, "--num-parallel: 4097.*at most 4,096"),
        ({"kv_cache_type": "q8"}, "--kv-cache-type: 'q8'.*q8_0, q4_0"),
        ({"kv_cache_type": "nonsense"}, "--kv-cache-type"),
        ({"kv_cache_type": ""}, "--kv-cache-type"),
        ({"flash_attention": "enabled"}, "--flash-attention.*auto, on, off"),
        ({"gpus": " , "}, "--gpus"),
        ({"env": {"no sign": "x"}}, "--env"),
        ({"timeout": 0.0}, "--timeout"),
    ],
)
def test_a_value_that_cannot_be_is_refused_before_anything_else(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        RunOptions(**options)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q8_0/f16", "fp8_e5m2", "bfloat16"])
def test_cache_types_of_every_engine_can_be_asked_about(kind: str) -> None:
    assert QueryOptions(kv_cache_type=kind).kv_cache_type == kind


def test_limits_are_values_that_can_be() -> None:
    assert RunOptions(num_parallel=4096, contexts=(1, 1 << 31), num_batch=1, timeout=0.001).num_parallel == 4096
    assert QueryOptions(num_parallel=4096, ctx=1 << 31).ctx == 1 << 31


def test_a_cell_of_a_sweep_has_the_options_of_a_calibration_and_no_others() -> None:
    assert set(Cell.__struct_fields__) == {*CalibrationOptions.__struct_fields__, "machine"}
    (cell,) = read_plan({"include": [{"model": "a", "ctx": "4096, 8192", "num_batch": 512, "gpus": "none"}]}, "plan")
    assert cell.run_options() == RunOptions(model="a", contexts=(4096, 8192), num_batch=512, gpus="none")
    assert shared(cell.run_options())["contexts"] == (4096, 8192)


def test_every_setting_is_an_option_of_a_command_with_its_variable() -> None:
    variables = {
        parameter.envvar
        for module, _ in COMMANDS.values()
        for parameter in import_module(f"harness.cli.{module}").cli.params
        if parameter.envvar
    }
    assert variables == {one.variable for one in settings().values()} - {"HARNESS_CACHE"}


@pytest.mark.parametrize(("verb", "kind"), [("calibrate", RunOptions), ("recalibrate", Overrides), ("check", QueryOptions)])
def test_commands_take_options_at_their_declared_defaults(verb: str, kind: type[RunOptions | QueryOptions]) -> None:
    command: click.Command = import_module(f"harness.cli.{COMMANDS[verb][0]}").cli
    context = command.make_context(verb, ["made-up"] if verb == "check" else [])
    assert kind.of(context.params) == kind()
    if verb != "recalibrate":
        assert {one.field for one in declarations(kind).values()} <= set(context.params)


def test_contexts_and_models_of_the_file_are_not_those_of_a_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "harness.toml").write_text("ctx = [4096, 8192]\nmodels = 'volume'\nnum_batch = 512\n")
    monkeypatch.chdir(tmp_path)
    context = click.Context(group)
    load_settings(context)

    def given(verb: str, *arguments: str) -> dict[str, Any]:
        command = import_module(f"harness.cli.{COMMANDS[verb][0]}").cli
        return command.make_context(verb, list(arguments), parent=context, default_map=context.default_map[verb]).params  # type: ignore[no-any-return,index]

    assert RunOptions.of(given("calibrate")) == RunOptions(contexts=(4096, 8192), models="volume", num_batch=512)
    asked = given("check", "made-up")
    assert (asked["names"], asked["ctx"]) == (("made-up",), None)
    assert given("recalibrate")["names"] == ()


def test_flash_attention_is_asked_for_and_recorded_in_two_ways() -> None:
    assert [recorded_flash(word) for word in ("on", "off", "auto", None)] == ["enabled", "disabled", None, None]
    assert [asked_flash(word) for word in ("enabled", "disabled", None)] == ["on", "off", "auto"]


def test_free_memory_without_a_size_is_refused() -> None:
    assert read_available("24GiB,1GiB") == (24 << 30, 1 << 30)
    assert read_available(5) == (5,)
    assert read_available(None) is None
    with pytest.raises(UsageError, match="--available"):
        read_available("")
