"""Verdicts as sentences, for the terminal, errors and reports alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.prediction.verdict import Verdict
from harness.text import counted, written
from harness.units import format_size, format_sum

if TYPE_CHECKING:
    from harness.serving.check import Assessment


def title(one: Assessment) -> str:
    """What is judged: model, context, slots, and where."""
    slots = f" × {counted(one.request.num_parallel, 'slot')}" if one.request.num_parallel > 1 else ""
    text = f"{one.request.model} at {counted(one.request.context, 'token')}{slots}"
    if one.chosen is not None:
        variant = f"@{one.chosen.variant}" if one.chosen.variant else ""
        text += f" · {written(one.chosen.calibration.id)}{variant} · {where(one)}"
    return text


def where(one: Assessment) -> str:
    """The memory that a verdict is about."""
    if one.chosen is None:
        return ""
    if one.chosen.calibration.metadata.machine.target == "host":
        return "host memory"
    chosen = [] if one.details is None else [device.name for device in one.details.devices]
    gpus, short = one.chosen.gpus, one.chosen.names or ()
    if len(gpus) > 1 and chosen:
        return " + ".join(f"{name} ({gpu.name})" for name, gpu in zip(short, gpus, strict=True) if name in chosen)
    if len(chosen) > 1:
        return f"{len(chosen)} cards"
    names = [gpu.name for gpu in gpus]
    return " + ".join(names) or ("a GPU that is not read" if one.chosen.available is None else "a card")


def sentence(one: Assessment) -> str:
    """The verdict of one model in words."""
    verdict = one.details
    if verdict is None:
        return f"UNCALIBRATED: {one.reason}. Calibrate it: {one.advice}"
    if one.verdict == "unknown":
        known = "" if verdict.required_bytes is None else f" It needs {_most(verdict)}{_size(verdict.required_bytes)}."
        return f"UNKNOWN: {one.reason}.{known}" + (f" {_capital(one.advice)}" if one.advice else "")
    head = "FITS" if one.verdict == "fits" else "WARNING: CPU OFFLOAD LIKELY"
    if one.verdict == "offload" and verdict.basis == "host":  # nothing is offloaded there
        head += f" (host memory {'runs' if verdict.short_bytes else 'may run'} out: the machine would swap, or end the engine)"
    asked = _asked(verdict)
    if one.chosen is not None and one.chosen.method is not None:
        head = f"{head}, {estimate_words(one.chosen.method, verdict)}"
    if one.verdict == "fits" and verdict.tight:
        head = f"{head}, TIGHT"
    outcome = ", ".join(filter(None, (_placement(verdict), _speed(one, verdict))))
    why = f"{one.reason}." if one.reason and one.verdict == "offload" else ""
    first = outcome and f"{outcome[0].upper()}{outcome[1:]}."
    parts = (asked + _need(verdict), first, _host(verdict), why, _largest(verdict), _growth(one, verdict))
    return f"{head}: " + " ".join(filter(None, parts))


def _asked(verdict: Verdict) -> str:
    """What a placement that was asked for changes; a host that cannot hold its part comes first."""
    if verdict.host_short_bytes and verdict.basis == "gpu" and (verdict.margin_bytes or 0) >= (verdict.uncertainty_bytes or 0):
        return "the host cannot hold its part. On the GPU it "
    if verdict.forced is None:
        return ""
    if verdict.out_of_memory:
        instead = "may end" if verdict.tight else "ends"
        return f"by the engine's own rule; with {verdict.forced} it {instead} with an out-of-memory error. It "
    if verdict.fits_by_rule:
        return f"with {verdict.forced} it "
    keeps = f" (keeps {_size(verdict.rule_reserve_bytes)} free)" if verdict.rule_reserve_bytes else ""
    return f"would not fit by the engine's rule{keeps}, and fits when forced ({verdict.forced}): "


def _host(verdict: Verdict) -> str:
    """What is on the host of a model whose target is a GPU, where more is there than always."""
    required, available = verdict.host_required_bytes, verdict.host_available_bytes
    if verdict.basis == "host" or required is None:
        return ""
    if verdict.host_short_bytes:
        need, _, margin, free = _sum(required, None, available)
        return f"Host memory: needs {need}, {free} are available: short by {margin}: the machine would swap, or end the engine."
    whole = verdict.layers_offloaded == verdict.layers_total and not verdict.layers_overflowing
    if whole and 2 * required < (verdict.required_bytes or 0):  # else weights were put there by choice
        return ""
    of = ", not judged (--host-available SIZE judges it)" if available is None else f" of {_size(available)} available"
    return f"Host memory: {_size(required)}{of}."


def _growth(one: Assessment, verdict: Verdict) -> str:
    """What comes beside a model that fits, later on."""
    growth = verdict.host_growth_bytes
    if one.verdict != "fits" or not growth or (verdict.basis == "gpu" and not verdict.tight):
        return ""
    left = (verdict.host_available_bytes or 0) - ((verdict.host_required_bytes or verdict.required_bytes) or 0)
    outcome = f"only {_size(left)} are left" if verdict.tight else "that fits as well"
    if verdict.tight and left >= growth:
        outcome = f"{_size(left)} are left for that and for what the servers of the models before it may take"
    return f"Later {one.uncounted} may take up to {_size(growth)} more of host memory: {outcome}."


def estimate_words(method: str, verdict: Verdict) -> str:
    """That figures were not measured, how they were had, and how far they may be off."""
    required, doubt = verdict.required_bytes, verdict.uncertainty_bytes
    bound = "" if not required or doubt is None else f", ± {100 * doubt / required:.0f}%"
    return f"ESTIMATED ({method}{bound})"


def _capital(text: str) -> str:
    return text if text.startswith("harness ") else text[0].upper() + text[1:]


def _size(size: int | None) -> str:
    return format_size(size, 1)


def _most(verdict: Verdict) -> str:
    return "at most " if verdict.at_most else ""


def _need(verdict: Verdict) -> str:
    if len(verdict.devices) > 1:
        return _need_each(verdict)
    need, reserve, margin, free = _sum(verdict.required_bytes, verdict.reserve_bytes, verdict.available_bytes)
    keeps = f" and keeps {reserve} free" if verdict.reserve_bytes else ""
    outcome = f"short by {margin}" if verdict.short_bytes else f"{margin} to spare"
    if verdict.tight and verdict.verdict != "fits":
        outcome += f", and the prediction is good to {_size(verdict.uncertainty_bytes)}: it may fit or not"
    outcome += "."
    return f"needs {_most(verdict)}{need}{keeps}, {free} are available: {outcome}"


def _sum(required: int | None, reserve: int | None, available: int | None) -> tuple[str, str, str, str]:
    """What is needed, kept free, missing or to spare, and free: figures that add up as printed."""
    margin = (available or 0) - (required or 0) - (reserve or 0)
    need, keeps, rest, free = format_sum(required or 0, reserve or 0, margin, available or 0)
    return need, keeps, rest.removeprefix("-"), free


def _need_each(verdict: Verdict) -> str:
    """What every device holds; the one that is short by its name."""
    sums = [(one, *_sum(one.required_bytes, one.reserve_bytes, one.available_bytes)) for one in verdict.devices]
    each = "; ".join(f"{one.name} {need} and {keeps} kept free, of {free}" for one, need, keeps, _, free in sums)
    short = [f"{one.name} is short by {margin}" for one, _, _, margin, _ in sums if one.short_bytes]
    least = min(verdict.devices, key=lambda one: one.available_bytes - one.required_bytes - one.reserve_bytes)
    outcome = ", ".join(short) or f"{_size(verdict.margin_bytes)} to spare on {least.name}"
    if verdict.tight and verdict.verdict != "fits":
        outcome += f", and the prediction is good to {_size(verdict.uncertainty_bytes)} a device: it may fit or not"
    return f"needs {_size(verdict.required_bytes)} over {len(verdict.devices)} devices ({each}): {outcome}."


def _placement(verdict: Verdict) -> str:
    total, on_gpu = verdict.layers_total, verdict.layers_offloaded
    if verdict.basis == "host" or total is None or on_gpu is None:
        return ""
    several = len(verdict.devices) > 1
    split = f" ({', '.join(f'{one.layers} on {one.name}' for one in verdict.devices)})" if several else ""
    place = f"the GPUs{split}" if several else "the GPU"
    over = verdict.layers_overflowing
    if on_gpu == total and not over:
        return f"all {total} layers on {place}" if verdict.verdict == "fits" or verdict.host_short_bytes else ""
    return f"{on_gpu} of {total} layers stay on {place}{f', {over} of them with experts on the host' if over else ''}"


def _speed(one: Assessment, verdict: Verdict) -> str:
    speed, full = verdict.decode_tokens_per_s, one.full_decode_tokens_per_s
    if speed is None or (verdict.verdict == "offload" and verdict.basis == "host"):
        return ""
    instead = f" instead of {_rate(full)}" if full and speed < full and verdict.verdict == "offload" else ""
    bound = "" if one.decode_uncertainty is None else f" ± {one.decode_uncertainty:.0%}"
    return f"about {_rate(speed)} tokens/s{bound}{instead}"


def _rate(speed: float) -> str:
    return f"{speed:.0f}" if speed >= 10 else f"{speed:.1f}"


def _largest(verdict: Verdict) -> str:
    if verdict.max_context is None:
        return ""
    if verdict.max_context == 0:
        return "No context fits."
    return f"Largest context that fits: {verdict.max_context:,}."
