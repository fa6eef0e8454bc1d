"""What is asked of the daemon for a launch."""

from __future__ import annotations

from typing import Any

import pytest

from harness.errors import UsageError
from harness.sandboxes.base import GpuRequest, Launch, Mount
from harness.sandboxes.container_config import check_reference, container_config, repository
from harness.sandboxes.daemon import DaemonFacts, GpuPath

LABELS = {"harness": "1", "harness.run": "r"}


def config(launch: Launch, gpu_path: GpuPath | None = None, proxies: dict[str, str] | None = None) -> dict[str, Any]:
    return container_config(
        launch,
        image="sha256:0",
        port=8080,
        network="harness-r",
        labels=LABELS,
        memory_limit=1 << 30,
        daemon=DaemonFacts(address="unix:///d.sock", gpu_path=gpu_path),
        proxies=proxies or {},
    )


def gpu_side(text: str, gpu_path: GpuPath | None = None) -> tuple[list[dict[str, Any]], str]:
    made = config(Launch(argv=(), gpus=GpuRequest.parse(text)), gpu_path)
    visible = [one.partition("=")[2] for one in made["Env"] if one.startswith("NVIDIA_VISIBLE_DEVICES=")]
    assert len(visible) == 1, "always set, once"
    return made["HostConfig"]["DeviceRequests"], visible[0]


def test_a_container_is_bounded_and_unprivileged() -> None:
    host = config(Launch(argv=("serve",), writable=("/root/.ollama",)))["HostConfig"]

    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert host["ReadonlyRootfs"] is True
    assert host["Memory"] == host["MemorySwap"] == 1 << 30
    assert host["PidsLimit"] > 0
    assert "exec" in host["Tmpfs"]["/tmp"].split(","), "old engines unpack their runners there"
    assert host["RestartPolicy"] == {"Name": "no"}
    assert host["LogConfig"]["Type"] == "json-file"
    assert host["LogConfig"]["Config"]["max-size"]
    assert [one["Target"] for one in host["Mounts"]] == ["/root/.ollama"]
    assert "Privileged" not in host


def test_it_is_on_the_network_of_its_run_and_publishes_no_port() -> None:
    host = config(Launch(argv=(), network=True))["HostConfig"]

    assert host["NetworkMode"] == "harness-r"
    assert "PortBindings" not in host


@pytest.mark.parametrize(
    ("text", "path", "request_", "visible"),
    [
        ("none", "runtime", [], "void"),
        ("none", "cdi", [], "void"),
        ("all", "runtime", [{"Driver": "", "Capabilities": [["gpu"]], "Count": -1}], "all"),
        ("all", None, [{"Driver": "", "Capabilities": [["gpu"]], "Count": -1}], "all"),
        ("GPU-a,1", "runtime", [{"Driver": "", "Capabilities": [["gpu"]], "DeviceIDs": ["GPU-a", "1"]}], "GPU-a,1"),
        ("all", "cdi", [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=all"]}], "void"),
        ("0", "cdi", [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=0"]}], "void"),
        ("nvidia.com/gpu=0", "runtime", [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=0"]}], "void"),
    ],
)
def test_gpus(text: str, path: GpuPath | None, request_: list[dict[str, Any]], visible: str) -> None:
    """Count and device ids exclude each other, and the toolkit's variable never hands out more than was asked for."""
    assert gpu_side(text, path) == (request_, visible)


def test_proxies_reach_only_an_engine_that_downloads() -> None:
    proxies = {"HTTPS_PROXY": "http://p:3128", "no_proxy": "localhost", "HF_TOKEN": "t"}

    offline = config(Launch(argv=()), proxies=proxies)["Env"]
    online = config(Launch(argv=(), network=True), proxies=proxies)["Env"]

    assert not [one for one in offline if "proxy" in one.lower()]
    assert {"HTTPS_PROXY=http://p:3128", "no_proxy=localhost"} <= set(online)
    assert not [one for one in online if "HF_TOKEN" in one]


def test_a_models_volume_stays_and_a_scratch_volume_goes() -> None:
    """The volume of downloaded models is no leftover of a run; the nameless ones are."""
    launch = Launch(argv=(), mounts=(Mount(kind="volume", source="models", target="/m"),), writable=("/w",))

    models, scratch = config(launch)["HostConfig"]["Mounts"]

    assert models["ReadOnly"] is True
    assert models["VolumeOptions"]["Labels"] == {"harness": "1", "harness.kind": "models"}
    assert scratch["Source"] == ""
    assert scratch["VolumeOptions"]["Labels"] == LABELS


@pytest.mark.parametrize("name", ["../etc", "/etc", "a:b", "", "-v", "a\nb"])
def test_a_volume_name_is_no_path(name: str) -> None:
    with pytest.raises(UsageError):
        config(Launch(argv=(), mounts=(Mount(kind="volume", source=name, target="/m"),)))


@pytest.mark.parametrize(
    "reference",
    [
        "ollama/ollama:0.33.0",
        "localhost:5000/team/image_1:tag",
        "ghcr.io/ggml-org/llama.cpp:server-cuda-b10434",
        "vllm/vllm-openai@sha256:" + "0" * 64,
        "image:tag@sha256:" + "a" * 64,
        "sha256:" + "b" * 64,
    ],
)
def test_names_of_images(reference: str) -> None:
    assert check_reference(reference) == reference


@pytest.mark.parametrize(
    "reference",
    ["", "-v", "a b", "a;reboot", "$(x)", "../a", "a/../b", "UPPER", "a@sha256:1", "a\nb", "a:", "é", "x" * 500, "a=b"],
)
def test_what_is_not_the_name_of_an_image(reference: str) -> None:
    with pytest.raises(UsageError):
        check_reference(reference)


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("ollama/ollama:0.33.0", "ollama/ollama"),
        ("docker.io/ollama/ollama", "ollama/ollama"),
        ("docker.io/library/busybox:1", "busybox"),
        ("localhost:5000/a/b:tag@sha256:00", "localhost:5000/a/b"),
    ],
)
def test_the_repository_of_a_reference(reference: str, expected: str) -> None:
    assert repository(reference) == expected
