"""Exports say what was judged, and no name of a model becomes anything but a name in the files of other programs."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.engines.registry import policy_of
from harness.errors import UsageError
from harness.exports import environment, kubernetes
from harness.exports.entry import Entry
from harness.exports.formats import FORMATS, write
from harness.model.record import EngineVersion
from harness.prediction.verdict import judge
from harness.store.yaml import read_calibration
from harness.units import GIB
from tests.support import readers
from tests.support.calibrations import made_up, on_host, with_settings

ROOT = Path(__file__).parents[3]
#: What a file may hold of a name: printable, as names are when they are read; quotes, markup and substitutions of each reader.
NAMES = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=40),
    st.sampled_from(
        [
            "a b", '"', '"""', "'", "$HOME", "${PORT}", "$(id)", "`id`", "a: b", "- a", "#x", "x #y", "x;y", "%n", "%%n", "[x]",
            "*", "&a", "!!python/object:x", "yes", "null", "1e3", "\\", "x\\", "--flag", "a]", "q:7b's", "{{x}}", "a|b", "<a>",
            "~", "=",
        ]
    ),
)  # fmt: skip


def entry(name: str = "made-up", engine: str = "llama-server", **changes: Any) -> Entry:
    calibration = msgspec.structs.replace(made_up(), engine=engine, id=f"{engine}/made-up")
    if engine == "vllm":
        calibration = read_calibration(ROOT / "tests/golden/vllm/0.32.0-cpu/tiny-llama.yaml")
    policy, free = policy_of(engine), (24 * GIB,)
    verdict = judge(calibration, 8192, 1, free, policy)
    assert verdict.verdict == "fits"
    return msgspec.structs.replace(
        Entry(
            model=name, key=calibration.id, calibration=calibration, verdict=verdict, derived=(),
            start=policy.start(calibration, verdict, free), image="example/engine@sha256:00",
        ),
        **changes,
    )  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_says_from_which_calibration_when_and_with_which_bound(name: str) -> None:
    engine = {"modelfile": "ollama", "ollama-env": "ollama", "vllm": "vllm"}.get(name, "llama-server")
    one = entry(engine=engine)
    for style in FORMATS[name].styles or (None,):
        if style == "mig":
            continue
        text = write(name, style, [one])
        comment = "\n".join(line for line in text.splitlines() if line.startswith("#"))
        assert f"harness calibration {one.key} of {one.calibration.metadata.calibrated_at}" in comment
        assert "8192 tokens: " in comment
        assert engine == "vllm" or "+/- 2.0 MiB" in comment


def test_ollama_gets_what_decides_about_a_load() -> None:
    calibration = with_settings(made_up(), kv_cache_type="q8_0", env={"OLLAMA_GPU_OVERHEAD": "1000"})
    policy = policy_of("ollama")
    verdict = judge(calibration, 8192, 2, (24 * GIB,), policy)
    start = policy.start(calibration, verdict, (24 * GIB,))

    assert start.parameters == {"num_ctx": 8192, "num_batch": 512, "num_gpu": 29}
    assert start.variables == {
        "OLLAMA_CONTEXT_LENGTH": "8192", "OLLAMA_NUM_PARALLEL": "2", "OLLAMA_KV_CACHE_TYPE": "q8_0",
        "OLLAMA_FLASH_ATTENTION": "1", "OLLAMA_GPU_OVERHEAD": "1000",
    }  # fmt: skip
    spread = judge(calibration, 8192, 1, (4 * GIB, 4 * GIB), policy)
    assert policy.start(calibration, spread, (4 * GIB, 4 * GIB)).variables["OLLAMA_SCHED_SPREAD"] == "1"
    host = on_host(calibration)
    assert policy.start(host, judge(host, 8192, 1, (24 * GIB,), policy), (24 * GIB,)).parameters["num_gpu"] == 0


def test_llama_server_gets_every_option_that_decides_about_memory() -> None:
    calibration = with_settings(made_up(), env={"LLAMA_ARG_OVERRIDE_KV": "llama.context_length=int:9", "LLAMA_ARG_MLOCK": "1"})
    policy = policy_of("llama-server")
    start = policy.start(calibration, judge(calibration, 8192, 4, (24 * GIB,), policy), (24 * GIB,))

    words = shlex.join(start.arguments)
    assert "--ctx-size 32768 --parallel 4 --batch-size 2048 --ubatch-size 512 --flash-attn on --cache-type-k f16" in words
    assert "--override-kv llama.context_length=int:9" in words
    assert start.variables == {"LLAMA_ARG_MLOCK": "1"}
    host = on_host(calibration)
    assert "--device none --n-gpu-layers 0 --fit off" in shlex.join(
        policy.start(host, judge(host, 8192, 1, (24 * GIB,), policy), (24 * GIB,)).arguments
    )


@settings(max_examples=60, deadline=None)
@given(NAMES)
def test_a_name_in_a_modelfile_is_one_value(name: str) -> None:
    found = readers.modelfile(write("modelfile", None, [entry(name, "ollama")]))

    assert found == [("from", name), ("num_ctx", "8192"), ("num_batch", "512"), ("num_gpu", "29")]


@settings(max_examples=60, deadline=None)
@given(NAMES)
def test_a_name_in_yaml_is_one_text(name: str) -> None:
    one = entry(name)
    service = yaml.safe_load(write("compose", None, [one]))["services"][one.label]
    assert service["command"][:2] == ["--model", one.weights.replace("$", "$$")]
    (container,) = yaml.safe_load(write("k8s", None, [one]))["spec"]["template"]["spec"]["containers"]
    assert container["args"][1].replace("$$(", "$(") == one.weights
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", one.label)
    claim = yaml.safe_load(write("gpustack", None, [one]))
    assert int(claim["env"]["GPUSTACK_MODEL_VRAM_CLAIM"]) >= (one.verdict.required_bytes or 0) + GIB


@settings(max_examples=60, deadline=None)
@given(NAMES)
def test_a_name_in_a_shell_and_in_llama_swap_is_one_word(name: str) -> None:
    one = entry(name)
    lines = [line for line in write("llama-server", "command", [one]).split("\n") if line and not line.startswith("#")]
    assert len(lines) == 1
    assert shlex.split(lines[0])[:3] == ["llama-server", "--model", one.weights]
    try:
        model = yaml.safe_load(write("llama-swap", None, [one]))["models"][name]
    except UsageError:
        assert "${" in name
        return
    words = shlex.split(model["cmd"])
    assert words[:3] == ["llama-server", "--model", one.weights]
    assert words[-2:] == ["--port", "${PORT}"]


@settings(max_examples=60, deadline=None)
@given(NAMES)
def test_a_name_in_presets_is_one_section_or_is_refused(name: str) -> None:
    one = entry(name)
    try:
        text = write("llama-server", "preset", [one])
    except UsageError:
        assert set("[];#") & set(name) or name == "*"
        return
    found = readers.presets(text)
    assert set(found) == {"default", name}
    assert found["default"] == {"version": "1"}
    assert found[name] == {"model": one.weights, **one.start.preset}


@settings(max_examples=60, deadline=None)
@given(NAMES)
def test_a_value_in_a_unit_file_is_one_word(name: str) -> None:
    assert readers.unit(f"Environment={environment.quoted(f'NAME={name}')}") == {"NAME": name}


@settings(max_examples=60, deadline=None)
@given(NAMES)
def test_a_name_in_metrics_is_one_label(name: str) -> None:
    parser = pytest.importorskip("prometheus_client.parser")
    families = list(parser.text_string_to_metric_families(write("prometheus", None, [entry(name)])))

    assert {sample.labels["model"] for family in families for sample in family.samples} == {name}
    predicted = next(family for family in families if family.name == "harness_memory_predicted_bytes")
    assert predicted.samples[0].value == entry().verdict.required_bytes


def test_models_of_one_server_share_its_settings_or_are_refused() -> None:
    small, large = entry("small", "ollama"), entry("large", "ollama")
    variables = large.start.variables | {"OLLAMA_CONTEXT_LENGTH": "32768"}
    large = msgspec.structs.replace(large, start=msgspec.structs.replace(large.start, variables=variables))
    assert readers.unit(write("ollama-env", None, [small, large]))["OLLAMA_CONTEXT_LENGTH"] == "8192"

    other = msgspec.structs.replace(
        large, start=msgspec.structs.replace(large.start, variables=variables | {"OLLAMA_KV_CACHE_TYPE": "q8_0"})
    )
    for some in ([small, other], [other, small]):
        with pytest.raises(UsageError, match="one server has one OLLAMA_KV_CACHE_TYPE: q8_0 for large, unset for small"):
            write("ollama-env", None, some)


def test_llama_swap_keeps_models_that_fit_together() -> None:
    models = [entry("a"), entry("b"), entry("c")]
    matrix = yaml.safe_load(write("llama-swap", "matrix", models, [(0, 2)]))
    assert matrix["matrix"] == {"vars": {"m0": "a", "m1": "b", "m2": "c"}, "sets": {"fit0": "m0 & m2", "fit1": "m1"}}
    assert all(re.fullmatch(r"[a-zA-Z0-9]{1,8}", name) for name in matrix["matrix"]["vars"])
    groups = yaml.safe_load(write("llama-swap", "groups", models, [(0, 2)]))["groups"]
    assert groups["together"] == {"swap": False, "exclusive": True, "members": ["a", "c"]}
    assert groups["one-at-a-time"]["members"] == ["b"]


def test_a_format_of_another_engine_names_those_that_there_are() -> None:
    with pytest.raises(
        UsageError, match="modelfile is not a format for llama-server/made-up; formats for it: llama-server, compose"
    ):
        write("modelfile", None, [entry()])
    with pytest.raises(UsageError, match="k8s has no style 'x'; there are: whole, mig, shared, hami"):
        write("k8s", "x", [entry()])
    with pytest.raises(UsageError, match="llama-swap starts one server for each model"):
        write("llama-swap", None, [entry(engine="ollama")])


@pytest.mark.parametrize(
    ("card", "profile"),
    [("NVIDIA H100 80GB HBM3", "1g.10gb"), ("NVIDIA A100-SXM4-40GB", "1g.10gb"), ("NVIDIA H200", "1g.18gb")],
)
def test_the_smallest_mig_instance_that_holds_the_model(card: str, profile: str) -> None:
    calibration = made_up(gpu=card)
    policy = policy_of("llama-server")
    verdict = judge(calibration, 8192, 1, (24 * GIB,), policy)
    one = entry(calibration=calibration, verdict=verdict)

    assert kubernetes.mig_profile(one) == profile
    (container,) = yaml.safe_load(write("k8s", "mig", [one]))["spec"]["template"]["spec"]["containers"]
    assert container["resources"] == {"limits": {f"nvidia.com/mig-{profile}": "1"}}


def test_shares_of_a_gpu_are_in_mebibytes() -> None:
    one = entry()
    pod = yaml.safe_load(write("k8s", "shared", [one]))["spec"]["template"]
    assert pod["metadata"]["annotations"] == {"gpu-memory": str(one.claim >> 20)}
    (container,) = yaml.safe_load(write("k8s", "hami", [one]))["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "1", "nvidia.com/gpumem": str(one.claim >> 20)}


def test_an_image_that_was_not_measured_is_named_as_such() -> None:
    assert "was measured outside a container" in write("compose", None, [entry()])
    metadata = entry().calibration.metadata
    machine = msgspec.structs.replace(metadata.machine, sandbox="docker")
    measured = msgspec.structs.replace(metadata, machine=machine, engine=EngineVersion(version="b1", image="example/engine"))
    one = entry(calibration=msgspec.structs.replace(entry().calibration, metadata=measured))
    assert "was measured outside a container" not in write("compose", None, [one])


@pytest.mark.requires("systemd-analyze")
def test_systemd_takes_the_drop_in(tmp_path: Path) -> None:
    folder = tmp_path / "ollama.service.d"
    folder.mkdir()
    (tmp_path / "ollama.service").write_text("[Service]\nExecStart=/bin/true\n")
    (folder / "harness.conf").write_text(write("ollama-env", None, [entry(engine="ollama")]))
    done = subprocess.run(
        ["systemd-analyze", "verify", "ollama.service"],
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "sysinit.target not found" in done.stderr:
        pytest.skip("systemd's own units are not here")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.requires("docker-compose")
def test_docker_compose_takes_the_services(tmp_path: Path) -> None:
    file = tmp_path / "compose.yaml"
    file.write_text(write("compose", None, [entry("q:7b's $HOME"), entry(engine="ollama"), entry(engine="vllm")]))
    done = subprocess.run(
        ["docker", "compose", "-f", str(file), "config"],
        env={"MODELS": "/models", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["services"]["q-7b-s-home"]["command"][1] == "/models/q:7b's $HOME.gguf"
