"""Speeds at a depth follow from two that were timed, and never say that a longer context is faster."""

from __future__ import annotations

import msgspec
import pytest

from harness.fit.constants import fit_record
from harness.model.calibration import Calibration, DepthSpeed
from harness.prediction.memory import decode_at_depth
from tests.support.records import load, record


def timed(*depths: tuple[int, float]) -> Calibration:
    found = fit_record(record(load(8192), load(16384), load(32768)))
    speeds = tuple(DepthSpeed(depth=depth, decode_tokens_per_s=rate) for depth, rate in depths)
    performance = msgspec.structs.replace(found.metadata.performance, depths=speeds)
    return msgspec.structs.replace(found, metadata=msgspec.structs.replace(found.metadata, performance=performance))


def test_the_time_of_a_token_grows_in_a_straight_line() -> None:
    """100 tokens/s are 10 ms, 50 are 20 ms: twice as deep again are 30 ms."""
    assert decode_at_depth(timed((0, 100.0), (1000, 50.0)), 2000) == pytest.approx(100 / 3, abs=0.01)


def test_a_deeper_timing_that_came_out_faster_is_noise() -> None:
    assert decode_at_depth(timed((64, 18.8), (1536, 19.7)), 32768) == 18.8


def test_one_depth_says_nothing_of_others() -> None:
    assert decode_at_depth(timed((64, 18.8)), 32768) is None
