"""Lines out of bytes: any bytes, any length, in memory that does not grow.

Handles CR, CRLF, ANSI colours, journald prefixes and Docker's json-file lines. A line longer than ``MAX_LINE`` is cut: no
fact stands that far right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Final

from harness.core.facts import LoadFacts
from harness.logs.llama import LlamaReader
from harness.logs.vllm import VllmReader

#: Longest line that is looked at, bytes.
MAX_LINE: Final = 16384
_ANSI: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
#: Cheap signs that a line may hold a fact of llama.cpp or Ollama; others are skipped without a regex.
_LLAMA_SIGNS: Final = (
    b"MiB", b"msg=", b"n_ctx", b"n_seq", b"n_batch", b"n_ubatch", b"n_layer", b"lash", b"offload", b"load", b"CLIP", b"failed",
    b"error", b"creating", b"graph splits", b"memory", b"starting", b"started", b"listening", b"--model", b"K (", b" MB",
    b"overflowing", b": dev = ", b"version", b"mmproj", b"constructing",
)  # fmt: skip
_VLLM_SIGNS: Final = (
    b"GiB", b" GB", b"vLLM", b"VLLM", b"blocks", b"KV cache", b"Maximum concurrency", b"max_model_len", b"model len", b"Error",
    b"startup complete", b"version", b"block size", b"tensor_parallel", b"Gib", b"non-default args", b"startup", b"model_len",
    b"load model", b"Uvicorn", b"init engine", b"repo", b"not supported", b"ttention", b"_ATTN", b"\xe2\x96\x88", b"failed",
    b"max_num_batched", b"local folder", b"Value error",
)  # fmt: skip

#: One pass over the bytes instead of one per sign: a third of the time.
_LLAMA: Final = re.compile(b"|".join(map(re.escape, _LLAMA_SIGNS)))
_VLLM: Final = re.compile(b"|".join(map(re.escape, _VLLM_SIGNS)))


class LogReader:
    """Reads a log in chunks. ``feed`` never raises, whatever the bytes."""

    def __init__(self) -> None:
        self._rest = b""
        self._skipping = False
        self._llama = LlamaReader()
        self._vllm = VllmReader()

    def feed(self, data: bytes) -> None:
        """Take the next bytes, of any number."""
        start = 0
        if self._skipping:
            newline = data.find(b"\n")
            if newline < 0:
                return
            self._skipping, start = False, newline + 1
        lines = data[start:].split(b"\n") if start else data.split(b"\n")
        lines[0] = self._rest + lines[0] if len(self._rest) < MAX_LINE else self._rest
        self._rest = lines.pop()
        for line in lines:
            self._line(line)
        if len(self._rest) > MAX_LINE:
            self._line(self._rest[:MAX_LINE])
            self._rest, self._skipping = b"", True

    def finish(self) -> list[LoadFacts]:
        """The loads of the log, in its order."""
        if self._rest:
            self._line(self._rest)
            self._rest = b""
        return self._llama.finish() + self._vllm.finish()

    def _line(self, raw: bytes) -> None:
        raw = raw[:MAX_LINE]
        llama, vllm = _LLAMA.search(raw), _VLLM.search(raw)
        if not (llama or vllm):
            return
        for line in clean_lines(raw):
            if llama:
                self._llama.feed_line(line)
            if vllm:
                self._vllm.feed_line(line)


def clean_lines(raw: bytes) -> list[str]:
    """The text lines in one raw line, without colours; a carriage return begins a new one."""
    text = raw.decode("utf-8", "replace")
    if text.startswith('{"log":'):
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            text = str(json.loads(text)["log"])
    if "\x1b" in text:
        text = _ANSI.sub("", text)
    return [line for line in text.replace("\n", "\r").split("\r") if line]


def parse_chunks(chunks: Iterable[bytes]) -> list[LoadFacts]:
    """The loads that a log tells of, in its order."""
    reader = LogReader()
    for chunk in chunks:
        reader.feed(chunk)
    return reader.finish()


def parse_log(data: bytes | str) -> list[LoadFacts]:
    """The loads that a whole log tells of, in its order."""
    return parse_chunks([data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data])
