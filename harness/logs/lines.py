"""Which lines of a log may hold a fact, found without looking at each; and what a line says without its wrapping.

A log that is served for days is requests, slots and timings; only the heads of such lines are looked at, by one search over
a whole block of bytes. What is skipped here holds no fact in any version: heads of llama.cpp's tools/server (slot, srv, que),
of gin's access log, of Ollama's slog at INFO and DEBUG, of vLLM's access log, and of tables that a load prints.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from typing import Final

#: Longest line that is looked at, bytes: no fact stands further right.
MAX_LINE: Final = 65536

#: Words with which an interesting message of slog begins.
_MESSAGES: Final = (
    rb"load |load$|memory |model|kv |compute|offload|start|Start|llama|Llama|runner|using |loading model|Listening|Load |error|"
    rb"fail|Fail|unable|new model|Loading Dynamic|client|timed|context|GPU|gpu|aborting load|requires"
)
#: Heads of lines without a fact.
_BORING: Final = (
    rb"\[GIN|"
    rb"slot |que  |res  |"
    rb"srv {1,16}(?:update|get_availabl|log_server_r|cancel_tasks|params_from_|prompt_|send|remove|next_|stop|terminate|"
    rb"process_|handle|operator|on_|clean|init: (?!init)|load: {1,4}- )|"
    rb" {0,8}(?:prompt eval|eval|total|sampling|load) time =|"
    rb" {0,8}graphs reused|draft acceptance|statistics|"
    rb"llama_model_loader: -|print_info: (?!n_ctx_train)|llm_load_print_meta: (?!n_ctx_train)|llm_load_vocab: |"
    rb"load: |create_tensor: |load_tensors: layer|system_info: |"
    rb"\{\"function\":\"(?!main|load|init)|(?:INFO|DEBUG|VERB) \[(?!main|load|init)\w{1,60}\] |"
    rb"time=\S{10,40} level=(?:INFO|DEBUG|TRACE|-8) (?:source=\S{1,80} )?msg=(?!\"?(?:" + _MESSAGES + rb"))|"
    rb"INFO: {1,8}[\d.:]{7,40} - \"|(?:\([^)\n]{1,60}\) )?INFO [\d-]{5} [\d:]{8} \[?(?:loggers|metrics)\.py:\d+\]"
)
#: What may stand before a head: docker's json-file, journald, containerd, compose, timestamps, levels, colours.
_WRAPPING: Final = (
    rb"(?:\{\"log\":\")?(?:[^\n|\]]{0,90}(?:\[\d{1,9}\]: |std(?:err|out) [FP] |:\d\d[.,\d]{0,12}Z | {1,9}\| ))?"
    rb"(?:\x1b\[[\d;]{0,12}m)?(?:[\d.]{8,20} )?(?:[IWED] )?"
)
#: The start of each line that is none of these; the newline before it is part of the match.
CANDIDATE: Final = re.compile(rb"\n(?!\n|\Z|" + _BORING + rb")")
#: The same for a log whose lines are wrapped.
CANDIDATE_WRAPPED: Final = re.compile(rb"\n(?!\n|\Z|" + _BORING + rb"|" + _WRAPPING + rb"(?:" + _BORING + rb"))")
_FIRST: Final = frozenset({b"{", b"\x1b", b"I", b"W", b"D", b"E", *(b"%d" % digit for digit in range(10))})
_ANSI: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def is_wrapped(raw: bytes) -> bool:
    """Whether a line seems to have something before its head."""
    return raw[:1] in _FIRST or b"]: " in raw[:100] or b"  | " in raw[:40]


def clean_lines(raw: bytes) -> list[str]:
    """The text lines in one raw line: without docker's json-file around it, and without colours."""
    text = raw.decode("utf-8", "replace")
    if text.startswith(('{"log":', '{"__', '{"MESSAGE":')):
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            fields = json.loads(text)
            text = str(fields["log"] if "log" in fields else fields["MESSAGE"])
    if "\x1b" in text:
        text = _ANSI.sub("", text)
    if "\n" in text or "\r" in text:
        return [line for line in text.replace("\r", "\n").split("\n") if line]
    return [text] if text else []
