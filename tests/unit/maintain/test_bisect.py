"""A binary search over versions, with calibrations that a test makes up; no Docker, no network."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import EngineError, NotFoundError, UnavailableError, UsageError
from harness.maintain.bisect import bisect, ordered
from harness.maintain.tags import tags
from harness.maintain.versions import source
from harness.measure.events import Observer
from harness.model.calibration import Calibration
from harness.render.bisect import bisection_text, document
from tests.support.calibrations import made_up

VERSIONS = [f"0.{number}.0" for number in range(30, 50)]


@functools.cache
def larger(gib: float) -> Calibration:
    calibration = made_up()
    metadata = calibration.metadata
    bands = tuple(msgspec.structs.replace(one, base_vram_gb=one.base_vram_gb + gib) for one in metadata.bands)
    parts = msgspec.structs.replace(metadata.breakdown_gb, overhead=(metadata.breakdown_gb.overhead or 0) + gib)
    constants = msgspec.structs.replace(calibration.constants, base_vram_gb=calibration.constants.base_vram_gb + gib)
    return msgspec.structs.replace(
        calibration, constants=constants, metadata=msgspec.structs.replace(metadata, bands=bands, breakdown_gb=parts)
    )


def engine(first: int, broken: frozenset[int] = frozenset()) -> tuple[Callable[[str], Calibration], list[str]]:
    """Versions from the one at ``first`` on take 1 GiB more; ``broken`` ones end."""
    asked: list[str] = []

    def measure(version: str) -> Calibration:
        index = VERSIONS.index(version)
        asked.append(version)
        if index in broken:
            raise EngineError("it ended")
        return larger(1.0 if index >= first else 0.0)

    return measure, asked


@settings(max_examples=40, deadline=None)
@given(st.integers(1, len(VERSIONS) - 1))
def test_the_version_is_found_in_few_steps(first: int) -> None:
    measure, asked = engine(first)
    found = bisect(VERSIONS, measure, Observer())

    assert (found.last, found.first, found.skipped) == (VERSIONS[first - 1], VERSIONS[first], ())
    assert len(asked) == len(set(asked)) <= 2 + len(VERSIONS).bit_length()
    assert any("overhead" in line for line in bisection_text(found))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, len(VERSIONS) - 1), st.frozensets(st.integers(1, len(VERSIONS) - 2)))
def test_versions_that_cannot_be_measured_are_passed_over(first: int, broken: frozenset[int]) -> None:
    measure, _ = engine(first, broken)
    found = bisect(VERSIONS, measure, Observer())

    low, high = VERSIONS.index(found.last), VERSIONS.index(found.first)
    assert low < first <= high
    assert set(range(low + 1, high)) <= broken
    assert list(found.skipped) == VERSIONS[low + 1 : high]
    assert json.loads(json.dumps(document(found)))["first_bad"] == found.first


def test_nothing_that_moved_is_said_and_an_end_that_fails_is_an_error() -> None:
    measure, _ = engine(len(VERSIONS))
    with pytest.raises(NotFoundError, match=r"nothing moved .* between 0\.30\.0 and 0\.49\.0"):
        bisect(VERSIONS, measure, Observer())
    measure, _ = engine(5, frozenset({0}))
    with pytest.raises(EngineError):
        bisect(VERSIONS, measure, Observer())


def test_versions_are_ordered_by_their_numbers_and_other_flavours_are_left_out() -> None:
    listed = ["0.10.0", "0.9.0", "latest", "0.9.1-rocm", "0.9.2-rc1", "0.11.0", "0.9.9", "x y"]
    assert ordered(listed, "0.9.0", "0.10.0") == ["0.9.0", "0.9.9", "0.10.0"]
    assert ordered(["v0.1.0", "v0.2.0-rocm", "v0.2.0"], "v0.1.0", "v0.2.0") == ["v0.1.0", "v0.2.0"]
    assert ordered([], "b100", "b200") == ["b100", "b200"]
    with pytest.raises(UsageError, match=r"0\.10\.0 is not before 0\.9\.0"):
        ordered(listed, "0.10.0", "0.9.0")
    with pytest.raises(UsageError, match="not a version"):
        ordered(listed, "0.9.0", "$(id)")


def test_versions_come_from_the_image_that_is_pinned_or_named(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models/catalog.yaml").write_text("models: {}\n")
    (tmp_path / "images/pins.yaml").write_text("ollama: 'ollama/ollama:0.33.0'\n")
    assert source("auto", None, tmp_path, wheels=False).option("0.31.0") == {"image": "ollama/ollama:0.31.0"}
    named = source("ollama", "registry.example.org:5000/own/ollama:x", tmp_path, wheels=False)
    assert named.option("a1") == {"image": "registry.example.org:5000/own/ollama:a1"}
    with pytest.raises(UnavailableError, match="vllm is installed from no package index"):
        source("vllm", None, tmp_path, wheels=True).versions()


def registry(answer: Callable[[httpx.Request], httpx.Response]) -> httpx.Client:
    return httpx.Client(transport=httpx.MockTransport(answer))


def test_tags_are_listed_with_an_anonymous_token() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.host == "auth.docker.io":
            assert request.url.params["scope"] == "repository:ollama/ollama:pull"
            return httpx.Response(200, json={"token": "t"})
        assert str(request.url).startswith("https://registry-1.docker.io/v2/ollama/ollama/tags/list")
        if request.headers.get("authorization") != "Bearer t":
            challenge = 'Bearer realm="https://auth.docker.io/token",service="x",scope="repository:ollama/ollama:pull"'
            return httpx.Response(401, headers={"www-authenticate": challenge})
        if "last" in request.url.params:
            return httpx.Response(200, json={"tags": ["0.2.0", 7]})
        return httpx.Response(200, json={"tags": [f"0.1.{n}" for n in range(1000)]}, headers={"link": '</v2/>; rel="next"'})

    assert tags("ollama/ollama", registry(answer))[-2:] == ("0.1.999", "0.2.0")


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(401, headers={"www-authenticate": 'Bearer realm="http://auth.docker.io/token"'}),
        httpx.Response(401, headers={"www-authenticate": 'Bearer realm="https://elsewhere.example/token"'}),
        httpx.Response(401, headers={"www-authenticate": 'Bearer realm="https://evildocker.io/token"'}),
        httpx.Response(200, json=["0.1"]),
        httpx.Response(200, json={"tags": "0.1"}),
        httpx.Response(200, text="<html>"),
        httpx.Response(302, headers={"location": "https://elsewhere.example"}),
        httpx.Response(503),
    ],
)
def test_a_registry_that_answers_otherwise_is_not_followed(answer: httpx.Response) -> None:
    with pytest.raises(UnavailableError, match=r"registry-1\.docker\.io"):
        tags("ollama/ollama", registry(lambda _: answer))
    with pytest.raises(UsageError):
        tags("https://x/y z")
