"""The messages of llama.cpp and Ollama that are looked at. Builds are llama.cpp's (b1234), releases Ollama's (0.1.2)."""

from __future__ import annotations

from typing import Final

from harness.logs import failures
from harness.logs.llama import LlamaReader
from harness.logs.table import Row, ignored

_CPP, _SERVER, _OLLAMA_GO = "llama.cpp ", "llama.cpp tools/server/", "ollama "

#: Every kind of message that is looked at. A sign holds no quote and no digit, so that no wrapping hides it.
TABLE: Final = (
    # what was allocated
    Row("layers to GPU", LlamaReader.layers, _CPP + "src/llama-model.cpp, since b600; ollama ml/backend/ggml, 0.9.6 to 0.24"),
    Row("buffer size", LlamaReader.buffers, _CPP + "src/llama-{model,kv-cache,context}.cpp, tools/mtmd, since b1800"),
    Row(" cells,", LlamaReader.sizes, _CPP + "src/llama-kv-cache.cpp, since b5900"),
    Row("KV self size", LlamaReader.sizes, _CPP + "src/llama.cpp, b1800 to b5900"),
    Row("model size:", LlamaReader.sizes, _CPP + "tools/mtmd/clip.cpp, since b2000"),
    Row("compute allocated memory", LlamaReader.sizes, _CPP + "examples/llava/clip.cpp, b1800 to b4900"),
    Row("KV cache, size", LlamaReader.creating, _CPP + "src/llama-kv-cache-iswa.cpp, since b5500"),
    Row("CLIP using", LlamaReader.encoder, _CPP + "tools/mtmd/clip.cpp, since b1800"),
    Row("VRAM", LlamaReader.oldest, _CPP + "llama.cpp, b600 to b1800"),
    Row("mem required", LlamaReader.oldest, _CPP + "llama.cpp, b100 to b1700"),
    Row("system memory used", LlamaReader.oldest, _CPP + "llama.cpp, b1700 to b1800"),
    Row("kv self size", LlamaReader.oldest, _CPP + "llama.cpp, b100 to b1700"),
    Row("buffer total", LlamaReader.oldest, _CPP + "llama.cpp, b1200 to b1800"),
    Row("metal_add_buffer", LlamaReader.oldest, _CPP + "ggml-metal.m, b600 to b1800"),
    Row("GPU acceleration", LlamaReader.oldest, _CPP + "llama.cpp, b600 to b1800"),
    Row("cache to GPU", LlamaReader.oldest, _CPP + "llama.cpp, b600 to b1500"),
    Row("model weights", LlamaReader.go, _OLLAMA_GO + "ml/device.go, 0.6.0 to 0.24"),
    Row("kv cache", LlamaReader.go, _OLLAMA_GO + "ml/device.go, 0.11.5 to 0.24"),
    Row("compute graph", LlamaReader.go, _OLLAMA_GO + "ml/device.go, 0.6.0 to 0.24"),
    Row("does not support caching", LlamaReader.go, _OLLAMA_GO + "runner/ollamarunner, 0.11.5 to 0.24: embeddings"),
    Row("msg=memory", LlamaReader.go, _OLLAMA_GO + "ml/backend/ggml, 0.7.1 to 0.24, at DEBUG"),
    # how
    Row("Operation:", LlamaReader.go, _OLLAMA_GO + "runner/ollamarunner, 0.11.5 to 0.24"),
    Row("n_ctx ", LlamaReader.setting, _CPP + "src/llama-context.cpp, since b100"),
    Row("n_ctx=", LlamaReader.setting, _CPP + "src/llama-context.cpp, retyped"),
    Row("n_seq_max", LlamaReader.setting, _CPP + "src/llama-context.cpp, since b4800"),
    Row("n_ubatch", LlamaReader.setting, _CPP + "src/llama-context.cpp, since b2500"),
    Row("flash_attn", LlamaReader.setting, _CPP + "src/llama-context.cpp, since b2700"),
    Row("n_ctx_train", LlamaReader.setting, _CPP + "src/llama-model.cpp, since b1000"),
    Row("kv_size", LlamaReader.setting, _CPP + "src/llama-kv-cache.cpp, b4500 to b5600"),
    Row("type_k", LlamaReader.setting, _CPP + "src/llama-kv-cache.cpp, b4500 to b5600"),
    Row("Flash Attention", LlamaReader.flash, _CPP + "src/llama-context.cpp, since b6300"),
    Row("overridden to", LlamaReader.overridden, _CPP + "src/llama-model-loader.cpp, since b5300"),
    Row("overriden to", LlamaReader.overridden, _CPP + "src/llama-model.cpp, b5000 to b5300; ik_llama.cpp"),
    Row("splits = ", LlamaReader.splits, _CPP + "src/llama-context.cpp, since b2000; one line with the nodes since b11400"),
    Row("sched copies", LlamaReader.copies, _CPP + "src/llama-context.cpp, since b10400"),
    Row("pipeline parallelism", LlamaReader.copies, _CPP + "src/llama-context.cpp, since b2400"),
    Row(": dev = ", LlamaReader.layer, _CPP + "src/llama-kv-cache.cpp, since b5700, at -lv 5"),
    Row("n_slots", LlamaReader.slots, _SERVER + "server-context.cpp, since b1800"),
    Row("RPC", LlamaReader.remote, _CPP + "common/common.cpp (device_info), src/llama.cpp (using device), since b6900"),
    # where a load begins and ends
    Row("starting llama-server", LlamaReader.begin, _OLLAMA_GO + "llm/llama_server.go, since 0.30"),
    Row("starting runner", LlamaReader.begin, _OLLAMA_GO + "llm/server.go, 0.11.5 to 0.24"),
    Row("starting llama server", LlamaReader.begin, _OLLAMA_GO + "llm/server.go, 0.1.32 to 0.11.4"),
    Row("starting llama runner", LlamaReader.begin, _OLLAMA_GO + "llm/llama.go, 0.1.0 to 0.1.17"),
    Row("Loading Dynamic llm server", LlamaReader.library, _OLLAMA_GO + "llm/dyn_ext_server.go, 0.1.21 to 0.1.31"),
    Row("Initializing internal llama server", LlamaReader.library, _OLLAMA_GO + "llm/ext_server_common.go, 0.1.18 to 0.1.20"),
    Row("starting go runner", LlamaReader.go, _OLLAMA_GO + "runner/llamarunner, 0.4.0 to 0.24"),
    Row("starting ollama engine", LlamaReader.go, _OLLAMA_GO + "runner/ollamarunner, 0.5.12 to 0.24"),
    Row("using llama-server for model", LlamaReader.announce, _OLLAMA_GO + "server/sched.go, since 0.30"),
    Row("loading model via llama-server", LlamaReader.announce, _OLLAMA_GO + "llm/llama_server.go, since 0.30"),
    Row("new model will fit", LlamaReader.announce, _OLLAMA_GO + "server/sched.go, 0.1.33 to 0.12.10"),
    Row("loaded meta data", LlamaReader.meta, _CPP + "src/llama-model-loader.cpp, since b1000"),
    Row("loading model", LlamaReader.loading, _SERVER + "server-context.cpp, since b2000; src/llama-model.cpp (tensors)"),
    Row("constructing llama_context", LlamaReader.context, _CPP + "src/llama-context.cpp, since b4800"),
    Row("draft context", LlamaReader.draft_context, _CPP + "common/speculative.cpp, since b9800"),
    Row("loading draft model", LlamaReader.draft_model, _SERVER + "server-context.cpp; common/speculative.cpp, since b4300"),
    Row("vocab only", LlamaReader.tokens, _CPP + "src/llama-model.cpp, since b1000"),
    Row("started in", LlamaReader.started, _OLLAMA_GO + "llm/server.go, llm/llama_server.go, since 0.1.0"),
    Row("model loaded", LlamaReader.ready, _SERVER + "server.cpp, since b2000; from another function since b11300"),
    Row("Load Text Model OK", LlamaReader.ready, "koboldcpp koboldcpp.py, since 1.0"),
    Row("listening", LlamaReader.listens, _SERVER + "server.cpp, since b1200; ollama server/routes.go"),
    Row("Listening", LlamaReader.listens, _OLLAMA_GO + "server/routes.go, since 0.1.0"),
    Row("eval time", LlamaReader.ready, _CPP + "src/llama-context.cpp; tools/server: timings, since b100"),
    Row("main loop", LlamaReader.ready, _OLLAMA_GO + "llm/dyn_ext_server.go, 0.1.18 to 0.1.31"),
    Row("retrying", LlamaReader.retry, _OLLAMA_GO + "llm/llama_server.go, since 0.30"),
    # the engine's projection
    Row("fit_memory_breakdown", LlamaReader.fit_record, _CPP + "common/fit.cpp with --log-jsonl, since b11400"),
    Row("breakdown", LlamaReader.fit, _CPP + "src/llama-context.cpp, common/fit.cpp, since b6700"),
    Row(" + ", LlamaReader.fit, _CPP + "the rows of that table, quoted alone"),
    Row("params_fit", LlamaReader.fit, _CPP + "common/fit.cpp (llama_params_fit_impl until b8600), since b7400"),
    Row("fit_params", LlamaReader.fit, _CPP + "common/fit.cpp, since b8600"),
    Row("projected to use", LlamaReader.fit, _CPP + "common/fit.cpp, since b7400"),
    Row("MiB used", LlamaReader.fit, _CPP + "common/fit.cpp, since b7400"),
    Row("no changes needed", LlamaReader.fit, _CPP + "common/fit.cpp, since b7400"),
    Row("trying to fit", LlamaReader.fit, _CPP + "common/fit.cpp, since b7400"),
    Row("estimated", LlamaReader.estimated, _SERVER + "server-context.cpp ([mtmd], [spec]), since b8600"),
    # why it failed
    *(Row(sign, LlamaReader.failure, "failures.py", role="failure") for sign in failures.SIGNS),
    # what speaks of memory and of no load: devices, files, requests, Ollama's estimates before 0.12.11
    *(
        Row(sign, ignored, "of no load", role="noise")
        for sign in (
            *("MiB free", "Total VRAM", "VRAM available", "VRAM usage", "vram-based", "vram mode", "inference compute"),
            *("gpu memory", "system memory", "host memory", "total memory", "memory.available", "memory.required"),
            *("runner.vram", "compute capability"),
            *("checkpoint", "checkpoints", "cache state", "prompt cache", "total state size", "cache size limit"),
            *("context compression", "prompt save"),
            *("file size", "ctx size", "metadata size", "piece cache", "print_meta", "input buffer", "backend buffer"),
            *("max_size", "MaxWorkingSetSize", "reallocating", "pinned memory", "cuda memory data"),
            *("mmapped", "mlock", "working set", "failed to measure", "downloading", "pulling", "disk space", "swap"),
        )
    ),
)  # fmt: skip
