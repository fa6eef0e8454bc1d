"""What is timed in a calibration, and when nothing is put on the host for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from harness.engines.base import Source
from harness.engines.policy import Policy
from harness.model.record import LoadRequest, Record

#: Prompts of the speed load, tokens: two depths, the first one repeated until it is known how far speeds repeat.
SPEED_PROMPTS: Final = (64, 1536)
#: Prompts of the load with nothing on the GPU: too short for llama.cpp to send their products there (32 tokens).
HOST_SPEED_PROMPTS: Final = (16,)
#: That load is made only if the weights take at most this share of the memory that is available.
HOST_SHARE: Final = 0.6


class SpeedLoad(msgspec.Struct, frozen=True, kw_only=True):
    """A load under which speeds are timed; ``skipped`` is why it is not made."""

    title: str
    request: LoadRequest
    prompts: tuple[int, ...]
    skipped: str | None = None


def speed_loads(policy: Policy, source: Source, record: Record) -> Iterator[SpeedLoad]:
    """The loads under which a run times speeds: with the engine's own defaults, then with nothing on the GPU."""
    request = policy.speed_request(record)
    if request is None:
        return
    prompts = tuple(prompt for prompt in SPEED_PROMPTS if prompt < request.context - 128) or (32,)
    yield SpeedLoad(title="speed", request=request, prompts=prompts)
    if record.machine.target == "gpu":
        host = LoadRequest(context=min(request.context, 2048), purpose="host-speed")
        yield SpeedLoad(
            title="speed on the host alone", request=host, prompts=HOST_SPEED_PROMPTS,
            skipped=no_host_speed(policy, source),
        )  # fmt: skip


def no_host_speed(policy: Policy, source: Source) -> str | None:
    """Why speed with nothing on the GPU is not measured; ``None`` if it is."""
    from harness.meters.host import available_memory

    if not policy.runs_on_host:
        return "this engine does not run on the host"
    if source.embedding:
        return "an embedding model writes nothing"
    size, available = weights_bytes(source), available_memory()
    if size is None:
        return "the size of the weights is not known"
    if available is None or size > HOST_SHARE * available:
        return "the weights would take more than 60 % of the memory that is available"
    return None


def weights_bytes(source: Source) -> int | None:
    """Bytes of a model's weights, from its file or its tensors; ``None`` where neither is known."""
    if source.path is not None:
        return source.path.stat().st_size
    tensors = source.tensors
    return None if tensors is None else sum(tensors.layer_bytes) + tensors.output_bytes + tensors.embedding_bytes
