"""Which formats there are, what each is called, and in which styles it is written."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Final

import msgspec

from harness.errors import UsageError

if TYPE_CHECKING:
    from harness.exports.entry import Entry


class Format(msgspec.Struct, frozen=True, kw_only=True):
    """A format: its module, what it is, its styles (the first is the default), and whether it is one engine's alone."""

    module: str
    text: str
    styles: tuple[str, ...] = ()
    own: bool = False
    several: bool = True


FORMATS: Final[dict[str, Format]] = {
    "modelfile": Format(module="modelfile", text="Ollama's Modelfile of one model", own=True, several=False),
    "ollama-env": Format(module="environment", text="variables of Ollama's server", styles=("systemd", "compose"), own=True),
    "compose": Format(module="compose", text="services for Docker Compose"),
    "llama-swap": Format(module="llama_swap", text="llama-swap's configuration", styles=("matrix", "groups")),
    "llama-server": Format(
        module="llama_server", text="a command line, or presets of its router", styles=("command", "preset"), own=True
    ),
    "vllm": Format(module="command_line", text="a command line, as harness allocate prints it", own=True),
    "k8s": Format(module="kubernetes", text="a Deployment", styles=("whole", "mig", "shared", "hami")),
    "gpustack": Format(module="gpustack", text="a model's claim of memory in GPUStack"),
    "prometheus": Format(module="prometheus", text="predicted memory for node_exporter's textfile collector"),
}


def write(name: str, style: str | None, entries: Sequence[Entry], together: Sequence[Sequence[int]] = ()) -> str:
    """Models in a format.

    Args:
        name: of the format.
        style: of the format; ``None`` for its first.
        entries: the models.
        together: positions of models that fit beside each other, the largest such sets.

    Raises:
        UsageError: the format has no such style, is of another engine, or cannot hold a name.
    """
    if name not in FORMATS:
        raise UsageError(f"{name!r} is not a format; there are: {', '.join(FORMATS)}", code="no-format")
    kind = FORMATS[name]
    if style is not None and style not in kind.styles:
        known = f"there are: {', '.join(kind.styles)}" if kind.styles else "it has one form"
        raise UsageError(f"{name} has no style {style!r}; {known}", code="no-format")
    for entry in entries:
        if kind.own and name not in entry.start.formats:
            other = ", ".join((*entry.start.formats, *(one for one, each in FORMATS.items() if not each.own)))
            raise UsageError(f"{name} is not a format for {entry.key}; formats for it: {other}", code="no-format")
    if not kind.several and len(entries) > 1:
        raise UsageError(f"{name} holds one model; name one", code="no-format")
    chosen = style or (kind.styles[0] if kind.styles else "")
    text: str = import_module(f"harness.exports.{kind.module}").write(entries, chosen, together)
    return text
