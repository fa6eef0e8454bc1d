"""The plan of a memory as a table, for a terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from harness.render.calibrations import none_in
from harness.render.style import paint
from harness.render.tables import Column, Drawn, Table, Verbatim
from harness.text import clean, counted
from harness.units import format_size

if TYPE_CHECKING:
    from harness.serving.capacity import CapacityRow, KeptLoaded, Memory

#: Cells of the bar that shows how much of the memory a model takes, and of a card's.
_BAR: Final = 16
_CARD_BAR: Final = 24
#: The mark and the colour of each model on a card.
_MARKS: Final = (("█", "blue"), ("▓", "cyan"), ("▒", "green"), ("▞", "yellow"), ("▚", "red"))
_COLUMNS: Final = (
    Column("model", right=False), Column("engine", right=False, rank=3), Column("largest context"), Column("takes"),
    Column("to spare"), Column("tokens/s", rank=1), Column("when full", rank=2),
)  # fmt: skip
_HEADS: Final = tuple(column.head for column in _COLUMNS)


def memory_table(memory: Memory) -> Iterator[str | Drawn]:
    """A heading, a row for each model, and which models fit together."""
    several = len({row.chosen.calibration.engine for row in memory.rows}) > 1
    columns = (*_COLUMNS[:3], Column("", right=False, rank=4), *_COLUMNS[3:])
    rows = []
    for row in memory.rows:
        name, engine, context, *rest = cells(row)
        colour = "red" if row.largest_context == 0 else "green" if _whole(row) and not row.verdict.tight else "yellow"
        middle = (paint(engine, dim=True) if several else "", paint(context, colour), _bar(row, memory))
        rows.append((paint(name, bold=True), *middle, *rest))
    yield paint(heading(memory), "cyan", bold=True)
    yield Table(columns, rows)
    yield from _picture(memory)
    yield from (paint(line, dim=True) for line in notes(memory))


def _picture(memory: Memory) -> Iterator[str]:
    """Which models of the first set are on which card, as bars."""
    if not memory.groups or not memory.cards:
        return
    group, width = memory.groups[0], max(len(card.name) for card in memory.cards)
    yield ""
    marks = {model: _MARKS[index % len(_MARKS)] for index, model in enumerate(group.models)}
    for card in memory.cards:
        bar, parts, filled, taken = "", [], 0, 0
        for model, size in group.cards.get(card.name, {}).items():
            mark, colour = marks[model]
            taken += size
            end = min(max(round(_CARD_BAR * taken / max(card.available_bytes, 1)), filled + 1), _CARD_BAR)
            bar, filled = bar + paint(mark * (end - filled), colour), end
            parts.append(f"{mark} {clean(model)} {format_size(size, 1)}")
        parts.append(f"{format_size(max(card.available_bytes - taken, 0), 1)} free")
        yield f"{clean(card.name):{width}}  {bar}{paint('░' * (_CARD_BAR - filled), dim=True)}  {', '.join(parts)}"


def heading(memory: Memory) -> str:
    """Which memory, and how much of it is free; of several cards each."""
    if len(memory.cards) > 1:
        each = " + ".join(format_size(card.available_bytes, 1) for card in memory.cards)
        return clean(f"{memory.name} · {each} free")
    free = "not known how much is free" if memory.available_bytes is None else f"{format_size(memory.available_bytes, 1)} free"
    of = f" of {format_size(memory.total_bytes, 1)}" if memory.total_bytes else ""
    kept = f" · the engine keeps {format_size(memory.reserve_bytes, 1)} of it" if memory.reserve_bytes else ""
    return clean(f"{memory.name} · {free}{of}{kept}")


def cells(row: CapacityRow) -> list[str]:
    """What is said of one model; a dash is not known."""
    verdict = row.verdict
    slots = f" × {row.request.num_parallel}" if row.request.num_parallel > 1 else ""
    return [
        clean(row.name),
        row.chosen.calibration.engine,
        _context(row) + slots,
        ("at most " if verdict.at_most else "") + format_size(verdict.required_bytes, 1),
        _spare(row),
        _rate(verdict.decode_tokens_per_s),
        _rate(row.full_decode_tokens_per_s),
    ]


def _spare(row: CapacityRow) -> str:
    verdict = row.verdict
    if short := verdict.short_bytes or verdict.host_short_bytes:
        return f"-{format_size(short, 1)}"
    if verdict.verdict != "fits" or verdict.available_bytes is None or verdict.required_bytes is None:
        return "–"
    spare = format_size(verdict.available_bytes - verdict.required_bytes - (verdict.reserve_bytes or 0), 1)
    return f"{spare}, tight" if verdict.tight else spare


def _context(row: CapacityRow) -> str:
    if row.largest_context is None:
        return "–"
    if row.largest_context:
        return f"{row.largest_context:,}"
    if row.verdict.layers_offloaded is None or row.verdict.host_short_bytes:
        return "none fits"
    return f"{row.verdict.layers_offloaded}/{row.verdict.layers_total} layers"


def _whole(row: CapacityRow) -> bool:
    return row.largest_context == row.chosen.calibration.metadata.quality.valid_to


def _rate(speed: float | None) -> str:
    return "–" if speed is None else f"{speed:.0f}" if speed >= 10 else f"{speed:.1f}"


def _bar(row: CapacityRow, memory: Memory) -> str:
    """Weights, then what the context adds, of the memory that is free."""
    taken, free = row.verdict.required_bytes, memory.available_bytes
    if not free or taken is None:
        return ""
    full = min(round(_BAR * taken / free), _BAR)
    solid = min(round(_BAR * (row.weights_bytes or 0) / free), full)
    return paint("█" * solid, "blue") + paint("▓" * (full - solid), "cyan") + paint("░" * (_BAR - full), dim=True)


def notes(memory: Memory) -> list[str]:
    """Below the table: which models fit together, and why something is not known."""
    reasons: dict[str, list[str]] = {}
    for row in memory.rows:
        if row.reason:
            reasons.setdefault(row.reason, []).append(row.name)
    lines = [f"not known for {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    if memory.available_bytes is None:
        lines += dict.fromkeys(row.chosen.advice for row in memory.rows)
    lines += _beside(memory)
    for group in memory.groups:
        pairs = list(zip(group.models, group.contexts, strict=True))
        if len(set(group.contexts)) == 1:
            members = f" at {group.contexts[0]:,}: {' + '.join(group.models)}"
        else:
            members = ": " + " + ".join(f"{model} at {context:,}" for model, context in pairs)
        more = "" if group.largest_context <= max(group.contexts) else f", and up to {group.largest_context:,} tokens each"
        later = f", tight: {format_size(group.host_growth_bytes, 1)} more later, at most" if group.tight else ""
        lines.append(f"together{members} ({format_size(group.required_bytes, 1)}){more}{later}")
    if not memory.groups and sum(bool(row.largest_context) for row in memory.rows) > 1:
        lines.append("together: no two of them")
    lines += [_kept(one) for one in memory.limits]
    if not memory.all_sets:
        lines.append("there are more such sets: name the models that matter, or put them first with --prefer")
    return [clean(line) for line in lines]


def _beside(memory: Memory) -> Iterator[str]:
    """Host memory that lacks, or that servers may come to take."""
    for row in memory.rows:
        if row.verdict.basis == "gpu" and row.verdict.host_short_bytes:
            short = format_size(row.verdict.host_short_bytes, 1)
            yield f"{row.name}: host memory is short by {short} for its part: the machine would swap, or end the engine"
    tight: dict[str, list[str]] = {}
    for row in memory.rows:
        if row.verdict.verdict == "fits" and row.verdict.tight:
            most = format_size(row.verdict.host_growth_bytes, 1)
            tight.setdefault(row.uncounted or "", []).append(f"{row.name} up to {most}")
    for what, rows in tight.items():
        yield f"tight: later {what} may take more of host memory than is left: {', '.join(rows)}"


def _kept(limit: KeptLoaded) -> str:
    if limit.step == "evict-limit":
        most = counted(int(limit.figures.get("limit", 0)), "model")
        return f"{limit.engine} keeps at most {most} loaded (OLLAMA_MAX_LOADED_MODELS)"
    if limit.step == "host-memory":
        return f"no set of {limit.engine} whose parts host memory cannot hold"
    percent = limit.figures.get("percent")
    return f"no set in which {limit.engine} would end a model: its estimate of the next one is above {percent}% of what is free"


def memory_markdown(memory: Memory) -> str:
    """The same as GitHub's Markdown."""

    def line(texts: list[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    rule = "| --- | --- | " + " | ".join(["---:"] * (len(_HEADS) - 2)) + " |"
    table = [line(list(_HEADS)), rule, *(line(cells(row)) for row in memory.rows)]
    below = notes(memory)
    return "\n".join([f"**{heading(memory)}**", "", *table, *(["", *(f"- {note}" for note in below)] if below else [])])


def plan_text(memories: Sequence[Memory], root: str, *, markdown: bool, refused: bool = False) -> Iterator[str | Drawn]:
    """Each memory with what fits it, as a table or as Markdown; ``refused``: there are calibrations, and none answers."""
    if not memories:
        yield f"no calibration in {clean(root)} answers; the warnings say why" if refused else none_in(root)
    elif markdown:
        yield Verbatim("\n\n".join(memory_markdown(one) for one in memories))
    else:
        for number, one in enumerate(memories):
            yield from ([""] if number else [])
            yield from memory_table(one)
