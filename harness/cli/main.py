"""``harness``: the entry point. Commands are loaded when they are used."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NoReturn

import click
import msgspec
from click.core import ParameterSource

from harness import __version__
from harness.cli.context import load_settings, wants_json
from harness.cli.output import CommandResult, closed, colour, finish
from harness.cli.signals import Terminated, hear, lose_streams
from harness.errors import CannotWriteError, ConfigError, HarnessError, NotFoundError, NotPermittedError, UsageError
from harness.text import plain_characters

#: Verb -> (module, one line of help). Help is here so that `harness --help` imports nothing.
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "calibrate": ("calibrate", "Measure a model in a clean engine and write its calibration."),
    "check": ("check", "Will it fit now, or be offloaded to the CPU? Ends with 0, 3 or 4."),
    "plan": ("plan", "What fits a card or this machine: contexts, speeds, and which models fit together."),
    "tune": ("tune", "The best settings for a budget, or what would make a model fit."),
    "export": ("export", "Settings that fit, in the formats of Ollama, Compose, llama-swap, Kubernetes and others."),
    "serve": ("serve", "Check a model, start it clean, and run a command in front of it."),
    "estimate": ("estimate", "Memory of models that were not measured, from their headers."),
    "predict": ("predict", "Memory and speed of a calibrated model at a context."),
    "allocate": ("allocate", "The options with which vLLM starts with a context."),
    "show": ("show", "One calibration: constants, parts, quality, speeds."),
    "list": ("listing", "All calibrations of the store."),
    "parse": ("parse", "What an engine's log says about each load."),
    "import": ("import_log", "A calibration from a log and memory that others measured."),
    "fit": ("fit", "Build the artifact again from a run's record."),
    "recalibrate": ("recalibrate", "Measure again what an upgrade made stale."),
    "diff": ("diff", "What moved between two calibrations, stores or revisions, and what that means."),
    "bisect": ("bisect", "Which version of an engine changed a model's memory (binary search)."),
    "report": ("report", "All calibrations as one page for a browser, with charts and a planner."),
    "merge": ("merge", "Merge the stores of several machines, without loss."),
    "share": ("share", "One calibration with its record, anonymised, as a file for a pull request."),
    "sweep": ("sweep", "Calibrate a whole plan: models, engines, settings; here or on a Ray cluster."),
    "exporter": ("exporter", "Metrics of the models that run here, for Prometheus."),
    "mcp": ("mcp", "A server for agents on standard input and output: check, plan, tune, estimate."),
    "doctor": ("doctor", "What works here, what does not, and why."),
    "rm": ("remove", "Remove calibrations from the store; their records stay."),
    "rename": ("rename", "File a calibration under another name or variant."),
    "completion": ("completion", "Completion of verbs, options and models for bash, zsh or fish."),
    "help": ("help", "Help of a verb."),
    "clean": ("clean", "What harness has left on this machine; --yes removes what is orphaned."),
}


_ASCII: Final = "harness_ascii"
#: Other names of verbs.
ALIASES: Final = {"ls": "list"}


class Lazy(click.Group):
    """A group that imports a command's module when it is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Verbs in the order in which one uses them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb."""
        cmd_name = ALIASES.get(cmd_name, cmd_name)
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"harness.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.cli
        if "_HARNESS_COMPLETE" in os.environ:
            from harness.cli.completion import complete

            complete(command)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb and its arguments.

        Raises:
            UsageError: no such verb, with those that are written almost so; or an option of one value that is given twice.
        """
        word = args[0]
        if word not in COMMANDS and word not in ALIASES:
            from difflib import get_close_matches

            near = get_close_matches(word, COMMANDS, n=3)
            meant = f" (did you mean {' or '.join(near)}?)" if near else ""
            raise click.UsageError(f"no such verb: {word}{meant}", ctx)
        name, command, rest = super().resolve_command(ctx, args)
        if command is not None and not ctx.resilient_parsing:
            _refuse_repeated(command, word, ctx, rest)
        return ALIASES.get(word, name), command, rest

    def invoke(self, ctx: click.Context) -> NoReturn:
        """Run one verb, print its result and end."""
        finish(super().invoke(ctx))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "-V", "--version", prog_name="harness")
@click.option("--store", metavar="DIR", help="Folder of calibrations and runs.")
@click.option("-q", "--quiet", is_flag=True, help="Print results only: ids of lists, no progress.")
@click.option("-v", "--verbose", is_flag=True, help="Also print the store and the settings in use.")
@click.pass_context
def cli(context: click.Context, /, **_: Any) -> None:
    """How much memory will this model need, at this context, on this engine, and will it be offloaded to the CPU?"""
    load_settings(context)


def _refuse_repeated(command: click.Command, verb: str, parent: click.Context, args: list[str]) -> None:
    """Refuse an option of one value that stands twice on the command line: which one counts is not for a parser to guess."""
    context = command.context_class(command, info_name=verb, parent=parent, **command.context_settings)
    _, _, order = command.make_parser(context).parse_args(list(args))
    for param in order:
        if isinstance(param, click.Option) and not (param.multiple or param.is_flag or param.count) and order.count(param) > 1:
            raise click.UsageError(f"{param.opts[0]} is given more than once", context)


def main() -> None:
    """Run the command line and end with the contract's exit codes."""
    try:
        _main()
    except SystemExit:
        try:
            sys.stdout.flush()
        except OSError:  # said already; Python, which tries once more at the very end, would make the status 120
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
    except OSError:  # not even the failure can be said
        lose_streams()
        sys.exit(CannotWriteError.exit_code)


def _main() -> None:
    _open_streams()
    verb = next((word for word in sys.argv[1:] if not word.startswith("-")), "harness")
    ended = CommandResult(command=verb, as_json=wants_json())
    hear(ended)
    try:
        cli.main(prog_name="harness", standalone_mode=False, color=colour())
    except HarnessError as error:
        _end(ended, error)
    except click.UsageError as error:
        if isinstance(error, click.BadParameter) and _from_the_file(error):
            _end(ended, ConfigError(f"harness.toml: {error.format_message()}"))
        hint = f"{error.ctx.command_path} --help" if error.ctx else "harness --help"
        _end(ended, UsageError(error.format_message(), hint=hint))
    except click.ClickException as error:
        _end(ended, UsageError(error.format_message()))
    except (KeyboardInterrupt, click.Abort):
        _stopped(ended, 130, "interrupted")
    except Terminated:
        _stopped(ended, 143, "terminated")
    except BrokenPipeError:
        closed()
    except OSError as error:
        known = _refusal(error)
        if known is None:
            _bug(ended)
        try:
            _end(ended, known)
        except OSError:  # standard output itself cannot be written
            _end(msgspec.structs.replace(ended, as_json=False), known)
    except Exception:  # noqa: BLE001 - whatever it is, it ends as the contract says
        _bug(ended)


def _end(ended: CommandResult, error: HarnessError) -> NoReturn:
    finish(msgspec.structs.replace(ended, failure=error))


def _stopped(ended: CommandResult, status: int, code: str) -> NoReturn:
    click.echo(f"{code}; everything was torn down", err=True)
    finish(msgspec.structs.replace(ended, exit_code=status, errors=({"code": code, "message": code, "hint": None},)))


def _open_streams() -> None:
    """Standard output and error that can be written to: closed ones go nowhere, and what an encoding lacks has a stand-in."""
    codecs.register_error("harness", plain_characters)
    codecs.register(_ascii)
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115 - as long as the process
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            plain = codecs.lookup(stream.encoding).name == "ascii"
            stream.reconfigure(encoding=_ASCII if plain else None, errors="harness")


def _ascii(name: str) -> codecs.CodecInfo | None:
    """ASCII under a name of ours: in place of what is called so, click writes UTF-8, whatever the terminal shows."""
    if name != _ASCII:
        return None
    known = codecs.lookup("ascii")
    return codecs.CodecInfo(
        name=_ASCII, encode=known.encode, decode=known.decode, streamreader=known.streamreader,
        streamwriter=known.streamwriter, incrementalencoder=known.incrementalencoder,
        incrementaldecoder=known.incrementaldecoder,
    )  # fmt: skip


def _from_the_file(error: click.BadParameter) -> bool:
    """Whether it is not the command line that is wrong, but a value of harness.toml."""
    if error.ctx is None or error.param is None or error.param.name is None:
        return False
    return error.ctx.get_parameter_source(error.param.name) is ParameterSource.DEFAULT_MAP


def _refusal(error: OSError) -> HarnessError | None:
    """What the operating system refused, where no command said it better; ``None`` where that is no user's doing."""
    text = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error.strerror)
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
        return NotFoundError(text)
    if error.errno in (errno.EACCES, errno.EPERM):
        return NotPermittedError(text)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        return CannotWriteError(text)
    return None


def _bug(ended: CommandResult) -> NoReturn:
    """Show the exception that nothing foresaw, and end with 1."""
    import traceback

    click.echo(traceback.format_exc(), err=True, nl=False)
    _end(ended, HarnessError("this is a bug in harness; the lines above say where"))


if __name__ == "__main__":
    main()
