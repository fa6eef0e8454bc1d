"""Settings for a budget, in lines: the best, what else there is, and what would make a model fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from harness.render.style import paint
from harness.text import clean, written
from harness.units import format_size

if TYPE_CHECKING:
    from harness.prediction.tuning import Choice, SettingChange, Tuning
    from harness.serving.tuning import Tuned

#: Other choices that are shown.
_SHOWN: Final = 6
_NAMES: Final = {
    **{name: name for name in ("card", "slots", "context")},
    "batch": "physical batch",
    "kv-cache": "KV cache",
    "layers": "placement",
}


def tuning_text(found: Tuned) -> Iterator[str]:
    """The lines of ``tune``."""
    tuning, best = found.tuning, found.tuning.best
    free = " + ".join(format_size(one, 1) for one in tuning.available)
    yield paint(clean(f"{found.model} · {written(found.key)} · {free} free"), bold=True)
    if best is None:
        yield from _missed(tuning)
    else:
        yield "  " + paint("SETTINGS: ", "green", bold=True) + clean(settings(best))
        yield "  " + clean(consequence(best))
        yield from (f"    {clean(line)}" for line in _costs(best, tuning))
    others = [one for one in tuning.choices if one is not best][:_SHOWN]
    if others:
        yield "  more, for its price:" if best else "  what would help, the cheapest first:"
    for one in others:
        yield f"    {clean(_other(one, tuning))}"
    if best is None and tuning.short_bytes:
        yield f"    {format_size(tuning.short_bytes, 1)} more free memory: nothing else has to change"


def settings(one: Choice) -> str:
    """What to set."""
    words = [f"{one.context:,} tokens", f"{one.num_parallel} slots" if one.num_parallel > 1 else ""]
    words.append(f"KV cache {one.kv_cache_type}")
    words.append("" if one.num_batch is None else f"physical batch {one.num_batch:,}")
    words.append("" if not one.cards else f"on {' + '.join(one.cards)}")
    return ", ".join(filter(None, words))


def consequence(one: Choice) -> str:
    """What follows: memory, layers, speed, and where the figures come from."""
    size = f"needs {format_size(one.required_bytes, 1)}"
    if one.reserve_bytes:
        size += f" and keeps {format_size(one.reserve_bytes, 1)} free"
    if one.gpu_layers is None:
        place = f"{format_size(one.margin_bytes, 1)} to spare"
        if one.tight:
            place += f", tight: its server may take up to {format_size(one.host_growth_bytes, 1)} more of host memory later"
    else:
        place = f"{one.gpu_layers} of {one.layers_total} layers stay on the GPU"
    speed = "speed not measured" if one.decode_tokens_per_s is None else f"about {_rate(one.decode_tokens_per_s)} tokens/s"
    return f"{size}: {place}; {speed} ({one.source}, {one.calibration})"


def _costs(one: Choice, tuning: Tuning) -> list[str]:
    """Each change with what it saves, and what it costs as far as that was measured."""
    return [f"{change_words(change)}{_speed(one, tuning, change)}" for change in one.changes]


def change_words(change: SettingChange) -> str:
    """One change in words."""
    saved = f": {format_size(-change.saves_bytes, 1)}" if change.saves_bytes else ""
    instead = "" if change.instead_of == "all" else f" instead of {change.instead_of}"
    return f"{_NAMES[change.setting]} {change.value}{instead}{saved}"


def _speed(one: Choice, tuning: Tuning, change: SettingChange) -> str:
    if change.setting not in ("kv-cache", "layers"):
        return ", slower prompts" if change.setting == "batch" else ""
    usual, speed = tuning.usual_tokens_per_s, one.decode_tokens_per_s
    if not usual or not speed:
        return ", its speed was not measured"
    if change.setting == "layers":
        return f", about {_rate(speed)} instead of {_rate(usual)} tokens/s"
    return f", {100 * (speed / usual - 1):+.0f}% tokens/s as measured"


def _other(one: Choice, tuning: Tuning) -> str:
    changes = "; ".join(_costs(one, tuning)) or "no change"
    reached = f"{one.context:,} tokens" + (f" × {one.num_parallel} slots" if one.num_parallel > 1 else "")
    held = "" if one.gpu_layers is None else ", on GPU and host"
    lacks = f"; it lacks {format_size(one.host_short_bytes, 1)} of host memory" if one.host_short_bytes else ""
    return f"{changes} → {reached}{held} ({one.source}){lacks}"


def _missed(tuning: Tuning) -> Iterator[str]:
    demand = tuning.demand
    wanted = [f"{tuning.context:,} tokens" + (f" × {demand.num_parallel} slots" if demand.num_parallel > 1 else "")]
    if demand.tokens_per_s is not None:
        wanted.append(f"{demand.tokens_per_s:g} tokens/s")
    yield "  " + paint("OUT OF REACH: ", "red", bold=True) + f"{' and '.join(wanted)}."
    if tuning.least_bytes is not None:
        yield f"  The least that any settings here need for {tuning.context:,} tokens is {format_size(tuning.least_bytes, 1)}."


def _rate(speed: float) -> str:
    return f"{speed:.0f}" if speed >= 10 else f"{speed:.1f}"
