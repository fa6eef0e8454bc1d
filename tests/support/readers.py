"""How the programs that read exports read them, as far as a test needs it: their grammars in a few lines."""

from __future__ import annotations

import re

_INI_LINE = re.compile(
    r"[ \t]*(?:\[[ \t]*(?P<section>[^\]\n]+?)[ \t]*\]|(?P<key>[A-Za-z_][A-Za-z0-9_.-]*)[ \t]*=[ \t]*(?P<value>[^;#\n]*?)|)"
    r"[ \t]*(?:[;#].*)?"
)


def presets(text: str) -> dict[str, dict[str, str]]:
    """llama.cpp's presets (``common/preset.cpp``, ``parse_ini_from_file``): a value ends at ``;`` or ``#``."""
    found: dict[str, dict[str, str]] = {"default": {}}
    section = "default"
    for line in re.split(r"\r\n|\n|\r", text):
        match = _INI_LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"no line of a preset: {line!r}")
        if match["section"]:
            section = match["section"]
            found[section] = {}
        elif match["key"]:
            found[section][match["key"]] = match["value"]
    return found


def modelfile(text: str) -> list[tuple[str, str]]:
    """Ollama's Modelfile (``parser/parser.go``, ``ParseFile``): commands, with the name of a parameter in their place."""
    found = []
    rest = text
    while rest := rest.lstrip(" \t\r\n"):
        if rest[0] == "#":
            rest = re.split(r"[\r\n]", rest, maxsplit=1)[1] if re.search(r"[\r\n]", rest) else ""
            continue
        name, _, rest = rest.partition(" ")
        if not re.fullmatch(r"[A-Za-z]+", name):
            raise ValueError(f"no command: {name!r}")
        if name.lower() == "parameter":
            name, _, rest = rest.partition(" ")
        value = ""
        for character in rest:  # up to a newline outside of quotes
            if character in "\r\n" and _closed(value.strip()):
                break
            value += character
        rest = rest[len(value) :]
        found.append((name.lower(), _unquoted("".join(one for one in value if one.isprintable()).strip())))
    return found


def _closed(value: str) -> bool:
    if value.startswith('"""'):
        return len(value) >= 6 and value.endswith('"""')
    return not value.startswith('"') or (len(value) >= 2 and value.endswith('"'))


def _unquoted(value: str) -> str:
    if not _closed(value):
        raise ValueError(f"quotes that do not end: {value!r}")
    return value[3:-3] if value.startswith('"""') else value[1:-1] if value.startswith('"') else value


def unit(text: str) -> dict[str, str]:
    """Variables of a unit file (systemd.syntax(7)): one quoted word a line; escapes and specifiers are undone."""
    found = {}
    for line in text.split("\n"):
        if line.startswith("Environment="):
            match = re.fullmatch(r'"((?:[^"\\]|\\.)*)"', line.removeprefix("Environment="))
            if match is None:
                raise ValueError(f"no word: {line!r}")
            name, _, value = re.sub(r"\\(.)", r"\1", match[1]).partition("=")
            if re.search(r"(?<!%)(?:%%)*%(?!%)", value):
                raise ValueError(f"a specifier: {value!r}")
            found[name] = value.replace("%%", "%")
    return found
