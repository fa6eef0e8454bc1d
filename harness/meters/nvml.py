"""The driver's own figure: memory of processes by device, from NVML (nvidia-ml-py 13).

NVML reports PIDs of the host, so it is asked on the host. A figure that cannot be had is ``None`` with a reason, never
0: N/A (WDDM), 0 for a process that holds a context (some drivers inside containers), not supported (MIG under vGPU),
not permitted, and an empty list although the engine runs (WSL2) are five different answers. For all of them there is a
second, named figure: by how much the device as a whole rose above its baseline (``device-delta``), which means something
only while no other process uses the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from harness.errors import NotFoundError, NotPermittedError, UnavailableError, UntrustedError
from harness.meters.base import BaselineMeter
from harness.meters.host import machine_available
from harness.model.gpu import LocalGpu
from harness.model.trace import MeterName, Occupancy, Reading

#: NVML's return codes (nvml.h, ``nvmlReturn_t``).
_NOT_SUPPORTED: Final = 3
_NO_PERMISSION: Final = 4
_INSUFFICIENT_SIZE: Final = 7
_GPU_IS_LOST: Final = 15
_RESET_REQUIRED: Final = 16
_TRIES: Final = 3
_LISTS: Final = (
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetGraphicsRunningProcesses",
    "nvmlDeviceGetMPSComputeRunningProcesses",
)
#: No Linux gives out a PID from here on (linux/threads.h, ``PID_MAX_LIMIT``): a list with one was read with a wrong layout.
_PID_LIMIT: Final = 1 << 22


@contextmanager
def _nvml() -> Iterator[Any]:
    """The library, initialised."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        if error.value == _NO_PERMISSION:
            raise NotPermittedError(f"NVML does not answer: {error}") from error
        raise UnavailableError(f"no NVIDIA driver found: {error}", code="no-nvml") from error
    try:
        yield pynvml
    except pynvml.NVMLError as error:  # the caller has dealt with what it expects of a single GPU
        raise UnavailableError(f"the NVIDIA driver does not answer: {error}", code="no-nvml") from error
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def gpus() -> list[LocalGpu]:
    """All NVIDIA GPUs that answer, in the driver's order; of a GPU in MIG mode its instances, by the index of the whole.

    One that shares the machine's memory (GB10, Jetson Thor) has no size of its own; what is free is then ``MemAvailable``,
    which is what llama.cpp takes for it (ggml-cuda.cu, ``prop.integrated``).

    Raises:
        UnavailableError, NotPermittedError: the driver cannot be asked.
    """
    with _nvml() as nvml:
        driver = str(nvml.nvmlSystemGetDriverVersion())
        found = []
        for index in range(nvml.nvmlDeviceGetCount()):
            try:
                whole = nvml.nvmlDeviceGetHandleByIndex(index)
                instances = _instances(nvml, whole)
                for handle in [whole] if instances is None else instances:
                    uuid, name = str(nvml.nvmlDeviceGetUUID(handle)), str(nvml.nvmlDeviceGetName(handle))
                    total, free, unified = _memory(nvml, handle)
                    found.append(
                        LocalGpu(key=str(index), name=name, uuid=uuid, driver=driver, total_bytes=total, free_bytes=free,
                            shared=unified, mig=instances is not None)
                    )  # fmt: skip
            except nvml.NVMLError:
                continue  # a GPU that fell off the bus; the others answer
        return found


def _instances(nvml: Any, handle: Any) -> list[Any] | None:
    """Handles of a split GPU's instances; ``None`` for a GPU that is whole."""
    try:
        enabled, _ = nvml.nvmlDeviceGetMigMode(handle)
        slots = nvml.nvmlDeviceGetMaxMigDeviceCount(handle) if enabled else 0
    except nvml.NVMLError:
        return None  # a GPU, or a driver, without MIG
    if not enabled:
        return None
    found = []
    for slot in range(slots):
        with suppress(nvml.NVMLError):  # an empty slot
            found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, slot))
    return found


def free_bytes(uuid: str) -> int | None:
    """Free memory of a GPU now; ``None`` where the driver does not say.

    Raises:
        UnavailableError, NotPermittedError: the driver cannot be asked. NotFoundError: no such GPU.
    """
    with _nvml() as nvml:
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        except nvml.NVMLError as error:
            raise NotFoundError(f"the driver has no GPU {uuid}: {error}", code="no-such-gpu") from error
        return _memory(nvml, handle)[1]


def _memory(nvml: Any, handle: Any) -> tuple[int | None, int | None, bool]:
    """Total and free bytes, and whether the GPU has no memory of its own.

    The difference of the two is the same whether the driver counts what it reserves as used or not.
    """
    try:
        return (*_sizes(nvml, handle), False)
    except nvml.NVMLError as error:
        unified = error.value == _NOT_SUPPORTED
        return None, machine_available() if unified else None, unified


def _sizes(nvml: Any, handle: Any) -> tuple[int, int]:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return int(memory.total), int(memory.free)


def _raise_if_lost(error: Any) -> None:
    if error.value in (_GPU_IS_LOST, _RESET_REQUIRED):
        raise UntrustedError(f"a GPU was lost during the run: {error}", code="gpu-lost") from error


class NvmlMeter(BaselineMeter):
    """Memory of the engine's processes on the GPUs, or the instances of GPUs, named by UUID.

    Raises:
        UnavailableError, NotPermittedError: the driver cannot be asked. NotFoundError: no such GPU.
    """

    name: MeterName = "nvml"
    #: The process list takes the driver's global lock for milliseconds; the memory of a device costs it microseconds.
    interval: float = 0.25
    peek_interval: float = 0.05

    def __init__(self, uuids: Sequence[str]) -> None:
        super().__init__(uuids)
        self._context = _nvml()
        self._nvml = self._context.__enter__()
        try:
            self._handles = {uuid: self._nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids}
        except self._nvml.NVMLError as error:
            self.close()
            raise NotFoundError(f"the driver has no such GPU: {error}", code="no-such-gpu") from error

    def read(self, pids: frozenset[int]) -> Reading:
        """Sum of ``pids`` over the devices, or the devices' rise; other processes there are other_processes.

        Raises:
            UntrustedError: a GPU was lost, so the run is void.
        """
        devices: dict[str, int] = {}
        other_processes: dict[int, int | None] = {}
        why: str | None = None
        for uuid, handle in self._handles.items():
            used = self._processes(handle)
            if isinstance(used, str):
                return self.rise_instead(used, {}, listed=False)
            mine = {pid: size for pid, size in used.items() if pid in pids}
            for pid in used.keys() - pids:
                other_processes[pid] = _added(other_processes.get(pid, 0), used[pid])
            if any(size is None for size in mine.values()):
                why = "the driver gives no memory by process (N/A)"
            elif any(size == 0 for size in mine.values()):
                why = why or "the driver reports 0 bytes for a process with a context"
            elif mine:
                devices[uuid] = sum(size or 0 for size in mine.values())
        if not pids:
            return Reading(total_bytes=None, reason="the engine has no processes", other_processes=other_processes)
        why = why or (None if devices else self._unattributed(other_processes))
        if why is not None:
            return self.rise_instead(why, other_processes)
        return Reading(total_bytes=sum(devices.values()), devices=devices, other_processes=other_processes)

    def _unattributed(self, other_processes: dict[int, int | None]) -> str:
        """Why the list holds none of the engine's processes."""
        if not other_processes:
            return "the driver names no process on the GPU"
        if not any(Path(f"/proc/{pid}").exists() for pid in other_processes):
            return "the processes that the driver names are not visible here (a container needs pid: host)"
        return "none of the engine's processes is on the GPU"

    def occupancy(self) -> Occupancy:
        """What the GPUs hold now, and the processes on them."""
        processes: dict[int, int | None] = {}
        for handle in self._handles.values():
            used = self._processes(handle)
            for pid, size in ({} if isinstance(used, str) else used).items():
                processes[pid] = _added(processes.get(pid, 0), size)
        return Occupancy(devices=self.used(), processes=processes)

    def accounted(self, pids: frozenset[int]) -> int | None:
        """``maxMemoryUsage`` of the driver's accounting, which is read where an administrator has enabled it."""
        nvml, total = self._nvml, 0
        for handle in self._handles.values():
            try:
                if not nvml.nvmlDeviceGetAccountingMode(handle):
                    return None
            except nvml.NVMLError:
                return None
            for pid in pids:
                with suppress(nvml.NVMLError):  # not a process of this GPU
                    total += nvml.nvmlDeviceGetAccountingStats(handle, pid).maxMemoryUsage or 0
        return total or None

    def used(self) -> dict[str, int]:
        """A machine whose GPU shares the host's memory gives none."""
        used: dict[str, int] = {}
        for uuid, handle in self._handles.items():
            try:
                total, free = _sizes(self._nvml, handle)
            except self._nvml.NVMLError as error:
                _raise_if_lost(error)
                continue
            used[uuid] = total - free
        return used

    def _processes(self, handle: Any) -> dict[int, int | None] | str:
        """PID to bytes, every list merged (a process stands in several, with one figure); or why not."""
        merged: dict[int, int | None] = {}
        for name in _LISTS:
            answer = self._list(name, handle)
            if isinstance(answer, str):
                if name == _LISTS[0]:
                    return answer
                continue  # MPS or graphics lists are not everywhere
            for process in answer:
                pid = int(process.pid)
                if not 0 < pid < _PID_LIMIT:
                    return f"the driver's list of processes makes no sense (PID {pid}): nvidia-ml-py does not match the driver"
                size = None if process.usedGpuMemory is None else int(process.usedGpuMemory)
                known = merged.get(pid)
                merged[pid] = size if known is None else max(known, size or 0)
        return merged

    def _list(self, name: str, handle: Any) -> list[Any] | str:
        nvml = self._nvml
        call: Callable[[Any], list[Any]] = getattr(nvml, name)
        for _ in range(_TRIES):
            try:
                return list(call(handle))
            except nvml.NVMLLibraryMismatchError:
                call = getattr(nvml, f"{name}_v2")  # a driver before 510
            except nvml.NVMLError as error:
                _raise_if_lost(error)
                if error.value == _NOT_SUPPORTED:
                    return "the driver does not support memory by process here"
                if error.value == _NO_PERMISSION:
                    return "the driver does not permit us to see memory by process"
                if error.value != _INSUFFICIENT_SIZE:
                    return f"the driver does not answer: {error}"
        return "the driver's list of processes kept growing"

    def close(self) -> None:
        """Shut NVML down."""
        self._context.__exit__(None, None, None)


def _added(one: int | None, other: int | None) -> int | None:
    """The sum; unknown where a part is."""
    return None if one is None or other is None else one + other
