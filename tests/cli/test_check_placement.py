"""A placement that was asked for, and the side of the host in a verdict."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from harness.model.record import Tensors
from harness.units import GIB, MIB
from tests.support.calibrations import made_up, on_host, store_of
from tests.support.command import Command, Done
from tests.support.records import WEIGHTS

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
    assert data(run("check", "made-up@8192", "--available", "5120", "--reserve", "0", "--json"))["reserve_bytes"] == 0


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


def test_a_prompt_cache_that_may_outgrow_the_host_is_tight(run: Command) -> None:
    """8 GiB and 32 checkpoints of the 15 MiB that are fixed, beside 200 MiB of 4 GiB."""
    asked = ("check", "made-up@8192", "--available", "24GiB", "--host-available")
    answer = data(run(*asked, "4GiB", "--json"))
    assert (answer["verdict"], answer["tight"]) == ("fits", True)
    assert answer["host_growth_bytes"] == pytest.approx(8 * GIB + 32 * 15 * MIB, abs=MIB)
    text = run(*asked, "4GiB")
    assert (text.returncode, "FITS, TIGHT: " in text.stdout) == (0, True)
    assert (
        "LLAMA_ARG_CACHE_RAM, LLAMA_ARG_CTX_CHECKPOINTS) may take up to 8,672.0 MiB more of host memory: only 3," in text.stdout
    )
    assert not data(run(*asked, "9GiB", "--json"))["tight"]


@pytest.mark.parametrize(("cache", "most"), [(None, 8192), ("100", 100), ("0", 0), ("-1", 224 + 15)])
def test_on_host_memory_what_the_server_may_cache_is_judged_too(
    run: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str | None, most: int
) -> None:
    """Without a limit it keeps prompts of one whole context: 224 MiB of keys and values, and 15 that are fixed."""
    store_of(tmp_path / "store", on_host(made_up()))
    monkeypatch.setenv("LLAMA_ARG_CTX_CHECKPOINTS", "0")
    if cache is not None:
        monkeypatch.setenv("LLAMA_ARG_CACHE_RAM", cache)
    need = data(run("check", "made-up@8192", "--available", "64GiB", "--json"))
    assert need["host_growth_bytes"] == pytest.approx(most * MIB, abs=MIB)
    edge = need["required_bytes"] + need["uncertainty_bytes"] + need["host_growth_bytes"]
    for more, tight in ((MIB, False), *(((-MIB, True),) if most else ())):
        answer = data(run("check", "made-up@8192", "--available", f"{(edge + more) / MIB}MiB", "--json"))
        assert (answer["verdict"], answer["tight"]) == ("fits", tight)


@pytest.mark.parametrize("typed", [("--reserve", "0"), ("--reserve", "512MiB"), ("--gpu-layers", "all", "--reserve", "1.5MiB")])
def test_a_placement_is_printed_as_it_can_be_typed(run: Command, tmp_path: Path, typed: tuple[str, ...]) -> None:
    """``--reserve 0.0 MiB`` was two words, of which the first is no size."""
    store_of(tmp_path / "store", on_host(made_up("in-host-memory")))
    done = run("check", "in-host-memory@8k", "--available", "24GiB", *typed)
    assert f"UNKNOWN: {' '.join(typed)}:" in done.stdout
