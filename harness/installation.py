"""How what is missing is installed, where this harness came from a checkout and where it came from a wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Final

#: The distribution's name. It is not on a package index yet: a checkout or a wheel is what there is.
DISTRIBUTION: Final = "llm-memory-harness"
_ABOVE: Final = Path(__file__).resolve().parents[1]
#: Extras that `make setup` installs.
_OF_SETUP: Final = frozenset({"embedded", "report"})


def install_hint(extra: str) -> str:
    """How the extra of :data:`DISTRIBUTION` is installed here."""
    if not (_ABOVE / "pyproject.toml").is_file() or not (_ABOVE / "Makefile").is_file():
        return f"install the extra {extra!r} of the wheel: pip install '{DISTRIBUTION.replace('-', '_')}-….whl[{extra}]'"
    if extra in _OF_SETUP:
        return f"install the extra {extra!r}: make setup in {_ABOVE}"
    return f"install the extra {extra!r}: pip install -e '{_ABOVE}[{extra}]'"
