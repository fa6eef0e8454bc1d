"""``harness allocate``: the calibration that answers for what will run here, the memory that is free, and the flags."""

from __future__ import annotations

import shlex

import msgspec

from harness.engines.registry import ALLOCATED, policy_of
from harness.engines.settings import settings_alone
from harness.errors import ADVICE, HarnessError, NotFoundError, UnknownVerdictError
from harness.inventory.machine import LocalMachine
from harness.inventory.weights import calibrations_of
from harness.model.calibration import Calibration
from harness.prediction.allocation import Allocation, Deployment
from harness.prediction.settings import derive
from harness.serving.advice import calibrating
from harness.serving.calibration_lookup import CalibrationFilter
from harness.store.store import Store, variant_of


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """An allocation and the calibration that it follows from."""

    calibration: Calibration
    allocation: Allocation


def answer(
    store: Store,
    model: str,
    context: int,
    concurrency: int,
    wanted: Deployment,
    *,
    settings: CalibrationFilter | None = None,
    available: tuple[int, ...] | None = None,
) -> Answer:
    """The flags for a start of ``model`` here, or on GPUs with ``available`` bytes each.

    Raises:
        UnknownVerdictError: no calibration matches (UNCALIBRATED), or the free memory cannot be read. OffloadLikelyError: it
            cannot be had.
    """
    if available is None and wanted.gpu is None:
        wanted = msgspec.structs.replace(wanted, gpu=_gpu_here())
    calibration = matching(store, model, wanted, settings)
    return Answer(
        calibration=calibration,
        allocation=policy_of(calibration.engine).allocate(calibration, context, concurrency, available or _free(calibration)),
    )


def matching(store: Store, model: str, wanted: Deployment, settings: CalibrationFilter | None = None) -> Calibration:
    """The calibration of :data:`ALLOCATED` that answers for what will run, at these settings: the default file first.

    Raises:
        UnknownVerdictError: there is none (UNCALIBRATED), with what the others differ in.
    """
    settings, policy, different = settings or CalibrationFilter(), policy_of(ALLOCATED), []
    for path, calibration in calibrations_of(store, model, ALLOCATED):
        if settings.variant is not None and variant_of(path) != settings.variant:
            continue
        obstacles = derive(calibration, settings.asked, ggml_caches=policy.ggml_caches).obstacles
        if not (differs := (*policy.mismatches(calibration, wanted), *obstacles)):
            return calibration
        different.append(f"{path.name}: {', '.join(differs)}")
    why = f" ({'; '.join(different)})" if different else ""
    raise UnknownVerdictError(
        f"UNCALIBRATED: no calibration of {model} by {policy.title} answers for this{why}",
        hint=calibrating(model, msgspec.structs.replace(settings, engine=ALLOCATED), store),
    )


def _gpu_here() -> str | None:
    """The name of this machine's first NVIDIA GPU; ``None`` where there is none."""
    found = LocalMachine().nvidia
    return None if isinstance(found, HarnessError) else found[0].name


def _free(calibration: Calibration) -> tuple[int, ...]:
    machine, count = calibration.metadata.machine, calibration.metadata.settings.gpus
    here = LocalMachine()
    if machine.target == "host":
        if here.host_bytes is None:
            raise UnknownVerdictError("the memory that is free cannot be read", hint=ADVICE)
        return (here.host_bytes,)
    found = here.gpus_of(machine.meter, settings_alone(calibration.metadata.settings.env))
    if isinstance(found, HarnessError):
        raise UnknownVerdictError(f"no GPU can be read: {found.message}", hint=ADVICE) from found
    free = [gpu.free_bytes for gpu in found if machine.gpus and gpu.name == machine.gpus[0].name]
    known = sorted((one for one in free if one is not None), reverse=True)[:count]
    if len(known) < count:
        raise UnknownVerdictError("the free memory of such a GPU cannot be read", hint=ADVICE)
    return tuple(known)


def shell(answer: Answer) -> str:
    """The command line, ready to be pasted."""
    return shlex.join(policy_of(answer.calibration.engine).command(answer.allocation))


def compose(answer: Answer) -> str:
    """A service for Docker Compose: the image that was measured, by its digest where it has one.

    Raises:
        NotFoundError: it was measured outside a container.
    """
    metadata, allocation = answer.calibration.metadata, answer.allocation
    engine = metadata.engine
    if engine.image is None:
        raise NotFoundError(
            "this calibration was measured outside a container, so it names no image",
            hint="leave --compose out",
            code="no-image",
        )
    import yaml

    volumes = policy_of(answer.calibration.engine).volumes()
    digest = engine.image_digest if engine.image_digest and "@" not in engine.image else None
    service: dict[str, object] = {
        "image": f"{engine.image}@{digest}" if digest else engine.image,
        "ipc": "host",
        "command": ["--model", allocation.model, *allocation.flags],
        "ports": ["127.0.0.1:8000:8000"],
        "volumes": [f"{name}:{place}" for name, place in volumes.items()],
    }
    if metadata.machine.target == "gpu":
        devices = [{"driver": "nvidia", "count": metadata.settings.gpus, "capabilities": ["gpu"]}]
        service["deploy"] = {"resources": {"reservations": {"devices": devices}}}
    document = {"services": {answer.calibration.engine: service}, "volumes": dict.fromkeys(volumes)}
    return yaml.safe_dump(document, sort_keys=False, width=4096)
