"""``llama-server`` made of the PyPI package ``xllamacpp``: llama.cpp's own HTTP server behind a Cython module.

It is started as a program by its path, in any Python that has the package (no import of harness), and understands as much of
llama-server's command line and of its ``LLAMA_ARG_*`` variables (tools/server/README.md) as ``CommonParams`` has settings
for. A setting that the installed release does not have is an error; one that only switches off what such a release does not
do is left out, and said.

Exit status: 0 ``--version`` and ``--list-devices``; 1 the server could not be set up; 2 usage; 69 the package cannot be
imported, or lacks a setting. A signal ends it at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

PACKAGE: Final = "xllamacpp"
_USAGE: Final = 2
_UNAVAILABLE: Final = 69
_ON: Final = frozenset({"on", "true", "1", "enabled", "yes"})
_OFF: Final = frozenset({"off", "false", "0", "disabled", "no"})


class UnsupportedError(Exception):
    """The installed release has no such setting."""


def fail(status: int, message: str) -> NoReturn:
    """End with one sentence."""
    sys.stderr.write(f"llama-server (xllamacpp): {message}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # nothing of a half-made server is worth cleaning up


def _field(*names: str, convert: Callable[[str], Any]) -> Callable[[Any, Any, str], None]:
    """Sets the first of these fields that the release has; a name with a dot is a field of a field."""

    def apply(params: Any, _: Any, text: str) -> None:
        value = convert(text)
        for name in names:
            owner = params
            *path, last = name.split(".")
            for step in path:
                owner = getattr(owner, step, None)
            if hasattr(owner, last):
                kind = type(getattr(owner, last))
                setattr(owner, last, kind([value]) if kind in (list, set) else value)
                return
        raise UnsupportedError(names[0])

    return apply


def _switch(text: str) -> bool:
    if text.lower() in _ON | _OFF:
        return text.lower() in _ON
    raise ValueError(f"{text!r} is neither on nor off")


def _not(text: str) -> bool:
    return not _switch(text)


def _member(module: Any, enumeration: str, member: str) -> Any:
    names = getattr(module, enumeration, None)
    value = getattr(names, member, None)
    if names is None:
        raise UnsupportedError(enumeration)
    if value is None:
        raise ValueError(f"{member.rpartition('_')[2]} is not known to this release")
    return value


def _cache_type(name: str) -> Callable[[Any, Any, str], None]:
    def apply(params: Any, module: Any, text: str) -> None:
        value = _member(module, "ggml_type", f"GGML_TYPE_{text.upper()}")
        _field(name, convert=lambda _: value)(params, module, text)

    return apply


def _flash(params: Any, module: Any, text: str) -> None:
    word = "AUTO" if text == "auto" else "ENABLED" if _switch(text) else "DISABLED"
    if hasattr(params, "flash_attn_type"):
        params.flash_attn_type = _member(module, "llama_flash_attn_type", f"LLAMA_FLASH_ATTN_TYPE_{word}")
    elif word != "AUTO":
        _field("flash_attn", convert=_switch)(params, module, text)


def _load_mode(params: Any, module: Any, text: str) -> None:
    """``load_mode`` since llama.cpp b10229; three switches before."""
    if hasattr(params, "load_mode"):
        params.load_mode = _member(module, "llama_load_mode", f"LLAMA_LOAD_MODE_{text.replace('-', '_').upper()}")
        return
    wanted = {"none": (False, False), "mmap": (True, False), "mlock": (False, True), "auto": (True, False)}
    if text not in wanted:
        raise UnsupportedError("load_mode")
    params.use_mmap, params.use_mlock = wanted[text]
    if hasattr(params, "use_direct_io"):
        params.use_direct_io = False


def _layers(params: Any, _: Any, text: str) -> None:
    """-1: as many as fit; a release that knows no ``all`` takes any large number."""
    params.n_gpu_layers = {"auto": -1, "all": 9999}[text] if text in ("auto", "all") else int(text)


def _device(params: Any, _: Any, text: str) -> None:
    if text != "none":
        raise ValueError("devices cannot be chosen in this engine; use CUDA_VISIBLE_DEVICES or the like, or 'none'")
    params.n_gpu_layers = 0


def _threads(params: Any, _: Any, text: str) -> None:
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(text)


def _target(params: Any, _: Any, text: str) -> None:
    """MiB to leave free on each device."""
    if not hasattr(params, "fit_params_target"):
        raise UnsupportedError("fit_params_target")
    sizes = [int(part) << 20 for part in text.split(",")]
    known = list(params.fit_params_target)
    params.fit_params_target = [*sizes, *[sizes[-1]] * (len(known) - len(sizes))]


class ServerOption(NamedTuple):
    """One setting. ``value``: what a flag without an argument stands for; ``optional``: a release may do without."""

    flags: tuple[str, ...]
    variable: str | None
    apply: Callable[[Any, Any, str], None]
    value: str | None = None
    optional: bool = False


def _text(*names: str) -> Callable[[Any, Any, str], None]:
    return _field(*names, convert=str)


def _number(*names: str) -> Callable[[Any, Any, str], None]:
    return _field(*names, convert=int)


#: Fields of ``common_params`` (common/common.h), under the names they have had since b5966 (xllamacpp 0.2.0).
OPTIONS: Final = (
    ServerOption(("-m", "--model"), "LLAMA_ARG_MODEL", _text("model.path", "model")),
    ServerOption(("-a", "--alias"), "LLAMA_ARG_ALIAS", _text("model_alias")),
    ServerOption(("--host",), "LLAMA_ARG_HOST", _text("hostnames", "hostname")),
    ServerOption(("--port",), "LLAMA_ARG_PORT", _number("port")),
    ServerOption(("-c", "--ctx-size"), "LLAMA_ARG_CTX_SIZE", _number("n_ctx")),
    ServerOption(("-b", "--batch-size"), "LLAMA_ARG_BATCH", _number("n_batch")),
    ServerOption(("-ub", "--ubatch-size"), "LLAMA_ARG_UBATCH", _number("n_ubatch")),
    ServerOption(("-np", "--parallel"), "LLAMA_ARG_N_PARALLEL", _number("n_parallel")),
    ServerOption(("-fa", "--flash-attn"), "LLAMA_ARG_FLASH_ATTN", _flash),
    ServerOption(("-ctk", "--cache-type-k"), "LLAMA_ARG_CACHE_TYPE_K", _cache_type("cache_type_k")),
    ServerOption(("-ctv", "--cache-type-v"), "LLAMA_ARG_CACHE_TYPE_V", _cache_type("cache_type_v")),
    ServerOption(("-ngl", "--gpu-layers", "--n-gpu-layers"), "LLAMA_ARG_N_GPU_LAYERS", _layers),
    ServerOption(("-dev", "--device"), "LLAMA_ARG_DEVICE", _device),
    ServerOption(("-t", "--threads"), "LLAMA_ARG_THREADS", _threads),
    ServerOption(("--kv-unified",), "LLAMA_ARG_KV_UNIFIED", _field("kv_unified", convert=_switch), "on"),
    ServerOption(("--swa-full",), "LLAMA_ARG_SWA_FULL", _field("swa_full", convert=_switch), "on"),
    ServerOption(("--load-mode",), "LLAMA_ARG_LOAD_MODE", _load_mode),
    ServerOption(("--no-repack",), None, _field("no_extra_bufts", convert=_switch), "on"),
    ServerOption(("--no-warmup",), None, _field("warmup", convert=_not), "on"),
    ServerOption(("--embeddings", "--embedding"), "LLAMA_ARG_EMBEDDINGS", _field("embedding", convert=_switch), "on"),
    ServerOption(("--mmproj",), "LLAMA_ARG_MMPROJ", _text("mmproj.path")),
    ServerOption(("-lv", "--log-verbosity"), "LLAMA_LOG_VERBOSITY", _number("verbosity")),
    # What a release cannot do needs no switching off.
    ServerOption(("--ctx-checkpoints",), "LLAMA_ARG_CTX_CHECKPOINTS", _number("n_ctx_checkpoints"), optional=True),
    ServerOption(("--cache-ram",), "LLAMA_ARG_CACHE_RAM", _number("cache_ram_mib"), optional=True),
    ServerOption(("-fit", "--fit"), "LLAMA_ARG_FIT", _field("fit_params", convert=_switch), optional=True),
    ServerOption(("-fitt", "--fit-target"), "LLAMA_ARG_FIT_TARGET", _target),
    # Not llama-server's: everything is planned, and nothing allocated. What cannot do it must not load instead.
    ServerOption(("--no-alloc",), None, _field("no_alloc", convert=_switch), "on"),
    ServerOption(("--no-ui", "--no-webui"), None, _field("ui", "webui", convert=_not), "on", optional=True),
    ServerOption(("--offline",), "LLAMA_OFFLINE", _field("offline", convert=_switch), "on", optional=True),
)  # fmt: skip
#: Variables that it reads.
VARIABLES: Final = frozenset(option.variable for option in OPTIONS if option.variable is not None)
#: llama-server's flags for the format of its log, which is always whole here.
_NO_MEANING: Final = ("--no-log-prefix", "--no-log-timestamps")
#: Seconds of CPU time that planning a load may take.
_PLANNING: Final = 60


def build_of(version: str) -> str:
    """llama.cpp's build in a release: ``b11549`` of 2026.10.11549; a release before 2026.4 does not say it."""
    parts = version.split(".")
    calendar = len(parts) > 2 and len(parts[0]) == len("2026") and parts[2].isdigit()
    return f"b{parts[2]}" if calendar else f"{PACKAGE}-{version}"


def installed_version(folder: Path) -> str | None:
    """The version of the package in a site-packages folder, from the name of its metadata; importing that is slow."""
    found = sorted(folder.glob(f"{PACKAGE}-*.dist-info"))
    return found[-1].name.removeprefix(f"{PACKAGE}-").removesuffix(".dist-info") if found else None


def read_arguments(arguments: list[str], environ: dict[str, str]) -> argparse.Namespace:
    """The settings asked for: ``settings`` maps an option's index to its text; flags come before variables."""
    parser = argparse.ArgumentParser(prog="llama-server", add_help=False, allow_abbrev=False)
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--list-devices", action="store_true")
    for flag in _NO_MEANING:
        parser.add_argument(flag, action="store_true")
    for index, option in enumerate(OPTIONS):
        if option.value is None:
            parser.add_argument(*option.flags, dest=f"o{index}")
        else:
            parser.add_argument(*option.flags, dest=f"o{index}", action="store_const", const=option.value)
    given, unknown = parser.parse_known_args(arguments)
    strange = [name for name in environ if name.startswith("LLAMA_ARG_") and name not in VARIABLES]
    if unknown or strange:
        fail(
            _USAGE,
            f"no such setting in this engine: {(unknown or sorted(strange))[0]}; --engine-binary names another llama-server",
        )
    given.settings = {}
    for index, option in enumerate(OPTIONS):
        text = getattr(given, f"o{index}")
        if text is None and option.variable is not None:
            text = environ.get(option.variable)
        if text is not None:
            given.settings[index] = text
    return given


def apply_settings(params: Any, module: Any, settings: dict[int, str], release: str) -> None:
    """Put the settings into ``CommonParams``; what the release lacks ends the program."""
    for index, text in settings.items():
        option = OPTIONS[index]
        try:
            option.apply(params, module, text)
        except (UnsupportedError, AttributeError) as error:
            if not option.optional:
                fail(_UNAVAILABLE, f"xllamacpp {release} no longer has {error}, which {option.flags[0]} {text} needs")
            sys.stderr.write(f"llama-server (xllamacpp): {release} has no {error}; {option.flags[0]} {text} is left out\n")
        except (ValueError, TypeError, OverflowError) as error:
            fail(_USAGE, f"{option.flags[0]} {text}: {error}")


def _import() -> Any:
    try:
        import xllamacpp
    except ImportError as error:
        fail(_UNAVAILABLE, f"the package xllamacpp cannot be imported: {' '.join(str(error).split())}")
    return xllamacpp


def _list_devices(module: Any) -> None:
    """As ``llama-server --list-devices``: GPUs only."""
    sys.stdout.write("Available devices:\n")
    for one in module.get_device_info():
        if "GPU" in str(one["type"]):
            total, free = one["memory_total"] >> 20, one["memory_free"] >> 20
            sys.stdout.write(f"  {one['name']}: {one['description']} ({total} MiB, {free} MiB free)\n")


def main(arguments: list[str]) -> None:
    """Serve until a signal comes."""
    given = read_arguments(arguments, dict(os.environ))
    module = _import()
    release = str(module.__version__)
    if given.version:
        sys.stdout.write(f"version: {build_of(release)} (xllamacpp {release})\n")
        return
    if given.list_devices:
        _list_devices(module)
        return
    params = module.CommonParams()
    apply_settings(params, module, given.settings, release)
    if getattr(params, "no_alloc", False):
        _end_after_planning(params)
    _end_by_signal()
    try:
        server = module.Server(params)
    except RuntimeError as error:
        fail(1, str(error))  # why stands in its log, above
    _end_by_signal()  # some releases install handlers of their own, after which this program would stay
    if not hasattr(server, "listening_address"):
        _say_health(given)
    while server is not None:
        signal.pause()


def _end_after_planning(params: Any) -> None:
    """A server without memory crashes at its first use: let it end before, at a projector that is not there."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_PLANNING, _PLANNING))
    if not params.mmproj.path:
        params.mmproj.path = "/dev/null/none"


def _say_health(given: argparse.Namespace) -> None:
    """For a release whose server takes no HTTP requests (before 0.2.9): say that it is there; memory needs no more."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    asked = {OPTIONS[index].flags[0]: text for index, text in given.settings.items()}
    HTTPServer((asked.get("--host", "127.0.0.1"), int(asked.get("--port", "8080"))), Health).serve_forever()


def _end_by_signal() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


if __name__ == "__main__":
    main(sys.argv[1:])
