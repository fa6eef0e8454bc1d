"""Write the reference pages that follow from the code: docs/reference/{cli,artifact,errors,harness-toml}.md.

    python scripts/reference.py [--check]

With ``--check`` nothing is written; the status is 1 where a page is not what the code says.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
import types
import typing
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from harness import errors
from harness.cli.main import COMMANDS
from harness.model.calibration import Calibration
from harness.options import settings

ROOT: Final = Path(__file__).resolve().parents[1]
PAGES: Final = ROOT / "docs" / "reference"
NOTE: Final = "<!-- Written by scripts/reference.py from the code: do not edit. -->\n\n"


def cli_page() -> str:
    """Every verb with its arguments and options."""
    parts = ["# Command line\n\n", NOTE, _CLI_INTRODUCTION]
    parts += [f"| [`{verb}`](#harness-{verb}) | {text} |\n" for verb, (_, text) in COMMANDS.items()]
    for verb, (module, _) in COMMANDS.items():
        command: click.Command = import_module(f"harness.cli.{module}").cli
        parts.append(_verb(verb, command))
    return "".join(parts)


_CLI_INTRODUCTION: Final = """\
Every verb takes `--json`: one document on standard output, also on failure, with the keys `version`, `command`, `status`,
`exit_code`, `data` and `errors`. Progress goes to standard error. What each status means: [exit codes](exit-codes.md).

Options are read from flags, then `HARNESS_…` variables, then `harness.toml`, then the defaults; `harness doctor` shows each
value and where it came from. Sizes: `24GiB`, `24Gi` and `24g` are binary, `24GB` is decimal, a bare number is MiB.

| verb | what it does |
| --- | --- |
"""


def toml_page() -> str:
    """Every setting of harness.toml and the environment."""
    parts = ["# harness.toml and variables\n\n", NOTE, _TOML_INTRODUCTION]
    for name, one in sorted(settings().items()):
        values = " / ".join(f"`{choice}`" for choice in one.option.choices) or _cell(one.option.metavar or "text")
        written = " or ".join(dict.fromkeys(_WRITTEN[kind] for kind in one.written))
        meaning = _cell(one.option.help or ("Where models are put together." if name == "cache" else ""))
        parts.append(f"| `{name}` | `{one.variable}` | {values} | {written} | {meaning} |\n")
    return "".join(parts)


_WRITTEN: Final = {int: "number", float: "number", str: "text", list: "list"}
_TOML_INTRODUCTION: Final = """\
A `harness.toml` in a folder holds for that folder and all below it; the nearest one counts, and where it stands
`models/calibrations` beside it is the store. A flag beats a variable, a variable the file, the file the default. A key that is
not in this table is an error (78), a variable `HARNESS_…` that is not is a warning. An empty one is an error (2) for every
verb that would go by it. `tune --slots`, `export --slots` and `allocate --concurrency` go by `num_parallel`.
`harness doctor` and `-v` show each value and where it came from.

```toml
# harness.toml
engine = "ollama"
ctx = ["8k", "32k"]       # contexts of calibrate; also "8k,32k", or numbers
kv_cache_type = "q8_0"
num_parallel = 2
available = "24GiB"       # the card that check and plan are about
store = "calibrations"
```

| key | variable | values | type | meaning |
| --- | --- | --- | --- | --- |
"""


def _verb(verb: str, command: click.Command) -> str:
    context = click.Context(command, info_name=f"harness {verb}")
    usage = " ".join(command.get_usage(context).removeprefix("Usage:").split())
    lines = [f"\n## harness {verb}\n\n", f"```text\n{usage}\n```\n\n", f"{inspect.cleandoc(command.help or '')}\n\n"]
    lines += ["| option | meaning | default | variable |\n", "| --- | --- | --- | --- |\n"]
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            lines.append(_option(parameter, context))
    return "".join(lines)


def _option(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    metavar = option.make_metavar(context).strip("[]").replace("|", " / ")
    value = "" if option.is_flag else f" `{metavar}`"
    shown = option.default
    default = (
        "" if option.is_flag or shown is None or callable(shown) or "Sentinel" in repr(shown) or shown == () else f"`{shown}`"
    )
    variable = f"`{option.envvar}`" if isinstance(option.envvar, str) else ""
    return f"| {names}{value} | {_cell(option.help or '')} | {default} | {variable} |\n"


#: Left out of the artifacts of other engines (model/calibration.py, ``to_document``).
_VLLM_ALONE: Final = {"kv_blocks", "vllm", "total_cuda_gb"}


def artifact_page() -> str:
    """Every field of a calibration."""
    parts = ["# The artifact\n\n", NOTE, _ARTIFACT_INTRODUCTION]
    seen: dict[type[msgspec.Struct], str] = {}
    _collect(Calibration, "the file", seen)
    for kind, where in seen.items():
        parts.append(f"\n## {where}\n\n{_prose(kind)}\n\n| field | type | |\n| --- | --- | --- |\n")
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in msgspec.structs.fields(kind):
            absent = "may be absent" if _may_be_absent(kind, field) else ""
            parts.append(f"| `{field.name}` | {_cell(_type_name(hints[field.name]))} | {absent} |\n")
    return "".join(parts)


_ARTIFACT_INTRODUCTION: Final = """\
One YAML file a calibration: `models/calibrations/<engine>/<name>.yaml`, `<name>@<variant>.yaml` for a variant. In the name `:`
is written `-`, `/` is `--`, and any other character outside `[A-Za-z0-9._-]` is `%XX`. Fields ending in `_gb` are GiB (2^30
bytes) with six decimals; `null` is unknown, never 0. The JSON schema is `models/calibration.schema.json`. A file with a newer
`schema_version` is refused (78).
"""


def _collect(kind: Any, where: str, seen: dict[type[msgspec.Struct], str]) -> None:
    if kind in seen:
        return
    seen[kind] = where
    for field, hint in typing.get_type_hints(kind).items():
        for inner in _structs(hint):
            _collect(inner, f"`{field}`" if where == "the file" else f"{where[:-1]}.{field}`", seen)


def _may_be_absent(kind: type[msgspec.Struct], field: msgspec.structs.FieldInfo) -> bool:
    defaulted = field.default is not msgspec.NODEFAULT or field.default_factory is not msgspec.NODEFAULT
    return field.name in _VLLM_ALONE or (defaulted and kind.__struct_config__.omit_defaults)


def _structs(hint: Any) -> list[type[msgspec.Struct]]:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return [hint]
    return [inner for argument in typing.get_args(hint) for inner in _structs(argument)]


_PLAIN: Final = {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is typing.Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if one is type(None) else _type_name(one) for one in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return f"{hint.__name__}"
    return _PLAIN.get(getattr(hint, "__name__", ""), str(hint))


def errors_page() -> str:
    """Every error by its code, with the messages and hints that stand in the code."""
    found: dict[tuple[int, str], dict[str, str]] = {}
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "harness").rglob("*.py"))]
    shared = {name: text for tree in trees for name, text in _texts(tree).items() if not name.startswith("_")}
    for tree in trees:
        texts = shared | _texts(tree)
        for call in ast.walk(tree):
            if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
                continue
            kind = getattr(errors, call.func.id, None)
            if not isinstance(kind, type) or not issubclass(kind, errors.HarnessError):
                continue
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            message = _said(call.args[0]) if call.args else None
            for code in _codes(given.get("code"), kind.default_code):
                messages = found.setdefault((kind.exit_code, code), {})
                if message is not None:
                    hint = given.get("hint")
                    said = texts.get(hint.id) if isinstance(hint, ast.Name) else hint and _said(hint)
                    messages[message] = said or messages.get(message, "")
    parts = ["# Errors\n\n", NOTE, _ERRORS_INTRODUCTION]
    status = None
    for (exit_code, code), messages in sorted(found.items()):
        if exit_code != status:
            status = exit_code
            parts.append(f"\n## Status {status}\n\n| code | message | what to do |\n| --- | --- | --- |\n")
        for index, (message, hint) in enumerate(sorted(messages.items()) or [("in the words of whoever refused", "")]):
            parts.append(f"| {f'`{code}`' if not index else ''} | {_cell(message)} | {_cell(hint)} |\n")
    return "".join(parts)


_ERRORS_INTRODUCTION: Final = """\
Every failure has a status for scripts ([exit codes](exit-codes.md)), a code that is finer and as stable (`errors[].code` with
`--json`), a message, and often a hint. Here they are as they stand in the code; `…` is what a message fills in.
"""


def _texts(tree: ast.Module) -> dict[str, str]:
    """The texts that a module names: its constants."""
    return {
        node.target.id: said
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value and (said := _said(node.value))
    }


def _codes(node: ast.expr | None, default: str) -> list[str]:
    if isinstance(node, ast.IfExp):
        return [*_codes(node.body, default), *_codes(node.orelse, default)]
    return [(_said(node) if node is not None else None) or default]


def _said(node: ast.expr) -> str | None:
    """A literal text, with an ellipsis for what is filled in; ``None`` where it comes from elsewhere."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return re.sub(
            "(…)+", "…", "".join((_said(part) or "…") if isinstance(part, ast.Constant) else "…" for part in node.values)
        )
    if isinstance(node, ast.BinOp):
        return f"{_said(node.left) or '…'}{_said(node.right) or '…'}"
    return None


def _prose(kind: type) -> str:
    """A docstring as Markdown: its literals are code."""
    return re.sub(r"``([^`]+)``", r"`\1`", inspect.cleandoc(kind.__doc__ or ""))


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def main() -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name, make in (
        ("cli.md", cli_page),
        ("artifact.md", artifact_page),
        ("errors.md", errors_page),
        ("harness-toml.md", toml_page),
    ):
        path, text = PAGES / name, make()
        if check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            stale.append(name)
        elif not check:
            path.write_text(text, encoding="utf-8")
    if stale:
        print(f"not what the code says: {', '.join(stale)} (run python scripts/reference.py)", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
