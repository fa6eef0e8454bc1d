"""What the NVIDIA driver says, asked directly: without harness's meter, so that the meter can be compared with it."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles
from types import TracebackType
from typing import Any, Final, Self

#: Lists of processes by symbol and entry size: bare functions have the oldest layout, ``_v2`` and ``_v3`` a longer one.
LISTS: Final = ("Compute", "Graphics", "MPSCompute")
_FACTS: Final = (
    "Name", "Brand", "Architecture", "CudaComputeCapability", "ComputeMode", "PersistenceMode", "AccountingMode",
    "AccountingBufferSize", "MigMode", "EccMode", "DisplayActive", "VirtualizationMode", "PowerState", "BAR1MemoryInfo",
    "ConfComputeProtectedMemoryUsage", "GspFirmwareVersion",
)  # fmt: skip


class _Short(ctypes.Structure):
    _fields_ = (("pid", ctypes.c_uint), ("used", ctypes.c_ulonglong))


class _Long(ctypes.Structure):
    _fields_ = (*_Short._fields_, ("gpu_instance", ctypes.c_uint), ("compute_instance", ctypes.c_uint))


class Driver:
    """NVML, initialised for as long as the ``with`` lasts.

    Raises:
        OSError: there is no driver, or it does not answer; the message says which.
    """

    def __enter__(self) -> Self:
        import pynvml

        self.nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise OSError(f"no NVIDIA driver: {error}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.nvml.nvmlShutdown()

    def ask(self, function: str, *arguments: Any) -> Any:
        """The answer of ``nvml<function>``, or ``{"error": …}``."""
        try:
            return plain(getattr(self.nvml, f"nvml{function}")(*arguments))
        except (self.nvml.NVMLError, self.nvml.NVMLLibraryMismatchError, AttributeError, TypeError) as error:
            return {"error": str(error)}

    def handle(self, index: int) -> Any:
        """The handle of a GPU."""
        return self.nvml.nvmlDeviceGetHandleByIndex(index)

    def memory(self, index: int) -> dict[str, int]:
        """Bytes of a GPU: ``total``, ``free`` and ``used`` by the first version of the call."""
        found = self.nvml.nvmlDeviceGetMemoryInfo(self.handle(index))
        return {"total": int(found.total), "free": int(found.free), "used": int(found.used)}

    def processes(self, index: int) -> dict[int, int | None]:
        """PID to bytes on a GPU (``None``: the driver does not say), compute processes only."""
        found = self.nvml.nvmlDeviceGetComputeRunningProcesses(self.handle(index))
        return {int(one.pid): None if one.usedGpuMemory is None else int(one.usedGpuMemory) for one in found}

    def facts(self) -> dict[str, Any]:
        """Everything about the driver and its GPUs that may matter to a memory meter."""
        count = int(self.nvml.nvmlDeviceGetCount())
        return {
            "driver": self.ask("SystemGetDriverVersion"),
            "nvml": self.ask("SystemGetNVMLVersion"),
            "cuda": self.ask("SystemGetCudaDriverVersion"),
            "gpus": [self._gpu(index) for index in range(count)],
        }

    def _gpu(self, index: int) -> dict[str, Any]:
        handle = self.handle(index)
        facts = {name: self.ask(f"DeviceGet{name}", handle) for name in _FACTS}
        facts["memory_v1"] = self.ask("DeviceGetMemoryInfo", handle)
        facts["memory_v2"] = self.ask("DeviceGetMemoryInfo", handle, getattr(self.nvml, "nvmlMemory_v2", 0))
        facts["lists"] = self.lists(index)
        bus = self.ask("DeviceGetPciInfo", handle)
        name = bus.get("busId", "").lower()[-12:] if isinstance(bus, dict) else ""
        power = Path("/sys/bus/pci/devices", name, "power")
        facts["runtime_pm"] = {file: _text(power / file) for file in ("control", "runtime_status")}
        return facts

    def lists(self, index: int) -> dict[str, Any]:
        """Every list of processes in every layout: PIDs and bytes, or the error's number."""
        found: dict[str, Any] = {}
        for kind in LISTS:
            for version, layout in (("", _Short), ("_v2", _Long), ("_v3", _Long)):
                found[f"{kind}{version}"] = self._list(f"nvmlDeviceGet{kind}RunningProcesses{version}", index, layout)
        return found

    def _list(self, symbol: str, index: int, layout: type[ctypes.Structure]) -> Any:
        function = getattr(self.nvml.nvmlLib, symbol, None)
        if function is None:
            return "no such symbol"
        room = ctypes.c_uint(64)
        entries = (layout * 64)()
        if code := function(self.handle(index), ctypes.byref(room), entries):
            return f"error {code}"
        return [{"pid": one.pid, "used": one.used} for one in entries[: room.value]]


def plain(value: Any) -> Any:
    """What NVML returned as something that JSON can hold; its structs by their fields."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, (int, float, str, type(None))):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    fields = [field[0] for field in getattr(value, "_fields_", ())]
    return {name: plain(getattr(value, name)) for name in fields} if fields else str(value)


def cost(call: Callable[[], object], count: int) -> dict[str, float]:
    """Microseconds that a call takes: median, 95th percentile and longest of ``count``."""
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e6)
    return {
        "median_us": round(median(times), 1),
        "p95_us": round(quantiles(times, n=20)[-1], 1),
        "max_us": round(max(times), 1),
    }


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
