"""The embedded llama-server: llama-server's command line, put into the settings of whatever release is installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.engines.base import Options, Source
from harness.engines.llama_server.embedded import PROGRAM, embedded_command, missing_instructions
from harness.engines.llama_server.recipe import LlamaServer, find_command
from harness.engines.llama_server.xllamacpp_server import VARIABLES, apply_settings, build_of, read_arguments
from harness.errors import UnavailableError, UsageError
from harness.model.record import LoadRequest, Model
from harness.sandboxes.base import GpuRequest, Site

#: A package that has the fields of a release, and a server that says what it was given and ends.
FAKE = """
__version__ = "{version}"
class Names:
    def __getattr__(self, name): return name
class CommonParams:
    def __init__(self): self.__dict__.update({fields})
ggml_type = llama_flash_attn_type = llama_load_mode = Names()
class Server:
    def __init__(self, params):
        print(sorted((name, value) for name, value in vars(params).items() if value != {fields}.get(name)))
        raise RuntimeError("that is all")
def get_device_info():
    return [
        dict(name="CPU", description="some CPU", type="GGML_BACKEND_DEVICE_TYPE_CPU", memory_total=1 << 30, memory_free=1),
        dict(name="CUDA0", description="a GPU", type="GGML_BACKEND_DEVICE_TYPE_GPU", memory_total=2 << 30, memory_free=1 << 30),
    ]
"""
FIELDS: dict[str, Any] = {
    "model": "", "hostname": "", "port": 0, "n_ctx": 0, "n_batch": 0, "n_ubatch": 0, "n_parallel": 1, "verbosity": 3,
    "flash_attn_type": None, "cache_type_k": None, "cache_type_v": None, "n_gpu_layers": -1, "no_extra_bufts": False,
    "use_mmap": True, "use_mlock": False, "cache_ram_mib": 8192, "n_ctx_checkpoints": 8, "fit_params": True, "offline": False,
}  # fmt: skip


def launched(tmp_path: Path, **options: object) -> tuple[str, ...]:
    model = tmp_path / "m.gguf"
    model.write_bytes(b"GGUF")
    source = Source(model=Model(name="m"), path=model)
    asked = Options(gpus=GpuRequest(mode="none"), target="host", **options)  # type: ignore[arg-type]
    site = Site(sandbox="process", host="127.0.0.1", port=8123)
    return LlamaServer().launch(source, LoadRequest(context=4096, num_batch=512), asked, site).argv


def run(tmp_path: Path, *arguments: str, version: str = "2026.10.11549", without: str = "") -> subprocess.CompletedProcess[str]:
    fields = {name: value for name, value in FIELDS.items() if name != without}
    (tmp_path / "xllamacpp.py").write_text(FAKE.replace("{version}", version).replace("{fields}", repr(fields)))
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.engines.llama_server.embedded.find_spec", lambda _: SimpleNamespace(origin=None))
    monkeypatch.setattr("harness.engines.llama_server.recipe.cpu_flags", frozenset)


@pytest.mark.usefixtures("installed")
def test_what_a_load_asks_for_reaches_the_settings_of_an_old_release(tmp_path: Path) -> None:
    done = run(tmp_path, *launched(tmp_path, num_parallel=2, kv_cache_type="q8_0", flash_attention="off")[3:])
    assert dict(eval(done.stdout)) == {  # noqa: S307 - printed by the package above
        "model": str(tmp_path / "m.gguf"), "hostname": "127.0.0.1", "port": 8123, "n_ctx": 8192, "n_batch": 2048,
        "n_ubatch": 512,
        "n_parallel": 2, "verbosity": 4, "flash_attn_type": "LLAMA_FLASH_ATTN_TYPE_DISABLED", "cache_type_k": "GGML_TYPE_Q8_0",
        "cache_type_v": "GGML_TYPE_Q8_0", "n_gpu_layers": 0, "no_extra_bufts": True, "use_mmap": False, "cache_ram_mib": 0,
        "n_ctx_checkpoints": 0, "fit_params": False, "offline": True,
    }  # fmt: skip
    assert done.returncode == 1


def test_a_setting_that_a_new_release_has_lost_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "--model", "m.gguf", "-ub", "512", version="2027.1.13000", without="n_ubatch")
    assert done.returncode == 69
    assert done.stderr == "llama-server (xllamacpp): xllamacpp 2027.1.13000 no longer has n_ubatch, which -ub 512 needs\n"


def test_what_a_release_never_had_needs_no_switching_off_and_is_said(tmp_path: Path) -> None:
    done = run(tmp_path, "--model", "m.gguf", "--cache-ram", "0", version="0.2.0", without="cache_ram_mib")
    assert done.returncode == 1, "it went on to the server"
    assert "0.2.0 has no cache_ram_mib; --cache-ram 0 is left out" in done.stderr


@pytest.mark.parametrize(
    ("package", "says"),
    [
        ("raise ImportError('libgomp.so.1: cannot open shared object file')", "libgomp.so.1: cannot open shared object file"),
        (
            "raise ImportError('xllamacpp.abi3.so: wrong ELF class:\\nELFCLASS32')",
            "xllamacpp.abi3.so: wrong ELF class: ELFCLASS32",
        ),
        (None, "No module named 'xllamacpp'"),
    ],
    ids=["no libgomp", "another architecture", "missing"],
)
def test_a_package_that_cannot_be_imported_is_one_sentence(tmp_path: Path, package: str | None, says: str) -> None:
    if package is not None:
        (tmp_path / "xllamacpp.py").write_text(package)
    done = subprocess.run(
        [sys.executable, "-S", str(PROGRAM), "--version"],
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (69, "")
    assert done.stderr == f"llama-server (xllamacpp): the package xllamacpp cannot be imported: {says}\n"


def test_where_there_is_no_engine_the_message_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("harness.engines.llama_server.embedded.find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match="there is no llama-server here") as caught:
        find_command(None)
    assert "make setup" in (caught.value.hint or "")


def test_it_lists_gpus_as_llama_server_does(tmp_path: Path) -> None:
    assert run(tmp_path, "--list-devices").stdout == "Available devices:\n  CUDA0: a GPU (2048 MiB, 1024 MiB free)\n"


@pytest.mark.parametrize(
    ("release", "build"),
    [("2026.10.11549", "b11549"), ("2031.1.20000", "b20000"), ("2026.4.8672.1", "b8672"), ("0.2.14", "xllamacpp-0.2.14")],
)
def test_its_version_is_the_build_of_llama_cpp(release: str, build: str, tmp_path: Path) -> None:
    assert build_of(release) == build
    assert run(tmp_path, "--version", version=release).stdout == f"version: {build} (xllamacpp {release})\n"


def test_a_flag_comes_before_a_variable() -> None:
    given = read_arguments(["-c", "512"], {"LLAMA_ARG_CTX_SIZE": "1024", "LLAMA_ARG_UBATCH": "256"})
    params = SimpleNamespace(n_ctx=0, n_ubatch=0)
    apply_settings(params, None, given.settings, "0")
    assert (params.n_ctx, params.n_ubatch) == (512, 256)


@pytest.mark.usefixtures("installed")
def test_a_variable_that_it_does_not_read_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    assert "LLAMA_ARG_RPC" not in VARIABLES
    with pytest.raises(UsageError, match="LLAMA_ARG_RPC"):
        launched(tmp_path, env={"LLAMA_ARG_RPC": "127.0.0.1:1"})
    launched(tmp_path, env={"LLAMA_ARG_SWA_FULL": "1"})


@pytest.mark.usefixtures("installed")
def test_a_cpu_without_its_instructions_is_told_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.engines.llama_server.recipe.cpu_flags", lambda: frozenset({"sse4_2", "fma", "f16c"}))
    with pytest.raises(UnavailableError, match="AVX2, BMI2") as caught:
        find_command(None)
    assert "--engine-binary" in (caught.value.hint or "")
    assert missing_instructions(frozenset({"avx2", "bmi2", "f16c", "fma", "sse4_2"})) == ()
    assert missing_instructions(frozenset()) == (), "unknown is not missing"


@pytest.mark.requires("embedded")
def test_the_installed_one_names_its_build() -> None:
    command = embedded_command()
    assert command is not None
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    version = LlamaServer().version(Options(), None).version
    assert done.stdout.startswith(f"version: {version} ")
    assert version is not None
    assert version.startswith("b")
