"""A Deployment for Kubernetes: a whole GPU, a MIG instance, or a share of a GPU's memory.

Shares: the annotation ``gpu-memory`` of the KAI scheduler (MiB), or the resource ``nvidia.com/gpumem`` of HAMi (MiB).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from harness.errors import NotFoundError, UsageError
from harness.exports.entry import Entry, comments, document, image_remarks, unique
from harness.units import GIB, MIB, format_size

#: MIG profiles by the words of a card's name (NVIDIA's MIG user guide), the smallest first: slices and nominal GB.
_MIG: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("H200", ("1g.18gb", "1g.35gb", "2g.35gb", "3g.71gb", "7g.141gb")),
    ("H100 80GB", ("1g.10gb", "1g.20gb", "2g.20gb", "3g.40gb", "7g.80gb")),
    ("A100-SXM4-80GB", ("1g.10gb", "1g.20gb", "2g.20gb", "3g.40gb", "7g.80gb")),
    ("A100 80GB", ("1g.10gb", "1g.20gb", "2g.20gb", "3g.40gb", "7g.80gb")),
    ("A100", ("1g.5gb", "1g.10gb", "2g.10gb", "3g.20gb", "7g.40gb")),
    ("A30", ("1g.6gb", "2g.12gb", "4g.24gb")),
)
#: What an instance has at least of its nominal size (H200: 16.0 GiB of 1g.18gb is the least share among them).
_USABLE: Final = 0.88


def write(entries: Sequence[Entry], style: str, _together: Sequence[Sequence[int]]) -> str:
    """A document for each model."""
    names = unique([entry.label for entry in entries])
    return "---\n".join(_deployment(name, entry, style) for name, entry in zip(names, entries, strict=True))


def _deployment(name: str, entry: Entry, style: str) -> str:
    if entry.image is None:
        raise NotFoundError(f"no image is known for {entry.key}: it was measured outside a container", code="no-image")
    start, mib = entry.start, str(entry.claim // MIB)
    limits: dict[str, str] = {}
    annotations: dict[str, str] = {}
    remarks = []
    if not entry.on_gpu:
        limits = {"memory": f"{mib}Mi"}
    elif style == "mig":
        profile = mig_profile(entry)
        limits = {f"nvidia.com/mig-{profile}": "1"}
        remarks.append(
            f"an instance of {profile} is taken to have {_USABLE:.0%} of its nominal size; nvidia-smi mig -lgip says more"
        )
    elif style == "shared":
        annotations = {"gpu-memory": mib}
    else:
        limits = {"nvidia.com/gpu": str(entry.gpus), **({"nvidia.com/gpumem": mib} if style == "hami" else {})}
    words = [*entry.words, *(("--host", "0.0.0.0") if start.model_option else ())]  # noqa: S104 - inside the pod
    container: dict[str, Any] = {
        "name": "engine",
        "image": entry.image,
        # Kubernetes replaces $(NAME) in arguments; two dollars are one.
        "args": [word.replace("$(", "$$(") for word in words],
        "env": [{"name": key, "value": value.replace("$(", "$$(")} for key, value in start.variables.items()],
        "ports": [{"containerPort": start.port}],
        "readinessProbe": {"httpGet": {"path": start.health, "port": start.port}},
        "resources": {"limits": limits} if limits else {},
        "volumeMounts": [{"name": _volume(one), "mountPath": place} for one, place in _places(entry).items()],
    }
    spec: dict[str, Any] = {
        "containers": [{key: value for key, value in container.items() if value not in ([], {})}],
        "volumes": [{"name": _volume(one), "persistentVolumeClaim": {"claimName": one}} for one in _places(entry)],
    }
    if style == "shared" and entry.on_gpu:
        spec = {"schedulerName": "kai-scheduler", **spec}
    labels = {"app.kubernetes.io/name": name}
    template = {"metadata": {"labels": labels, **({"annotations": annotations} if annotations else {})}, "spec": spec}
    found = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "labels": labels},
        "spec": {"replicas": 1, "strategy": {"type": "Recreate"}, "selector": {"matchLabels": labels}, "template": template},
    }
    return comments([entry], *image_remarks([entry]), *remarks) + document(found)


def _places(entry: Entry) -> dict[str, str]:
    return {**entry.start.volumes, **({"models": entry.folder} if entry.start.model_option else {})}


def _volume(name: str) -> str:
    return f"{name}-data"


def mig_profile(entry: Entry) -> str:
    """The smallest MIG profile of the calibrated card that holds the model.

    Raises:
        UsageError: the card has no MIG that is known here, the model takes several GPUs, or no instance is large enough.
    """
    names = [gpu.name for gpu in entry.calibration.metadata.machine.gpus]
    profiles = next((some for word, some in _MIG if names and word in names[0]), ())
    if entry.gpus > 1 or not profiles:
        raise UsageError(f"no MIG profile is known for {' + '.join(names) or 'an unknown card'}", code="no-mig-profile")
    for profile in profiles:
        if entry.claim <= _USABLE * int(profile.partition(".")[2].removesuffix("gb")) * GIB:
            return profile
    raise UsageError(f"no MIG instance of {names[0]} holds {format_size(entry.claim, 1)}", code="no-mig-profile")
