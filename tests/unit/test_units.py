"""Sizes as people type them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.units import GIB, MIB, format_size, format_slope, format_sum, pad_cells, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * GIB),
        ("24Gi", 24 * GIB),
        ("24g", 24 * GIB),
        ("24GB", 24 * 10**9),
        ("24 gb", 24 * 10**9),
        ("24576", 24 * GIB),
        ("24576MiB", 24 * GIB),
        ("9.8GiB", round(9.8 * GIB)),
        (".5g", GIB // 2),
        ("512b", 512),
    ],
)
def test_units_are_told_apart(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "0", "0GiB", "-1", "12XB", "GiB", "1 2", "1e9", "nan", "inf", "24i", "²", "\u0661g", "9" * 400 + "g"]
)
def test_nonsense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


def test_an_unknown_size_is_not_zero() -> None:
    assert format_size(None) == "–"
    assert format_size(0) == "0.0 MiB"


def test_sizes_below_ten_gib_are_in_mib_as_drivers_have_them() -> None:
    assert format_size(1536 * MIB) == "1,536.0 MiB"
    assert format_size(12 * GIB) == "12.00 GiB"


@given(st.lists(st.integers(-(64 << 30), 64 << 30), min_size=1, max_size=6))
def test_figures_add_up_as_printed(sizes: list[int]) -> None:
    *parts, total = (float(text.removesuffix(" MiB").replace(",", "")) for text in format_sum(*sizes, sum(sizes)))
    assert sum(parts) == pytest.approx(total, abs=1e-6)
    assert all(abs(part * MIB - size) <= MIB for part, size in zip(parts, sizes, strict=True))


def test_a_slope_has_one_form() -> None:
    assert format_slope(28 * 1024 * 10_000 / GIB) == "28.000 KiB/token"
    assert format_slope(None) == "–"


def test_cells_come_in_steps_of_256() -> None:
    assert [pad_cells(tokens) for tokens in (1, 256, 257)] == [256, 256, 512]
