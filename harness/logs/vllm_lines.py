"""Lines of vLLM that hold a figure, release by release; see :mod:`harness.logs.vllm` for where they come from."""

from __future__ import annotations

import re
from typing import Final

from harness.logs.numbers import COUNT, SIZE

_N: Final = SIZE
_COUNT: Final = COUNT

WEIGHTS: Final = re.compile(rf"(?:Loading model weights|Model loading) took (?:in total )?{_N} Gi?B")
AVAILABLE: Final = re.compile(
    rf"Available KV cache memory: {_N} GiB|reserved for KV Cache is {_N}GiB|kv_cache_size={_N}GiB"
    rf"|reserved {_N} ?GiB memory for KV Cache as specified|(?:Auto|Explicitly) set \({_N}/{_N}\) GiB for KV cache"
    rf"|total_hbm_avail_gb={_N}GiB"
)
IN_USE: Final = re.compile(rf"Current kv cache memory in use is (?:(\d{{1,18}}) bytes|{_N} GiB)")
TOKENS: Final = re.compile(rf"KV cache size: {_COUNT} tokens")
BLOCKS: Final = re.compile(
    r"(?<!\w)(?P<device>[A-Za-z]\w{1,19}) blocks: (?P<blocks>\d{1,12})|num_gpu_blocks is: (?P<exact>\d{1,12})"
)
CONCURRENCY: Final = re.compile(rf"Maximum concurrency for {_COUNT} tokens per request: ~?{_N}x")
GRAPHS: Final = re.compile(rf"Graph capturing finished in {_N} secs?, took {_N} GiB")
ESTIMATE: Final = re.compile(rf"Estimated CUDA graph memory: {_N} GiB")
POOL: Final = re.compile(rf"CUDA graph pool memory: {_N} GiB \(actual\)(?:, {_N} GiB \(estimated\))?")
SHARES: Final = re.compile(rf"current --gpu-memory-utilization={_N} is equivalent to --gpu-memory-utilization={_N} ")
SUMMARY: Final = re.compile(
    rf"Free memory on device(?: \S{{1,40}})? \({_N}/{_N} GiB\) on startup\. "
    rf"Desired \w+ memory utilization is \({_N}, {_N} GiB\)"
)
PARTS: Final = re.compile(
    rf"Actual usage is {_N} GiB for (?P<what>weight|consumed memory)[^,]{{0,40}}, {_N} GiB for peak activation"
    rf"(?:, {_N} GiB for non-torch memory)?,? and {_N} GiB for (?:CUDA|NPU|XPU|\w{{1,10}})? ?[Gg]raph"
)
V0: Final = re.compile(
    rf"model weights take {_N}GiB; non_torch_memory takes {_N}GiB; PyTorch activation peak memory takes {_N}GiB"
)
V0_TOTAL: Final = re.compile(rf"total_gpu_memory \({_N}GiB\) x gpu_memory_utilization \({_N}\) = {_N}GiB")
V06: Final = re.compile(
    rf"total_gpu_memory={_N}GiB.{{0,100}}peak_torch_memory={_N}GiB.{{0,200}}non_torch_memory={_N}GiB.{{0,100}}gpu_memory_utilization={_N}"
)
CPU_USE: Final = re.compile(rf"with {_N} GiB requested memory for the worker\. {_N} GiB memory was consumed by non-kv")
ENGINE: Final = re.compile(r"LLM engine \(v(?P<version>[^)\s]{1,60})\)")
API: Final = re.compile(r"API server version (?P<version>\S{1,60})|█ +version (?P<banner>\d\S{0,60})")
BANNER_MODEL: Final = re.compile(r"█ +model +(?P<model>\S.{0,299}?)\s*$")
LOADING: Final = re.compile(r"Starting to load model (?P<model>\S.{0,299}?)\.\.\.")
MAX_LEN: Final = re.compile(r"Using max model len (\d{1,12})|Auto-fit max_model_len: .{0,80}? to (\d{1,12}) to fit")
BATCHED: Final = re.compile(r"max_num_batched_tokens=(\d{1,9})")
RESOLVED: Final = re.compile(r"kv_cache_dtype=torch\.(\w{1,40})")
BLOCK_SIZE: Final = re.compile(r"Setting attention block size to (\d{1,9}) tokens")
#: key=value of the engine's configuration, 'key': value of "non-default args", key=value of a Namespace.
SETTING: Final = re.compile(
    r"(?<![\w.])'?(?P<key>model|model_tag|dtype|quantization|kv_cache_dtype|enforce_eager|tensor_parallel_size"
    r"|pipeline_parallel_size|data_parallel_size|max_seq_len|max_model_len|max_num_batched_tokens|max_num_seqs|block_size"
    r"|kv_cache_memory_bytes"
    r"|gpu_memory_utilization)'?(?:=|: )(?P<value>'[^']{0,300}'|\"[^\"]{0,300}\"|[^,\s)}]{1,100})"
)
