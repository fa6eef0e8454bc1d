"""The report for people: tables of what ``report.json`` holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final

MIB: Final = 1 << 20


def mib(size: int | None) -> str:
    """Bytes as MiB, two decimals."""
    return "–" if size is None else f"{size / MIB:.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join("–" if cell is None else str(cell) for cell in row) + " |" for row in rows), ""]


def markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    lines = ["# GPU report", ""]
    sections = report["sections"]
    for name, found in sections.items():
        draw = _DRAWN.get(name, _nothing)
        try:
            drawn = draw(found)
        except (KeyError, TypeError, IndexError) as error:  # a section that came half way
            drawn = [f"(not shown: {error!r})", ""]
        lines += [f"## {name} ({report['seconds'].get(name, '–')} s)", "", *drawn] if drawn else []
    for title in ("skipped", "failed"):
        lines += [f"- {title}: {name}: {why.strip().splitlines()[-1]}" for name, why in report[title].items()]
    return "\n".join(lines) + "\n"


def _nothing(found: dict[str, Any]) -> list[str]:
    return []


def _machine(found: dict[str, Any]) -> list[str]:
    gpus = "; ".join(str(one["Name"]) for one in found["gpus"])
    lists = found["gpus"][0]["lists"] if found["gpus"] else {}
    return [
        f"{gpus}, driver {found['driver']}, CUDA {found['cuda']}, {found['kernel']}",
        f"memory v1 {found['gpus'][0]['memory_v1']}, v2 {found['gpus'][0]['memory_v2']}",
        f"lists: {lists}", "",
    ]  # fmt: skip


def _allocations(found: dict[str, Any]) -> list[str]:
    rows = [(one["step"], mib(one["device_used"]), ", ".join(map(mib, one["listed"]))) for one in found["steps"]]
    return [*table(("step", "device used, MiB", "by process, MiB"), rows), f"return: {found['return_seconds']}", ""]


def _reading(found: dict[str, Any]) -> list[str]:
    rows = [
        (name, call, cost["median_us"], cost["p95_us"], cost["max_us"])
        for name, calls in found.items() for call, cost in calls.items() if isinstance(cost, dict)
    ]  # fmt: skip
    return table(("state", "call", "median µs", "95 % µs", "most µs"), rows)


def _calibration(found: dict[str, Any]) -> list[str]:
    rows = [
        (
            *(load[key] for key in ("context", "batch", "purpose", "outcome")),
            *(mib(load[key]) for key in ("logged", "idle", "busy", "overhead_idle", "overhead_busy", "device_peak", "left")),
            load["ready_s"], load["layers"],
        )
        for load in found["loads"]
        if load["purpose"] != "dry-run"
    ]  # fmt: skip
    head = (
        "context", "batch", "purpose", "outcome", "logged", "idle", "busy", "over idle", "over busy", "device peak", "left",
        "ready s", "layers",
    )  # fmt: skip
    lines = table(head, rows)
    if "error" in found:
        lines += [f"not trusted: {found['error']}", ""]
    if far := found.get("far"):
        said = mib(far["predicted"]["total_bytes"])
        lines += [f"{far['context']} tokens, all of them filled: {mib(far['total'])} MiB, predicted {said} MiB", ""]
    speeds = [one for load in found["loads"] for one in load["speeds"]]
    return [*lines, *(f"- {one}" for one in speeds), ""]


def _cards(found: dict[str, Any]) -> list[str]:
    rows = [
        (
            one["share"], mib(one.get("free")), one["check"]["verdict"], one["check"]["layers_offloaded"],
            one["check"]["layers_overflowing"], one["engine"]["layers"], one["engine"]["overflowing"], one["engine"]["of"],
            one["check"]["decode_tokens_per_s"], one["decode_tokens_per_s"], mib(one["read"]), mib(one["engine"]["logged"]),
        )
        for one in found["cards"]
        if "check" in one
    ]  # fmt: skip
    head = (
        "share", "free MiB", "verdict", "layers said", "overflow said", "layers", "overflow", "of", "tokens/s said", "tokens/s",
        "read MiB", "logged MiB",
    )  # fmt: skip
    lines = table(head, rows)
    return [*(_calibration(found["calibration"]) if "calibration" in found else []), *lines]


def _filled(found: dict[str, Any]) -> list[str]:
    lines = []
    for name, one in found.items():
        rows = [
            (row["prompt"], mib(row["total"]), mib(row["total"] - one["logged"]), row.get("tokens_per_s"))
            for row in one["rows"]
        ]
        lines += [name, "", *table(("prompt", "total MiB", "above the log MiB", "tokens/s"), rows)]
    return lines


def _devices(found: dict[str, Any]) -> list[str]:
    rows = []
    for one in found["rows"]:
        facts = one.get("facts") or {"devices": {}}
        parts = {
            name: [mib(device[part]) for part in ("weights_bytes", "kv_cache_bytes", "compute_bytes")]
            for name, device in facts["devices"].items() if device["kind"] == "gpu"
        }  # fmt: skip
        sizes = [mib(one.get(key)) for key in ("logged", "idle", "busy")]
        placed = (one["devices"], one["context"], mib(one["free"]), facts.get("layers_offloaded"), parts)
        rows.append((*placed, *sizes, one.get("error")))
    head = ("devices", "context", "free", "layers", "weights, KV, compute", "logged", "idle", "busy", "error")
    return table(head, rows)


def _decisions(found: dict[str, Any]) -> list[str]:
    rows = []
    for one in found["rows"]:
        placed = [line for line in one["fit"] if " layers" in line or "no changes needed" in line]
        rows.append((one["model"], one["devices"], mib(one["free"]), "<br>".join(placed) or one["reason"]))
    return table(("model", "devices", "free MiB", "what the engine decided"), rows)


def _plain(found: dict[str, Any]) -> list[str]:
    return [*(f"- {name}: {value}" for name, value in found.items()), ""]


_DRAWN: Final = {
    "machine": _machine, "allocations": _allocations, "reading": _reading, "namespaces": _plain, "frameworks": _plain,
    "batches": _calibration, "middle": _calibration, "middle batches": _calibration, "large": _calibration,
    "no flash attention": _calibration, "edge": _cards, "edge small": _cards, "edge moe": _cards, "filled": _filled,
    "variants": _filled, "devices": _devices, "decisions": _decisions, "sampling": _plain,
}  # fmt: skip
