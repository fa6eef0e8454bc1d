"""What records hold: the messages of JSON by the names of their fields, the cells of tables."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from typing import Any, Final

#: Names under which collectors keep a message, the surest first: docker, journald, Loki, Google Cloud, Splunk, Kibana,
#: OpenTelemetry, Azure, Datadog.
KEYS: Final = (
    *(
        "log",
        "MESSAGE",
        "message",
        "@message",
        "Message",
        "msg",
        "line",
        "Line",
        "textPayload",
        "_raw",
        "LogMessage",
        "logMessage",
    ),
    *("stringValue", "body", "text", "content", "event"),
)
DEEPEST: Final = 5


def texts(record: Any, depth: int) -> Iterator[tuple[str, dict[str, Any] | None, bool]]:
    """The messages in a record, the innermost record around each, and whether its name says that it is one."""
    if depth > DEEPEST:
        return
    if isinstance(record, dict):
        for key in KEYS:
            value = record.get(key)
            if isinstance(value, str):
                yield value, record, True
                return
            if key == "MESSAGE" and isinstance(value, list) and all(isinstance(one, int) and 0 <= one < 256 for one in value):
                yield bytes(value).decode("utf-8", "replace"), record, True  # journald's form of what is no text
                return
        for value in record.values():
            if isinstance(value, dict | list):
                yield from texts(value, depth + 1)
        if long := [value for value in record.values() if isinstance(value, str) and value.count(" ") > 1]:
            yield max(long, key=len), record, False
    elif isinstance(record, list):
        if len(record) == 2 and all(isinstance(one, str) for one in record):  # Loki's pairs of a time and a line
            yield record[1], None, True
            return
        for one in record:
            if isinstance(one, str) and " " in one:
                yield one, None, True
            else:
                yield from texts(one, depth + 1)


def cells_of(text: str, delimiter: str) -> list[str]:
    """The cells of a row; none if it is no row."""
    if delimiter not in text:
        return []
    try:
        return next(csv.reader([text], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []


def unescape(text: str) -> str:
    """What stands between the quotes of a string."""
    try:
        return str(json.loads(f'"{text}"', strict=False))
    except ValueError:
        return text.replace('\\"', '"').replace("\\n", "\n").replace("\\t", "\t").replace("\\\\", "\\")


def column(header: str) -> tuple[int, str, int] | None:
    """Where the message stands in a table whose first line names its columns: its place, the delimiter, how many there are."""
    for delimiter in ",;\t|":
        names = [name.strip(' "').lower() for name in header.split(delimiter)]
        if len(names) > 1 and all(re.fullmatch(r"[@\w. -]{1,40}", name) for name in names):
            place = next((at for key in KEYS for at, name in enumerate(names) if name == key.lower()), None)
            return None if place is None else (place, delimiter, len(names))
    return None
