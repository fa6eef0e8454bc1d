"""What a format writes of one model, and the comment that says where it comes from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec
import yaml

from harness.errors import UsageError
from harness.model.calibration import Calibration
from harness.model.start_command import StartCommand
from harness.prediction.verdict import Verdict
from harness.text import one_line
from harness.units import MIB, format_size

_LABEL: Final = re.compile(r"[^a-z0-9]+")


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One model at one context. ``key`` names the file of its calibration, ``image`` the container image that runs it.

    ``folder`` is where files of weights are, on the machine or in the container that starts the engine.
    """

    model: str
    key: str
    calibration: Calibration
    verdict: Verdict
    derived: tuple[str, ...]
    start: StartCommand
    image: str | None
    folder: str = "/models"

    @property
    def on_gpu(self) -> bool:
        """Whether it runs on a GPU."""
        return self.calibration.metadata.machine.target == "gpu"

    @property
    def gpus(self) -> int:
        """GPUs that one instance takes."""
        return max(len(self.verdict.devices), self.calibration.metadata.settings.gpus, 1)

    @property
    def claim(self) -> int:
        """Bytes to set aside so that everything stays on the target: the upper bound, and what the engine keeps free."""
        verdict = self.verdict
        needed = (verdict.required_bytes or 0) + (verdict.uncertainty_bytes or 0) + (verdict.reserve_bytes or 0)
        return -(-needed // MIB) * MIB

    @property
    def label(self) -> str:
        """A DNS label (RFC 1123) made of the model's name."""
        return _LABEL.sub("-", self.model.lower()).strip("-")[:50].strip("-") or "model"

    @property
    def weights(self) -> str:
        """Where the file of weights is, of an engine that is given one."""
        name = self.model.rpartition("/")[2]
        return f"{self.folder}/{name if name.endswith('.gguf') else f'{name}.gguf'}"

    @property
    def words(self) -> tuple[str, ...]:
        """Options with the file of weights before them, without the program."""
        given = () if self.start.model_option is None else (self.start.model_option, self.weights)
        return (*given, *self.start.arguments)


def origin(entry: Entry) -> Iterator[str]:
    """Calibration, date and bound, a line each; no line holds more than text."""
    metadata, verdict = entry.calibration.metadata, entry.verdict
    where = metadata.machine.devices()
    engine = f"{entry.calibration.engine} {metadata.engine.version or ''}".strip()
    yield one_line(f"{entry.model}: harness calibration {entry.key} of {metadata.calibrated_at} ({engine}, {where or 'a GPU'})")
    most = "at most " if verdict.at_most else ""
    slots = f" x {verdict.num_parallel} slots" if verdict.num_parallel > 1 else ""
    bound = f" +/- {format_size(verdict.uncertainty_bytes, 1)}" if verdict.uncertainty_bytes else ""
    kept = f", {format_size(verdict.reserve_bytes, 1)} kept free" if verdict.reserve_bytes else ""
    yield one_line(
        f"{verdict.context} tokens{slots}: {most}{format_size(verdict.required_bytes, 1)}{bound}{kept} ({verdict.source})"
    )
    yield from (one_line(f"derived: {text}") for text in entry.derived)


def comments(entries: Sequence[Entry], *more: str) -> str:
    """The origins of all entries, and other remarks, as lines that begin with ``#``."""
    lines = [line for entry in entries for line in origin(entry)] + list(more)
    return "".join(f"# {line}\n" for line in lines)


def image_remarks(entries: Sequence[Entry]) -> list[str]:
    """Of which models the image is not the one that was measured."""
    outside = [one for one in entries if one.image is not None and one.calibration.metadata.machine.sandbox != "docker"]
    return [one_line(f"{one.key} was measured outside a container; {one.image} is the image pinned here") for one in outside]


def document(value: object) -> str:
    """Plain values as YAML, every text quoted as it has to be, nothing referred to."""
    return str(yaml.dump(value, Dumper=_Plain, sort_keys=False, width=4096, allow_unicode=False))


def unique(names: Sequence[str]) -> list[str]:
    """Names that differ: a number follows one that was there before."""
    found: list[str] = []
    for name in names:
        number, candidate = 1, name
        while candidate in found:
            number += 1
            candidate = f"{name}-{number}"
        found.append(candidate)
    return found


def merged(entries: Sequence[Entry]) -> dict[str, str]:
    """The environment of one server for several models; a context that some of them do not have is the smallest.

    Raises:
        UsageError: the models were calibrated with settings that one server cannot have at once.
    """
    found: dict[str, tuple[str, Entry]] = {}
    for entry in entries:
        for name, value in entry.start.variables.items():
            before, other = found.get(name, (value, entry))
            if name.endswith("_CONTEXT_LENGTH"):
                value = min(before, value, key=int)
            elif value != before:
                raise UsageError(
                    f"one server has one {name}: {before} for {other.model}, {value} for {entry.model}",
                    hint="export them apart, or give the setting, for example --kv-cache-type f16",
                    code="different-settings",
                )
            found[name] = (value, entry)
    for entry in entries:
        missing = [name for name in found if name not in entry.start.variables]
        if missing:
            _refuse_missing(missing[0], found[missing[0]], entry)
    return {name: value for name, (value, _) in found.items()}


def _refuse_missing(name: str, had: tuple[str, Entry], entry: Entry) -> None:
    raise UsageError(
        f"one server has one {name}: {had[0]} for {had[1].model}, unset for {entry.model}",
        hint="export them apart, or give the setting, for example --kv-cache-type f16",
        code="different-settings",
    )
