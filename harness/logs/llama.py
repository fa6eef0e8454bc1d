"""Steps 3 and 4 for llama.cpp and Ollama: which messages hold a fact, and where a load begins and ends.

``llama_table`` says by which words a message is known, and which program printed it when. What the messages of a load say is
read in ``buffers`` (llama.cpp), ``oldest`` (llama.cpp of 2023), ``fitting`` (its projection) and ``ollama_go`` (Ollama's
own engine). Builds are llama.cpp's numbers (b1234), releases Ollama's (0.1.2).
"""

# ruff: noqa: D102 - each method takes the messages of its rows in llama_table, which say what they are
from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from harness.logs import buffers, failures, fitting, markers, oldest, ollama_go
from harness.logs.building import Building
from harness.logs.numbers import count, mib
from harness.logs.parts import MANY, MANY_LINES, LoggedModel
from harness.logs.slog import pairs
from harness.logs.unwrap import Message
from harness.model.facts import LoadFacts

_OFFLOADED: Final = re.compile(r"offloaded (\d{1,6})/(\d{1,6}) layers to GPU")
_SLOTS: Final = re.compile(r"n_slots\"?\s?[=:]\s?(\d{1,6})(?!\d)")
_SLOT_CELLS: Final = re.compile(r"n_ctx_slot = (\d{1,12}), kv_unified = '(true|false)'")
_SLOT: Final = re.compile(r"new slot,? n_ctx(?:_slot)? = (\d{1,12})(?!\d)")
_LOADING: Final = re.compile(r"loading model '(?P<path>[^']{1,4096})'")
_SPLITS: Final = re.compile(r"(?:graph splits = |graph: .{0,60}\bsplits = )(\d{1,9})(?!\d)")
_STARTED: Final = re.compile(r"(?:llama-server|llama runner|runner) started in (\d{1,9}(?:\.\d{1,9})?) seconds")
#: ``HTTP server is listening`` is none: it is printed before the model is loaded (tools/server, since 2024-01).
_READY: Final = re.compile(
    r"\bmodel loaded\b|Model OK: True|(?<!HTTP )server is listening|llama server listening at|: listening on|llama main loop"
)
_VERSION: Final = re.compile(r"Listening on .{1,100}\(version ([^)\s]{1,40})\)")
_REMOTE: Final = re.compile(r"\b(RPC\d{1,4})\s{0,16}(?::\s|\()(\S{1,200}:\d{1,5})[ )]")
#: Signs that Ollama wrote this log, in lines that are not slog's.
_OLLAMA: Final = re.compile(r"llama\.go:|routes\.go:|ext_server|[/\\]blobs[/\\]sha256")


class LlamaReader:
    """Takes messages; collects loads. ``numbers`` counts the loads of the whole log."""

    def __init__(self, numbers: Iterator[int]) -> None:
        self._numbers = numbers
        self._done: list[tuple[int, LoadFacts]] = []
        self._load: Building | None = None
        self.ollama = False
        self._version: str | None = None
        self._announced: str | None = None
        self._addresses: dict[str, str] = {}

    def finish(self) -> list[tuple[int, LoadFacts]]:
        """The loads with their numbers."""
        self._close(last=True)
        return self._done

    def note(self, message: Message) -> None:
        """Who wrote a message."""
        if not self.ollama and (
            message.program or "sha256" in message.text or ".go:" in message.text or "ext_s" in message.text
        ):
            self.ollama = "ollama" in message.program or _OLLAMA.search(message.text) is not None

    # -- loads ------------------------------------------------------------------------------------------------------

    def _open(self) -> Building:
        if self._load is None:
            self._load = Building(next(self._numbers), self._addresses)
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
        if self.ollama:
            load.engine = "ollama"
            go = not load.own and (load.go_engine or (bool(load.go) and not load.llama_engine))
            load.dialect = "ollama-go" if go else "ollama-llama.cpp"
        facts = load.facts()
        if facts.devices or facts.failed or facts.fit is not None or facts.complete or load.started:
            self._done.append((load.number, facts))

    def _another(self) -> Building:
        self._close()
        return self._open()

    # -- Ollama's own lines -----------------------------------------------------------------------------------------

    def begin(self, message: Message) -> bool:
        """A start marker of Ollama: a runner or server for a model."""
        if "error starting" in message.text:
            return False
        self.ollama = True
        command = markers.command(message.text)
        model = markers.model_of(command)
        if command and model is None:
            return True  # a discovery runner loads nothing
        load = self._another()
        load.started = True
        load.model = model or load.model
        load.asked = markers.arguments(command)
        load.go_engine = "--ollama-engine" in command
        load.llama_engine = bool(command) and not load.go_engine
        return True

    def go(self, message: Message) -> bool:
        text = message.text
        if "msg=" not in text:
            return False
        self.ollama = True
        if self._load is not None and self._load.complete and ollama_go.opens_load(text):
            self._close()
        ollama_go.read(self._open(), text)
        return True

    def announce(self, message: Message) -> bool:
        """The model is named before its engine starts, or (``loading model via``) right after."""
        self.ollama = True
        model = pairs(message.text).get("model")
        load = self._load
        if load is None or ((load.complete or load.failure is not None) and not (load.started and not load.complete)):
            self._announced = model
        else:
            load.model = load.model or model
        return True

    def library(self, _: Message) -> bool:
        """Ollama 0.1.18 - 0.1.31 loads in a library of the server itself."""
        self.ollama = True
        self._another().started = True
        return True

    def retry(self, message: Message) -> bool:
        if "level=" not in message.text or self._load is None or self._load.complete:
            return False
        self._load.retrying = True
        return True

    def listens(self, message: Message) -> bool:
        if version := _VERSION.search(message.text):
            self._version, self.ollama = version[1], True
            return True
        return self.ready(message)

    def started(self, message: Message) -> bool:
        started = _STARTED.search(message.text)
        self.ollama = self.ollama or started is not None
        if started and self._load is not None:
            self._load.complete, self._load.seconds = True, float(started[1])
        return started is not None

    def ready(self, message: Message) -> bool:
        timed = "eval time" in message.text  # llama-cli says nothing else; of Ollama it may be another runner's
        if not timed and _READY.search(message.text) is None:
            return False
        load = self._load
        if load is not None and ((load.whole and not self.ollama) if timed else (load.progress or load.started)):
            load.complete = True
            if message.fields and isinstance(slots := message.fields.get("n_slots"), int):
                load.slots = load.slots or slots
        return True

    def failure(self, message: Message) -> bool:
        load = self._load
        if load is None or load.complete or load.failure is not None:
            if load is not None and "retrying without" in message.text:
                load.failure = None
            return False
        load.failure = failures.cause(message.text)
        if load.failure is not None:
            load.given_up = not (load.own or load.current.signs)
        return load.failure is not None

    # -- llama.cpp's lines ------------------------------------------------------------------------------------------

    def buffers(self, message: Message) -> bool:
        found = False
        for match in buffers.named(message.text):
            found = True
            if "load_tensors" in match["where"] or match["what"] == "model ":
                self._weights(match)
            else:
                self._buffer(match)
        return found

    def _buffer(self, match: re.Match[str]) -> None:
        if match["what"] == "KV " and not match["where"].startswith("~"):
            self._begins_again()
        buffers.buffer(self._open(), match)

    def _begins_again(self) -> None:
        """A context after everything was reserved, and no draft that it could belong to: another run follows in one paste."""
        load = self._open()
        if load.whole and not load.drafts and not load.retrying:
            self._another()

    def _weights(self, match: re.Match[str]) -> None:
        if not self._fresh(tensors=True).current.again:
            self._begins_again()
        load = self._open()
        load.seen = True
        model = load.current
        if model.again or any(context.used for context in model.contexts):
            load.restart(model)  # a new pass: what came before was a fit probe or a try that failed
        if load.lines < MANY_LINES:
            load.lines += 1
            # A model in several files has several lines for one device.
            buffers.add(model.weights, load.device(match["device"]), mib(match[4]))

    def layers(self, message: Message) -> bool:
        found = _OFFLOADED.search(message.text)
        if found is None:
            return False
        if "msg=" in message.text:
            return self.go(message)
        load = self._pass(self._fresh(tensors=True), "layers")
        if not load.current.draft:
            load.offloaded = (int(found[1]), int(found[2]))
        return True

    def _pass(self, load: Building, sign: str) -> Building:
        """A line that stands once in a pass: seen again, or behind contexts, it begins a new one."""
        if not load.current.again:
            self._begins_again()
            load = self._open()
        model = load.current
        if model.again or sign in model.signs or any(context.used for context in model.contexts):
            load.restart(model)
        model.signs.add(sign)
        return load

    def sizes(self, message: Message) -> bool:
        load = self._open()
        caches = load.current.context.caches
        if (found := buffers.TOTAL.search(message.text)) and caches and not load.drafts:
            last = caches[-1]
            twin = (count(found[2]), count(found[3]))
            if not last.announced and any(
                one.sized and one.layers == twin[1] and (one.cells or 0) <= twin[0] for one in caches
            ):
                load.current.context.caches = [one for one in caches if one.sized]
                load = self._another()  # two runs in one paste: one context has no two caches alike
                if not last.sized:
                    load.current.context.caches.append(last)
        return buffers.sizes(load, message.text)

    def creating(self, message: Message) -> bool:
        return buffers.creating(self._open(), message.text)

    def setting(self, message: Message) -> bool:
        if "slot" in message.text:
            if (one := _SLOT.search(message.text)) and self._load is not None and self._load.slots == 1:
                self._load.slot_cells = self._load.slot_cells or int(one[1])
            return True
        model = self._open().current
        if ("n_ctx " in message.text or "n_seq_max" in message.text) and model.contexts and model.contexts[-1].used:
            self._begins_again()
            self.context(message)
        return buffers.setting(self._open(), message.text, cut=message.cut)

    def flash(self, message: Message) -> bool:
        buffers.flash(self._open(), message.text)
        return True

    def context(self, message: Message) -> bool:
        model = self._open().current
        model.new_context(model.draft)
        return True

    def draft_context(self, message: Message) -> bool:
        if "creating" in message.text:
            self._open().current.new_context(draft=True)
        return "creating" in message.text

    def draft_model(self, message: Message) -> bool:
        models = self._open().models
        if len(models) < MANY:
            models.append(LoggedModel(draft=True))
        return True

    def tokens(self, message: Message) -> bool:
        """A model that was read for its tokens only."""
        if self._load is not None and not self._load.started and not self._load.own:
            self._load = None
        return True

    def encoder(self, message: Message) -> bool:
        return buffers.clip(self._open(), message.text)

    def estimated(self, message: Message) -> bool:
        if "[mtmd]" in message.text and self._load is not None:
            self._load.projectors.clear()  # it was measured without being loaded
        return True

    def splits(self, message: Message) -> bool:
        splits = _SPLITS.search(message.text)
        if splits and self._load is not None and "compute_meta" not in message.text:
            self._load.graph_splits = int(splits[1])
        return splits is not None

    def copies(self, message: Message) -> bool:
        return buffers.copies(self._open(), message.text) if self._load is not None else True

    def layer(self, message: Message) -> bool:
        return buffers.layer(self._open(), message.text)

    def overridden(self, message: Message) -> bool:
        return buffers.overridden(self._fresh(tensors=True), message.text)

    def slots(self, message: Message) -> bool:
        fields = message.fields or {}
        slots = fields.get("n_slots")
        if found := _SLOTS.search(message.text):
            slots = int(found[1])
        if not isinstance(slots, int) or slots > 10**6:
            return False
        load = self._open()
        load.slots, load.current.slots_made = slots, True
        if each := _SLOT_CELLS.search(message.text):
            load.slot_cells = int(each[1]) * (1 if each[2] == "true" else load.slots)
        return True

    def oldest(self, message: Message) -> bool:
        load = self._open()
        before = len(load.oldest)
        load.oldest_device = oldest.read(load.oldest, message.text) or load.oldest_device
        load.seen = load.seen or bool(load.oldest)
        return len(load.oldest) > before or bool(load.oldest)

    def remote(self, message: Message) -> bool:
        remotes = {address: name for name, address in _REMOTE.findall(message.text)}
        if len(self._addresses) < MANY:
            self._addresses.update(remotes)
            if self._load is not None:
                self._load.addresses.update(remotes)
        return bool(remotes)

    def fit(self, message: Message) -> bool:
        text = message.text
        if "initial parameters:" in text and self._load is not None and self._load.fit_done and not self._load.own:
            self._close()  # another projection
        if "error while trying to fit" in text and self._load is not None:
            self._load.failure = None  # the projection failed; the load itself is tried all the same
            return True
        if self._load is not None and self._load.failure is not None and "initial parameters:" in text:
            self._fresh()
        load = self._open()
        load.fits = load.fits or "_fit_" in text or "fit_params" in text
        return fitting.read(load, text) or "params_fit" in text

    def fit_record(self, message: Message) -> bool:
        data = (message.fields or {}).get("data")
        return isinstance(data, dict) and fitting.record(self._open(), data)

    def meta(self, message: Message) -> bool:
        path, version, _ = message.text.partition(" tensors from ")[2].partition(" (version GGUF")
        if not version or "clip" in message.text.partition("loaded meta")[0][-40:]:
            return bool(path)
        load = self._fresh(tensors=True)
        main = load.models[0]
        if load.current.draft and load.current.used and path == main.path:
            load.restart(main)
        elif not load.current.draft and main.used and main.path not in (None, path):
            load = self._another()  # the one before was cut off
        # The file is read again: for another pass, whose tensors follow, or for its tokens only.
        load.current.path, load.current.again = path, load.current.used
        return True

    def loading(self, message: Message) -> bool:
        """llama-server begins: in a load that a marker of Ollama opened, or in one of its own."""
        if "loading model tensors" in message.text:
            self._pass(self._fresh(tensors=True), "tensors")
            return True
        found = _LOADING.search(message.text)
        if found is None and "main: loading model" not in message.text:
            return False
        load = self._fresh()
        if load.seen or (found and not self.ollama and load.started and load.model not in (None, found["path"])):
            load = self._another()
        load.started = True
        load.model = load.model or (found["path"] if found else None)
        return True
