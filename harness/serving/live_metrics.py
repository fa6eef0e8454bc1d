"""``harness exporter``: what runs on this machine, measured now, beside what its calibration predicts.

One walk through ``/proc`` finds processes that have a model; calibrations are read again only when a file of the store has
changed. What cannot be read has no sample: nothing is exported as 0 that is unknown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

import msgspec

from harness.engines.registry import BUILT_IN, policy_of, running_servers
from harness.engines.running import RunningServer
from harness.errors import HarnessError
from harness.exports.prometheus import MetricSample
from harness.installation import install_hint
from harness.inventory.machine import ModelProcess, model_processes, process_names
from harness.meters.host import HostMeter, available_memory
from harness.model.calibration import Calibration
from harness.model.gpu import LocalGpu
from harness.prediction.memory import predict
from harness.prediction.settings import derive
from harness.prediction.verdict import judge
from harness.store.store import Store

#: What is measured, beside :data:`harness.exports.prometheus.METRICS`.
METRICS: Final[dict[str, str]] = {
    "harness_memory_predicted_bytes": "Predicted memory of a model that runs, as it was started.",
    "harness_memory_uncertainty_bytes": "Half the width of the prediction interval.",
    "harness_memory_measured_bytes": "Memory of the model's processes now, by the meter of its calibration.",
    "harness_memory_margin_bytes": "What its start leaves to spare: free and measured, less predicted and the reserve.",
    "harness_memory_engine_bytes": "Memory of the model by the engine's own account, by place.",
    "harness_memory_free_bytes": "Free memory of a device now.",
    "harness_layers": "Layers of a model that runs, the output layer among them.",
    "harness_layers_spilled": "Layers that the engine leaves on the host with what is there, as predicted.",
    "harness_context_tokens": "Tokens per slot with which a model runs.",
    "harness_calibration_outdated": "1 where the engine that runs is not of the version that was calibrated.",
    "harness_up": "1 where everything could be read.",
    "harness_collect_seconds": "How long the last collection took.",
}


class ProcessMeter(Protocol):
    """The part of a GPU's meter that is needed."""

    def accounted(self, pids: frozenset[int]) -> int | None:
        """Memory of processes on one device; ``None`` where it is not said."""


class Exporter:
    """Collects samples; keeps meters open and calibrations in memory between two collections."""

    def __init__(
        self,
        store: Store,
        *,
        proc: Path = Path("/proc"),
        gpus: Callable[[], Sequence[LocalGpu]] | None = None,
        meter: Callable[[str], ProcessMeter] | None = None,
        servers: Callable[[str], Sequence[RunningServer]] = running_servers,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._proc, self._servers, self._clock = store, proc, servers, clock
        self._gpus, self._open = gpus or _nvidia, meter or _nvml_meter
        self._meters: dict[str, ProcessMeter] = {}
        self._stamp: tuple[tuple[str, int], ...] = ()
        self._whole = True  # whether all calibrations could be read
        self._known: dict[tuple[str, str], list[tuple[str, Calibration]]] = {}

    def samples(self) -> list[MetricSample]:
        """Everything that can be said now."""
        start = self._clock()
        found: list[MetricSample] = []
        self._read_store()
        complete = self._whole
        try:
            devices = list(self._gpus())
        except HarnessError:
            devices = []  # no NVIDIA driver: models in host memory are still measured
        found += [
            _sample("harness_memory_free_bytes", {"device": one.name}, one.free_bytes)
            for one in devices
            if one.free_bytes is not None
        ]
        servers = {engine: tuple(self._servers(engine)) for engine in BUILT_IN}
        for engine, some in servers.items():
            found += _own_account(engine, some)
        for loaded in model_processes(self._proc):
            try:
                found += self._of(loaded, devices, servers.get(loaded.engine, ()))
            except HarnessError:
                complete = False
        found.append(_sample("harness_collect_seconds", {}, self._clock() - start))
        found.append(_sample("harness_up", {}, float(complete)))
        return found

    def _read_store(self) -> None:
        """Read calibrations where a file has changed."""
        stamp = []
        for path in self._store.paths():
            with suppress(OSError):  # it went away meanwhile
                stamp.append((str(path), path.stat().st_mtime_ns))
        if tuple(stamp) == self._stamp:
            return
        self._known, self._whole = {}, True

        def failed(_: str) -> None:
            self._whole = False

        for entry in self._store.entries(failed):
            calibration = entry.calibration
            for name in process_names(calibration):
                self._known.setdefault((calibration.engine, name), []).append((entry.key, calibration))
        self._stamp = tuple(stamp)

    def _of(self, loaded: ModelProcess, devices: list[LocalGpu], servers: Sequence[RunningServer]) -> Iterator[MetricSample]:
        candidates = [pair for name in sorted(loaded.names) for pair in self._known.get((loaded.engine, name), ())]
        if not candidates:
            return
        names = {one.name for one in devices}
        here = [pair for pair in candidates if {gpu.name for gpu in pair[1].metadata.machine.gpus} <= names]
        key, calibration = (here or candidates)[0]
        labels = {"model": calibration.metadata.model.name, "engine": calibration.engine, "calibration": key}
        measured = self._measured(loaded, calibration, devices)
        for device, size in measured.items():
            yield _sample("harness_memory_measured_bytes", {**labels, "device": device}, size)
        version = next((one.version for one in servers if one.version), None)
        if version is not None and calibration.metadata.engine.version is not None:
            yield _sample("harness_calibration_outdated", labels, float(version != calibration.metadata.engine.version))
        context = loaded.context or next(
            (model.context for one in servers for model in one.models if model.name in (labels["model"], *loaded.names)), None
        )
        if context is not None:
            yield from self._predicted(loaded, calibration, context, labels, measured, devices)

    def _predicted(
        self,
        loaded: ModelProcess,
        calibration: Calibration,
        context: int,
        labels: dict[str, str],
        measured: dict[str, int],
        devices: list[LocalGpu],
    ) -> Iterator[MetricSample]:
        """What the calibration says of the settings that run; nothing where it does not say anything of them."""
        rules = policy_of(calibration.engine)
        asked = msgspec.structs.replace(loaded.settings, num_parallel=loaded.num_parallel)
        at = derive(calibration, asked, ggml_caches=rules.ggml_caches)
        on_gpu = calibration.metadata.machine.target == "gpu" and rules.loads_files
        layers = calibration.metadata.model.layers if on_gpu else None
        if layers is not None and loaded.gpu_layers is not None and loaded.gpu_layers <= layers:
            return
        if at.obstacles or loaded.placed or context > calibration.metadata.quality.valid_to:
            return
        device = next(iter(measured)) if len(measured) == 1 else "all"
        labels = {**labels, "device": device}
        needed = predict(at.calibration, context, loaded.num_parallel)
        yield _sample("harness_context_tokens", labels, context)
        yield _sample("harness_memory_predicted_bytes", labels, needed.total_bytes)
        yield _sample("harness_memory_uncertainty_bytes", labels, needed.uncertainty_bytes)
        if calibration.metadata.machine.target == "host":
            free = available_memory(self._proc)
        else:
            free = next((one.free_bytes for one in devices if one.name == device), None)
        if free is None or len(measured) != 1:
            return
        verdict = judge(at.calibration, context, loaded.num_parallel, (free + measured[device],), rules)
        if verdict.margin_bytes is not None:
            yield _sample("harness_memory_margin_bytes", labels, verdict.margin_bytes)
        if verdict.layers_total is not None and verdict.layers_offloaded is not None:
            yield _sample("harness_layers", labels, verdict.layers_total)
            yield _sample("harness_layers_spilled", labels, verdict.layers_total - verdict.layers_offloaded)

    def _measured(self, loaded: ModelProcess, calibration: Calibration, devices: list[LocalGpu]) -> dict[str, int]:
        pids = frozenset(_with_children(loaded.pid))
        if calibration.metadata.machine.target == "host":
            size = HostMeter(self._proc).read(pids).total_bytes
            return {} if size is None else {"host": size}
        found = {}
        for gpu in devices:
            if gpu.uuid is None:
                continue
            if gpu.uuid not in self._meters:
                self._meters[gpu.uuid] = self._open(gpu.uuid)
            if size := self._meters[gpu.uuid].accounted(pids):
                found[gpu.name] = size
        return found


def _own_account(engine: str, servers: Sequence[RunningServer]) -> Iterator[MetricSample]:
    for model in (model for server in servers for model in server.models):
        if model.size_bytes is not None:
            gpu = model.gpu_bytes or 0
            for place, size in (("gpu", gpu), ("host", model.size_bytes - gpu)):
                yield _sample("harness_memory_engine_bytes", {"model": model.name, "engine": engine, "place": place}, size)


def _sample(name: str, labels: dict[str, str], value: float) -> MetricSample:
    return MetricSample(name, labels, value)


def _with_children(pid: int) -> list[int]:
    import psutil

    try:
        return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.Error:
        return [pid]


def _nvidia() -> Sequence[LocalGpu]:
    from harness.meters.nvml import gpus

    return gpus()


def _nvml_meter(uuid: str) -> ProcessMeter:
    from harness.meters.nvml import NvmlMeter

    return NvmlMeter([uuid])


def listen(exporter: Exporter, address: str, port: int) -> Callable[[], None]:
    """Answer scrapes on an address of this machine, as OpenMetrics where it is asked for; the result ends it.

    Raises:
        UnavailableError: ``prometheus-client`` is not installed, or the port is taken.
    """
    from harness.errors import UnavailableError

    try:
        from prometheus_client import CollectorRegistry, start_http_server
        from prometheus_client.core import GaugeMetricFamily
    except ImportError as error:
        raise UnavailableError(
            "prometheus-client is not installed", hint=f"{install_hint('exporter')}; or --textfile FILE",
            code="no-prometheus-client",
        ) from error  # fmt: skip

    class Collector:
        def collect(self) -> Iterator[GaugeMetricFamily]:
            families: dict[str, GaugeMetricFamily] = {}
            for sample in exporter.samples():
                family = families.setdefault(
                    sample.name, GaugeMetricFamily(sample.name, METRICS[sample.name], labels=list(sample.labels))
                )
                family.add_metric(list(sample.labels.values()), sample.value)
            yield from families.values()

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector())
    try:
        server, thread = start_http_server(port, addr=address, registry=registry)
    except OSError as error:
        raise UnavailableError(f"{address}:{port} cannot be listened on: {error.strerror}", code="port-taken") from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return stop
