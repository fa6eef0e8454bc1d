"""A process that takes memory of a GPU on command: a CUDA context, plain allocations, an end of either kind.

``python -m tests.gpu.cuda`` answers each line of its standard input with one line of JSON; :class:`Cuda` is the other side.
The driver's own library is used (``libcuda.so.1``, CUDA driver API), so that every byte is one that was asked for; ``torch``
shows a framework's context instead.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import psutil

ROOT: Final = Path(__file__).parents[2]


class CudaError(Exception):
    """The process cannot do what it was told; the message is the driver's."""


class Cuda:
    """A child process that holds memory of the first GPU; ``wrapper`` is a command that it is started through."""

    def __init__(self, *, wrapper: tuple[str, ...] = ()) -> None:
        self._process = subprocess.Popen(
            [*wrapper, sys.executable, "-m", "tests.gpu.cuda"],
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.end(kill=True)

    @property
    def pid(self) -> int:
        """Its PID on this machine, whatever namespace it lives in."""
        found = [self._process.pid, *(one.pid for one in psutil.Process(self._process.pid).children(recursive=True))]
        return found[-1]

    def __call__(self, command: str) -> dict[str, Any]:
        """Have it do something.

        Raises:
            CudaError: it could not, or has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError as error:
            raise CudaError(f"{command}: {error}") from error
        if not answer:
            raise CudaError(f"{command}: the process ended with {self._process.wait()}")
        done: dict[str, Any] = json.loads(answer)
        if "error" in done:
            raise CudaError(f"{command}: {done['error']}")
        return done

    def end(self, *, kill: bool = False) -> None:
        """End it: of itself, or by SIGKILL; returns when the process is gone."""
        if self._process.poll() is None:
            if kill:
                for child in psutil.Process(self._process.pid).children(recursive=True):
                    child.kill()
                self._process.kill()
            elif self._process.stdin is not None:
                self._process.stdin.close()
            self._process.wait(30)
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class _Driver:
    """libcuda, the primary context of device 0, and what was allocated in it."""

    def __init__(self) -> None:
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._call("cuInit", 0)
        self._held: list[ctypes.c_uint64] = []

    def _call(self, function: str, *arguments: Any) -> None:
        if code := getattr(self._cuda, function)(*arguments):
            raise CudaError(f"{function} returned {code}")

    def version(self) -> dict[str, Any]:
        number = ctypes.c_int()
        self._call("cuDriverGetVersion", ctypes.byref(number))
        return {"cuda": number.value}

    def context(self) -> dict[str, Any]:
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)
        return self.info()

    def info(self) -> dict[str, Any]:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return {"free": free.value, "total": total.value}

    def alloc(self, size: str) -> dict[str, Any]:
        block = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(block), ctypes.c_size_t(int(size)))
        self._held.append(block)
        return {"held": len(self._held)}

    def free(self) -> dict[str, Any]:
        while self._held:
            self._call("cuMemFree_v2", self._held.pop())
        return {"held": 0}


def _listed() -> dict[str, Any]:
    """The driver's list of processes as this process sees it."""
    from tests.gpu.driver import Driver

    with Driver() as driver:
        return {"pids": {str(pid): size for pid, size in driver.processes(0).items()}}


def _torch() -> dict[str, Any]:
    import torch

    held = torch.zeros(1 << 28, dtype=torch.float32, device="cuda")
    torch.cuda.synchronize()
    return {"asked": held.numel() * 4, "reserved": torch.cuda.memory_reserved(), "torch": torch.__version__}


def main() -> None:
    """Answer until standard input ends."""
    driver: _Driver | None = None
    for line in sys.stdin:
        name, *arguments = line.split()
        try:
            answer: dict[str, Any]
            if name == "torch":
                answer = _torch()
            elif name == "list":
                answer = _listed()
            else:
                driver = driver or _Driver()
                commands: dict[str, Callable[..., dict[str, Any]]] = {
                    "init": dict, "version": driver.version, "context": driver.context, "info": driver.info,
                    "alloc": driver.alloc, "free": driver.free,
                }  # fmt: skip
                answer = commands[name](*arguments)
        except (CudaError, OSError, ImportError, RuntimeError, AttributeError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
