"""Which leftovers may be removed: only ours, and only those that nobody owns."""

from __future__ import annotations

import msgspec
import pytest

from harness.ownership import (
    OWNER_BOOT,
    OWNER_CLOCK,
    OWNER_NAMESPACE,
    OWNER_PID,
    OWNER_START,
    life_of,
    owner_labels,
    this_process,
)


def labels(**changes: str) -> dict[str, str]:
    return owner_labels("run") | changes


def test_a_live_owner_keeps_its_own() -> None:
    assert life_of(labels()) == "alive"


@pytest.mark.parametrize(
    ("changes", "abandoned"),
    [
        ({OWNER_START: "1"}, True),  # the PID was given to another process
        ({OWNER_BOOT: "another"}, True),  # the machine was started anew
        ({OWNER_NAMESPACE: "pid:[1]", OWNER_PID: "999999999"}, False),  # an owner that cannot be seen from here
        ({OWNER_CLOCK: "time:[1]", OWNER_START: "1"}, False),  # its start is told by another clock
        ({"harness.deadline": "1"}, False),  # of an older harness: no clock counts against an owner that lives
        ({OWNER_PID: "", "harness.deadline": "soon"}, False),  # damaged labels: hands off
        ({OWNER_PID: "-1"}, False),
        ({OWNER_PID: "9" * 5000}, False),
    ],
)
def test_what_the_labels_say(changes: dict[str, str], abandoned: bool) -> None:
    assert (life_of(labels(**changes)) == "gone") is abandoned


def test_a_clock_that_jumps_takes_nothing_from_an_owner_that_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = labels()
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert life_of(mine) == "alive"


def test_an_owner_of_another_machine_that_shares_the_disk_is_left_alone() -> None:
    here = this_process()
    assert here.life() == "alive"
    elsewhere = msgspec.structs.replace(here, boot="another", machine="another")
    assert elsewhere.life() == "unknown"
    assert msgspec.structs.replace(elsewhere, machine=here.machine).life() == "gone"
