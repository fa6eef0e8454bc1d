"""Engine logs, read. Pure: text or bytes in, :class:`~harness.model.facts.LoadFacts` out."""

from __future__ import annotations

from harness.logs.reader import LogReader, parse_chunks, parse_log

__all__ = ["LogReader", "parse_chunks", "parse_log"]
