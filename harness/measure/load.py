"""One load, from start to end: launch, wait, settle, prompt, time, unload. Every wait has a deadline and watches the engine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from harness.engines.base import NO_ANSWER, Engine, Options, Source
from harness.engines.settings import hidden
from harness.errors import BusyError, EngineError, HarnessError, UnavailableError, WontFitError
from harness.measure.engine_log import await_facts, check_alive, explain_image, read_facts, refuse_without_gpu
from harness.measure.events import Observer
from harness.measure.kills import KillWatch
from harness.measure.load_state import LoadState
from harness.measure.program import ProgramWatch
from harness.measure.timing import CpuWatch, busy_before, prompt_length, prompts_to_time
from harness.meters.base import DeviceMeter, Meter
from harness.meters.sampler import Sampler
from harness.model.record import EngineVersion, Gpu, Load, LoadOutcome, LoadRequest, Speed
from harness.model.trace import BASELINE_TOLERANCE, Occupancy, Plateau
from harness.polling import poll
from harness.sandboxes.base import Running, Sandbox
from harness.sandboxes.tail import last_lines
from harness.text import one_line

if TYPE_CHECKING:
    import httpx

#: How long a plateau may take to settle, seconds.
SETTLE: Final = 15.0
#: A driver takes its time to free memory: how long it may take to come back after an unload, seconds.
RETURN: Final = 10.0
#: Tokens written when a speed is measured.
DECODE_TOKENS: Final = 48

#: How long the last lines of a load may take to arrive, and an engine that hung up may take to end, seconds.
LAST_LINES: Final = 5.0
HUNG_UP: Final = 2.0
#: How long the processes of an unloaded model may take to end, seconds.
UNLOAD: Final = 60.0
#: Called at each named stage of a load; tests inject faults here.
StageHook = Callable[[str], None]


def no_hook(stage: str) -> None:
    """Do nothing at any stage."""


class LoadRunner:
    """Makes loads in one sandbox with one engine; keeps a persistent engine between them.

    Times in the loads are seconds since the runner was made.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        sandbox: Sandbox,
        meter: Meter,
        options: Options,
        folder: Path,
        observer: Observer,
        hook: StageHook = no_hook,
        port: int | None = None,
        gpus: tuple[Gpu, ...] = (),
    ) -> None:
        self.engine, self.sandbox, self.meter, self.options = engine, sandbox, meter, options
        self.folder, self.observer, self.hook, self.port = folder, observer, hook, port
        self._gpus = gpus
        self._began = time.monotonic()
        self.running: Running | None = None
        #: The engine as its container and its server tell it; ``None`` for a process.
        self.identity: EngineVersion | None = None
        self._starts = 0
        self._program = ProgramWatch(engine, options) if sandbox.name == "process" else None
        self._others: frozenset[int] = frozenset()

    def take_baseline(self) -> Occupancy | None:
        """What the target's devices hold before anything is started; ``None`` where the meter sees no devices."""
        return self.meter.take_baseline() if isinstance(self.meter, DeviceMeter) else None

    def occupancy(self) -> Occupancy | None:
        """What they hold now."""
        return self.meter.occupancy() if isinstance(self.meter, DeviceMeter) else None

    def _await_return(self, state: LoadState) -> None:
        """After an unload: wait until the devices are back at their baseline, and note what they still hold."""
        meter = self.meter
        if not isinstance(meter, DeviceMeter):
            return
        begin = time.monotonic()
        risen: dict[str, int] = {}

        def returned() -> bool:
            nonlocal risen
            risen = meter.risen()
            return max(risen.values(), default=0) <= BASELINE_TOLERANCE

        poll(returned, limit=RETURN, every=0.1)
        if risen:
            state.left = sum(size for size in risen.values() if size > BASELINE_TOLERANCE)
        state.settled += time.monotonic() - begin

    def now(self) -> float:
        """Seconds since the run began."""
        return round(time.monotonic() - self._began, 3)

    def start(self, source: Source, request: LoadRequest | None, begin: Callable[[], None] = lambda: None) -> Running:
        """Start the engine and wait until it answers; ``begin`` is called as soon as it runs."""
        running = self.launch(source, request)
        begin()
        try:
            self.await_ready(running)
        except (EngineError, BusyError) as error:
            explain_image(error, running.image, self.engine.policy)
            raise
        if self.options.target == "gpu":
            refuse_without_gpu(running, self.engine.policy, self._gpus)
        if not self.engine.persistent:
            running.end_network()  # what it loads, it has
        if self.identity is None and (running.image is not None or self.engine.persistent):
            with self.client(running) as client:
                version = self.engine.version(self.options, client).version
            version = None if version is None else one_line(version, 64)
            image = running.image
            self.identity = EngineVersion(
                version=version,
                image=None if image is None else image.reference,
                image_digest=None if image is None else image.digest,
                named=self.options.named,
            )
        return running

    def launch(self, source: Source, request: LoadRequest | None) -> Running:
        """Start the engine, and do not wait for it."""
        site = self.sandbox.site(self.port)
        launch = self.engine.launch(source, request, self.options, site)
        launch = msgspec.structs.replace(launch, hidden=hidden(self.options.env))
        log = self.folder / f"engine-{self._starts}.log"
        self._starts += 1
        self.hook("start")
        self.running = self.sandbox.start(launch, site, log)
        self.hook("started")
        return self.running

    def prepare(self, source: Source, request: LoadRequest | None = None) -> Source:
        """Start a persistent engine and make the model present in it; what is known of the model then."""
        running = self.start(source, request)
        with self.client(running) as client, self._watching(running):
            found = self.engine.prepare(client, source, self.options, self.observer.progress)
        running.end_network()  # the model is here
        return found

    def _started(self, source: Source, request: LoadRequest, begin: Callable[[], None] = lambda: None) -> Running:
        """The engine of a load; ``begin`` is called as soon as its memory is the load's. A persistent one runs on."""
        if self._program is not None:
            self._program.check()
        if not self.engine.persistent:
            return self.start(source, request, begin)
        if self.running is None:
            self.prepare(source)
        assert self.running is not None  # noqa: S101 - prepare() has set it
        self._others = self.running.pids()
        begin()
        return self.running

    def _measured(self) -> frozenset[int]:
        """The processes of a load. On the host an engine that stays is none of them: its own heap comes and goes."""
        pids = self.running.pids() if self.running is not None else frozenset()
        return pids - self._others if self.options.target == "host" else pids

    @contextlib.contextmanager
    def _watching(self, running: Running) -> Iterator[None]:
        """Where a request got no answer because the engine ended, say that it ended, and how; else show its last lines."""
        try:
            yield
        except (EngineError, UnavailableError) as error:
            if error.code == NO_ANSWER:
                poll(lambda: running.exit_status() is not None, limit=HUNG_UP, every=0.02)
            check_alive(running, self.engine.policy)
            if isinstance(error, EngineError) and not error.tail:
                error.tail = last_lines(running.log, 12)
            raise

    def await_ready(self, running: Running) -> None:
        """Wait for the server.

        Raises:
            WontFitError: it ended because it could not allocate. EngineError: it ended. BusyError: it did not answer in time.
        """
        limit = self.options.timeout
        with self.client(running) as client:
            if not poll(lambda: self.engine.ready(client), limit=limit, alive=lambda: check_alive(running, self.engine.policy)):
                raise BusyError(
                    f"the engine did not answer within {limit:.0f} s",
                    hint="raise --timeout, or look at its log: " + str(running.log),
                    code="engine-timeout",
                )

    def client(self, running: Running) -> httpx.Client:
        """An HTTP client of a running engine, which ignores proxies: the engine is on this machine."""
        import httpx

        return httpx.Client(base_url=running.endpoint, trust_env=False, timeout=self.options.timeout)

    def stop(self) -> None:
        """End the engine, if one runs."""
        if self.running is not None:
            self.running.stop()
            self.running = None

    def measure(self, source: Source, request: LoadRequest, expected: int | None = None) -> Load:
        """One load measured with the meter: idle plateau, and for GPU targets the plateau after a prompt.

        A load that does not fit is an outcome, not an error, and so is one whose engine was killed: ``wont-fit`` where there is
        evidence that it was for memory (``expected`` bytes by the loads before it), else ``failed``.
        """
        started = self.now()
        state, watch = LoadState(self._log_size()), KillWatch()
        outcome: LoadOutcome = "failed"
        reason: str | None = None
        try:
            self._measure(source, request, state)
            outcome = "ok"
        except WontFitError as error:
            outcome, reason = "wont-fit", error.message
        except EngineError as error:
            on_host = self.options.target == "host"
            outcome, reason = watch.outcome(error, state.peak_bytes if on_host else None, expected if on_host else None)
        finally:
            log = self._release(quietly=outcome != "ok")
        self._unload(source, quietly=outcome != "ok")
        if self._program is not None:
            self._program.check()
        self._await_return(state)
        return self._finish(request, outcome, reason, log, started, state)

    def _release(self, *, quietly: bool = False) -> Path | None:
        """End an engine that serves one load; the log of the load. ``quietly`` after an error, which this must not replace."""
        log = self.running.log if self.running else None
        if not self.engine.persistent:
            with contextlib.suppress(*((HarnessError,) if quietly else ())):
                self.stop()
        return log

    def _unload(self, source: Source, *, quietly: bool = False) -> None:
        """Have a persistent engine drop the model; after an error (``quietly``) end it where it does not."""
        if not quietly:
            self._drop(source)
            return
        try:
            self._drop(source)
        except HarnessError:
            with contextlib.suppress(HarnessError):
                self.stop()
            self.running = None  # the next load starts it anew

    def _drop(self, source: Source) -> None:
        """Ask for it, and wait until the processes that held the model are gone."""
        running = self.running
        if running is None or not self.engine.persistent:
            return
        if running.exit_status() is not None:
            self.stop()  # the next load starts it anew
            return
        with self.client(running) as client, self._watching(running):
            self.engine.unload(client, source, self.options)
        if not poll(lambda: not running.pids() - self._others, limit=UNLOAD, every=0.02):
            raise EngineError("the engine said that it unloaded the model, but its processes stay", code="still-loaded")

    def _measure(self, source: Source, request: LoadRequest, state: LoadState) -> None:
        sampler = Sampler(self.meter, self._measured, on_reading=self.observer.memory)

        def watch() -> None:
            sampler.start()
            sampler.mark("load")

        try:
            running = self._started(source, request, watch)
            with self.client(running) as client, self._watching(running):
                state.reported = self.engine.load(client, source, request, self.options)
                state.ready = self.now()
                self.hook("loaded")
                begin = time.monotonic()
                sampler.mark("idle")
                state.idle = self._settle(sampler, running)
                state.settled = time.monotonic() - begin
                if self.options.target == "gpu":
                    self._busy(client, source, request, sampler, running, state)
        finally:
            state.trace = sampler.stop()

    def _busy(
        self,
        client: httpx.Client,
        source: Source,
        request: LoadRequest,
        sampler: Sampler,
        running: Running,
        state: LoadState,
    ) -> None:
        """The plateau after a prompt: driver pools grow at the first real batch, without flash attention at every batch."""
        if self.meter.name == "log":
            return
        sampler.mark("prompt")
        begin = time.monotonic()
        facts = read_facts(running.log, state.log_start, None, self.engine.policy) if self.meter.name == "nvml" else None
        length = prompt_length(request, facts)
        state.prompt = self.engine.generate(client, source, request, self.options, length, 1).prompt_tokens
        state.requested = time.monotonic() - begin
        self.hook("prompted")
        begin = time.monotonic()
        sampler.mark("busy")
        state.busy = self._settle(sampler, running)
        state.settled += time.monotonic() - begin

    def _settle(self, sampler: Sampler, running: Running) -> Plateau | None:
        if self.meter.name == "log":
            return None
        plateau = sampler.settle(SETTLE, alive=lambda: running.exit_status() is None)
        check_alive(running, self.engine.policy)
        return plateau

    def time_speed(self, source: Source, request: LoadRequest, prompts: Sequence[int]) -> Load:
        """A load under the engine's own defaults, and one timed request for each prompt length."""
        started = self.now()
        why = busy_before(CpuWatch(frozenset)) if self.options.target == "host" else None
        if why is not None:
            return Load(request=request, outcome="skipped", reason=why, started=started, ended=self.now())
        state = LoadState()
        speeds: list[Speed] = []
        outcome: LoadOutcome = "failed"
        reason: str | None = None
        try:
            if self.engine.persistent and self.options.target == "host" and self.running is not None:
                self.stop()  # what makes its memory repeatable makes it slow
                self.prepare(source, request)
                started = self.now()
            state.log_start = self._log_size()
            running = self._started(source, request)
            with self.client(running) as client, self._watching(running):
                self.engine.load(client, source, request, self.options)
                state.ready = self.now()
                begin = time.monotonic()
                cpu = CpuWatch(running.pids)
                for prompt in prompts_to_time(prompts, speeds, cpu, on_host=self.options.target == "host"):
                    self.observer.progress(f"timing a prompt of {prompt:,} tokens", len(speeds), None)
                    speeds.append(self.engine.generate(client, source, request, self.options, prompt, DECODE_TOKENS))
                state.requested = time.monotonic() - begin
                state.others = cpu.by_others()
            outcome = "ok"
        except WontFitError as error:
            outcome, reason = "wont-fit", error.message
        except EngineError as error:
            if self.running is None or self.running.exit_status() is not None:
                raise
            reason = error.message  # memory has been measured; a speed that is not there is said
        finally:
            log = self._release(quietly=outcome != "ok")
        self._unload(source, quietly=outcome != "ok")
        self._await_return(state)
        load = self._finish(request, outcome, reason, log, started, state)
        return msgspec.structs.replace(load, speeds=tuple(speeds))

    def _log_size(self) -> int:
        """Where the log of the next load begins: engines of one load have a log each."""
        if self.running is None or not self.engine.persistent:
            return 0
        try:
            return self.running.log.stat().st_size
        except OSError:
            return 0

    def _finish(
        self, request: LoadRequest, outcome: LoadOutcome, reason: str | None, log: Path | None, started: float, state: LoadState
    ) -> Load:
        log_end, facts = None, None
        if log is not None and log.exists():
            # The last lines of an engine that runs on may still be on their way.
            wait = LAST_LINES if self.engine.persistent and outcome == "ok" else 0.0
            log_end, facts = await_facts(log, state.log_start, wait, self.engine.policy)
        made = state.load(request, outcome, reason)
        name = None if log is None else log.name
        return msgspec.structs.replace(made, log=name, log_end=log_end, facts=facts, started=started, ended=self.now())
