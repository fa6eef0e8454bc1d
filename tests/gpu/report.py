"""``make test-gpu``: what a real driver, GPU and engine do, in one file that can be sent to somebody.

    scripts/gpu_report.sh [--engine-binary LLAMA_SERVER] [-o gpu-report.tar.gz] [--seconds 480] [--scratch FOLDER] [--only a,b]

Needs an NVIDIA driver and Python with harness's requirements; neither network nor root. A section that fails says why and costs
only itself; the file is written anew after each of them. It holds ``report.json`` and ``report.md``, the records and the logs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

from tests.gpu.cuda import Cuda, CudaError
from tests.gpu.driver import Driver, cost
from tests.gpu.engine import SECTIONS as ENGINE_SECTIONS
from tests.gpu.engine import Kit, MissingError
from tests.gpu.pack import pack
from tests.gpu.render import markdown

GIB: Final = 1 << 30
#: A section is not begun with less time than this left, seconds.
LEAST: Final = 8.0
_READINGS: Final = 40
_CALLS: Final = (
    ("memory", "MemoryInfo", 400),
    ("compute list", "ComputeRunningProcesses", 100),
    ("graphics list", "GraphicsRunningProcesses", 100),
    ("MPS list", "MPSComputeRunningProcesses", 100),
)


def say(text: str) -> None:
    """Progress, for whoever waits."""
    sys.stderr.write(f"gpu-report: {text}\n")
    sys.stderr.flush()


class Late(BaseException):
    """A section's time is up; nothing in it may catch this."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise :class:`Late` in the body after ``seconds``."""

    def late(number: int, frame: FrameType | None) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def machine(kit: Kit) -> dict[str, Any]:
    """The machine, the driver, its GPUs, and who else uses them."""
    with Driver() as driver:
        found = driver.facts()
    mps = [one.name for one in Path("/proc").glob("[0-9]*") if "nvidia-cuda-mps" in _text(one / "comm")]
    system = platform.uname()
    return {
        **found,
        "kernel": f"{system.system} {system.release} {system.machine}",
        "python": platform.python_version(),
        "root": os.geteuid() == 0,
        "in_container": Path("/.dockerenv").exists() or "container" in _text(Path("/proc/1/environ")),
        "pid_1": _text(Path("/proc/1/comm")).strip(),
        "wsl": Path("/dev/dxg").exists(),
        "mps_daemon": bool(mps),
        "cpus": os.cpu_count(),
        "memory_kib": _text(Path("/proc/meminfo")).split("MemTotal:")[-1].split()[0],
    }


def allocations(kit: Kit) -> dict[str, Any]:
    """NVML against plain allocations of known size: context, 1 GiB, freed, a second process, an end of either kind."""
    steps: list[dict[str, Any]] = []
    with Driver() as driver:

        def note(step: str, *others: Cuda, **more: Any) -> None:
            listed = driver.processes(0)
            steps.append(
                {
                    "step": step,
                    "device_used": driver.memory(0)["used"],
                    "listed": [listed.get(one.pid) for one in others],
                    **more,
                }
            )

        note("nothing")
        with Cuda() as one, Cuda() as other:
            one("init")
            note("cuInit", one)
            note("context", one, **_named(one("context"), "cuda_"))
            one(f"alloc {GIB}")
            note("1 GiB", one, **_named(one("info"), "cuda_"))
            one(f"alloc {GIB // 2 + 1}")
            note("and 512 MiB + 1 byte", one)
            one("alloc 1")
            note("and 1 byte", one)
            lists = driver.lists(0)
            one("free")
            note("freed", one)
            other("context")
            other(f"alloc {3 * GIB}")
            note("a second process with 3 GiB", one, other)
            one(f"alloc {GIB}")
            note("the first takes 1 GiB again", one, other)
            returned = {"exit": _returns(driver, one, kill=False), "killed": _returns(driver, other, kill=True)}
            note("both have ended")
    return {"steps": steps, "lists_with_1_process": lists, "return_seconds": returned}


def frameworks(kit: Kit) -> dict[str, Any]:
    """A framework's context: torch, with 1 GiB of its own."""
    with Driver() as driver, Cuda() as one:
        before = driver.memory(0)["used"]
        try:
            answer = one("torch")
        except CudaError as error:
            raise MissingError(str(error)) from error
        return {**answer, "listed": driver.processes(0).get(one.pid), "device_rise": driver.memory(0)["used"] - before}


def namespaces(kit: Kit) -> dict[str, Any]:
    """Which PIDs the driver names, seen from here and from a PID namespace of its own."""
    wrapper = ("unshare", *(() if os.geteuid() == 0 else ("--user", "--map-root-user")), "--pid", "--fork", "--mount-proc")
    if shutil.which("unshare") is None:
        raise MissingError("there is no program unshare")
    with Driver() as driver, Cuda(wrapper=wrapper) as inner, Cuda() as outer:
        inner("context")
        outer("context")
        listed = driver.processes(0)
        return {
            "inner_pid_here": inner.pid,
            "inner_listed_by_that_pid": inner.pid in listed,
            "inner_bytes": listed.get(inner.pid),
            "seen_here": sorted(listed),
            "seen_inside": inner("list")["pids"],
            "outer_pid": outer.pid,
        }


def reading(kit: Kit) -> dict[str, Any]:
    """What a reading costs, with nothing on the GPU and with a process there."""
    found: dict[str, Any] = {}
    with Driver() as driver, Cuda() as one:
        for name in ("idle", "one process"):
            if name != "idle":
                one("context")
                one(f"alloc {GIB}")
            found[name] = {
                title: cost(partial(getattr(driver.nvml, f"nvmlDeviceGet{function}"), driver.handle(0)), count)
                for title, function, count in _CALLS
            }
        uuid = driver.nvml.nvmlDeviceGetUUID(driver.handle(0))
        from harness.meters.nvml import NvmlMeter

        meter = NvmlMeter([uuid])
        try:
            pids = frozenset({one.pid})
            found["harness"] = {
                "read": cost(lambda: meter.read(pids), _READINGS),
                "peek": cost(meter.peek, _READINGS),
                "reading": meter.read(pids).total_bytes,
            }
        finally:
            meter.close()
    return found


def doctor(kit: Kit) -> dict[str, Any]:
    """What ``harness doctor`` makes of this machine."""
    done = kit.harness("doctor", "--json")
    return {"status": done["exit_code"], "findings": done["data"]}


def _returns(driver: Driver, one: Cuda, *, kill: bool) -> dict[str, float | None]:
    """Seconds from a process's end until the driver no longer names it, and until its memory is free."""
    pid, before = one.pid, driver.memory(0)["free"]
    held = driver.processes(0).get(pid) or 0
    begin = time.monotonic()
    one.end(kill=kill)
    gone, free = None, None
    ended = time.monotonic() - begin
    while (gone is None or free is None) and time.monotonic() - begin < 10:
        if free is None and driver.memory(0)["free"] - before >= held * 0.98:
            free = time.monotonic() - begin
        if gone is None and pid not in driver.processes(0):
            gone = time.monotonic() - begin
    return {"process_ended": round(ended, 4), "not_listed": gone and round(gone, 4), "memory_free": free and round(free, 4)}


def _named(found: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {f"{prefix}{key}": value for key, value in found.items()}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


#: Sections in order of what they are worth; with each the most it may take, seconds.
SECTIONS: Final[dict[str, tuple[Callable[[Kit], dict[str, Any]], float]]] = {
    "machine": (machine, 20),
    "allocations": (allocations, 40),
    "reading": (reading, 20),
    "namespaces": (namespaces, 20),
    "doctor": (doctor, 30),
    "frameworks": (frameworks, 30),
    **ENGINE_SECTIONS,
}


def run(kit: Kit, output: Path, only: frozenset[str], seconds: float) -> dict[str, Any]:
    """All sections, the report packed after each."""
    end = time.monotonic() + seconds
    report: dict[str, Any] = {"version": 1, "seconds": {}, "skipped": {}, "failed": {}, "sections": {}}
    for name, (section, most) in SECTIONS.items():
        if only and name not in only:
            continue
        left = end - time.monotonic()
        if left < LEAST:
            report["skipped"][name] = f"no time was left of {seconds:.0f} s"
            write(report, kit, output)
            continue
        say(name)
        begin = time.monotonic()
        try:
            with limit(min(most, left)):
                report["sections"][name] = section(kit)
        except MissingError as error:
            report["skipped"][name] = str(error)
        except Late:
            report["failed"][name] = f"it took more than {min(most, left):.0f} s"
        except Exception as error:  # noqa: BLE001 - a section that fails is part of the report
            report["failed"][name] = "".join(traceback.format_exception(error)[-6:])
        finally:
            kit.stop()
        report["seconds"][name] = round(time.monotonic() - begin, 1)
        if why := report["skipped"].get(name) or report["failed"].get(name):
            say(f"{name}: {why.strip().splitlines()[-1]}")
        report["sections"] |= {f"{name} (unfinished)": kit.take_partial()} if name in report["failed"] else {}
        write(report, kit, output)
    return report


def write(report: dict[str, Any], kit: Kit, output: Path) -> None:
    """Write what is known so far."""
    (kit.folder / "report.json").write_text(json.dumps(report, indent=1, default=str) + "\n")
    (kit.folder / "report.md").write_text(markdown(report))
    pack(kit.folder, output)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scripts/gpu_report.sh")
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu-report.tar.gz"))
    parser.add_argument("--engine-binary", help="a llama-server that was built for CUDA; without it the engine is left out")
    parser.add_argument("--seconds", type=float, default=480, help="what all of it may take")
    parser.add_argument(
        "--scratch", type=Path, help="where the models lie meanwhile (up to 30 GB; default: a temporary folder)"
    )
    parser.add_argument("--only", default="", help=f"sections, of {', '.join(SECTIONS)}")
    parser.add_argument("--models", default="small-1b,mid-8b,large-32b,moe", help="shapes, the smallest first")
    asked = parser.parse_args()
    only = frozenset(filter(None, asked.only.split(",")))
    if unknown := only - SECTIONS.keys():
        parser.error(f"no such section: {', '.join(sorted(unknown))}")
    try:
        with Driver() as driver:
            driver.facts()
    except OSError as error:
        say(str(error))
        sys.exit(69)
    with tempfile.TemporaryDirectory(prefix="gpu-report-", dir=asked.scratch) as name:
        kit = Kit(Path(name), binary=asked.engine_binary, models=tuple(asked.models.split(",")))
        report = run(kit, asked.output, only, asked.seconds)
    say(f"written: {asked.output} ({asked.output.stat().st_size / 1e6:.1f} MB)")
    sys.stdout.write(markdown(report))
    sys.exit(1 if report["failed"] else 0)


if __name__ == "__main__":
    main()
