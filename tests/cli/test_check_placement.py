"""A placement that was asked for, and the side of the host in a verdict."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from harness.model.calibration import SHARED_CACHE
from harness.model.record import Tensors
from harness.units import GIB, MIB
from tests.support.calibrations import made_up, on_host, store_of
from tests.support.command import Command, Done
from tests.support.records import WEIGHTS, load

LAYER, EXPERTS = 138 * MIB, 120 * MIB


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    store_of(tmp_path / "store", made_up(), with_experts())
    return Command(tmp_path, monkeypatch, capfd)


def with_experts() -> Any:
    """28 layers of 138 MiB, of which 120 MiB are experts."""
    tensors = Tensors(
        layer_bytes=(LAYER,) * 28, output_bytes=WEIGHTS - 28 * LAYER, embedding_bytes=0, expert_bytes=(EXPERTS,) * 28,
        expert_use=0.25,
    )  # fmt: skip
    return made_up("moe", tensors=tensors)


def data(done: Done) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(done.stdout)["data"]
    return found


def test_what_the_rule_would_offload_fits_when_forced(run: Command) -> None:
    """4 707 MiB are needed at 8 192 tokens; the rule keeps 1 GiB more."""
    by_rule = run("check", "made-up@8192", "--available", "5120", "--json")
    assert (by_rule.returncode, data(by_rule)["verdict"]) == (3, "offload")
    for option in (("--gpu-layers", "all"), ("--fit", "off"), ("--gpu-layers", "29")):
        forced = run("check", "made-up@8192", "--available", "5120", *option, "--json")
        assert forced.returncode == 0, forced.stdout
        answer = data(forced)
        assert (answer["fits_by_rule"], answer["out_of_memory"], answer["reserve_bytes"]) == (False, False, 0)
        assert answer["required_bytes"] == data(by_rule)["required_bytes"]
        assert answer["layers_offloaded"] == 29
    text = run("check", "made-up@8192", "--available", "5120", "--gpu-layers", "all").stdout
    assert (
        "FITS: would not fit by the engine's rule (keeps 1,024.0 MiB free), and fits when forced (--gpu-layers all): " in text
    )
    assert "413.0 MiB to spare" in text


def test_forced_layers_that_do_not_fit_are_an_out_of_memory_error_and_no_offload(run: Command) -> None:
    done = run("check", "made-up@8192", "--available", "4096", "--gpu-layers", "all", "--json")
    assert done.returncode == 3
    answer = data(done)
    assert (answer["verdict"], answer["out_of_memory"], answer["fits_by_rule"]) == ("offload", True, False)
    text = run("check", "made-up@8192", "--available", "4096", "--gpu-layers", "all").stdout
    assert "with --gpu-layers all it ends with an out-of-memory error" in text
    assert "layers stay" not in text


def test_a_reserve_of_ones_own_moves_the_edge(run: Command) -> None:
    answer = data(run("check", "made-up@8192", "--available", "5120", "--reserve", "256MiB", "--json"))
    assert (answer["verdict"], answer["reserve_bytes"]) == ("fits", 256 * MIB)
    assert data(run("check", "made-up@8192", "--available", "5120", "--reserve", "2GiB", "--json"))["verdict"] == "offload"


def test_some_layers_by_choice_leave_the_rest_to_the_host(run: Command) -> None:
    """15 of 29: the output part and 14 layers; the other 14 and their caches are host memory."""
    asked = ("check", "made-up@8192", "--available", "4096", "--gpu-layers", "15")
    answer = data(run(*asked, "--host-available", "3GiB", "--json"))
    assert (answer["verdict"], answer["layers_offloaded"], answer["source"]) == ("fits", 15, "derived")
    compute = (64 + 8) * MIB
    moved = 14 * LAYER + (28_672 * 8192 + 15 * MIB) // 2
    assert answer["host_required_bytes"] == pytest.approx(200 * MIB + moved + compute, abs=2 * MIB)
    assert answer["required_bytes"] == pytest.approx(
        WEIGHTS - 14 * LAYER + 300 * MIB + (28_672 * 8192 + 15 * MIB) // 2 + compute + 8 * MIB, abs=3 * MIB
    )
    short = run(*asked, "--host-available", "2GiB", "--json")
    assert (short.returncode, data(short)["host_short_bytes"] > 0, data(short)["out_of_memory"]) == (3, True, False)
    assert "the host cannot hold its part" in run(*asked, "--host-available", "2GiB").stdout


def test_experts_on_the_host_by_choice_need_host_memory(run: Command) -> None:
    asked = ("check", "moe@8192", "--available", "4096", "--n-cpu-moe", "28")
    fits = run(*asked, "--host-available", "8GiB", "--json")
    answer = data(fits)
    assert (fits.returncode, answer["layers_offloaded"], answer["layers_overflowing"]) == (0, 29, 28)
    assert answer["required_bytes"] == pytest.approx(4707 * MIB - 28 * EXPERTS, rel=0.01)
    assert answer["host_required_bytes"] >= 28 * EXPERTS
    short = run(*asked, "--host-available", "2GiB")
    assert short.returncode == 3
    assert re.search(
        r"Host memory: needs 3,\d\d\d\.\d MiB, 2,048\.0 MiB are available: short by 1,\d\d\d\.\d MiB", short.stdout
    )
    assert "all 29 layers on the GPU" not in short.stdout
    # only some of them: what is left is on the GPU
    some = data(run("check", "moe@8192", "--available", "8192", "--n-cpu-moe", "10", "--json"))
    assert some["required_bytes"] - answer["required_bytes"] == pytest.approx(18 * EXPERTS, abs=MIB)


def test_what_spills_needs_host_memory_too(run: Command) -> None:
    spills = ("check", "made-up@65536", "--available", "5632")
    held = data(run(*spills, "--host-available", "16GiB", "--json"))
    assert held["host_required_bytes"] > 200 * MIB
    assert (held["host_available_bytes"], held["host_short_bytes"]) == (16 * GIB, 0)
    text = run(*spills, "--host-available", "100MiB")
    assert text.returncode == 3
    assert "the machine would swap, or end the engine" in text.stdout


def test_the_host_of_a_card_that_is_not_here_is_not_known(run: Command) -> None:
    answer = data(run("check", "made-up@8192", "--available", "24GiB", "--json"))
    assert (answer["verdict"], answer["host_available_bytes"]) == ("fits", None)
    assert answer["host_required_bytes"] == pytest.approx(200 * MIB, abs=MIB)


def test_a_prompt_cache_that_may_outgrow_the_host_is_said(run: Command) -> None:
    done = run("check", "made-up@8192", "--available", "24GiB", "--host-available", "4GiB")
    assert done.returncode == 0
    assert "LLAMA_ARG_CACHE_RAM" in done.stderr
    assert "LLAMA_ARG_CACHE_RAM" not in run("check", "made-up@8192", "--available", "24GiB", "--host-available", "64GiB").stderr


@pytest.mark.parametrize("option", [("--gpu-layers", "all"), ("--n-cpu-moe", "2"), ("--fit", "off"), ("--reserve", "1GiB")])
def test_host_memory_has_nothing_to_place(run: Command, tmp_path: Path, option: tuple[str, ...]) -> None:
    store_of(tmp_path / "store", on_host(made_up("hosted")))
    done = run("check", "hosted@8192", "--available", "24GiB", *option)
    assert done.returncode == 4
    assert "has no layers to place" in done.stdout


def test_experts_of_a_model_without_any_are_unknown(run: Command) -> None:
    done = run("check", "made-up@8192", "--available", "24GiB", "--n-cpu-moe", "2")
    assert done.returncode == 4
    assert "knows of no experts" in done.stdout


def test_nonsense_is_refused_before_anything_is_looked_up(run: Command) -> None:
    for option in (("--gpu-layers", "some"), ("--fit", "maybe"), ("--reserve", "much"), ("--n-cpu-moe", "-1")):
        assert run("check", "made-up@8192", "--available", "24GiB", *option).returncode == 2


def test_plan_and_predict_take_a_placement(run: Command) -> None:
    done = run("predict", "moe", "--ctx", "8192", "--n-cpu-moe", "28", "--json")
    assert data(done)["with_available"]["required_bytes"] == pytest.approx(4707 * MIB - 28 * EXPERTS, rel=0.01)
    assert "28 of them without their experts" in run("predict", "moe", "--ctx", "8192", "--n-cpu-moe", "28").stdout
    by_rule, forced = (
        data(run("plan", "made-up", "--available", "5632", *more, "--json"))["memories"][0]["models"][0]["largest_context"]
        for more in ((), ("--fit", "off"))
    )
    assert by_rule < forced
    at_edge = ("check", f"made-up@{forced}", "--available", "5632", "--fit", "off")
    assert run(*at_edge).returncode == 0
    assert run("check", f"made-up@{forced + 256}", *at_edge[2:]).returncode == 3


def test_the_batch_of_a_question_is_a_setting(run: Command) -> None:
    same = run("check", "made-up@8192", "--available", "24GiB", "--num-batch", "512")
    other = run("check", "made-up@8192", "--available", "24GiB", "--num-batch", "2048")
    assert (same.returncode, other.returncode) == (0, 4)
    assert "--num-batch 2048" in other.stdout


def test_a_model_known_by_its_name_alone_is_said_to_be(run: Command) -> None:
    assert "Known by its name alone" in run("check", "made-up@8192", "--available", "24GiB").stdout
    assert "Known by its name alone" not in run("check", "llama-server/made-up@8192", "--available", "24GiB").stdout


def on_this_machine(run: Command, tmp_path: Path, *more: str, **env: str) -> Done:
    """Asked about this machine's host memory, which any machine has."""
    loads = tuple(load(context, layer_kinds="fw" * 14) for context in (8192, 16384, 32768))
    store_of(tmp_path / "store", on_host(made_up("hosted", loads=loads)))
    return run("check", "hosted@8192", "--json", *more, **env)


def test_variables_with_which_a_server_would_start_are_settings(run: Command, tmp_path: Path) -> None:
    unknown = {
        "LLAMA_ARG_FLASH_ATTN": "off", "LLAMA_ARG_UBATCH": "2048", "LLAMA_ARG_N_PARALLEL": "4", "LLAMA_ARG_SWA_FULL": "1",
        "LLAMA_ARG_OVERRIDE_TENSOR": "exps=CPU", "LLAMA_ARG_N_GPU_LAYERS": "10", "LLAMA_ARG_CACHE_TYPE_V": "q8_0",
    }  # fmt: skip
    for name, value in unknown.items():
        done = on_this_machine(run, tmp_path, **{name: value})
        assert done.returncode == 4, (name, done.stdout)
    q8 = {"LLAMA_ARG_CACHE_TYPE_K": "q8_0", "LLAMA_ARG_CACHE_TYPE_V": "q8_0"}
    plain = data(on_this_machine(run, tmp_path))
    smaller = data(on_this_machine(run, tmp_path, **q8))
    assert smaller["source"] == "derived"
    assert smaller["required_bytes"] < plain["required_bytes"]
    # an option wins, and a card that is not here has no environment
    assert data(on_this_machine(run, tmp_path, "--kv-cache-type", "f16", **q8))["required_bytes"] == plain["required_bytes"]
    assert run("check", "made-up@8192", "--available", "24GiB", LLAMA_ARG_FLASH_ATTN="off").returncode == 0


def test_slots_that_share_one_cache_say_nothing_of_another_number(run: Command, tmp_path: Path) -> None:
    shared = made_up("shared")
    quality = msgspec.structs.replace(shared.metadata.quality, notes=(f"{SHARED_CACHE}: the constants hold for 1 slots",))
    metadata = msgspec.structs.replace(shared.metadata, quality=quality)
    store_of(tmp_path / "store", msgspec.structs.replace(shared, metadata=metadata))
    asked = ("check", "shared@8192", "--available", "48GiB")
    assert (run(*asked).returncode, run(*asked, "--num-parallel", "2").returncode) == (0, 4)
    other = run("check", "made-up@8192", "--available", "48GiB", "--num-parallel", "2", "--json")
    assert data(other)["source"] == "derived"
