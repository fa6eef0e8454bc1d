"""Both sides of every tolerance of a drift: what measuring could have moved, and a little more."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from harness.model.calibration import Calibration, Performance
from harness.model.record import EngineVersion
from harness.units import MIB, gib
from tests.support.calibrations import made_up, on_host
from tests.support.rules import compare


def exact(calibration: Calibration, **performance: float | None) -> Calibration:
    """The same, as if it had been measured without any error of its own."""
    speeds = {"load_s": 2.0, "prompt_tokens_per_s": 900.0, "decode_tokens_per_s": 60.0, "host_decode_tokens_per_s": 6.0}
    quality = msgspec.structs.replace(calibration.metadata.quality, max_error=0.0, overhead_spread_gb=0.0)
    metadata = msgspec.structs.replace(
        calibration.metadata,
        quality=quality,
        performance=Performance(**{**speeds, **performance}),  # type: ignore[arg-type]
    )
    return msgspec.structs.replace(calibration, metadata=metadata)


def moved(old: Calibration, new: Calibration) -> set[str]:
    return {figure.name for figure in compare(old, new).moved}


def heavier(calibration: Calibration, mib: float, part: str = "weights") -> Calibration:
    """With so much more in one part of base, and in base."""
    size = gib(mib * MIB)
    parts = calibration.metadata.breakdown_gb
    base = calibration.constants.base_vram_gb + size
    return msgspec.structs.replace(
        calibration,
        constants=msgspec.structs.replace(calibration.constants, base_vram_gb=base),
        metadata=msgspec.structs.replace(
            calibration.metadata, breakdown_gb=msgspec.structs.replace(parts, **{part: getattr(parts, part) + size})
        ),
    )


#: Loads at 8 192, 16 384 and 32 768 tokens: rounding of 0.02 MiB at both ends moves the line at 0 by so much, MiB.
INTERCEPT = 0.02 + 2 * 0.02 / (32768 - 8192) * (8192 + 16384 + 32768) / 3


@pytest.mark.parametrize(
    ("mib", "expected"),
    [
        (2 * (2 + 3 * INTERCEPT) - 0.01, False),  # the driver's step of 2 MiB, and three parts rounded, on both sides
        (2 * (2 + 3 * INTERCEPT) + 0.01, True),
    ],
)
def test_base_may_move_by_the_meters_step_and_the_rounding_of_its_parts(mib: float, expected: bool) -> None:
    old = exact(made_up())
    assert ("base_vram_gb" in moved(old, heavier(old, mib, "overhead"))) == expected
    assert ("overhead_gb" in moved(old, heavier(old, mib, "overhead"))) == expected


def test_weights_move_beyond_the_rounding_of_the_log() -> None:
    old = exact(made_up())
    assert "weights_gb" not in moved(old, heavier(old, 0.039))
    assert "weights_gb" in moved(old, heavier(old, 0.045))


def test_ollamas_go_engine_rounds_to_a_tenth_of_a_gibibyte() -> None:
    def of_go(version: str) -> Calibration:
        made = exact(made_up())
        metadata = msgspec.structs.replace(made.metadata, engine=EngineVersion(version=version))
        return msgspec.structs.replace(made, engine="ollama", metadata=metadata)

    for version, least_mib in (("0.29.9", 102.4), ("0.30.0", 0.04)):
        old = of_go(version)
        assert "weights_gb" not in moved(old, heavier(old, least_mib - 0.01))
        assert "weights_gb" in moved(old, heavier(old, least_mib + 0.01))


@pytest.mark.parametrize(
    ("side", "spread", "within", "beyond"),
    [
        (exact, None, 51.0, 50.9),  # 15 % where no timing was repeated
        (exact, 0.01, 57.0, 56.9),  # 5 % at least
        (exact, 0.1, 54.0, 53.9),
        (lambda made, **changes: exact(on_host(made), **changes), None, 45.0, 44.9),  # 25 % on the host
        (lambda made, **changes: exact(on_host(made), **changes), 0.1, 39.0, 38.9),  # and what it spread by
    ],
)
def test_a_speed_may_move_by_its_spread(
    side: Callable[..., Calibration], spread: float | None, within: float, beyond: float
) -> None:
    old = side(made_up(), spread=spread)
    for speed, expected in ((within, False), (beyond, True)):
        new = side(made_up(), spread=spread, decode_tokens_per_s=speed)
        assert ("decode_tokens_per_s" in moved(old, new)) == expected


def test_a_speed_on_the_host_may_move_by_a_quarter() -> None:
    old = exact(made_up())
    assert "host_decode_tokens_per_s" not in moved(old, exact(made_up(), host_decode_tokens_per_s=4.5))
    assert "host_decode_tokens_per_s" in moved(old, exact(made_up(), host_decode_tokens_per_s=4.49))
