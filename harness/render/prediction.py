"""A prediction for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from harness.prediction.memory import Prediction
from harness.render.style import paint
from harness.render.tables import Column, Drawn, Table
from harness.text import counted, written
from harness.units import format_size, format_sum


def prediction_text(prediction: Prediction, name: str, with_memory: Mapping[str, object] | None) -> Iterator[str | Drawn]:
    """Memory by part, speeds, and the verdict with so much memory free."""
    slots = f" × {counted(prediction.num_parallel, 'slot')}" if prediction.num_parallel > 1 else ""
    yield paint(f"{written(name)} at {counted(prediction.context, 'token')}{slots}", bold=True)
    yield Table((Column("", right=False), Column("")), _parts(prediction), indent=2)
    yield from _speeds(prediction)
    if with_memory is not None:
        yield _sentence(with_memory)


def _parts(prediction: Prediction) -> list[tuple[str, str]]:
    sizes = {
        "weights": prediction.weights_bytes, "fixed cache": prediction.fixed_cache_bytes,
        "context cache": prediction.context_cache_bytes, "compute": prediction.compute_bytes,
        "overhead": prediction.overhead_bytes,
    }  # fmt: skip
    if prediction.weights_bytes is None:
        rows, total = [], format_size(prediction.total_bytes)
    else:
        *parts, total = format_sum(*sizes.values(), prediction.total_bytes)
        rows = list(zip(sizes, parts, strict=True))
    off = format_size(prediction.uncertainty_bytes)
    name, bound = "total", ("good to", f"± {off}")
    if prediction.at_most:
        name, bound = "total, at most", ("beyond that, at most", off)
    return [*rows, (paint(name, bold=True), paint(total, bold=True)), bound]


def _speeds(prediction: Prediction) -> list[str]:
    speed, spread = prediction.speed, f"± {prediction.speed.uncertainty:.0%}"
    lines = []
    if speed.decode_tokens_per_s:
        deep = speed.decode_at_depth_tokens_per_s
        lines.append(
            f"decode {speed.decode_tokens_per_s:.1f} tokens/s {spread}"
            + (f", about {deep:.1f} when the context is full" if deep else "")
        )
    if speed.prompt_tokens_per_s:
        lines.append(f"prompt {speed.prompt_tokens_per_s:.1f} tokens/s {spread}")
    return lines


def _sentence(found: Mapping[str, object]) -> str:
    size, forced, host = found["available_bytes"], found["forced"], found["host_required_bytes"]
    beside, short = found["host_available_bytes"], found["host_short_bytes"]
    given = " and ".join((
        *((f"{format_size(size, 1)} free",) if isinstance(size, int) else ()),
        *((f"{format_size(beside, 1)} of host memory",) if isinstance(beside, int) and beside != size else ()),
        *((str(forced),) if forced else ()),
    ))  # fmt: skip
    free = f"with {given}: " if given else ""
    if found["verdict"] == "unknown":
        return f"{free}UNKNOWN" + (", it may fit or not" if found["at_most"] else "") + f": {found['reason']}"
    layers, total, speed = found["layers_offloaded"], found["layers_total"], found["decode_tokens_per_s"]
    stays = "it does not fit" if layers is None else f"{layers} of {total} layers stay on the GPU"
    where = "everything fits" if found["verdict"] == "fits" else stays
    if forced:
        over = f", {found['layers_overflowing']} of them without their experts" if found["layers_overflowing"] else ""
        ends = "; that is an out-of-memory error" if found["out_of_memory"] else ""
        where = f"{layers} of {total} layers on the GPU{over}: {format_size(_whole(found['required_bytes']), 1)}{ends}"
    if isinstance(host, int) and layers is not None and (layers != total or found["layers_overflowing"]):
        where += f", and {format_size(host, 1)} of host memory"
    if isinstance(short, int) and short and beside != size:
        return f"{free}{where}; host memory lacks {format_size(short, 1)}"
    if found["verdict"] == "fits" and found["tight"]:
        where += (
            f", tight: its server may take up to {format_size(_whole(found['host_growth_bytes']), 1)} more of host memory later"
        )
    return f"{free}{where}" + (f", about {speed:.1f} tokens/s" if isinstance(speed, float) else "")


def _whole(size: object) -> int | None:
    return size if isinstance(size, int) else None
