"""Any bytes are a log: no exception, no dependence on how they arrive, no line that costs more than its length."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.logs import parse_chunks, parse_log
from harness.logs.text import MAX_LINE
from harness.units import MIB

#: Pieces of llama.cpp's and Ollama's lines (figures of our own), to be glued in any order and broken anywhere.
PIECES = (
    b"load_tensors:        CUDA0 model buffer size =  1024.25 MiB\n",
    b"load_tensors: offloaded 27/27 layers to GPU\r\n",
    b"llama_context: constructing llama_context\n",
    b"llama_kv_cache_unified: creating     SWA KV cache, size = 1024 cells\n",
    b"llama_kv_cache:      CUDA0 KV buffer size =   256.50 MiB\n",
    b"llama_kv_cache: size =  256.50 MiB (  4096 cells,  26 layers,  1/1 seqs), K (f16):  128.25 MiB, V (f16):  128.25 MiB\n",
    b"sched_reserve:      CUDA0 compute buffer size =   300.00 MiB\n",
    b'time=2026-01-01T00:00:00Z level=INFO msg="starting runner" cmd="ollama runner --model /models/a.gguf --port 1"\n',
    b'level=INFO msg="kv cache" device=CUDA0 size="1.5 GiB"\n',
    b"main: server is listening on http://127.0.0.1:1\n",
    b"- CUDA0 (a GPU): 12 layers ( 3 overflowing), 1 MiB used\n",
    b"|   - CUDA0 (a GPU) | 24576 = 1000 + ( 900 = 600 + 200 + 100) + 5 |\n",
    b"\x1b[31m", b"\r", b"\n", b"....", b'{"log":"', b"\xff\xfe", b"\x00", b"msg=", b"MiB",
)  # fmt: skip
logs = st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=40)), max_size=30).map(b"".join)


@settings(max_examples=300, deadline=None)
@given(logs)
def test_any_bytes_are_read_without_an_exception(data: bytes) -> None:
    for load in parse_log(data):
        assert load.to_json()["engine"] in ("ollama", "llama-server", "vllm")
        for device in load.devices.values():
            assert device.weights_bytes is None or device.weights_bytes >= 0


@settings(max_examples=200, deadline=None)
@given(logs, st.lists(st.integers(min_value=0, max_value=2000), max_size=12))
def test_how_a_log_is_cut_into_chunks_does_not_matter(data: bytes, cuts: list[int]) -> None:
    at = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    chunks = [data[begin:end] for begin, end in pairwise(at)]
    assert parse_chunks(chunks) == parse_log(data)


@pytest.mark.parametrize("length", [MAX_LINE - 1, MAX_LINE, MAX_LINE + 1, 3 * MAX_LINE])
def test_a_line_longer_than_any_is_cut_alike_however_it_arrives(length: int) -> None:
    data = b"x" * length + PIECES[0] + PIECES[0]
    whole = parse_log(data)
    for size in (1000, MAX_LINE, MAX_LINE + 1):
        assert parse_chunks(data[i : i + size] for i in range(0, len(data), size)) == whole
    assert whole[0].devices["CUDA0"].weights_bytes == 1024 * MIB + MIB // 4
