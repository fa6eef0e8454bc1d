"""llama.cpp's lines, on their own or between Ollama's, and Ollama's around them: where a load begins and ends.

What the lines of a load say is read in ``buffers`` (llama.cpp), ``oldest`` (llama.cpp of 2023), ``fitting`` (its projection)
and ``ollama_go`` (Ollama's own engine).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from harness.logs import buffers, failures, fitting, markers, oldest, ollama_go
from harness.logs.building import MANY, Building, Model
from harness.logs.slog import pairs
from harness.model.facts import LoadFacts

_OFFLOADED: Final = re.compile(r"offloaded (\d{1,6})/(\d{1,6}) layers to GPU")
_SLOTS: Final = re.compile(r"n_slots\"?\s?[=:]\s?(\d{1,6})")
_SLOT_CELLS: Final = re.compile(r"n_ctx_slot = (\d{1,12}), kv_unified = '(true|false)'")
_LOADING: Final = re.compile(r"loading model '(?P<path>[^']{1,4096})'")
_SPLITS: Final = re.compile(r"graph splits = (\d{1,9})")
_STARTED: Final = re.compile(r"(?:llama-server|llama runner|runner) started in (\d{1,9}(?:\.\d{1,9})?) seconds")
#: ``HTTP server is listening`` is none: it is printed before the model is loaded (tools/server, since 2024-01).
_READY: Final = re.compile(
    r"\bmodel loaded\b|(?<!HTTP )server is listening|llama server listening at|: listening on|llama main loop"
)
_VERSION: Final = re.compile(r"Listening on .{1,100}\(version ([^)\s]{1,40})\)")
_ANNOUNCED: Final = ("using llama-server for model", "loading model via llama-server", "new model will fit")
#: Signs that Ollama wrote this log, in lines that are not slog's.
_OLLAMA: Final = ("ollama[", "ollama  |", "llama.go:", "routes.go:", "ext_server", "/blobs/sha256", "\\blobs\\sha256")


class LlamaReader:
    """Takes cleaned lines; collects loads."""

    def __init__(self) -> None:
        self._done: list[LoadFacts] = []
        self._load: Building | None = None
        self._ollama = False
        self._version: str | None = None
        self._announced: str | None = None

    def finish(self) -> list[LoadFacts]:
        """The loads, in order."""
        self._close(last=True)
        return self._done

    def feed_line(self, line: str) -> None:
        """Look at one line."""
        if "level=" in line and "msg=" in line:
            self._ollama = True
            begin = line.find("time=")
            if begin > 0 and ": " in line[:begin]:
                self._llama(line[:begin])  # text without a newline stood before
                line = line[begin:]
            self._slog(line)
            return
        if not self._ollama and any(sign in line for sign in _OLLAMA):
            self._ollama = True
        self._llama(line)

    # -- loads ------------------------------------------------------------------------------------------------------

    def _open(self) -> Building:
        if self._load is None:
            self._load = Building()
            self._load.model, self._announced = self._announced, None
        return self._load

    def _fresh(self, *, tensors: bool = False) -> Building:
        """The load under way; a load that has ended, well or badly, is closed first.

        ``tensors``: the line speaks of tensors, which a load that was given up before it had any may still print.
        """
        load = self._load
        if load is not None:
            late = tensors and load.started and load.given_up
            if load.complete or (load.failure is not None and not load.retrying and not late):
                self._close()
        return self._open()

    def _close(self, *, last: bool = False) -> None:
        load, self._load = self._load, None
        if load is None or not (load.progress or (load.started and last)):
            return
        main = load.models[0]
        if main.weights and not any(main.weights.values()):
            load.restart(main)  # only a fit probe was logged: nothing was allocated
        load.version = self._version
        if self._ollama:
            load.engine = "ollama"
            go = not load.own and (load.go_engine or (bool(load.go) and not load.llama_engine))
            load.dialect = "ollama-go" if go else "ollama-llama.cpp"
        facts = load.facts()
        if facts.devices or facts.failed or facts.fit is not None or facts.complete or load.started:
            self._done.append(facts)

    def _begin(self, line: str) -> bool:
        """A start marker of Ollama: a runner or server for a model."""
        command = markers.command(line)
        model = markers.model_of(command)
        if command and model is None:
            return True  # a discovery runner loads nothing
        self._close()
        load = self._open()
        load.started = True
        load.model = model or load.model
        load.asked = markers.arguments(command)
        load.go_engine = "--ollama-engine" in command
        load.llama_engine = bool(command) and not load.go_engine
        return True

    # -- Ollama's own lines -----------------------------------------------------------------------------------------

    def _slog(self, line: str) -> None:
        if any(start in line for start in markers.STARTS) and "error starting" not in line:
            self._begin(line)
        elif ollama_go.is_figure(line):
            if self._load is not None and self._load.complete and ollama_go.opens_load(line):
                self._close()
            ollama_go.read(self._open(), line)
        elif any(sign in line for sign in _ANNOUNCED):
            self._announce(line)
        elif "Loading Dynamic llm server" in line:
            self._library(line)
        elif "retrying" in line and self._load is not None and not self._load.complete:
            self._load.retrying = True
        elif not self._said(line):
            self._failure(line)

    def _announce(self, line: str) -> None:
        """The model is named before its engine starts, or (``loading model via``) right after."""
        model = pairs(line).get("model")
        if self._load is not None and self._load.started and not self._load.complete:
            self._load.model = self._load.model or model
        elif self._load is None or self._load.complete or self._load.failure is not None:
            self._announced = model
        else:
            self._load.model = self._load.model or model

    def _said(self, line: str) -> bool:
        """Whether a line says that something is ready, or what runs."""
        if "istening on" in line and (version := _VERSION.search(line)):
            self._version = version[1]
            return True
        load = self._load
        if "started in" in line and (started := _STARTED.search(line)):
            if load is not None:
                load.complete, load.seconds = True, float(started[1])
            return True
        if ("oaded" in line or "isten" in line or "main loop" in line) and _READY.search(line):
            if load is not None and (load.progress or load.started):
                load.complete = True
            return True
        return False

    def _failure(self, line: str) -> None:
        load = self._load
        if load is None or load.complete or load.failure is not None:
            if load is not None and "retrying without" in line:
                load.failure = None
            return
        load.failure = failures.cause(line)
        if load.failure is not None:
            load.given_up = not (load.own or load.current.signs)

    # -- llama.cpp's lines ------------------------------------------------------------------------------------------

    def _llama(self, line: str) -> None:
        if "buffer size" in line:
            for match in buffers.BUFFER.finditer(line):
                if "load_tensors" in match["where"] or match["what"] == "model ":
                    self._weights(match)
                else:
                    buffers.buffer(self._open(), match)
        elif fitting.is_fit(line):
            fitting.read(self._open(), line)
        elif "MiB" in line or " MB" in line:
            if not buffers.sizes(self._open(), line):
                self._failure(line)
        elif "offload" in line and (offloaded := _OFFLOADED.search(line)):
            self._layers(int(offloaded[1]), int(offloaded[2]))
        elif "= " not in line or not buffers.setting(self._open(), line):
            self._words(line)

    def _weights(self, match: re.Match[str]) -> None:
        load = self._fresh(tensors=True)
        load.seen = True
        model = load.current
        if model.again or any(context.used for context in model.contexts):
            load.restart(model)  # a new pass: what came before was a fit probe or a try that failed
        # A model in several files has several lines for one device.
        buffers.add(model.weights, buffers.device_name(match["device"]), buffers.mib(match["size"]))

    def _layers(self, offloaded: int, total: int) -> None:
        load = self._fresh(tensors=True)
        self._pass(load, "layers")
        if not load.current.draft:
            load.offloaded = (offloaded, total)

    def _pass(self, load: Building, sign: str) -> None:
        """A line that stands once in a pass: seen again, or behind contexts, it begins a new one."""
        model = load.current
        if model.again or sign in model.signs or any(context.used for context in model.contexts):
            load.restart(model)
        model.signs.add(sign)

    def _words(self, line: str) -> None:
        for sign, take in _WORDS:
            if sign in line and take(self, line):
                return
        if not self._said(line):
            self._failure(line)

    def _library(self, _line: str) -> bool:
        """Ollama 0.1.18 - 0.1.31 loads in a library of the server itself."""
        self._close()
        self._open().started = True
        return True

    def _creating(self, line: str) -> bool:
        return buffers.creating(self._open(), line)

    def _flash(self, line: str) -> bool:
        buffers.flash(self._open(), line)
        return True

    def _context(self, line: str) -> bool:
        model = self._open().current
        model.new_context(model.draft)
        return True

    def _draft_context(self, line: str) -> bool:
        if "creating" in line:
            self._open().current.new_context(draft=True)
        return "creating" in line

    def _draft_model(self, line: str) -> bool:
        models = self._open().models
        if len(models) < MANY:
            models.append(Model(draft=True))
        return True

    def _tokens(self, line: str) -> bool:
        """A model that was read for its tokens only."""
        if self._load is not None and not self._load.started and not self._load.own:
            self._load = None
        return True

    def _encoder(self, line: str) -> bool:
        return buffers.clip(self._open(), line)

    def _splits(self, line: str) -> bool:
        if self._load is not None and "compute_meta" not in line and (splits := _SPLITS.search(line)):
            self._load.graph_splits = int(splits[1])
        return True

    def _layer(self, line: str) -> bool:
        return buffers.layer(self._open(), line)

    def _slots(self, line: str) -> bool:
        if (slots := _SLOTS.search(line)) is None:
            return False
        load = self._open()
        load.slots, load.current.slots_made = int(slots[1]), True
        if each := _SLOT_CELLS.search(line):
            load.slot_cells = int(each[1]) * (1 if each[2] == "true" else load.slots)
        return True

    def _oldest(self, line: str) -> bool:
        load = self._open()
        load.oldest_device = oldest.read(load.oldest, line) or load.oldest_device
        return True

    def _meta(self, line: str) -> bool:
        path, version, _ = line.partition(" tensors from ")[2].rpartition(" (version GGUF")
        if not version:
            return False
        load = self._fresh(tensors=True)
        main = load.models[0]
        if load.current.draft and load.current.used and path == main.path:
            load.restart(main)
        elif not load.current.draft and main.used and main.path not in (None, path):
            self._close()  # the one before was cut off
            load = self._open()
        # The file is read again: for another pass, whose tensors follow, or for its tokens only.
        load.current.path, load.current.again = path, load.current.used
        return True

    def _loading(self, line: str) -> bool:
        """llama-server begins: in a load that a marker of Ollama opened, or in one of its own."""
        if "loading model tensors" in line:
            self._pass(self._fresh(tensors=True), "tensors")
            return True
        found = _LOADING.search(line)
        if found is None and "main: loading model" not in line:
            return False
        load = self._fresh()
        if load.seen or (found and not self._ollama and load.started and load.model not in (None, found["path"])):
            self._close()
            load = self._open()
        load.started = True
        load.model = load.model or (found["path"] if found else None)
        return True


#: Words of llama.cpp, and who takes a line with them; the first that takes it has it.
_WORDS: Final[tuple[tuple[str, Callable[[LlamaReader, str], bool]], ...]] = (
    ("KV cache, size", LlamaReader._creating),
    ("Flash Attention", LlamaReader._flash),
    ("constructing llama_context", LlamaReader._context),
    ("draft context", LlamaReader._draft_context),
    ("loading draft model", LlamaReader._draft_model),
    ("loaded meta data", LlamaReader._meta),
    ("loading model", LlamaReader._loading),
    ("vocab only", LlamaReader._tokens),
    ("CLIP using", LlamaReader._encoder),
    ("graph splits = ", LlamaReader._splits),
    (": dev = ", LlamaReader._layer),
    ("n_slots", LlamaReader._slots),
    ("starting llama runner", LlamaReader._begin),
    ("Initializing internal llama server", LlamaReader._library),
    ("cache to GPU", LlamaReader._oldest),
    (" for GPU accel", LlamaReader._oldest),
)
