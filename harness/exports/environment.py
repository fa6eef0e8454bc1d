"""Variables of a server: a drop-in for systemd (systemd.exec(5), *Environment=*), or of a service of Docker Compose."""

from __future__ import annotations

from collections.abc import Sequence

from harness.exports.compose import escaped
from harness.exports.entry import Entry, comments, document, merged


def write(entries: Sequence[Entry], style: str, _together: Sequence[Sequence[int]]) -> str:
    """One server for all the models."""
    variables = merged(entries)
    engine = entries[0].calibration.engine
    if style == "compose":
        return comments(entries) + document({"services": {engine: {"environment": escaped(variables)}}})
    lines = ["[Service]", *(f"Environment={quoted(f'{name}={value}')}" for name, value in variables.items())]
    where = f"/etc/systemd/system/{engine}.service.d/harness.conf, then: systemctl daemon-reload && systemctl restart {engine}"
    return comments(entries, where) + "\n".join(lines) + "\n"


def quoted(text: str) -> str:
    """A word of a unit file: in quotes, specifiers (``%``) and escapes doubled."""
    inside = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{inside}"'
