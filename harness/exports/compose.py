"""Services for Docker Compose, with the GPU reserved and the image by its digest (compose-spec, *deploy.resources*)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.errors import NotFoundError
from harness.exports.entry import Entry, comments, document, image_remarks, merged, unique


def write(entries: Sequence[Entry], _style: str, _together: Sequence[Sequence[int]]) -> str:
    """A service for each model, and one for all models of an engine that serves many."""
    services: dict[str, Any] = {}
    shared = [entry for entry in entries if entry.start.parameters]
    apart = [entry for entry in entries if not entry.start.parameters]
    if shared:
        services[shared[0].calibration.engine] = _service(shared[0], merged(shared), shared[0].start.port)
    for number, (name, entry) in enumerate(zip(unique([entry.label for entry in apart]), apart, strict=True)):
        services[name] = _service(entry, entry.start.variables, entry.start.port + number)
    volumes = {name: None for entry in entries for name in entry.start.volumes}
    found: dict[str, Any] = {"services": services}
    if volumes:
        found["volumes"] = volumes
    remarks = ["MODELS is the folder of GGUF files"] if any(entry.start.model_option for entry in entries) else []
    return comments(entries, *image_remarks(entries), *remarks) + document(found)


def _service(entry: Entry, variables: dict[str, str], port: int) -> dict[str, Any]:
    if entry.image is None:
        raise NotFoundError(f"no image is known for {entry.key}: it was measured outside a container", code="no-image")
    start = entry.start
    found: dict[str, Any] = {"image": escaped(entry.image)}
    if start.shared_memory:
        found["ipc"] = "host"
    words = [*entry.words, *(("--host", "0.0.0.0") if start.model_option else ())]  # noqa: S104 - inside the container
    found["command"] = [escaped(word) for word in words]
    if variables:
        found["environment"] = escaped(variables)
    found["ports"] = [f"127.0.0.1:{port}:{start.port}"]
    volumes = [f"{name}:{place}" for name, place in start.volumes.items()]
    if start.model_option:
        volumes.append(f"${{MODELS:?the folder of GGUF files}}:{escaped(entry.folder)}:ro")
    if volumes:
        found["volumes"] = volumes
    if entry.on_gpu:
        devices = [{"driver": "nvidia", "count": entry.gpus, "capabilities": ["gpu"]}]
        found["deploy"] = {"resources": {"reservations": {"devices": devices}}}
    return found


def escaped(value: Any) -> Any:
    """A text that Compose does not interpolate, or a mapping of such."""
    return {name: escaped(one) for name, one in value.items()} if isinstance(value, dict) else str(value).replace("$", "$$")
