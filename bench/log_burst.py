"""Bursts of 20 000 log lines: is every line of every burst in the log?

python -m bench.log_burst [--sandbox docker|process] [--count 100]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.support.places import Place, make_place
from tests.support.waiting import until

LINES = 20_000


def burst(place: Place, number: int) -> tuple[int, float]:
    """Lines missing from one burst, and the seconds that the engine took to write it."""
    running = place.start("burst", str(LINES), log=f"{number}.log")
    until(lambda: running.exit_status() is not None, "the end of the burst")
    running.stop()
    lines = running.log.read_text().splitlines()
    running.log.unlink()
    seen = {int(line.split()[1]) for line in lines if line.startswith("line ")}
    [took] = [float(line.split()[1]) for line in lines if line.startswith("took ")]
    return LINES - len(seen), took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sandbox", choices=("docker", "process"), default="process")
    parser.add_argument("--count", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = make_place(options.sandbox, Path(folder))
        with place.opened():
            bursts = [burst(place, number) for number in range(options.count)]
    times = sorted(took for _, took in bursts)
    whole = sum(missing == 0 for missing, _ in bursts)
    print(f"sandbox {options.sandbox}: {whole} of {len(bursts)} bursts of {LINES} lines are complete")
    print(f"lines lost: {sum(missing for missing, _ in bursts)}")
    print(f"a burst took the engine: median {times[len(times) // 2]:.3f} s, longest {times[-1]:.3f} s")


if __name__ == "__main__":
    main()
