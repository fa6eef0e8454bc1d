"""What a load really takes, without a GPU: a device made of this machine's CPU, and a llama-server that fills it.

``ggml-rpc-server`` (:mod:`tests.support.rpc`) holds weights, caches and compute buffers in its own process, as a GPU would.
The engine's log says how many bytes lie there; the process's anonymous memory says it again, without our parser. glibc's
``MALLOC_PERTURB_`` makes reserved buffers resident, and a fixed mmap threshold gives freed ones back at once.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import httpx
import msgspec
import psutil

from harness.engines.llama_server.policy import LlamaServerPolicy
from harness.engines.llama_server.recipe import LlamaServer
from harness.errors import BusyError
from harness.fit.load_plan import BatchLimits
from harness.logs import parse_log
from harness.measure.calibrate import Result
from harness.measure.events import Observer
from harness.measure.prepare import prepare
from harness.model.calibration import Calibration
from harness.model.facts import LoadFacts
from harness.model.record import Record
from harness.options import FlashAttention, RunOptions
from harness.store.store import Store, read_record
from harness.units import KIB
from tests.support.rpc import programs
from tests.support.waiting import until

PROGRAMS: Final = programs()
#: Ollama's physical batch where nobody sets ``num_batch`` (server/sched.go, ``generationBatchForContext``, >= 0.30).
OLLAMA_BATCHES: Final[BatchLimits] = ((4096, 512), (32768, 1024), (1 << 31, 2048))
_PARTS: Final = ("weights_bytes", "kv_cache_bytes", "recurrent_bytes", "compute_bytes", "output_bytes")


class Mode(msgspec.Struct, frozen=True, kw_only=True):
    """Settings that decide how attention is computed and kept."""

    name: str
    flash_attention: FlashAttention
    kv_cache_type: str


MODES: Final = (
    Mode(name="f16, FA", flash_attention="on", kv_cache_type="f16"),
    Mode(name="q8_0, FA", flash_attention="on", kv_cache_type="q8_0"),
    Mode(name="f16, no FA", flash_attention="off", kv_cache_type="f16"),
)


class _OllamaBatches(LlamaServerPolicy):
    def batch_limits(self, version: str | None, *, target: str = "gpu", flash_attention: str = "auto") -> BatchLimits:
        return OLLAMA_BATCHES


class AsOllamaLoads(LlamaServer):
    """llama-server, loaded as Ollama loads it: the physical batch follows from the context."""

    policy = _OllamaBatches()  # type: ignore[misc]  # final for everyone but this test


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class Device:
    """A remote device of this machine's CPU; with ``resident``, whatever is reserved on it is real memory."""

    def __init__(self, folder: Path, *, resident: bool = False) -> None:
        self.name = "RPC0"
        self.env = {"GGML_VK_VISIBLE_DEVICES": ""}
        self.options: tuple[str, ...] = ()
        self._log = folder / f"device-{free_port()}.log"
        self._resident = resident
        self.deaths = 0

    def __enter__(self) -> Self:
        self._start()
        return self

    def _start(self) -> None:
        port = free_port()
        env = {**os.environ, "LD_LIBRARY_PATH": str(PROGRAMS), **self.env}
        if self._resident:
            env |= {"MALLOC_PERTURB_": "85", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        with self._log.open("wb") as log:
            self._server = subprocess.Popen(
                [PROGRAMS / "ggml-rpc-server", "-d", "CPU", "-p", str(port)], env=env, stdout=log, stderr=subprocess.STDOUT,
                restore_signals=False,  # Python ignores SIGPIPE: the device lives on when an engine is killed
            )  # fmt: skip
        until(self._listens, "the device")
        self.address = f"127.0.0.1:{port}"
        self.options = ("--rpc", self.address)

    def ended(self) -> bool:
        """Whether its process has ended: ggml-rpc-server may, when an engine is killed in the middle of a transfer."""
        return self._server.poll() is not None

    def ensure(self) -> None:
        """Start it again if it has ended; a device that was just started has nothing on it, like one that was freed."""
        if self.ended():
            self.deaths += 1
            self._start()

    def _listens(self) -> bool:
        assert self._server.poll() is None, self._log.read_text()
        return any(link.status == psutil.CONN_LISTEN for link in psutil.Process(self._server.pid).net_connections())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._server.kill()
        self._server.wait(200)

    def anonymous_bytes(self) -> int | None:
        """Anonymous memory of the device's process (``RssAnon`` of proc(5)); ``None`` where buffers are only reserved."""
        if not self._resident:
            return None
        match = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{self._server.pid}/status").read_text(), re.MULTILINE)
        assert match is not None
        return int(match[1]) * KIB

    def asked(self) -> dict[str, str]:
        """The environment with which harness finds the device."""
        return {"LLAMA_ARG_RPC": self.address, "LLAMA_ARG_FIT": "off", **self.env}


class SoftwareGpu(Device):
    """The software Vulkan device of Mesa; nothing but the log tells what lies on it."""

    def __init__(self) -> None:
        self.name = "Vulkan0"
        self.env = {"GGML_VK_VISIBLE_DEVICES": "0"}
        self.options = ()
        self._resident = False
        self.deaths = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return

    def ended(self) -> bool:
        return False

    def asked(self) -> dict[str, str]:
        return {"LLAMA_ARG_FIT": "off", **self.env}


class Truth(msgspec.Struct, frozen=True, kw_only=True):
    """One load as it was: bytes on the device by the log, and anonymous bytes of the device's process."""

    facts: LoadFacts
    logged: int
    anonymous: int | None


def load_truth(
    device: Device,
    model: Path,
    mode: Mode,
    context: int,
    *,
    num_batch: int = 512,
    num_parallel: int = 1,
    train_context: tuple[str, int] | None = None,
) -> Truth:
    """Load ``model`` at ``context`` tokens per slot, wait until it is there, look, and end it."""
    device.ensure()
    try:
        return _load(device, model, mode, context, num_batch, num_parallel, train_context)
    except AssertionError:
        if not device.ended():
            raise
        device.ensure()
        return _load(device, model, mode, context, num_batch, num_parallel, train_context)


def _load(
    device: Device,
    model: Path,
    mode: Mode,
    context: int,
    num_batch: int,
    num_parallel: int,
    train_context: tuple[str, int] | None,
) -> Truth:
    port = free_port()
    command = [str(PROGRAMS / "llama-server"), "-m", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["-c", str(context * num_parallel), "-np", str(num_parallel), "-b", str(max(num_batch, 2048))]
    command += ["-ub", str(num_batch), "-fa", mode.flash_attention, "-ctk", mode.kv_cache_type, "-ctv", mode.kv_cache_type]
    command += [*device.options, "-dev", device.name, "-ngl", "99", "-fit", "off", "--no-warmup", "--cache-ram", "0"]
    command += ["--log-verbosity", "4", "--no-log-prefix", "--no-log-timestamps"]
    if train_context is not None:
        command += ["--override-kv", f"{train_context[0]}.context_length=int:{train_context[1]}"]
    env = {**os.environ, "LD_LIBRARY_PATH": str(PROGRAMS), **device.env}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    pipe = process.stdout
    assert pipe is not None
    output = bytearray()
    os.set_blocking(pipe.fileno(), False)

    def loaded() -> bool:
        output.extend(pipe.read() or b"")
        assert process.poll() is None, output[-2000:].decode(errors="replace")
        return _healthy(client) and any(one.complete for one in parse_log(bytes(output)))

    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            until(loaded, f"{model.name} at {context} tokens", limit=300)
        anonymous = device.anonymous_bytes()
    finally:
        process.kill()
        process.wait(200)
        pipe.close()
    (facts,) = [one for one in parse_log(bytes(output)) if one.complete]
    assert facts.fully_offloaded, facts
    on_device = facts.devices[device.name]
    return Truth(facts=facts, logged=sum(getattr(on_device, part) or 0 for part in _PARTS), anonymous=anonymous)


def _healthy(client: httpx.Client) -> bool:
    try:
        return client.get("/health", timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def calibrate_on(
    device: Device,
    folder: Path,
    model: Path,
    mode: Mode,
    *,
    as_ollama: bool = False,
    train_context: tuple[str, int] | None = None,
) -> tuple[Record, Calibration]:
    """Record, fit and file a calibration of ``model`` with the default plan, as ``harness calibrate`` does."""
    device.ensure()
    env = device.asked()
    if train_context is not None:
        env["LLAMA_ARG_OVERRIDE_KV"] = f"{train_context[0]}.context_length=int:{train_context[1]}"
    asked = RunOptions(
        model=str(model),
        engine="llama-server",
        kv_cache_type=mode.kv_cache_type,
        flash_attention=mode.flash_attention,
        gpus=device.name,
        engine_binary=str(PROGRAMS / "llama-server"),
        env=env,
        speed=False,
        force=True,
    )
    session = prepare(asked, Store(folder), folder)
    # Without a number of layers there are no dry runs, which say how a model is split and nothing of its memory.
    known = msgspec.structs.replace(session.request.source.model, layers=None)
    source = msgspec.structs.replace(session.request.source, model=known)
    session = msgspec.structs.replace(session, request=msgspec.structs.replace(session.request, source=source))
    if as_ollama:
        session = msgspec.structs.replace(session, engine=AsOllamaLoads())

    def measured() -> Result | None:
        try:
            return session.calibrate(Observer())
        except BusyError:
            return None  # somebody else measures on the same device

    result = until(measured, f"{device.name} to be free", limit=600)
    assert result is not None
    return read_record(result.record), result.calibration
