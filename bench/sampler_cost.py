"""What the sampler of NVML costs: its CPU time, as a share of one core, at the rate that a calibration uses.

python -m bench.sampler_cost

The library it asks is the tests' stand-in for the driver, so this is the cost of harness and of nvidia-ml-py. What a
driver itself takes for an answer is not in it, and must be measured on a GPU. Needs gcc.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import time
from pathlib import Path

import pynvml

from harness.meters.nvml import NvmlMeter
from harness.meters.sampler import Sampler
from tests.support.fake_nvml import UUID, compile_library

SECONDS = 20.0
PROCESSES = 8


def main() -> None:
    pids = range(4711, 4711 + PROCESSES)
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder, "state")
        lines = ["driver 580.95.05", f"gpu {UUID} {24 << 30} {1 << 30} NVIDIA Test"]
        state.write_text("\n".join([*lines, *(f"process 0 C {pid} 104857600" for pid in pids), ""]))
        os.environ["FAKE_NVML_STATE"] = str(state)
        pynvml.nvmlLib = ctypes.CDLL(str(compile_library(Path(folder))))
        meter = NvmlMeter([UUID])
        meter.take_baseline()
        sampler = Sampler(meter, lambda: frozenset(pids))
        before = time.process_time()
        sampler.start()
        time.sleep(SECONDS)
        trace = sampler.stop()
        spent = time.process_time() - before
        meter.close()
    if trace.failures:
        raise SystemExit(f"readings failed: {trace.failures}")
    print(
        f"{trace.readings} readings of {PROCESSES} processes in {SECONDS:.0f} s, and the device's memory every "
        f"{meter.peek_interval:.2f} s: {spent / SECONDS:.3%} of one core (without the driver's own share)"
    )


if __name__ == "__main__":
    main()
