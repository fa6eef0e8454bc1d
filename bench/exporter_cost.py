"""What `harness exporter` costs: processor time of a collection, as a share of a core at one every ten seconds.

    python -m bench.exporter_cost [--calibrations 1000] [--count 50]

Collections over a store of so many calibrations and this machine's own processes; the first one, which reads the store, is
counted apart. The goal is 0.5 %.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from harness.serving.live_metrics import Exporter
from tests.support.calibrations import made_up, store_of

INTERVAL = 10.0
GOAL = 0.005


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibrations", type=int, default=1000)
    parser.add_argument("--count", type=int, default=50)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = store_of(Path(folder), *(made_up(f"model-{number}") for number in range(given.calibrations)))
        exporter = Exporter(store)
        start = time.process_time()
        exporter.samples()
        first = time.process_time() - start
        start = time.process_time()
        for _ in range(given.count):
            exporter.samples()
        each = (time.process_time() - start) / given.count
    share = each / INTERVAL
    print(f"{given.calibrations} calibrations: the first collection {first:.2f} s, each later one {1000 * each:.1f} ms")
    print(f"at one every {INTERVAL:.0f} s: {100 * share:.3f} % of a core (goal {100 * GOAL} %)")
    return int(share > GOAL)


if __name__ == "__main__":
    sys.exit(main())
