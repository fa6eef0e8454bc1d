"""What an engine sees of our environment; nothing here needs POSIX."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Final

#: What any program needs to run.
_PASSED: Final = frozenset({"HOME", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PATH", "TMPDIR", "TZ", "USER"})
#: What makes GPUs usable, or hides them. An engine's settings (``LLAMA_ARG_*``, ``OLLAMA_*``) are not among these: they
#: change what is measured, so they come through ``--env``, which is recorded.
_PASSED_GPU: Final = frozenset(
    {
        "CUDA_DEVICE_ORDER",
        "CUDA_VISIBLE_DEVICES",
        "GGML_VK_VISIBLE_DEVICES",
        "HIP_VISIBLE_DEVICES",
        "HSA_OVERRIDE_GFX_VERSION",
        "NVIDIA_VISIBLE_DEVICES",
        "ONEAPI_DEVICE_SELECTOR",
        "ROCR_VISIBLE_DEVICES",
        "XDG_RUNTIME_DIR",
        "ZES_ENABLE_SYSMAN",
    }
)
#: The Vulkan loader's (VK_DRIVER_FILES, VK_ICD_FILENAMES, …).
_PASSED_PREFIX: Final = "VK_"
_PROXIES: Final = frozenset({"http_proxy", "https_proxy", "no_proxy", "all_proxy"})


def clean_environment(environ: Mapping[str, str], *, network: bool = False) -> dict[str, str]:
    """What an engine sees of our environment: tokens, settings of other programs and our own stay out.

    Proxies are passed only where the engine itself is to use the network.
    """

    def passed(name: str) -> bool:
        if name in _PASSED or name in _PASSED_GPU or name.startswith(_PASSED_PREFIX):
            return True
        return network and name.lower() in _PROXIES

    clean = {name: value for name, value in environ.items() if passed(name)}
    clean.setdefault("PATH", os.defpath)
    return clean
