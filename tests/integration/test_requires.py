"""The rule that a missing resource skips with its reason, and fails where it was promised."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_CONFTEST = Path(__file__).parents[1] / "conftest.py"
_TEST = """
import os
import pytest

@pytest.mark.requires("chromium")
def test_a_browser_is_needed():
    pass

def test_no_setting_of_the_user_is_seen():
    assert "HARNESS_STORE" not in os.environ
"""


def _run(folder: Path, test: str, require: str, **more: str) -> subprocess.CompletedProcess[str]:
    (folder / "conftest.py").write_text(_CONFTEST.read_text())
    (folder / "test_it.py").write_text(test)
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--strict-markers", str(folder)],
        cwd=folder,
        # No browser is found on an empty PATH.
        env=os.environ | {"HARNESS_REQUIRE": require, "HARNESS_STORE": "/nowhere", "PATH": str(folder), **more},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    requires(*resources): resources\n")
    return tmp_path


def test_a_missing_resource_skips_and_says_why(folder: Path) -> None:
    run = _run(folder, _TEST, require="")

    assert run.returncode == 0, run.stdout
    assert "1 passed, 1 skipped" in run.stdout
    assert "needs chromium: none of these is on PATH" in run.stdout


def test_a_resource_that_was_promised_fails(folder: Path) -> None:
    run = _run(folder, _TEST, require="gcc, chromium")

    assert run.returncode == 1
    assert "HARNESS_REQUIRE lists chromium, but: none of these is on PATH" in run.stdout


@pytest.mark.parametrize(
    ("test", "require"),
    [(_TEST, "chromium,no-such-thing"), (_TEST.replace('"chromium"', '"no-such-thing"'), "")],
    ids=["in the variable", "in a marker"],
)
def test_a_misspelt_resource_is_an_error(folder: Path, test: str, require: str) -> None:
    run = _run(folder, test, require)

    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert "unknown ['no-such-thing']" in run.stdout + run.stderr


#: On a CPU that has nothing of what the wheel was compiled for.
_DEVICES = """
import pytest
from tests.support import rpc

rpc.WHEEL, rpc.cpu_flags = "pytest", frozenset

@pytest.mark.requires("rpc", "rpc-quantised")
def test_a_device_is_needed():
    assert (rpc.programs() / "ggml-rpc-server").exists()

@pytest.mark.requires("vulkan")
def test_a_gpu_is_needed():
    pass
"""


def test_what_this_cpu_cannot_do_is_skipped_even_where_it_is_required(folder: Path) -> None:
    run = _run(folder, _DEVICES, require="rpc")

    assert run.returncode == 0, run.stdout
    assert "needs rpc: this CPU lacks avx512" in run.stdout


def test_a_build_of_one_s_own_is_used_on_any_cpu(folder: Path) -> None:
    for name in ("llama-server", "ggml-rpc-server"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    run = _run(folder, _DEVICES, require="rpc,rpc-quantised,vulkan", HARNESS_TEST_LLAMA_CPP=str(folder))

    assert "1 passed, 1 skipped" in run.stdout
    assert "needs vulkan: the llama-server of HARNESS_TEST_LLAMA_CPP finds no Vulkan device" in run.stdout


def test_a_build_of_one_s_own_that_cannot_be_used_is_an_error(folder: Path) -> None:
    run = _run(folder, _DEVICES, require="", HARNESS_TEST_LLAMA_CPP=str(folder))

    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    assert f"there is no program llama-server and no ggml-rpc-server in {folder}" in run.stderr
