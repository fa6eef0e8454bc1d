"""Kill harness again and again, at every stage of a start, and count what stays.

    python -m bench.kill9 [--sandbox docker|process] [--count 100] [--signal KILL|HUP|TERM|INT]

Prints how many containers, processes and locks were left, and how long the engine outlived harness.
"""

from __future__ import annotations

import argparse
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harness.errors import BusyError
from harness.sandboxes.locks import hold
from tests.support.places import make_place
from tests.support.victim import Victim
from tests.support.waiting import until

STAGES = {
    "process": ("opened", "starting", "returned", "running"),
    "docker": ("opened", "starting", "creating", "created", "started", "returned", "running"),
}


def lock_is_free(mark: str, folder: Path) -> bool:
    try:
        with hold([mark], folder / "locks"):
            return True
    except BusyError:
        return False


def seconds_until(condition: Callable[[], bool], what: str) -> float:
    begin = time.monotonic()
    until(condition, what, limit=90)
    return time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sandbox", choices=sorted(STAGES), default="process")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--signal", choices=("KILL", "HUP", "TERM", "INT"), default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)  # noqa: S311 - not a secret
    gone: list[float] = []
    locks_left = 0
    victims: list[Victim] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place = make_place(options.sandbox, folder)
        for number in range(options.count):
            stage = STAGES[options.sandbox][number % len(STAGES[options.sandbox])]
            with Victim(options.sandbox, folder, mark=place.mark, stop_at=stage) as victim:
                victim.wait_for_stage(stage)
                victim.let_go()
                time.sleep(chance.uniform(0, 0.1))  # anywhere between this stage and the next
                victim.die(signal.Signals[f"SIG{options.signal}"])
                gone.append(seconds_until(lambda: not place.leftovers(), f"the engine's end, killed when {stage}"))
                locks_left += not lock_is_free(place.mark, folder)
                victims.append(victim)
        # A create that was under way may have brought a container after the first look.
        until(lambda: not any(victim.reapers() for victim in victims), "the end of the reapers", limit=90)
        left = place.leftovers()
    gone.sort()
    print(f"sandbox {options.sandbox}: {options.count} x SIG{options.signal} at {', '.join(STAGES[options.sandbox])}")
    print(f"left: {len(left)} containers and processes, {locks_left} locks")
    print(f"engine gone after: median {gone[len(gone) // 2]:.2f} s, longest {gone[-1]:.2f} s")


if __name__ == "__main__":
    main()
