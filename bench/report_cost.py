"""What a report of many calibrations takes: `python -m bench.report_cost [--count 200]`.

The calibrations are those of tests/golden in turn, under other names. Prints processor seconds and the size of the page.
"""

from __future__ import annotations

import argparse
import time
from itertools import cycle, islice
from pathlib import Path

from harness.report.build import assets
from harness.report.page import ReportEntry, page
from harness.store.yaml import read_calibration

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    count = parser.parse_args().count
    read = [read_calibration(path) for path in sorted(GOLDEN.rglob("*.yaml"))]
    entries = [ReportEntry(key=f"{one.id}-{number}", calibration=one) for number, one in enumerate(islice(cycle(read), count))]
    begin = time.process_time()
    size = len(page(entries, assets(), subtitle=""))
    print(f"{count} calibrations: {time.process_time() - begin:.1f} s of processor time, a page of {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
