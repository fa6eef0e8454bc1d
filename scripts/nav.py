"""The documentation's pages in the order in which one reads: a hook of MkDocs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SECTIONS = {"How to": "how-to", "Reference": "reference", "Explanation": "explanation", "Decisions": "adr"}


def on_config(config: Any) -> Any:
    """Fill the navigation with every page that there is."""
    pages = Path(config.docs_dir)
    listed = {
        title: [page.relative_to(pages).as_posix() for page in sorted((pages / folder).glob("*.md"))]
        for title, folder in SECTIONS.items()
    }
    config.nav = [
        {"Documentation": "README.md"},
        {"Tutorial": "tutorial.md"},
        *({title: found} for title, found in listed.items()),
    ]
    return config
