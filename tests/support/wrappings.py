"""What logs come wrapped in: collectors, terminals, exports, pages. Each takes the lines of a log, and gives a file's bytes."""
# ruff: noqa: ARG005 - each form is given the line and its number

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable
from typing import Any, Final

Wrap = Callable[[list[str]], bytes]


def _each(form: Callable[[str, int], str]) -> Wrap:
    return lambda lines: "".join(f"{form(line, number)}\n" for number, line in enumerate(lines)).encode()


def _clock(number: int) -> str:
    return f"{10 + number // 3600 % 12:02d}:{number // 60 % 60:02d}:{number % 60:02d}"


def _compact(record: object) -> str:
    return json.dumps(record, separators=(",", ":"), ensure_ascii=False)


def _document(record: Callable[[str, int], object], around: Callable[[list[object]], object] = lambda records: records) -> Wrap:
    """One pretty-printed document."""
    return lambda lines: json.dumps(around([record(line, number) for number, line in enumerate(lines)]), indent=2).encode()


def _table(
    delimiter: str, header: tuple[str, ...], row: Callable[[str, int], tuple[str, ...]], quoting: Any = csv.QUOTE_MINIMAL
) -> Wrap:
    def wrap(lines: list[str]) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, delimiter=delimiter, quoting=quoting)
        writer.writerow(header)
        writer.writerows(row(line, number) for number, line in enumerate(lines))
        return text.getvalue().encode()

    return wrap


def _folded(width: int, before: Callable[[int], str] = lambda number: "", again: bool = False) -> Wrap:
    """As a terminal of ``width`` columns shows it; ``again``: the prefix stands before every row, not before every line."""

    def wrap(lines: list[str]) -> bytes:
        rows = []
        for number, line in enumerate(lines):
            prefix = before(number)
            whole = line if again else prefix + line
            pieces = [whole[at : at + width] for at in range(0, len(whole), width)] or [""]
            rows += [prefix + piece if again else piece for piece in pieces]
        return "".join(f"{row}\n" for row in rows).encode()

    return wrap


def _verbose(line: str, number: int) -> str:
    """``journalctl -o verbose``."""
    head = f"Fri 2026-11-27 {_clock(number)}.123456 UTC [s=0b1;i={number:x};b=5c;m=9d;t=62;x=7f]"
    return f"{head}\n    PRIORITY=6\n    _COMM=serve\n    MESSAGE={line}\n    _PID=811"


_POD: Final = {"namespace": "ai", "pod": "llm-7d9f8b6c5-x2x4q", "container": "main"}

WRAPPINGS: Final[dict[str, Wrap]] = {
    # bytes
    "utf-8 with a byte order mark": lambda lines: b"\xef\xbb\xbf" + "".join(f"{line}\n" for line in lines).encode(),
    "utf-16 of powershell": lambda lines: b"\xff\xfe" + "".join(f"{line}\r\n" for line in lines).encode("utf-16-le"),
    "utf-16 big endian": lambda lines: b"\xfe\xff" + "".join(f"{line}\n" for line in lines).encode("utf-16-be"),
    "utf-16 without a mark": lambda lines: "".join(f"{line}\r\n" for line in lines).encode("utf-16-le"),
    "line ends of windows": lambda lines: "".join(f"{line}\r\n" for line in lines).encode(),
    "line ends of a terminal": lambda lines: "".join(f"{line}\r\r\n" for line in lines).encode(),
    # collectors that write records
    "docker json-file": _each(
        lambda line, n: _compact({"log": line + "\n", "stream": "stderr", "time": f"2026-11-27T{_clock(n)}.5Z"})
    ),
    "docker json-file, escaped as the daemon does": _each(
        lambda line, n: (
            _compact({"log": line + "\r\n", "stream": "stdout"})
            .replace("<", "\\u003c")
            .replace(">", "\\u003e")
            .replace("&", "\\u0026")
        )
    ),
    "journald json": _each(
        lambda line, n: json.dumps({"__CURSOR": f"s=1;i={n:x}", "_PID": "811", "MESSAGE": line, "PRIORITY": "6"})
    ),
    "journald json, bytes": _each(lambda line, n: json.dumps({"_PID": "811", "MESSAGE": list(line.encode())})),
    "journald verbose": _each(_verbose),
    "fluent-bit": _each(
        lambda line, n: json.dumps({"date": 1764240000.5 + n, "log": line, "kubernetes": {"pod_name": "llm 0"}})
    ),
    "vector": _each(
        lambda line, n: _compact({"file": "/var/log/a b c.log", "host": "box", "message": line, "source_type": "file"})
    ),
    "loki, logcli": _each(
        lambda line, n: json.dumps({"labels": {"app": "a b c"}, "line": line, "timestamp": f"2026-11-27T{_clock(n)}Z"})
    ),
    "loki, one answer": lambda lines: json.dumps(
        {
            "status": "success",
            "data": {
                "result": [{"stream": _POD, "values": [[str(1764240000000000000 + n), line]]} for n, line in enumerate(lines)]
            },
        },
        indent=1,
    ).encode(),
    "cloudwatch, get-log-events": _document(
        lambda line, n: {"timestamp": 1764240000000 + n, "message": line, "ingestionTime": 1764240000001 + n},
        lambda all_: {"events": all_},
    ),
    "google cloud": _document(
        lambda line, n: {"insertId": f"a{n}", "textPayload": line, "resource": {"type": "k8s_container"}}
    ),
    "splunk": _each(
        lambda line, n: json.dumps({"preview": False, "offset": n, "result": {"_raw": line, "sourcetype": "a b c"}})
    ),
    "elastic": _each(
        lambda line, n: json.dumps(
            {"_index": "logs", "_source": {"@timestamp": "2026-11-27", "message": line, "host": {"name": "a b"}}}
        )
    ),
    "opentelemetry": _each(
        lambda line, n: json.dumps({"timeUnixNano": "1764240000", "severityText": "Info", "body": {"stringValue": line}})
    ),
    "datadog": _each(lambda line, n: json.dumps({"id": f"A{n}", "content": {"service": "llm", "message": line}})),
    "a record in a record": _each(
        lambda line, n: _compact(
            {"log": _compact({"level": "info", "msg": line, "ts": 1764240000.1}) + "\n", "stream": "stderr"}
        )
    ),
    "logfmt around it": _each(lambda line, n: f"ts=2026-11-27T{_clock(n)}Z level=info component=llm msg={json.dumps(line)}"),
    # exports of tables
    "csv": _table(",", ("timestamp", "message", "stream"), lambda line, n: (f"2026-11-27T{_clock(n)}Z", line, "stderr")),
    "csv, all quoted": _table(
        ",", ("Date", "Host", "Message"), lambda line, n: (f"2026-11-27 {_clock(n)}", "box", line), csv.QUOTE_ALL
    ),
    "tab-separated": _each(lambda line, n: f"2026-11-27T{_clock(n)}Z\tbox\tstderr\t{line}"),
    # collectors that write text
    "journald": _each(lambda line, n: f"Nov 27 {_clock(n)} box serve[811]: {line}"),
    "journald, french": _each(lambda line, n: f"nov. 27 {_clock(n)} box serve[811]: {line}"),
    "journald, chinese": _each(lambda line, n: f"11月 27 {_clock(n)} box serve[811]: {line}"),
    "journald, short-iso-precise": _each(lambda line, n: f"2026-11-27T{_clock(n)}.123456+0100 box serve[811]: {line}"),
    "journald, short-unix": _each(lambda line, n: f"{1764240000 + n}.123456 box serve[811]: {line}"),
    "syslog": _each(lambda line, n: f"<30>1 2026-11-27T{_clock(n)}.123Z box serve 811 - - {line}"),
    "compose": _each(lambda line, n: f"llm-1  | {line}"),
    "compose with times and colours": _each(
        lambda line, n: f"\x1b[36mllm-1  |\x1b[0m 2026-11-27T{_clock(n)}.123456789Z {line}"
    ),
    "swarm": _each(lambda line, n: f"llm.1.x8zq2v6m1k0t@node-1    | {line}"),
    "kubectl, timestamps": _each(lambda line, n: f"2026-11-27T{_clock(n)}.123456789Z {line}"),
    "kubectl, prefix": _each(lambda line, n: f"[pod/llm-7d9f8b6c5-x2x4q/main] {line}"),
    "stern": _each(lambda line, n: f"llm-7d9f8b6c5-x2x4q main {line}"),
    "containerd": _each(lambda line, n: f"2026-11-27T{_clock(n)}.123456789+01:00 stderr F {line}"),
    "a router": _each(lambda line, n: f"[54321] {line}"),
    "heroku": _each(lambda line, n: f"2026-11-27T{_clock(n)}.123456+00:00 app[web.1]: {line}"),
    "go's log package": _each(lambda line, n: f"2026/11/27 {_clock(n)} {line}"),
    "american times": _each(lambda line, n: f"[11/27/2026, {_clock(n)} AM] {line}"),
    "german times": _each(lambda line, n: f"27.11.2026 {_clock(n)} {line}"),
    "ts": _each(lambda line, n: f"Nov 27 {_clock(n)} {line}"),
    "elapsed times": _each(lambda line, n: f"[{n * 0.013:12.6f}] {line}"),
    "uptime and level": _each(lambda line, n: f"{n // 60}.{n % 60:02d}.123.456 I {line}"),
    # terminals
    "colours": _each(lambda line, n: f"\x1b[1;32m{line}\x1b[0m\x1b[K"),
    "colours without escape": _each(lambda line, n: f"[32m{line}[0m"),
    "colours as text": _each(lambda line, n: f"^[[33m{line}^[[0m"),
    "a screen's padding": _each(lambda line, n: line.ljust(200)),
    "grep -n": _each(lambda line, n: f"{n + 1}:{line}"),
    "grep of files": _each(lambda line, n: f"/var/log/llm.log:{line}"),
    "cat -n": _each(lambda line, n: f"{n + 1:6d}\t{line}"),
    "a prompt": _each(lambda line, n: f"PS> {line}"),
    # pages
    "a quote": _each(lambda line, n: f"> {line}"),
    "a quote in a quote": _each(lambda line, n: f"> > {line}"),
    "a bar": _each(lambda line, n: f"▎ {line}"),
    "a list": _each(lambda line, n: f"- {line}"),
    "a code block": lambda lines: (
        "Here is the log:\n\n```text\n" + "".join(f"{line}\n" for line in lines) + "```\n\nThanks!\n"
    ).encode(),
    "an indented code block": _each(lambda line, n: f"        {line}"),
    "details of a page": lambda lines: (
        "<details><summary>log</summary>\n<pre><code>" + html.escape("\n".join(lines)) + "</code></pre></details>\n"
    ).encode(),
    "html": _each(lambda line, n: f'<span class="line">{html.escape(line)}</span><br>'),
    "html, twice": _each(lambda line, n: html.escape(html.escape(line))),
    "hard spaces": _each(lambda line, n: line.replace("  ", " \u00a0")),
    "blank lines between": _each(lambda line, n: f"{line}\n"),
    "a diff": _each(lambda line, n: f"+ {line}"),
}

#: Terminals by their width, and mailers: lines that are broken wherever they are full.
FOLDING: Final[dict[str, tuple[int, Wrap]]] = {
    "a terminal of 80 columns": (80, _folded(80)),
    "a terminal of 120 columns": (120, _folded(120)),
    "journald in a terminal of 100 columns": (100, _folded(100, lambda n: f"Nov 27 {_clock(n)} box serve[811]: ")),
    "a folded log, quoted": (96, _folded(96, lambda n: "> ", again=True)),
}
