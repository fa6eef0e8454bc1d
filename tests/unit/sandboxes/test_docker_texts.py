"""What daemons say, and what harness makes of it. The texts are Docker's own (20.10 to 28)."""

from __future__ import annotations

from typing import Any

import pytest

from harness.sandboxes.daemon import read_daemon, refusal
from harness.sandboxes.docker_errors import connection_error, daemon_error, image_error


@pytest.mark.parametrize(
    ("text", "exit_code", "code"),
    [
        ('could not select device driver "" with capabilities: [[gpu]]', 69, "gpu-runtime-missing"),
        ('could not select device driver "nvidia" with capabilities: [[gpu]]', 69, "gpu-runtime-missing"),
        ("Unknown runtime specified nvidia", 69, "gpu-runtime-missing"),
        ("unknown or invalid runtime name: nvidia", 69, "gpu-runtime-missing"),
        ("OCI runtime create failed: nvidia-container-cli: device error: unknown device id", 69, "gpu-runtime-missing"),
        ("CDI device injection failed: unresolvable CDI devices nvidia.com/gpu=0", 69, "gpu-runtime-missing"),
        ("invalid mount config for type \"bind\": bind source path does not exist: /m.gguf", 66, "not-found"),
        ("driver failed programming external connectivity: Bind for 127.0.0.1:80 failed: port is already allocated",
         75, "busy"),
        ("listen tcp4 127.0.0.1:8080: bind: address already in use", 75, "busy"),
        ("write /var/lib/docker/tmp/x: no space left on device", 73, "cannot-write"),
        ('OCI runtime create failed: exec: "llama": executable file not found in $PATH: unknown', 66, "not-found"),
        ('OCI runtime create failed: exec: "/x": permission denied: unknown', 77, "not-permitted"),
        ("OCI runtime create failed: container_linux.go:380: something else", 70, "engine-crashed"),
        ("server misbehaving", 69, "docker-error"),
    ],
)  # fmt: skip
def test_refusals_of_the_daemon(text: str, exit_code: int, code: str) -> None:
    error = daemon_error(text, "start the container")

    assert (error.exit_code, error.code) == (exit_code, code)


@pytest.mark.parametrize(
    ("text", "exit_code"),
    [
        ("manifest for ollama/ollama:nope not found: manifest unknown: manifest unknown", 66),
        ("pull access denied for no/such, repository does not exist or may require 'docker login'", 66),
        ("Error response from daemon: denied: requested access to the resource is denied", 66),
        ("Get \"https://registry-1.docker.io/v2/\": dial tcp: lookup registry-1.docker.io: no such host", 69),
        ("Get \"https://r/v2/\": net/http: request canceled (Client.Timeout exceeded while awaiting headers)", 69),
        ("failed to register layer: write /x: no space left on device", 73),
        ("invalid reference format", 2),
    ],
)  # fmt: skip
def test_images_that_cannot_be_had(text: str, exit_code: int) -> None:
    assert image_error(text, "some/image:tag").exit_code == exit_code


@pytest.mark.parametrize(
    ("text", "exit_code"),
    [
        ("[Errno 13] Permission denied", 77),
        ("('Connection aborted.', PermissionError(13, 'Permission denied'))", 77),
        ("[Errno 2] No such file or directory", 69),
        ("[Errno 111] Connection refused", 69),
    ],
)
def test_no_daemon(text: str, exit_code: int) -> None:
    error = connection_error(text, "unix:///var/run/docker.sock")

    assert error.exit_code == exit_code
    assert error.hint


def test_a_daemon_cannot_write_on_the_terminal() -> None:
    assert "\x1b" not in daemon_error("\x1b[2J\nbad", "start").message


@pytest.mark.parametrize(
    ("address", "version", "info", "code"),
    [
        ("unix:///var/run/docker.sock", {}, {"OperatingSystem": "Debian GNU/Linux 12"}, None),
        ("tcp://gpu-box:2375", {}, {}, "docker-remote"),
        ("ssh://gpu-box", {}, {}, "docker-remote"),
        ("unix:///x", {}, {"OperatingSystem": "Docker Desktop"}, "docker-desktop"),
        ("unix:///x", {}, {"SecurityOptions": ["name=seccomp,profile=default", "name=rootless"]}, "docker-rootless"),
        ("unix:///x", {"Components": [{"Name": "Podman Engine"}]}, {}, "docker-podman"),
    ],
)
def test_daemons_that_cannot_be_measured_beside(
    address: str, version: dict[str, Any], info: dict[str, Any], code: str | None
) -> None:
    refused = refusal(read_daemon(address, version, info))

    assert (refused.code if refused else None) == code


@pytest.mark.parametrize(
    ("info", "path"),
    [
        ({"Runtimes": {"runc": {}}}, None),
        ({"Runtimes": {"runc": {}, "nvidia": {}}}, "runtime"),
        ({"DiscoveredDevices": [{"Source": "cdi", "ID": "nvidia.com/gpu=0"}]}, "cdi"),
        ({"DiscoveredDevices": [{"Source": "cdi", "ID": "amd.com/gpu=0"}]}, None),
        ({"Runtimes": None, "DiscoveredDevices": None}, None),
    ],
)
def test_how_a_container_gets_a_gpu(info: dict[str, Any], path: str | None) -> None:
    assert read_daemon("unix:///x", {}, info).gpu_path == path
