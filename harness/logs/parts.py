"""What a load is made of: models, their contexts, the caches of these, and projectors. Figures of one pass add."""

from __future__ import annotations

from typing import Final

from harness.logs.oldest import Part

#: No load of a real engine has more devices, caches, contexts or models; a hostile log may, and memory stays flat.
MANY: Final = 256
#: The device of ``--split-mode tensor``: its buffers are the largest of the cards, only the sums of caches are whole.
META: Final = "Meta()"
#: The same for the lines of buffers of one load.
MANY_LINES: Final = 100_000


class Cache:
    """One KV cache of a context."""

    def __init__(self, cells: int | None = None, window: bool = False) -> None:
        self.cells, self.window = cells, window
        self.announced = cells is not None
        self.streams = 1
        self.slots: int | None = None
        self.layers: int | None = None
        self.sized = False
        self.types: tuple[str, str] | None = None
        #: Bytes of K and of V, and of both, where its ``size =`` line says them.
        self.halves: tuple[int, int] | None = None
        self.total: int | None = None
        self.devices: dict[str, int] = {}

    @property
    def size(self) -> int:
        """Bytes on all devices."""
        return sum(self.devices.values()) or self.total or 0


class Context:
    """One llama_context of a model: its caches and its compute buffers."""

    def __init__(self, draft: bool = False) -> None:
        self.draft = draft
        self.caches: list[Cache] = []
        self.kv_total: int | None = None
        self.parts: dict[tuple[str, Part], int] = {}

    @property
    def used(self) -> bool:
        """Whether anything was allocated in it."""
        return bool(self.parts or self.caches or self.kv_total is not None)

    @property
    def reserved(self) -> bool:
        """Whether its compute buffers were reserved, which comes last."""
        return any(part == "compute" for _, part in self.parts)


class LoggedModel:
    """One model of a load, as its current pass has it."""

    def __init__(self, draft: bool = False) -> None:
        self.draft = draft
        self.path: str | None = None
        self.clear()

    def clear(self) -> None:
        """Begin a pass: what the one before said does not count."""
        self.weights: dict[str, int] = {}
        self.lora: dict[str, int] = {}
        self.contexts: list[Context] = []
        self.overridden: set[str] = set()
        self.signs: set[str] = set()
        self.slots_made = False
        self.again = False

    @property
    def used(self) -> bool:
        """Whether weights or contexts were seen in this pass."""
        return bool(self.weights or any(context.used for context in self.contexts))

    @property
    def reserved(self) -> bool:
        """Whether compute buffers were reserved: a pass that came so far holds what it will hold."""
        return any(context.reserved for context in self.contexts)

    @property
    def context(self) -> Context:
        """The context whose lines are coming."""
        if not self.contexts:
            self.contexts.append(Context(self.draft))
        return self.contexts[-1]

    def new_context(self, draft: bool) -> None:
        """Lines of another context follow, unless the present one is still empty."""
        if self.slots_made and self.draft:
            # llama-server of 2024 and 2025 makes one context per slot and drops the one that it loaded the draft with.
            self.contexts, self.slots_made = [], False
        if self.contexts and not self.contexts[-1].used:
            self.contexts[-1].draft |= draft
        elif len(self.contexts) < MANY:
            self.contexts.append(Context(draft))


class Projector:
    """One image or audio encoder (``clip_ctx``)."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.weights = 0
        self.compute: dict[str, int] = {}
