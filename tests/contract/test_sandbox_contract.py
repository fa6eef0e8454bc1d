"""What every sandbox promises, whatever engine runs in it."""

from __future__ import annotations

import json
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.sandboxes.base import Running
from tests.support.places import PLACES, DockerPlace, Place, ProcessPlace
from tests.support.victim import Victim, kill_three_at
from tests.support.waiting import alive, until


@pytest.fixture
def process_place(tmp_path: Path) -> Place:
    return ProcessPlace(tmp_path)


@pytest.fixture
def docker_place(tmp_path: Path) -> Place:
    return DockerPlace(tmp_path)


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    chosen: Place = request.getfixturevalue(f"{request.param}_place")
    with chosen.opened():
        yield chosen


def wait_exit(running: Running) -> int:
    until(lambda: running.exit_status() is not None, "the engine's end")
    status = running.exit_status()
    assert status is not None
    return status


def has_line(running: Running, text: str) -> bool:
    return running.log.exists() and text.encode() in running.log.read_bytes()


def get(url: str) -> dict[str, object] | None:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as answer:
            body: dict[str, object] = json.load(answer)
            return body
    except OSError:
        return None


def test_endpoint_answers_and_environment_is_clean(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is reached at its endpoint, sees what the launch gives it, and none of our tokens."""
    monkeypatch.setenv("HF_TOKEN", "hf_not_for_engines")
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "77")
    site = place.sandbox.site()
    running = place.start("serve", site.host, str(site.port), site=site, env={"GIVEN": "yes"})
    until(lambda: get(running.endpoint), "an answer at the endpoint")

    body = get(running.endpoint)

    assert body is not None
    environment = body["environment"]
    assert isinstance(environment, dict)
    assert environment["GIVEN"] == "yes"
    assert not {"HF_TOKEN", "LLAMA_ARG_CTX_SIZE"} & environment.keys()


def test_no_line_of_a_burst_is_lost(place: Place) -> None:
    """20 000 lines as fast as the engine can write them all stand in the log once it has ended."""
    running = place.start("burst", "20000")
    assert wait_exit(running) == 0
    running.stop()

    lines = running.log.read_text().splitlines()

    assert sorted(int(line.split()[1]) for line in lines if line.startswith("line ")) == list(range(20_000))
    assert len(lines) == 20_001, "nothing else but how long it took"


def test_the_log_is_raw(place: Place) -> None:
    """Bytes that are no text, long lines and an unfinished last line are kept as they are."""
    running = place.start("raw")
    assert wait_exit(running) == 0
    running.stop()

    assert running.log.read_bytes() == b"a\xff\xfe\x00b\r\x1b[31m\n" + b"x" * 40_000 + b"\nunfinished"


@pytest.mark.parametrize(("scenario", "status"), [(("leave", "0"), 0), (("leave", "3"), 3), (("abort",), 137)])
def test_exit_status(place: Place, scenario: tuple[str, ...], status: int) -> None:
    """A plain status, and 128 + signal for a killed engine; afterwards there are no PIDs."""
    running = place.start(*scenario)

    assert wait_exit(running) == status
    assert running.pids() == frozenset()


def test_pids_are_the_whole_family(place: Place) -> None:
    """Children, grandchildren and a detached process are the engine's; stopping it ends them all."""
    running = place.start("family")
    until(lambda: has_line(running, "grandchild up") and has_line(running, "detached up"), "the family")

    pids = running.pids()
    assert len(pids) >= 4  # a container has a first process of its own besides
    assert all(alive(pid) for pid in pids)
    assert running.exit_status() is None

    running.stop()

    assert running.pids() == frozenset()
    assert not any(alive(pid) for pid in pids)


def test_a_stubborn_engine_is_killed(place: Place) -> None:
    """An engine that ignores SIGTERM is ended when the time is over, and stopping again is harmless."""
    running = place.start("stubborn")
    until(lambda: has_line(running, "ready"), "the engine")
    pids = running.pids()

    running.stop(timeout=0.2)
    running.stop()

    assert running.exit_status() == 128 + signal.SIGKILL
    assert not any(alive(pid) for pid in pids)


def test_two_starts_in_a_row(place: Place) -> None:
    """One sandbox starts a clean engine after another, and each log is its own."""
    for number in range(2):
        site = place.sandbox.site()
        running = place.start("serve", site.host, str(site.port), site=site, log=f"{number}.log")
        until(lambda running=running: get(running.endpoint), "an answer")  # type: ignore[misc]
        running.stop()
        assert running.log.read_text() == "ready\n"
        assert running.exit_status() is not None


def test_secrets_are_private_files(place: Place) -> None:
    """A secret is a file of mode 0400 that only the engine is shown, gone after the end; no environment names it."""
    running = place.start("secret", "token", secrets={"token": "s3cret"})
    until(lambda: has_line(running, "}\n"), "the secret")
    seen = json.loads(running.log.read_text())
    running.stop()

    assert seen["content"] == "s3cret"
    assert seen["mode"] == "0o400"
    assert not Path(seen["path"]).exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda one: one.name)
def test_nothing_survives_harness(place: Place, number: signal.Signals, tmp_path: Path) -> None:
    """However the process that started it dies, the engine, its grandchild and its detached child are gone."""
    with Victim(place.name, tmp_path, mark=place.mark) as victim:
        pids = victim.wait_for_family()
        assert len(pids) >= 4  # a container has a first process of its own besides
        assert place.leftovers()  # the mark is found while they run

        victim.die(number)

        until(lambda: not any(alive(pid) for pid in pids), "the end of the engine")
        until(lambda: not place.leftovers() and not victim.reapers(), "nothing left")


@pytest.mark.parametrize("stage", ["opened", "starting", "returned"])
def test_a_death_at_any_stage_leaves_nothing(place: Place, tmp_path: Path, stage: str) -> None:
    """A kill -9 while a start is about to happen, under way or just over: nothing stays, whoever was quicker."""
    kill_three_at(stage, place, tmp_path)
