"""A log in chunks: any bytes, any length, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from harness.logs.lines import CANDIDATE, CANDIDATE_WRAPPED, MAX_LINE, clean_lines, is_wrapped
from harness.logs.llama import LlamaReader
from harness.logs.vllm import VllmReader
from harness.model.facts import LoadFacts

#: Bytes that are searched at once.
_BLOCK: Final = 1 << 20
#: vLLM names itself, its process, or the Python file that speaks, before it says anything else.
_VLLM_SPEAKS: Final = (
    b".py:", b"vLLM", b"VLLM", b"vllm", b"EngineCore", b"ngine core", b"(APIServer", b"(Worker", b"ValueError", b"RuntimeError",
    b"torch.",
)  # fmt: skip
#: Cheap signs that a line of a vLLM log may hold a fact.
_VLLM_SIGNS: Final = (
    b"GiB", b" GB", b"vLLM", b"VLLM", b"blocks", b"KV cache", b"Maximum concurrency", b"max_model_len", b"model len", b"Error",
    b"startup complete", b"version", b"block size", b"tensor_parallel", b"Gib", b"non-default args", b"startup", b"model_len",
    b"load model", b"Uvicorn", b"init engine", b"repo", b"not supported", b"ttention", b"_ATTN", b"\xe2\x96\x88", b"failed",
    b"max_num_batched", b"local folder", b"graph for", b"graph of", b"Value error",
)  # fmt: skip


class LogReader:
    """Reads a log in chunks. ``feed`` never raises, whatever the bytes."""

    def __init__(self) -> None:
        self._rest = b""
        self._skipping = False
        self._llama = LlamaReader()
        self._vllm = VllmReader()
        self._vllm_speaks = False
        self._candidate = CANDIDATE

    def feed(self, data: bytes) -> None:
        """Take the next bytes, of any number."""
        for start in range(0, len(data), _BLOCK):
            self._block(data[start : start + _BLOCK].replace(b"\r", b"\n"))

    def _block(self, data: bytes) -> None:
        if self._skipping:
            _, newline, data = data.partition(b"\n")
            if not newline:
                return
            self._skipping = False
        end = data.rfind(b"\n")
        if end < 0:
            self._rest += data
        else:
            self._lines(b"\n" + self._rest + data[: end + 1])
            self._rest = data[end + 1 :]
        if len(self._rest) > MAX_LINE:
            self._line(self._rest[:MAX_LINE])
            self._rest, self._skipping = b"", True

    def finish(self) -> list[LoadFacts]:
        """The loads of the log, in its order."""
        if self._rest:
            self._lines(b"\n" + self._rest + b"\n")
            self._rest = b""
        return self._llama.finish() + self._vllm.finish()

    def _lines(self, block: bytes) -> None:
        """Look at the lines of a block that begins and ends with a newline."""
        end = 0
        while match := self._candidate.search(block, end):
            start = match.end()
            end = block.find(b"\n", start)
            raw = block[start : min(end, start + MAX_LINE)]
            if self._candidate is CANDIDATE and is_wrapped(raw):
                self._candidate = CANDIDATE_WRAPPED  # slower, and right for both
            self._line(raw)

    def _line(self, raw: bytes) -> None:
        if not self._vllm_speaks and _has(raw, _VLLM_SPEAKS):
            self._vllm_speaks = True
        vllm = self._vllm_speaks and _has(raw, _VLLM_SIGNS)
        for line in clean_lines(raw):
            self._llama.feed_line(line)
            if vllm:
                self._vllm.feed_line(line)


def _has(raw: bytes, signs: tuple[bytes, ...]) -> bool:
    for sign in signs:  # noqa: SIM110 - a loop takes half the time of any()
        if sign in raw:
            return True
    return False


def parse_chunks(chunks: Iterable[bytes]) -> list[LoadFacts]:
    """The loads that a log tells of, in its order."""
    reader = LogReader()
    for chunk in chunks:
        reader.feed(chunk)
    return reader.finish()


def parse_log(data: bytes | str) -> list[LoadFacts]:
    """The loads that a whole log tells of, in its order."""
    return parse_chunks([data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data])
