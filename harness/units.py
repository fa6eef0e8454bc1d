"""Bytes, and the sizes that people type.

Inside the program every amount of memory is an ``int`` of bytes. GiB (2**30) appears only in artifacts (fields ending in
``_gb``, because Ollama and vLLM print GiB under that name) and on screen.
"""

from __future__ import annotations

import re
from typing import Final

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

#: The longest context that can be asked for, tokens.
MAX_CONTEXT: Final = 1 << 31

#: Contexts are priced per this many tokens (``kv_cache_gb_per_10k``).
TOKENS_PER_UNIT: Final = 10_000

#: llama.cpp pads KV caches to this many cells (llama.cpp ``GGML_PAD(n_ctx, 256)``, Ollama >= 0.13.2).
CELL_PADDING: Final = 256

_BINARY: Final = {"": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1 << 40}
_DECIMAL: Final = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_LARGEST: Final = 1e18
_SIZE: Final = re.compile(
    r"\s*(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<prefix>[kmgt]?)(?P<suffix>i?b?)\s*", re.IGNORECASE | re.ASCII
)


def parse_size(text: str) -> int:
    """Read a size as people type it and return bytes.

    ``GiB``, ``Gi`` and ``g`` are binary, ``GB`` is decimal, and a bare number is MiB (what ``nvidia-smi`` prints).

    Raises:
        ValueError: if the text is not a positive size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"not a size: {text!r} (write 24GiB, 24GB, 24g or a number of MiB)")
    prefix, suffix = match["prefix"].lower(), match["suffix"].lower()
    if not prefix and suffix not in ("", "b"):
        raise ValueError(f"not a size: {text!r} (write 24GiB, 24GB, 24g or a number of MiB)")
    if not prefix and suffix == "":
        prefix = "m"
    factor = _DECIMAL[prefix] if suffix == "b" else _BINARY[prefix]
    number = float(match["number"])
    if number > _LARGEST:
        raise ValueError(f"not a size: {text[:20]!r}… is more than any machine has")
    value = round(number * factor)
    if value <= 0:
        raise ValueError(f"a size must be above zero: {text!r}")
    return value


def parse_reserve(text: str) -> int:
    """A size, or ``0``: the engine may fill its device (``--fit-target 0``)."""
    return 0 if text.strip() == "0" else parse_size(text)


#: A count of tokens as people type and print it; in a list, a comma before three digits belongs to the number.
_TOKENS: Final = re.compile(r"(?P<number>\d{1,3}(?:[,_]\d{3})+(?!\d)|\d+)(?P<prefix>[km]?)", re.IGNORECASE | re.ASCII)


def parse_tokens(text: str) -> int:
    """Read a count of tokens: ``8192``, ``8,192`` or ``8k`` (k is 1,024, as contexts come in powers of two).

    Raises:
        ValueError: anything else, or zero.
    """
    match = _TOKENS.fullmatch(text.strip())
    if match is None or len(text) > 20 or not (number := int(re.sub("[,_]", "", match["number"]))):
        raise ValueError(f"a number of tokens is expected, such as 8192, 8,192 or 8k, not {text.strip()[:20]!r}")
    return number * {"": 1, "k": KIB, "m": MIB}[match["prefix"].lower()]


#: What is meant as a context, whether it can be one or not.
_CONTEXT: Final = re.compile(r"[+-]?\d[\d.,_]*[km]?", re.ASCII | re.IGNORECASE)


def is_context(text: str) -> bool:
    """Whether what stands behind an ``@`` is meant as a context."""
    return _CONTEXT.fullmatch(text) is not None


def split_context(spec: str) -> tuple[str, int | None]:
    """``MODEL[@CTX]``: the model, and the tokens where a count of them stands behind the last ``@``.

    Raises:
        ValueError: what stands there begins as a count, and is none.
    """
    name, at, tail = spec.rpartition("@")
    return (name, parse_tokens(tail)) if at and is_context(tail) else (spec, None)


def _one_count(found: re.Match[str]) -> str:
    parts = found[0].split(",")
    if all(part[0] != "0" and int(part) >= CELL_PADDING for part in parts):
        one, several, count = "".join(parts), " ".join(parts), len(parts)
        raise ValueError(f"{found[0]!r} may be one context or {count}: write {one} for one, '{several}' for {count}")
    return "_".join(parts)


def parse_token_list(text: str) -> tuple[int, ...]:
    """Read counts of tokens with commas or spaces between them: ``8k,32k``, ``8192,16384``, ``8,192 16,384``.

    ``8,192`` is one count, as it is printed: a context has :data:`CELL_PADDING` tokens or more, so 8 and 192 are none.

    Raises:
        ValueError: one of them is none, or ``512,768`` may be one context or two.
    """
    apart = re.sub(r"(?<![\d,])(\d{1,3})((?:,\d{3})+)(?!\d)", _one_count, text)
    return tuple(parse_tokens(part) for part in re.split(r"[,\s]+", apart.strip()) if part) if text.strip() else ()


def read_numbers(text: str) -> tuple[int, ...]:
    """A comma list of whole numbers above zero.

    Raises:
        ValueError: anything else.
    """
    numbers = []
    for part in str(text).split(",") if text else ():
        word = part.strip().replace("_", "")
        if not (word.isascii() and word.isdigit()) or not 1 <= int(word) <= MAX_CONTEXT:
            raise ValueError(f"whole numbers above zero are expected, not {part.strip()!r}")
        numbers.append(int(word))
    return tuple(numbers)


def read_sizes(text: str) -> tuple[int, ...]:
    """A size, or a comma list with one for each device; bytes.

    Raises:
        ValueError: anything else.
    """
    return tuple(parse_size(part) for part in text.split(","))


def gib(size: float) -> float:
    """Bytes as GiB with the six decimals that artifacts carry (1e-6 GiB is about 1 KiB)."""
    return round(size / GIB, 6)


def from_gib(size: float) -> int:
    """GiB as bytes, to the nearest byte."""
    return round(size * GIB)


#: Below this a size is shown in MiB, as drivers and logs have it.
_SHOWN_IN_MIB: Final = 10 * GIB


def format_size(size: float | None, digits: int = 2) -> str:
    """A size for people: ``1,234.5 MiB`` below 10 GiB, else ``12.34 GiB``; unknown is an en dash."""
    if size is None:
        return "–"
    if abs(size) >= _SHOWN_IN_MIB:
        return f"{size / GIB:,.{digits}f} GiB"
    return f"{size / MIB:,.1f} MiB"


def format_sum(*sizes: int | None) -> tuple[str, ...]:
    """Sizes of which the last is the sum of the others, in MiB, so that the figures add up as printed.

    Each is rounded as the sum of those before it is, so none is wrong by more than one of its last digits.
    """
    digits = 1 if max((abs(size) for size in sizes if size is not None), default=0) < _SHOWN_IN_MIB else 0
    step = MIB / 10**digits
    *parts, _ = sizes
    texts, before, shown = [], 0, 0
    for size in parts:
        before += size or 0
        texts.append("–" if size is None else f"{(round(before / step) - shown) / 10**digits:,.{digits}f} MiB")
        shown = round(before / step)
    return (*texts, f"{shown / 10**digits:,.{digits}f} MiB")


def format_slope(gib_per_10k: float | None) -> str:
    """What each token of context adds, of GiB per 10,000 tokens; unknown is an en dash."""
    return "–" if gib_per_10k is None else f"{gib_per_10k * GIB / TOKENS_PER_UNIT / KIB:,.3f} KiB/token"


def pad_cells(tokens: int) -> int:
    """KV cells that the engine allocates for ``tokens`` of context in one slot."""
    return -(-tokens // CELL_PADDING) * CELL_PADDING
