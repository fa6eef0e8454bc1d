"""Engine logs, read. Pure: text or bytes in, :class:`~harness.model.facts.LoadFacts` out.

Four steps, a module each: ``text`` (bytes to lines of text), ``unwrap`` (lines to messages), the tables of ``llama`` and
``vllm`` (which messages hold a fact), and the loads that they fill (``building``, ``vllm_building``). ``doubts`` compares what
a log says twice.
"""

from __future__ import annotations

from harness.logs.hints import missing, unreadable
from harness.logs.reader import LogReader, LogReading, parse_chunks, parse_log, read_chunks

__all__ = ["LogReader", "LogReading", "missing", "parse_chunks", "parse_log", "read_chunks", "unreadable"]
