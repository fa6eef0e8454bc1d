"""``harness tune``: a status to act on, settings to copy, and a start that uses them."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from harness.inventory.machine import LocalMachine
from harness.prediction.tuning import Demand
from harness.serving.server import decide
from harness.serving.tuning import as_started, tune
from harness.units import GIB
from tests.support.calibrations import made_up, store_of, with_settings, with_version
from tests.support.command import Command
from tests.unit.prediction.test_tuning import MADE_UP


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, monkeypatch, capfd)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--available", "24GiB", "--min-ctx", "32768"), 0, "SETTINGS: 131,072 tokens, KV cache f16"),
        (
            ("--available", "7GiB", "--min-ctx", "80000"),
            0,
            "SETTINGS: 89,344 tokens, KV cache q8_0, physical batch 512",
        ),
        (("--available", "5GiB", "--min-ctx", "131072"), 3, "OUT OF REACH: 131,072 tokens."),
        (("--available", "5GiB", "--min-ctx", "131072"), 3, "4,101.0 MiB more free memory: nothing else has to change"),
        (("--available", "5GiB", "--min-ctx", "131072", "--min-tokens-per-s", "7"), 0, "about 9.8 instead of 60 tokens/s"),
        (("--available", "7GiB", "--kv-cache-type", "q4_0"), 0, "131,072 tokens, KV cache q4_0"),
        (("--available", "24GiB", "--min-ctx", "0"), 2, ""),
        (("--available", "24GiB", "--min-tokens-per-s", "nan"), 2, ""),
        (("--available", "24GiB", "--flash-attention", "off"), 4, ""),
    ],
)
def test_the_status_is_a_verdict(run: Command, tmp_path: Path, arguments: tuple[str, ...], status: int, said: str) -> None:
    store_of(tmp_path / "store", MADE_UP)
    done = run("tune", "made-up", *arguments)

    assert (done.returncode, done.stderr if done.returncode == 1 else "") == (status, "")
    assert said in done.stdout


def test_a_model_without_a_calibration_is_unknown_and_says_what_to_do(run: Command) -> None:
    done = run("tune", "unheard-of", "--available", "24GiB", "--json")

    answer = json.loads(done.stdout)
    assert done.returncode == 4
    assert answer["errors"][0]["hint"] == "harness calibrate unheard-of"


def test_only_files_of_the_same_weights_engine_and_card_are_put_beside_each_other(tmp_path: Path) -> None:
    q8 = with_settings(MADE_UP, kv_cache_type="q8_0")
    other_card = made_up(gpu="NVIDIA Test B")
    other_weights = msgspec.structs.replace(
        q8,
        metadata=msgspec.structs.replace(
            q8.metadata, model=msgspec.structs.replace(q8.metadata.model, digest=f"sha256:{'00' * 32}")
        ),
    )
    shelf = store_of(
        tmp_path, MADE_UP, q8=q8, card=with_settings(other_card, kv_cache_type="q4_0"), weights=other_weights,
        newer=with_version(q8, "b2"),
    )  # fmt: skip
    found = tune("made-up", shelf, LocalMachine(), Demand(), available=(24 * GIB,))

    assert set(found.files) == {"llama-server/made-up", "llama-server/made-up@q8"}


def test_a_start_takes_a_smaller_cache_before_a_shorter_context(tmp_path: Path) -> None:
    shelf = store_of(tmp_path, MADE_UP)

    def started(gib: float, context: int) -> tuple[int, str, str]:
        demand = Demand(context=context)
        judged = as_started("made-up", context, tune("made-up", shelf, LocalMachine(), demand, available=(int(gib * GIB),)))
        assert judged is not None
        assert judged.chosen is not None
        assert judged.details is not None
        return decide(judged, "tune"), judged.chosen.calibration.metadata.settings.kv_cache_type, judged.details.verdict

    assert started(7, 80_000) == (80_000, "q8_0", "fits")
    context, cache, verdict = started(5.5, 131_072)
    assert (cache, verdict) == ("q4_0", "fits")
    assert context < 131_072
    assert as_started("made-up", 8192, tune("made-up", shelf, LocalMachine(), Demand(context=8192), available=(GIB,))) is None
