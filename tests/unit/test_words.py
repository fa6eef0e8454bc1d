"""Code, messages, help and docs use the words of docs/reference/glossary.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Words without a place in a message, and what is said instead.
BANNED = {
    r"strangers?": "other process",
    r"nobody|nobody's": "unknown, unset, none",
    r"somebody|somebody's": "another process, another user",
    r"foretold|foretells?": "predicted",
    r"told": "given, known, distinguished",
    r"wishes|wished": "options",
    r"reckons?|reckoned": "estimates",
    r"aloud": "logged",
    r"lies": "is",
    r"whom": "which models fit together",
    r"manners": "graceful shutdown",
    r"breathe": "tolerate background use",
    r"want of memory": "OOM-killed",
    r"a 10k": "/ 10k tokens",
    r"any more": "no longer",
    r"would spill|spills to|spill to": "offloaded to",
}
#: Old names that stay in stored files and documents, and the page that lists them.
NAMES = ('name="strangers"', "stranger-moved", "`strangers`")
FILES = [
    path
    for folder, kinds in (("harness", ("*.py", "*.js", "*.html")), ("docs", ("*.md",)))
    for kind in kinds
    for path in sorted((ROOT / folder).rglob(kind))
    if path.name != "glossary.md"
]


@pytest.mark.parametrize("banned", BANNED)
def test_the_words_are_the_fields(banned: str) -> None:
    pattern = re.compile(rf"\b(?:{banned})\b", re.IGNORECASE)
    found = []
    for path in FILES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            plain = line
            for name in NAMES:
                plain = plain.replace(name, "")
            if pattern.search(plain):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, f"say {BANNED[banned]!r}:\n" + "\n".join(found)
