"""Whatever stands in a field of an artifact: it is refused with the field's path (65), or it is a figure that can be."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.engines.registry import policy_of
from harness.errors import BadInputError, ConfigError
from harness.model.calibration import KvBlocks, to_document
from harness.model.validation import from_document
from harness.prediction.verdict import judge
from harness.store.yaml import parse_calibration, read_calibration
from tests.support.calibrations import made_up, with_settings
from tests.support.vllm_artifacts import vllm_calibration

GOLDEN = Path(__file__).parents[2] / "golden"
#: Artifacts that have every field between them; all lie on a GPU, where a lie lets a model fit.
SUBJECTS = {
    "made-up": made_up(),
    "settings": with_settings(made_up(), env={"LLAMA_ARG_CACHE_REUSE": "1"}),
    "vllm": vllm_calibration(arguments=("--enforce-eager",)),
    "two-logs": vllm_calibration(blocks=KvBlocks(size=256, bytes=32 << 20, fixed=1, bound=True)),
    **{
        name: read_calibration(GOLDEN / "llama-server/b11434-cuda-h100" / name / f"{name}.yaml")
        for name in ("mid-8b-batches", "moe")
    },
    "two-slots": read_calibration(GOLDEN / "made-up/window-two-slots/made-up.yaml"),
    "dry-runs": read_calibration(GOLDEN / "made-up/gpu-dry-runs-and-speed/made-up.yaml"),
}
NEVER: tuple[Any, ...] = (-1, -0.5, 10**14, 10**18, 1e300, math.nan, math.inf, -math.inf, True, "4", "", [], {})
TEXTS: tuple[Any, ...] = ("a\nb", "\x1b[31m", "x" * 100_000, 5, True, [], {})
#: Numbers that may be below zero: what compute and what was measured grow by, or a rounding of their parts.
SIGNED = {"compute_gb_per_10k", "compute", "overhead", "overhead_gb"}
#: Texts that say something in any words.
FREE = {"notes", "arguments", "env"}
#: What nothing else in a file bounds: for how many slots it was made, where a batch ends, what a driver takes at first.
ALONE = {"num_parallel", "up_to", "start_gb"}
Place = tuple[str | int, ...]


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Each field once: of a list the first."""
    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(one, (*place, key))
    elif isinstance(value, list):
        yield from leaves(value[0], (*place, 0)) if value else ()
    else:
        yield place, value


def changed(document: dict[str, Any], place: Place, value: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(document))
    inner: Any = found
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return found


def documents() -> Iterator[Any]:
    for name, calibration in SUBJECTS.items():
        document = json.loads(json.dumps(to_document(calibration)))
        for place, value in leaves(document):
            if value is not None:
                yield pytest.param(document, place, value, id=f"{name}:{'.'.join(map(str, place))}")


def refused(document: dict[str, Any]) -> str | None:
    """Why an artifact is none; ``None``: it is read."""
    try:
        from_document(document, "it")
    except (BadInputError, ConfigError) as error:
        return error.message
    return None


@pytest.mark.parametrize(("document", "place", "value"), list(documents()))
def test_a_field_has_no_value_that_cannot_be(document: dict[str, Any], place: Place, value: Any) -> None:
    field = next(key for key in reversed(place) if isinstance(key, str))
    if isinstance(value, bool):
        tried: tuple[Any, ...] = (0, 1, "", "yes", [])
    elif isinstance(value, str):
        tried = TEXTS if FREE & set(place) else (*TEXTS, "")
    else:
        tried = tuple(one for one in NEVER if not (field in SIGNED and one in (-1, -0.5)))
    for one in tried:
        why = refused(changed(document, place, one))
        assert why is not None, f"{one!r:.40} is read"
        if field != "schema_version" and one not in (10**18, 1e300) and not isinstance(one, float):
            assert "env" in place or field in why or "contradicts itself" in why, why


@pytest.mark.parametrize("name", SUBJECTS)
def test_no_single_field_lets_a_model_fit_that_does_not(name: str) -> None:
    """A figure stands twice, or is bound by another: halved, doubled or zero it is refused, or lets nothing fit."""
    subject = SUBJECTS[name]
    rules, context = policy_of(subject.engine), min(8192, subject.metadata.quality.valid_to)
    needed = judge(subject, context, 2, (1 << 50,), rules)
    assert needed.required_bytes is not None
    short = (needed.required_bytes + (needed.reserve_bytes or 0) - (1 << 24),)
    assert judge(subject, context, 2, short, rules).verdict in ("offload", "unknown")
    document = json.loads(json.dumps(to_document(subject)))
    bad = []
    for place, value in leaves(document):
        if isinstance(value, bool) or not isinstance(value, int | float) or ALONE & set(place):
            continue
        for lie in (0, value // 2 if isinstance(value, int) else value / 2, value * 2):
            try:
                read = parse_calibration(yaml.safe_dump(changed(document, place, lie)).encode(), "it")
            except (BadInputError, ConfigError):
                continue
            if judge(read, context, 2, short, rules).verdict == "fits":
                bad.append((place, value, lie))
    assert not bad


@pytest.mark.parametrize(("share", "read"), [(0.91, True), (0.89, False)])
def test_what_torch_counts_of_a_gpu_is_what_its_driver_counts_but_for_a_tenth(share: float, read: bool) -> None:
    document = json.loads(json.dumps(to_document(SUBJECTS["vllm"])))
    why = refused(changed(document, ("metadata", "machine", "total_cuda_gb"), 80.0 * share))
    assert (why is None) is read, why


def test_a_load_of_vllm_may_fill_its_budget_and_one_of_another_batch_has_no_line() -> None:
    filled = json.loads(json.dumps(to_document(SUBJECTS["vllm"])))
    assert refused(changed(filled, ("metadata", "quality", "loads", 0, "total_gb"), 70.0)) is None
    other = json.loads(json.dumps(to_document(SUBJECTS["made-up"])))
    first: Place = ("metadata", "quality", "loads", 0)
    above = changed(other, (*first, "total_gb"), 70.0)
    assert "its line says" in str(refused(above))
    assert refused(changed(above, (*first, "num_batch"), 256)) is None
    assert refused(changed(above, (*first, "context"), 1000)) is None
