"""Every option once: its name, type, default, help, and the values that it may have.

The command line, environment variables, ``harness.toml``, the cells of a sweep, the keyword arguments of
:mod:`harness.api` and what an engine is started with follow from these fields. A field is spelled ``--its-name``,
``HARNESS_ITS_NAME`` and ``its_name``; one that has another name outside (``contexts`` is ``ctx``) says so once.

Values are validated when the options are built, before anything is looked up or started. Pure.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Final, Literal, Self, get_args, get_origin

import msgspec

from harness.engines.registry import BUILT_IN, engine_names, is_engine
from harness.errors import UsageError
from harness.model.record import LoadRequest
from harness.units import MAX_CONTEXT, parse_reserve, parse_size, parse_token_list, parse_tokens, read_numbers, read_sizes

SandboxChoice = Literal["auto", "docker", "process"]
FlashAttention = Literal["auto", "on", "off"]
#: KV cache types: those of llama.cpp (common/arg.cpp, ``kv_cache_types``), which Ollama takes some of, then those of vLLM
#: (vllm/config/cache.py, ``CacheDType``).
KV_CACHE_TYPES: Final = (
    *("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"),
    *("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc", "fp8_ds_mla"),
)
#: The most sequences of any server; what an engine can have is its own (:attr:`harness.prediction.rules.Rules.max_slots`).
MAX_SLOTS: Final = 4096
#: ``--gpu-layers all``: more than any model has.
ALL_LAYERS: Final = 1 << 20


#: Options that go by a setting of another name, where they are not given.
SAME_SETTING: Final = {"slots": "num_parallel", "concurrency": "num_parallel"}


class Option(msgspec.Struct, frozen=True, kw_only=True):
    """What an option's type does not say.

    ``setting``: it can also come from ``HARNESS_…`` and ``harness.toml``. ``read`` makes a value of text, ``check`` raises
    ``ValueError`` for one that cannot be. ``spelled_default`` is the text of a default that is no text itself; ``code`` is the
    error's.
    """

    help: str = ""
    metavar: str | None = None
    setting: bool = True
    choices: tuple[str, ...] = ()
    least: float | None = None
    most: float | None = None
    read: Callable[[str], Any] | None = None
    check: Callable[[Any], None] | None = None
    spelled_default: str | None = None
    code: str = "usage"


class Declaration(msgspec.Struct, frozen=True, kw_only=True):
    """An option as it was declared: ``field`` inside, ``name`` outside. ``kind`` is its plain type."""

    field: str
    name: str
    kind: Any
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """``--its-name``; of a switch that is on by default ``--no-its-name``."""
        return f"--{'no-' if self.default is True else ''}{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str | None:
        """``HARNESS_ITS_NAME``, where there is one."""
        return f"HARNESS_{SAME_SETTING.get(self.name, self.name).upper()}" if self.option.setting else None

    @property
    def written(self) -> tuple[type, ...]:
        """Types that the option can have in ``harness.toml``."""
        if isinstance(self.default, float):
            return (int, float)
        if isinstance(self.default, tuple):
            return (str, list)
        if self.option.read is not None and self.option.least is not None:
            return (str, int)
        return (int,) if self.option.least is not None else (str,)

    def validate(self, value: Any) -> None:
        """Raise unless the option can have this value.

        Raises:
            ValueError: what it can be.
        """
        option = self.option
        if value is None and self.default is None:
            return
        if option.choices and value not in option.choices:
            raise ValueError(f"{value!r} is not one of {', '.join(option.choices)}")
        try:
            msgspec.convert(value, self.kind)
        except msgspec.ValidationError as error:
            raise ValueError(f"{value!r} cannot be: {error}") from error
        for number in value if isinstance(value, tuple) else (value,):
            if option.least is not None and not option.least <= number <= (option.most or number):
                upto = "" if option.most is None else f" and at most {option.most:,.10g}"
                raise ValueError(f"{number} is out of range: at least {option.least:g}{upto}")
        if option.check is not None:
            option.check(value)


@functools.cache
def declarations(kind: type[msgspec.Struct]) -> dict[str, Declaration]:
    """The options that a class declares, by their names outside."""
    found = {}
    for field in msgspec.structs.fields(kind):
        if get_origin(field.type) is not Annotated:
            continue
        plain, *notes = get_args(field.type)
        option = next((note for note in notes if isinstance(note, Option)), None)
        if option is None:
            continue
        default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
        choices = option.choices or (get_args(plain) if get_origin(plain) is Literal else ())
        found[field.encode_name] = Declaration(
            field=field.name, name=field.encode_name, kind=plain, default=default,
            option=msgspec.structs.replace(option, choices=choices),
        )  # fmt: skip
    return found


def read_available(available: str | int | Sequence[int] | None) -> tuple[int, ...] | None:
    """Free memory as :mod:`harness.api` takes it, in bytes of each device; ``None``: it is to be read.

    Raises:
        UsageError: it is no size, or of no device.
    """
    if available is None:
        return None
    if isinstance(available, str):
        try:
            return read_sizes(available)
        except ValueError as error:
            raise UsageError(f"--available: {error}", hint="one size, or one for each device: 24GiB,24GiB") from error
    try:
        sizes = msgspec.convert((available,) if isinstance(available, int) else available, tuple[int, ...])
    except msgspec.ValidationError:
        sizes = ()
    if not sizes or min(sizes) < 0:
        raise UsageError(f"available memory is a size, or bytes of each device, not {available!r}")
    return sizes


def _read_batch(text: str) -> int | None:
    if text == "auto":
        return None
    numbers = read_numbers(text)
    if len(numbers) != 1:
        raise ValueError("one number, or auto, is expected")
    return numbers[0]


def _read_layers(text: str) -> int:
    if text != "all" and not text.isdecimal():
        raise ValueError("a number of layers, or all, is expected")
    return ALL_LAYERS if text == "all" else min(int(text), ALL_LAYERS)


def _read_env(text: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not sign:
        raise ValueError(f"NAME=VALUE is expected, not {text!r}")
    return name, value


def _check_env(env: dict[str, str]) -> None:
    for name, value in env.items():
        if not name.isidentifier() or "\0" in value:
            raise ValueError(f"NAME=VALUE is expected, not '{name}={value}'")


def _check_model(name: str) -> None:
    if not name or any(not character.isprintable() for character in name):
        raise ValueError("a model's name is not empty and has no control characters")


def check_variant(name: str) -> None:
    """Raise ``ValueError`` for a variant that ``MODEL@VARIANT`` could not name."""
    if re.fullmatch(r"\d+[km]?", name, re.ASCII | re.IGNORECASE):
        raise ValueError(f"{name!r} would be read as a context in MODEL@{name}; give it a letter")


def _check_engine(name: str) -> None:
    if name != "auto" and not is_engine(name):
        raise ValueError(f"{name!r} is not one of auto, {', '.join(engine_names())}")


def _check_gpus(gpus: str) -> None:
    if not any(part.strip() for part in gpus.split(",")):
        raise ValueError("all, none, or a list of GPUs is expected")


def _check_cache_type(kind: str) -> None:
    for part in kind.split("/"):  # "q8_0/f16": K and V differ
        if part not in KV_CACHE_TYPES:
            raise ValueError(f"{kind!r} is not a KV cache type; known types: {', '.join(KV_CACHE_TYPES)}")


def _check_speed(speed: float) -> None:
    if not 0 < speed < MAX_CONTEXT:
        raise ValueError(f"{speed} is no speed in tokens per second")


#: Options that more than one class has.
Engine = Annotated[
    str,
    Option(
        metavar="|".join(("auto", *BUILT_IN)), check=_check_engine,
        help="Engine whose calibration is meant, where several engines have one.",
    ),
]  # fmt: skip
CacheType = Annotated[str | None, Option(metavar="T", help="KV cache: f16, q8_0, q8_0/f16 (K/V), …", check=_check_cache_type)]
Flash = Annotated[FlashAttention, Option(help="Flash attention; auto: the engine's own choice.")]
NumBatch = Annotated[int | None, Option(
    metavar="N|auto", help="Physical batch of every load; auto: as the engine would choose.",
    least=1, most=MAX_CONTEXT, read=_read_batch, spelled_default="auto",
)]  # fmt: skip
Variant = Annotated[
    str | None,
    Option(metavar="NAME", setting=False, check=check_variant, help="Name of a variant of the calibration."),
]


class _Validated(msgspec.Struct, frozen=True, kw_only=True):
    def __post_init__(self) -> None:
        """Validate every option.

        Raises:
            UsageError: one has a value that it cannot have.
        """
        for one in declarations(type(self)).values():
            try:
                one.validate(getattr(self, one.field))
            except (ValueError, TypeError) as error:
                raise UsageError(f"{one.flag}: {error}", code=one.option.code) from error

    @classmethod
    def of(cls, values: dict[str, Any], **more: Any) -> Self:
        """From a command line: what it does not have, or leaves open, is at its default."""
        known = {name: values[name] for name in cls.__struct_fields__ if values.get(name) is not None}
        return cls(**known, **more)


class CalibrationOptions(_Validated, frozen=True, kw_only=True):
    """What a calibration, or a start of an engine, is asked for; a plan of a sweep may set all of it."""

    model: Annotated[
        str | None,
        Option(
            check=_check_model,
            code="bad-name",
            help="A name of the catalog, the engine's own name, or the path of a GGUF file.",
        ),
    ] = None
    engine: Engine = "auto"
    sandbox: Annotated[
        SandboxChoice, Option(help="Where the engine runs; auto: in Docker where a container gets the GPU, else a process.")
    ] = "auto"
    contexts: Annotated[
        tuple[int, ...],
        Option(
            metavar="N,N,…", help="Contexts to load, tokens per slot: 8k,32k.",
            least=1, most=MAX_CONTEXT, read=parse_token_list,
        ),
    ] = msgspec.field(default=(), name="ctx")  # fmt: skip
    num_batch: NumBatch = None
    kv_cache_type: CacheType = None
    flash_attention: Flash = "auto"
    num_parallel: Annotated[int, Option(least=1, most=MAX_SLOTS, help="Slots: sequences at once.")] = 1
    gpus: Annotated[
        str, Option(metavar="all|none|IDS", check=_check_gpus, help="GPUs of the engine: UUIDs, indices, or its own names.")
    ] = "all"
    image: Annotated[str | None, Option(metavar="REF", help="Image of the engine, by tag or digest.")] = None
    engine_binary: Annotated[str | None, Option(metavar="PATH", help="Your own llama-server, ollama or vllm.")] = None
    models: Annotated[str | None, Option(metavar="VOLUME|DIR", help="Volume or folder of the engine's models.")] = None
    env: Annotated[
        dict[str, str],
        Option(
            metavar="K=V", setting=False, help="Environment of the engine; recorded, secrets redacted.",
            read=_read_env, check=_check_env,
        ),
    ] = {}  # fmt: skip
    variant: Variant = None
    name: Annotated[
        str | None, Option(metavar="NAME", setting=False, check=_check_model, help="File the calibration under this name.")
    ] = None
    speed: Annotated[bool, Option(setting=False, help="Measure memory only.")] = True
    header_only: Annotated[bool, Option(setting=False, help="Measure memory from the model's header, without its weights.")] = (
        False
    )
    quick: Annotated[bool, Option(setting=False, help="Make one load; the engine plans the other contexts.")] = False
    timeout: Annotated[float, Option(metavar="S", least=0.001, help="Seconds to wait for one answer of the engine.")] = 600.0


class Allowed(msgspec.Struct, frozen=True, kw_only=True):
    """What files may set beyond the list of :mod:`harness.store.trust`: variables by name, the image, weights, a program."""

    env: frozenset[str] = frozenset()
    image: bool = False
    model: bool = False
    binary: bool = False


class RunOptions(CalibrationOptions, frozen=True, kw_only=True):
    """The options of ``harness calibrate``, not yet resolved; ``loads`` is a recorded plan."""

    force: Annotated[bool, Option(setting=False, help="Replace a calibration of another GPU, model or settings.")] = False
    loads: tuple[LoadRequest, ...] = ()
    allowed: Allowed = Allowed()


class Overrides(RunOptions, frozen=True, kw_only=True):
    """What a user says for all calibrations alike; ``gpus`` is ``None`` for those that each was measured on."""

    gpus: Annotated[
        str | None, Option(metavar="all|none|IDS", check=_check_gpus, help="GPUs of the engine; default: as before.")
    ] = None  # type: ignore[assignment]


_placing = functools.partial(Option, setting=False)


class QueryOptions(_Validated, frozen=True, kw_only=True):
    """What a question about calibrations says beside its models."""

    ctx: Annotated[
        int | None,
        Option(
            metavar="N", setting=False, least=1, most=MAX_CONTEXT, read=parse_tokens,
            help="Tokens per slot (8192, 8k), where MODEL names none.",
        ),
    ] = None  # fmt: skip
    num_parallel: Annotated[int, Option(least=1, most=MAX_SLOTS, help="Slots: sequences at once.")] = 1
    available: Annotated[
        tuple[int, ...] | None,
        Option(metavar="SIZE[,SIZE]", help="Memory available (24GiB,24GiB: of each device).", read=read_sizes),
    ] = None
    gpu: Annotated[str | None, Option(metavar="ID", setting=False)] = None
    extrapolate: Annotated[bool, Option(setting=False, help="Answer beyond the calibrated range too, with a warning.")] = False
    measured_only: Annotated[bool, Option(setting=False, help="No estimates: without a calibration it is unknown (4).")] = False
    engine: Engine = "auto"
    variant: Variant = None
    kv_cache_type: CacheType = None
    flash_attention: Flash = "auto"
    num_batch: NumBatch = None
    gpu_layers: Annotated[
        int | None, _placing(metavar="N|all", least=0, read=_read_layers, help="Layers put on the GPU, the output layer first.")
    ] = None
    n_cpu_moe: Annotated[int, _placing(metavar="N", least=0, most=4096, help="First layers whose experts are on the host.")] = 0
    fit: Annotated[Literal["on", "off"], _placing(help="off: the engine moves nothing to the host.")] = "on"
    reserve: Annotated[int | None, _placing(metavar="SIZE", read=parse_reserve, help="Size kept free (1GiB, or 0).")] = None
    host_available: Annotated[int | None, _placing(metavar="SIZE", read=parse_size, help="Host memory (64GiB).")] = None
    store: Annotated[str | None, Option(metavar="DIR", help="Folder of calibrations and runs.")] = None


class TuneOptions(_Validated, frozen=True, kw_only=True):
    """What ``harness tune`` has to reach."""

    min_ctx: Annotated[
        int | None, Option(setting=False, least=1, most=MAX_CONTEXT, metavar="N", help="Tokens per slot that have to fit.")
    ] = None
    min_tokens_per_s: Annotated[
        float | None,
        Option(
            setting=False, metavar="N", read=float, check=_check_speed,
            help="Decode speed to reach; layers may then be on the host.",
        ),
    ] = None  # fmt: skip
    slots: Annotated[int, Option(least=1, most=MAX_SLOTS, metavar="N", help="Sequences at once.")] = 1


#: Settings that no command has as an option.
_ALONE: Final = {"cache": Declaration(field="cache", name="cache", kind=str | None, default=None, option=Option())}


def settings() -> dict[str, Declaration]:
    """What environment variables and ``harness.toml`` can set, by its name there."""
    every = declarations(CalibrationOptions) | declarations(QueryOptions) | _ALONE
    every["ctx"] = declarations(CalibrationOptions)["ctx"]
    return {name: one for name, one in every.items() if one.option.setting}


def shared(options: CalibrationOptions) -> dict[str, Any]:
    """The fields that all classes of calibration options have, to build another of them."""
    return {name: getattr(options, name) for name in CalibrationOptions.__struct_fields__}
