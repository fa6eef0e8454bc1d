"""Docker here: whether containers can be measured, and whether they can be given an NVIDIA GPU; nothing is started."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Final

from harness.errors import HarnessError
from harness.inventory.gpus import has_device

if TYPE_CHECKING:
    from harness.sandboxes.daemon import DaemonFacts

#: What dockerd looks for on its PATH to serve ``--gpus``, registered as a runtime or not (moby, daemon/nvidia_linux.go).
HOOK: Final = "nvidia-container-runtime-hook"
#: How long a daemon may take to say what it is, seconds, before a choice is made without it.
ANSWER_LIMIT: Final = 3
_SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def docker_gpu_obstacle() -> str | None:
    """Why a container cannot be given an NVIDIA GPU here; ``None`` if it can. Asks the daemon; takes well under a second."""
    if not has_device():
        return "there is no NVIDIA GPU"
    facts = _daemon()
    if isinstance(facts, str):
        return facts
    return None if gpu_path(facts) else "Docker has neither the nvidia runtime, nor its hook, nor a CDI device of a GPU"


def docker_obstacle() -> str | None:
    """Why no container can be measured here, with a GPU or without; ``None`` if one can."""
    facts = _daemon()
    return facts if isinstance(facts, str) else None


def _daemon() -> DaemonFacts | str:
    """This machine's daemon, or why its containers cannot be measured."""
    from harness.sandboxes.daemon import refusal
    from harness.sandboxes.docker_client import Daemon

    try:
        with Daemon(limit=ANSWER_LIMIT) as daemon:
            facts = daemon.facts()
    except HarnessError as error:
        return error.message
    return facts if (refused := refusal(facts)) is None else refused.message


def gpu_path(facts: DaemonFacts) -> str | None:
    """How this machine's daemon gives a container a GPU, in words; ``None`` if it cannot."""
    if facts.gpu_path is not None:
        return {"runtime": "the nvidia runtime", "cdi": f"CDI ({', '.join(facts.cdi_gpus)})"}[facts.gpu_path]
    return f"the hook {HOOK}" if shutil.which(HOOK, path=f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}") else None
