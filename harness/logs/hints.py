"""What a log lacks, and what would print it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from harness.model.facts import LoadFacts

if TYPE_CHECKING:
    from harness.logs.reader import LogReading

_VERBOSE: Final = {
    "llama-server": "start llama-server with --log-verbosity 4 (LLAMA_ARG_LOG_VERBOSITY=4), which prints every buffer",
    "ollama": "restart ollama serve with OLLAMA_DEBUG=1 and give the log of the whole load, from `starting` to `started in`",
    "vllm": "give vLLM's log from its start to `Application startup complete`, at VLLM_LOGGING_LEVEL=INFO or below",
}


def missing(facts: LoadFacts) -> str | None:
    """What to do where a load is known and its memory is not; ``None`` where the log says what it can."""
    if facts.failed or (facts.devices and not facts.estimated):
        return None
    what = (
        "only the engine's projection of this load's memory is in the log"
        if facts.fit
        else "the log has no memory of this load"
    )
    return f"{what}: {_VERBOSE[facts.engine]}"


def unreadable(reading: LogReading) -> tuple[str, str]:
    """What a log looks like that speaks of memory and tells of no load, and what to do."""
    lines = "1 line of this log speaks" if reading.unread.count == 1 else f"{reading.unread.count} lines of this log speak"
    around = f", wrapped as {', '.join(reading.wrapping)}" if reading.wrapping else ""
    who = f"it looks like a log of {reading.engine}{around}" if reading.engine else f"no engine is named in it{around}"
    message = f"{lines} of memory, and no load of a model is in it; {who}"
    hint = _VERBOSE.get(reading.engine or "", "give the part of the log in which the model is loaded")
    return message, f"{hint}; --unread prints the lines"
