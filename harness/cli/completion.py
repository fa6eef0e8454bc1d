"""``harness completion``, and what can stand in an argument."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
from click.shell_completion import CompletionItem, get_completion_class

from harness.cli.context import store_at
from harness.cli.output import CommandResult
from harness.render.tables import Verbatim

SHELLS: Final = ("bash", "zsh", "fish")
#: Arguments that are a model or a calibration, and those that are a file or folder.
MODELS: Final = frozenset({"model", "names", "name", "old", "new", "calibrations"})
FILES: Final = frozenset({"log", "plan", "sources", "run"})


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def cli(context: click.Context, shell: str) -> CommandResult:
    """The script that completes verbs, options, models and GPUs; load it where your shell starts.

    bash: eval "$(harness completion bash)"; zsh: the same with zsh; fish: harness completion fish | source.
    """
    kind = get_completion_class(shell)
    assert kind is not None  # noqa: S101 - click knows all three
    if shell == "bash":  # its own source() starts bash to ask for the version
        script = kind.source_template % kind(context.find_root().command, {}, "harness", "_HARNESS_COMPLETE").source_vars()
    else:
        script = kind(context.find_root().command, {}, "harness", "_HARNESS_COMPLETE").source()
    return CommandResult(command="completion", text=lambda: [Verbatim(script)])


class CompletedArgument(click.ParamType[str]):
    """An argument that is a model or a file, taken as it is."""

    def __init__(self, name: str) -> None:
        self.name = name

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text itself."""
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Models of the store and the catalog, and files."""
        if self.name == "file" or incomplete.startswith((".", "/", "~")):
            return [CompletionItem(incomplete, type="file")]
        found = [CompletionItem(name) for name in dict.fromkeys(_models(ctx)) if name.startswith(incomplete)]
        return found or [CompletionItem(incomplete, type="file")]


def _models(ctx: click.Context) -> Iterator[str]:
    from harness.store.catalog import find_catalog, read_catalog
    from harness.text import written

    given = ctx.params.get("store") or ctx.find_root().params.get("store")
    for path in store_at(given).paths():
        yield written(f"{path.parent.name}/{path.stem}")
    yield from read_catalog(find_catalog(Path.cwd())).models


def gpus(incomplete: str) -> list[CompletionItem]:
    """All, none, and this machine's NVIDIA GPUs by number."""
    from harness.errors import HarnessError
    from harness.inventory.machine import LocalMachine

    found = LocalMachine().nvidia
    here = () if isinstance(found, HarnessError) else [CompletionItem(one.key, help=one.name) for one in found]
    return [one for one in (CompletionItem("all"), CompletionItem("none"), *here) if one.value.startswith(incomplete)]


def complete(command: click.Command) -> None:
    """Let the arguments of a verb, and the GPUs among its options, be completed."""
    for param in command.params:
        if isinstance(param, click.Argument) and param.name in MODELS | FILES and param.type is click.STRING:
            param.type = CompletedArgument("model" if param.name in MODELS else "file")
