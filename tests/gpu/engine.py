"""What a CUDA llama-server takes, measured by harness itself and asked again of the driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final
from unittest import mock

import httpx
import msgspec

from harness.errors import HarnessError, UntrustedError
from harness.fit.constants import fit_record
from harness.measure.calibrate import Session
from harness.measure.engine_log import read_facts
from harness.measure.events import Observer
from harness.measure.load import LoadRunner
from harness.measure.prepare import prepare
from harness.measure.setup import opened
from harness.model.facts import LoadFacts
from harness.model.record import Load, LoadRequest, Record, Speed
from harness.options import RunOptions
from harness.polling import poll
from harness.sandboxes.base import Running
from harness.store.store import Store, read_record
from harness.units import GIB
from tests.gpu.cuda import ROOT, Cuda
from tests.gpu.driver import Driver
from tests.gpu.shapes import SHAPES, write_shape

_PARTS: Final = (
    "weights_bytes", "lora_bytes", "projector_bytes", "kv_cache_bytes", "recurrent_bytes", "compute_bytes", "output_bytes",
)  # fmt: skip
#: Free memory in which a model is placed beside what the engine keeps free, as shares of what it is predicted to need.
CARDS: Final = (1.02, 1.003, 1.0006, 0.9994, 0.997, 0.8, 0.5, 0.25)
RESERVE: Final = GIB


class MissingError(Exception):
    """A section cannot be run here; the message says what is missing."""


class Kit:
    """What the sections share: a folder, models, a store, an engine."""

    def __init__(self, folder: Path, *, binary: str | None, models: tuple[str, ...]) -> None:
        self.folder, self.binary, self.models = folder, binary, models
        self.store = Store(folder / "store")
        self._partial: dict[str, Any] = {}
        self._stack = ExitStack()
        self._engines = 0

    def stop(self) -> None:
        """End what a section left running."""
        self._stack.close()

    def note(self, key: str, value: Any) -> None:
        """Keep a part of a section's result, should the section not come to its end."""
        self._partial.setdefault(key, []).append(value)

    def take_partial(self) -> dict[str, Any]:
        """What was noted since the last call."""
        found, self._partial = self._partial, {}
        return found

    def shape(self, name: str) -> str:
        """The name of a model that is among those asked for.

        Raises:
            MissingError: it is not, or there is no engine.
        """
        if self.binary is None:
            raise MissingError("no --engine-binary was given")
        if name not in self.models:
            raise MissingError(f"the model {name} was not asked for")
        return name

    def small(self) -> str:
        """The smallest of the models."""
        return self.shape(self.models[0])

    def middle(self) -> str:
        """The next larger one, where there is one."""
        return self.shape(self.models[min(1, len(self.models) - 1)])

    def model(self, name: str) -> Path:
        """The file of a model, written when it is first needed."""
        place = self.folder / "models"
        place.mkdir(exist_ok=True)
        path = place / f"{name}.gguf"
        return path if path.exists() else write_shape(SHAPES[name], place)

    def session(self, name: str, **options: Any) -> Session:
        """A calibration of a model by the engine that was named."""
        wanted = RunOptions(
            model=str(self.model(name)), engine="llama-server", sandbox="process", engine_binary=self.binary, force=True,
            timeout=120, **options,
        )  # fmt: skip
        return prepare(wanted, self.store, self.folder)

    def harness(self, *arguments: str) -> dict[str, Any]:
        """The JSON document of a command."""
        done = subprocess.run(
            [sys.executable, "-m", "harness", *arguments],
            cwd=self.folder, capture_output=True, text=True, check=False, timeout=120,
            env={**os.environ, "HARNESS_STORE": str(self.store.root), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        )  # fmt: skip
        if not done.stdout:
            raise RuntimeError(f"harness {' '.join(arguments)} said nothing: {done.stderr[-2000:]}")
        return dict(json.loads(done.stdout))

    def calibrate(self, name: str, **options: Any) -> dict[str, Any]:
        """Calibrate; what each load came to, and the error if the run is not to be trusted."""
        begin = time.monotonic()
        before = set(self.store.root.glob("runs/*"))
        result: dict[str, Any] = {"model": name}
        session = self.session(name, **options)
        result["reasons"] = session.choice.reasons
        try:
            result["artifact"] = session.calibrate(Observer()).artifact.read_text()
        except UntrustedError as error:
            result["error"] = {"code": error.code, "message": error.message}
        except HarnessError as error:
            result["error"] = {"code": error.code, "message": error.message, "tail": getattr(error, "tail", None)}
        result["seconds"] = round(time.monotonic() - begin, 1)
        for folder in set(self.store.root.glob("runs/*")) - before:
            record = read_record(folder / "record.json")
            result["run"] = record.run
            result["loads"] = [load_row(load) for load in record.loads]
            result["before"] = record.before and msgspec.to_builtins(record.before)
            result["after"] = record.after and msgspec.to_builtins(record.after)
            if "error" in result and record.status == "complete":
                result["fitted_all_the_same"] = self._fit_all_the_same(session, record)
        self.note("calibrations", result)
        return result

    def _fit_all_the_same(self, session: Session, record: Record) -> str:
        """An artifact of a run that is not to be trusted, so that what depends on one can be tried too."""
        with mock.patch("harness.fit.constants.check_overhead"), mock.patch("harness.fit.constants.MAX_ERROR", 1.0):
            try:
                calibration = fit_record(record)
            except HarnessError as error:
                return error.message
        path = session.artifact
        self.store.write(path, calibration)
        return path.read_text()

    @contextmanager
    def _runner(self, session: Session, title: str) -> Iterator[LoadRunner]:
        self._engines += 1
        folder = self.folder / "engines" / f"{self._engines:02d}-{title}"
        folder.mkdir(parents=True)
        with ExitStack() as stack:
            setup = opened(session.engine, session.choice, session.options, Observer())
            sandbox, meter = stack.enter_context(setup)
            runner = LoadRunner(
                engine=session.engine, sandbox=sandbox, meter=meter, options=session.options, folder=folder,
                observer=Observer(),
            )  # fmt: skip
            runner.take_baseline()
            stack.callback(runner.stop)
            self._stack.callback(runner.stop)
            yield runner

    @contextmanager
    def loaded(self, name: str, context: int, *, batch: int = 512, purpose: str = "speed", **options: Any) -> Iterator[Loaded]:
        """An engine that has loaded a model; with its own defaults, or as a load that is measured (``point``)."""
        session = self.session(name, **options)
        request = LoadRequest(context=context, num_batch=batch, purpose=purpose)  # type: ignore[arg-type]
        with self._runner(session, f"{name}-{context}-{batch}") as runner:
            yield Loaded(session, runner, runner.start(session.request.source, request), request)

    def decided(self, name: str, context: int, **options: Any) -> dict[str, Any]:
        """Where the engine puts the layers of a model; it is ended before it loads them."""
        session = self.session(name, **options)
        with self._runner(session, f"{name}-{context}-decision") as runner:
            running = runner.launch(session.request.source, LoadRequest(context=context, num_batch=512, purpose="speed"))
            done = poll(
                lambda: running.exit_status() is not None or b"common_fit_params: " in running.log.read_bytes(), limit=60
            )
            reason = None if done else "it did not decide within a minute"
        text = running.log.read_text(errors="replace")
        lines = [
            line.partition(": ")[2].strip() for line in text.splitlines() if "fit_impl" in line or "breakdown_print" in line
        ]
        return {"reason": reason, "log": running.log.parent.name, "fit": lines}


class Loaded:
    """A model in an engine."""

    def __init__(self, session: Session, runner: LoadRunner, running: Running, request: LoadRequest) -> None:
        self._session, self.runner, self.running, self._request = session, runner, running, request

    def read(self) -> int | None:
        """Bytes of its processes, now."""
        return self.runner.meter.read(self.running.pids()).total_bytes

    def settled(self) -> int | None:
        """Bytes of its processes once three readings agree."""
        last: list[int | None] = []
        for _ in range(20):
            last = [*last[-2:], self.read()]
            if len(last) == 3 and len(set(last)) == 1:
                break
            time.sleep(0.1)
        return last[-1]

    def generate(self, prompt: int, tokens: int) -> Speed:
        """Have it answer a prompt of so many tokens."""
        with httpx.Client(base_url=self.running.endpoint, trust_env=False, timeout=300) as client:
            return self._session.engine.generate(
                client, self._session.request.source, self._request, self._session.options, prompt, tokens
            )

    def facts(self) -> LoadFacts | None:
        """What its log says so far."""
        return read_facts(self.running.log, 0, None, self._session.engine.policy)


def logged_bytes(facts: LoadFacts | None) -> int | None:
    """All buffers on GPUs, as logged."""
    return None if facts is None else sum(facts.total(part, "gpu") or 0 for part in _PARTS)


def load_row(load: Load) -> dict[str, Any]:
    """One load of a record, flat."""
    facts, trace = load.facts, load.trace
    logged = logged_bytes(facts)

    def over(total: int | None) -> int | None:
        return None if total is None or logged is None else total - logged

    idle, busy = (None if plateau is None else plateau.total_bytes for plateau in (load.idle, load.busy))
    return {
        "purpose": load.request.purpose, "context": load.request.context, "batch": load.request.num_batch,
        "outcome": load.outcome, "reason": load.reason, "logged": logged, "idle": idle, "busy": busy,
        "overhead_idle": over(idle), "overhead_busy": over(busy),
        "spread": load.busy and load.busy.spread_bytes, "basis": load.busy and load.busy.basis,
        "device_peak": trace and trace.device_peak_bytes, "readings": trace and trace.readings,
        "failures": trace and trace.failures, "strangers": trace and trace.other_processes, "left": load.left_bytes,
        "ready_s": load.ready and round(load.ready - load.started, 2), "settle_s": load.settle_seconds,
        "layers": facts and [facts.layers_offloaded, facts.layers_total], "graph_splits": facts and facts.graph_splits,
        "flash_attention": facts and facts.flash_attention,
        "devices": facts and msgspec.to_builtins(facts.devices),
        "speeds": [msgspec.to_builtins(speed) for speed in load.speeds],
    }  # fmt: skip


def batches(kit: Kit) -> dict[str, Any]:
    """Overheads of one model at three physical batches, near and far: do they differ by batch, by context?"""
    loads = tuple(LoadRequest(context=context, num_batch=batch) for batch in (512, 1024, 2048) for context in (8192, 32_768))
    return kit.calibrate(kit.small(), loads=loads, speed=False, variant="batches")


def middle(kit: Kit) -> dict[str, Any]:
    """A calibration as a user makes it, speeds included."""
    name = kit.middle()
    return kit.calibrate(name, contexts=(8192, 32768, kit_top(name)))


def middle_batches(kit: Kit) -> dict[str, Any]:
    """Another model, with quantised weights, at three batches."""
    name = kit.middle()
    loads = [LoadRequest(context=8192, num_batch=batch) for batch in (512, 1024, 2048)]
    loads.append(LoadRequest(context=kit_top(name), num_batch=2048))
    return kit.calibrate(name, loads=tuple(loads), speed=False, variant="batches")


def large(kit: Kit) -> dict[str, Any]:
    """A model that fills the better part of the card at its longest context."""
    return kit.calibrate(kit.shape("large-32b"), contexts=(8192, 32768, 131_072), speed=False)


def kit_top(name: str) -> int:
    """The training context of a shape."""
    return SHAPES[name].train_context


def filled(kit: Kit) -> dict[str, Any]:
    """What grows after the load: first token, first real batch, half the context, all of it."""
    found = {}
    for name, batch, cache in ((kit.small(), 512, None), (kit.small(), 512, "q8_0")):
        top = kit_top(name)
        with kit.loaded(name, top, batch=batch, purpose="point", kv_cache_type=cache) as engine:
            rows: list[dict[str, Any]] = [{"prompt": 0, "total": engine.settled()}]
            for prompt in (1, batch, 2 * batch, 4 * batch, top // 2, top - 64):
                speed = engine.generate(prompt, 1)
                rows.append({"prompt": prompt, "total": engine.settled(), "tokens_per_s": speed.prompt_tokens_per_s})
            facts = engine.facts()
            found[f"{name} at batch {batch}, cache {cache or 'f16'}"] = {
                "logged": logged_bytes(facts), "rows": rows, "devices": facts and msgspec.to_builtins(facts.devices),
            }  # fmt: skip
        kit.note("filled", found)
    return found


def sampling(kit: Kit) -> dict[str, Any]:
    """Whether reading the driver slows the engine down: decode speed with no reader, at harness's rate, and without a pause."""
    found: dict[str, Any] = {}
    with kit.loaded(kit.small(), 8192) as engine:
        engine.generate(512, 64)
        for name, pause in (("none", None), ("4 Hz", 0.25), ("no pause", 0.0), ("none again", None)):
            with _reader(engine.read, pause) as count:
                speed = engine.generate(512, 384)
            found[name] = {"decode_tokens_per_s": speed.decode_tokens_per_s, "readings": count()}
    return found


@contextmanager
def _reader(read: Callable[[], object], pause: float | None) -> Iterator[Callable[[], int]]:
    """Reads again and again in a thread of its own; gives a function that says how often it has."""
    done, count = threading.Event(), [0]

    def go() -> None:
        while not done.is_set():
            read()
            count[0] += 1
            done.wait(pause)

    thread = threading.Thread(target=go, daemon=True)
    if pause is not None:
        thread.start()
    try:
        yield lambda: count[0]
    finally:
        done.set()
        if pause is not None:
            thread.join(10)


def edge(kit: Kit) -> dict[str, Any]:
    """Verdicts on cards of many sizes, acted out by a process that holds the rest, and what the engine then does."""
    return cards(kit, kit.middle(), 32_768, CARDS)


def edge_moe(kit: Kit) -> dict[str, Any]:
    """The same of a model with experts."""
    name = kit.shape("moe")
    calibrated = kit.calibrate(name, contexts=(8192, 16384, 32768))
    return {"calibration": calibrated, **cards(kit, name, 32_768, (1.003, 0.997, 0.8, 0.5, 0.25))}


def cards(kit: Kit, name: str, context: int, shares: Sequence[float]) -> dict[str, Any]:
    """Judge and then load the model with less and less free memory."""
    which = f"llama-server/{name}"
    asked = kit.harness("check", which, "--ctx", str(context), "--available", "1000GiB", "--json")
    if asked["status"] != "ok":
        raise MissingError(f"there is no calibration of {name}: {asked['errors']}")
    need, reserve = asked["data"]["required_bytes"], asked["data"]["reserve_bytes"]
    rows: list[dict[str, Any]] = []
    with Driver() as driver, Cuda() as ballast:
        ballast("context")
        for share in shares:
            ballast("free")
            free = driver.memory(0)["free"]
            hold = free - round(need * share) - reserve
            if hold <= 0:
                rows.append({"share": share, "skipped": f"the GPU has only {free} bytes free"})
                continue
            ballast(f"alloc {hold}")
            row: dict[str, Any] = {"share": share, "free": driver.memory(0)["free"], "needed": need}
            checked = kit.harness("check", which, "--ctx", str(context), "--json")
            row["check"] = {key: checked["data"].get(key) for key in _VERDICT} | {"exit": checked["exit_code"]}
            with kit.loaded(name, context) as engine:
                facts = engine.facts()
                row["read"] = engine.read()
                speeds = [engine.generate(64, 32) for _ in range(2)]
                row["engine"] = facts and {
                    "layers": facts.layers_offloaded, "of": facts.layers_total, "overflowing": facts.layers_overflowing,
                    "fully": facts.fully_offloaded, "logged": logged_bytes(facts),
                    "fit": facts.fit and msgspec.to_builtins(facts.fit),
                }  # fmt: skip
                row["decode_tokens_per_s"] = speeds[-1].decode_tokens_per_s
            rows.append(row)
            kit.note("cards", row)
    return {"model": name, "context": context, "cards": rows}


_VERDICT: Final = (
    "verdict", "required_bytes", "reserve_bytes", "available_bytes", "short_bytes", "layers_total", "layers_offloaded",
    "layers_overflowing", "decode_tokens_per_s", "max_context", "margin_bytes", "tight",
)  # fmt: skip


def devices(kit: Kit) -> dict[str, Any]:
    """One model over several devices: the engine shares one card out as two, and as four."""
    name = kit.middle()
    rows: list[dict[str, Any]] = []
    with Driver() as driver, Cuda() as ballast:
        ballast("context")
        whole = driver.memory(0)["free"]
        for count in (2, 4):
            for context, budget in ((8192, None), (kit_top(name), None), (32_768, 12 * GIB), (32_768, 9 * GIB)):
                ballast("free")
                if budget is not None and whole > budget:
                    ballast(f"alloc {driver.memory(0)['free'] - budget}")
                row: dict[str, Any] = {"devices": count, "context": context, "free": driver.memory(0)["free"]}
                try:
                    with kit.loaded(name, context, env={"GGML_CUDA_DEVICES": str(count)}) as engine:
                        row["idle"] = engine.read()
                        row["speed"] = msgspec.to_builtins(engine.generate(1024, 32))
                        row["busy"] = engine.settled()
                        facts = engine.facts()
                        row["logged"] = logged_bytes(facts)
                        row["log"] = engine.running.log.parent.name
                        row["facts"] = facts and facts.to_json()
                except HarnessError as error:
                    row["error"] = error.message
                rows.append(row)
                kit.note("devices", row)
    return {"model": name, "rows": rows}


def variants(kit: Kit) -> dict[str, Any]:
    """What grows without flash attention, and with two slots: prompts of two batches, of half the context, of all of it."""
    cases: list[tuple[str, int, int, dict[str, Any]]] = [
        ("two slots", 16_384, 512, {"num_parallel": 2}),
        *((f"no flash attention, batch {batch}", context, batch, {"flash_attention": "off"})
            for context, batch in ((16_384, 512), (16_384, 1024))),
    ]  # fmt: skip
    found = {}
    name = kit.small()
    for title, context, batch, options in cases:
        with kit.loaded(name, context, batch=batch, purpose="point", **options) as engine:
            rows: list[dict[str, Any]] = [{"prompt": 0, "total": engine.settled()}]
            for prompt in (2 * batch, context // 2, context - 64):
                speed = engine.generate(prompt, 1)
                rows.append({"prompt": prompt, "total": engine.settled(), "tokens_per_s": speed.prompt_tokens_per_s})
            found[f"{name} at {context}: {title}"] = {"logged": logged_bytes(engine.facts()), "rows": rows}
        kit.note("variants", found)
    return found


def unfused(kit: Kit) -> dict[str, Any]:
    """Without flash attention: a calibration, and what it predicts for twice its largest context against a full one."""
    name, far = kit.small(), 65_536
    options: dict[str, Any] = {"flash_attention": "off"}
    found = kit.calibrate(name, contexts=(8192, 16_384, 32_768), speed=False, variant="unfused", **options)
    predicted = kit.harness("predict", f"llama-server/{name}", "--variant", "unfused", "--ctx", str(far), "--json")
    with kit.loaded(name, far, purpose="point", **options) as engine:
        speed = engine.generate(far - 64, 1)
        found["far"] = {
            "context": far, "predicted": predicted["data"], "logged": logged_bytes(engine.facts()),
            "total": engine.settled(), "tokens_per_s": speed.prompt_tokens_per_s,
        }  # fmt: skip
    return found


def edge_small(kit: Kit) -> dict[str, Any]:
    """Verdicts for weights whose multiplications need a workspace beside them (F16)."""
    name = kit.small()
    calibrated = kit.calibrate(name, contexts=(8192, 32_768, kit_top(name)))
    return {"calibration": calibrated, **cards(kit, name, 32_768, (1.02, 1.003, 0.997, 0.5))}


def decisions(kit: Kit) -> dict[str, Any]:
    """Where the engine puts the layers over two and four devices with less and less free memory."""
    rows: list[dict[str, Any]] = []
    names = [name for name in (kit.middle(), "moe") if name in kit.models]
    with Driver() as driver, Cuda() as ballast:
        ballast("context")
        for name in names:
            size = kit.model(name).stat().st_size
            for count in (2, 4):
                for share in (2.0, 1.6, 1.2, 0.8):
                    ballast("free")
                    hold = driver.memory(0)["free"] - round(size * share) - (count + 1) * RESERVE
                    if hold <= 0:
                        continue
                    ballast(f"alloc {hold}")
                    row = {"model": name, "devices": count, "share": share, "free": driver.memory(0)["free"]}
                    rows.append(row | kit.decided(name, 32_768, env={"GGML_CUDA_DEVICES": str(count)}))
                    kit.note("decisions", rows[-1])
    return {"rows": rows}


def ollama(kit: Kit) -> dict[str, Any]:
    """The same small model in Ollama's container, where Docker, its GPU and the image are here."""
    from harness.inventory.docker import docker_gpu_obstacle

    if (obstacle := docker_gpu_obstacle()) is not None:
        raise MissingError(obstacle)
    from harness.sandboxes.docker_client import Daemon
    from harness.store.catalog import pinned_image

    image = pinned_image("ollama", ROOT)
    with Daemon() as daemon:
        if image is None or daemon.image(image) is None:
            raise MissingError(f"the image {image} is not on this machine (docker pull {image})")
    path = kit.model(kit.models[0])
    options = RunOptions(model=str(path), engine="ollama", image=image, contexts=(8192, 16384, 32768), force=True)
    result = prepare(options, kit.store, kit.folder).calibrate(Observer())
    return {"image": image, "artifact": result.artifact.read_text()}


SECTIONS: Final[dict[str, tuple[Callable[[Kit], dict[str, Any]], float]]] = {
    "batches": (batches, 90),
    "middle": (middle, 120),
    "edge": (edge, 100),
    "devices": (devices, 90),
    "filled": (filled, 70),
    "middle batches": (middle_batches, 60),
    "variants": (variants, 70),
    "sampling": (sampling, 30),
    "no flash attention": (unfused, 90),
    "edge small": (edge_small, 100),
    "edge moe": (edge_moe, 110),
    "large": (large, 120),
    "decisions": (decisions, 120),
    "ollama": (ollama, 120),
}
