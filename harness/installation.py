"""How what is missing is installed, where this harness came from a checkout and where it came from a wheel."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Final

#: The distribution's name. It is not on a package index yet: a checkout or a wheel is what there is.
DISTRIBUTION: Final = "llm-memory-harness"
#: The pip of the environment that harness is in, which is seldom the one on PATH.
_PIP: Final = f"{shlex.quote(sys.executable)} -m pip install"
_ABOVE: Final = Path(__file__).resolve().parents[1]
#: Extras that `make setup` installs.
_OF_SETUP: Final = frozenset({"embedded", "report"})


def install_hint(extra: str) -> str:
    """How the extra of :data:`DISTRIBUTION` is installed here."""
    if not (_ABOVE / "pyproject.toml").is_file() or not (_ABOVE / "Makefile").is_file():
        return f"install the extra {extra!r} of the wheel: {_PIP} {shlex.quote(f'{_wheel()}[{extra}]')}"
    if extra in _OF_SETUP:
        return f"install the extra {extra!r}: make setup in {_ABOVE}"
    return f"install the extra {extra!r}: {_PIP} -e {shlex.quote(f'{_ABOVE}[{extra}]')}"


def _wheel() -> str:
    """The file that it was installed from (PEP 610, ``direct_url.json``), else the name of one."""
    import json
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import unquote, urlsplit

    try:
        origin = distribution(DISTRIBUTION).read_text("direct_url.json") or "{}"
        path = Path(unquote(urlsplit(json.loads(origin).get("url", "")).path))
    except (PackageNotFoundError, OSError, ValueError):
        path = Path()
    return str(path) if path.is_file() else f"{DISTRIBUTION.replace('-', '_')}-….whl"
