"""``harness share``: one calibration with its record, without what says whose it is; and the check of such a file.

What leaves is rebuilt field by field from numbers, words of a list, and names that are public: of the model (without its
folder), the engine, and the card. Free text (reasons, notes, lines of logs), paths, hosts, UUIDs, PIDs, times of day and
variables that are no settings stay here. A file is good if its calibration is what its record says, and if scrubbing it again
changes nothing.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Final, Literal

import msgspec

from harness.engines.settings import ARGUMENTS, is_setting, settings_alone
from harness.errors import BadInputError, NotFoundError, NotPermittedError, UntrustedError
from harness.maintain.refit import fitted
from harness.model.calibration import Calibration, artifact_name, to_document
from harness.model.domains import unsound
from harness.model.facts import DeviceFacts, FitFacts, LoadFacts, Unread
from harness.model.record import EngineVersion, Load, Machine, Record, Settings
from harness.model.trace import Occupancy, Plateau
from harness.sandboxes.container_config import repository
from harness.store.run_folder import read_plain
from harness.store.store import RUNS, Store, read_record
from harness.text import word_of

#: Of the file's own form.
VERSION: Final = 1
_LARGEST: Final = 8 << 20
#: Variables that say where something is or who asks, and nothing of memory: they are left out.
_ELSEWHERE: Final = frozenset(
    {
        *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HOME", "HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
        *("http_proxy", "https_proxy", "no_proxy", "OLLAMA_MODELS", "OLLAMA_HOST", "OLLAMA_ORIGINS", "LLAMA_CACHE"),
    }
)
_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
_CARD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ()/._+-]{0,79}")
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_DAY: Final = re.compile(r"\d{4}-\d{2}-\d{2}")
#: What a load whose log contradicted itself is left with.
_DOUBT: Final = "its log contradicts itself"


class Shared(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A calibration and the record from which it follows, as they are given to others."""

    harness_share: Literal[1] = 1
    calibration: Calibration
    record: Record

    @property
    def name(self) -> str:
        """Where it belongs below models/community: ``engine/name@card.json``."""
        machine = self.calibration.metadata.machine
        card = "+".join(gpu.name for gpu in machine.gpus) or "host"
        return f"{self.calibration.id}@{word_of(card).strip('-')}.json"

    def encoded(self) -> bytes:
        """The file."""
        document = {"harness_share": VERSION, "calibration": to_document(self.calibration), "record": self.record}
        return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"


def share(store: Store, calibration: Calibration) -> Shared:
    """A calibration of a store, scrubbed; its record has to be there, and to say the same after scrubbing.

    Raises:
        NotFoundError: the record is not here. NotPermittedError: it was measured with variables that do not leave.
        UntrustedError: what is left of the record says something else.
    """
    run = calibration.metadata.run
    folder = None if run is None else store.root / RUNS / run
    if folder is None or not (folder / "record.json").is_file():
        raise NotFoundError(
            f"the record of {calibration.id}, run {calibration.metadata.run}, is not in {store.root / RUNS}", code="no-record",
            hint=f"to make one: harness recalibrate {shlex.quote(calibration.id)}",
        )  # fmt: skip
    record = scrubbed(read_record(folder))
    made = fitted(record, calibration.id)
    if _figures(made) != _figures(calibration):
        raise UntrustedError(f"what may be shared of {calibration.id} differs from its calibration")
    return Shared(calibration=made, record=record)


def check(path: Path) -> Shared:
    """A file that others have proposed.

    Raises:
        BadInputError: it is no such file, its calibration is not what its record says, or it holds more than may leave.
        UntrustedError: no line can be drawn through the record.
    """
    data = read_plain(path)
    if len(data) > _LARGEST:
        raise BadInputError(f"{path} exceeds {_LARGEST >> 20} MiB", code="bad-share")
    try:
        found = msgspec.json.decode(data, type=Shared)
        document = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise BadInputError(f"{path} is not a shared calibration: {error}", code="bad-share") from error
    if (why := unsound(document)) is not None:
        raise BadInputError(f"{path} is not a shared calibration: {why}", code="bad-share")
    if scrubbed(found.record) != found.record:
        raise BadInputError(f"{path} contains more than may be shared: make it with harness share", code="bad-share")
    if to_document(fitted(found.record, str(path))) != to_document(found.calibration):
        raise BadInputError(f"{path}: its calibration is not what its record says", code="bad-share")
    if not str(path.resolve()).endswith(f"/{found.name}"):
        raise BadInputError(f"{path} belongs at {found.name}", code="bad-share")
    return found


def _figures(calibration: Calibration) -> object:
    metadata = calibration.metadata
    return calibration.constants, metadata.breakdown_gb, metadata.bands, metadata.quality.max_error, metadata.quality.valid_to


def scrubbed(record: Record) -> Record:
    """What of a record may leave.

    Raises:
        NotPermittedError: it was measured with variables whose values do not leave, and its figures hold with them alone.
    """
    day = record.started_at[:10] if _DAY.fullmatch(record.started_at[:10]) else "1970-01-01"
    numbers = {gpu.uuid: f"GPU{index}" for index, gpu in enumerate(record.machine.gpus) if gpu.uuid is not None}
    name = _public(record.model.name)
    stem = artifact_name(name.removesuffix(".gguf"))
    model = msgspec.structs.replace(
        record.model,
        name=name,
        digest=_kept(record.model.digest, _DIGEST),
        architecture=_kept(record.model.architecture, _WORD),
        quantization=_kept(record.model.quantization, _WORD),
        stored_digest=_kept(record.model.stored_digest, _DIGEST),
    )
    return Record(
        schema_version=record.schema_version,
        run=f"{day.replace('-', '')}T000000Z-{record.engine_name}-{stem}",
        harness_version=_kept(record.harness_version, _WORD) or "0",
        started_at=f"{day}T00:00:00Z",
        status=record.status,
        id=f"{record.engine_name}/{stem}",
        engine_name=record.engine_name,
        model=model,
        engine=_engine(record),
        settings=_settings(record),
        machine=_machine(record.machine),
        reserve_bytes=record.reserve_bytes,
        tensors=record.tensors,
        estimate=record.estimate,
        batch_limits=record.batch_limits,
        loads=tuple(_load(load, numbers) for load in record.loads),
        before=_held(record.before, numbers),
        after=_held(record.after, numbers),
        weights=record.weights,
    )


def _kept(text: str | None, pattern: re.Pattern[str]) -> str | None:
    return text if text is not None and pattern.fullmatch(text) else None


def _public(name: str) -> str:
    """A model's name without the folder of a file; a name of an engine's own stays."""
    short = name.replace("\\", "/")
    return short.rpartition("/")[2] if short.startswith(("/", "./", "../", "~")) or short.endswith(".gguf") else short


def _engine(record: Record) -> EngineVersion:
    """The image only where its repository is one of those that everybody can have: no registry of one's own."""
    engine = record.engine
    image = engine.image
    host = image.partition("@")[0].partition("/")[0] if image is not None and "/" in image else ""
    if image is not None and (repository(image).count("/") > 1 or set(".:") & set(host) or host == "localhost"):
        image = None
    digest = None if image is None else _kept(engine.image_digest, _DIGEST)
    return EngineVersion(version=_kept(engine.version, _WORD), image=image, image_digest=digest)


def _settings(record: Record) -> Settings:
    settings = record.settings
    unknown = sorted(name for name, value in settings.env.items() if not is_setting(name, value) and name not in _ELSEWHERE)
    vllm = settings.vllm
    if vllm is not None:
        if vllm.arguments and not is_setting(ARGUMENTS, " ".join(vllm.arguments)):
            unknown.append(ARGUMENTS)
        words = {field: _kept(getattr(vllm, field), _WORD) for field in ("dtype", "quantization")}
        vllm = msgspec.structs.replace(vllm, model=_public(vllm.model), **words)
    if unknown:
        raise NotPermittedError(
            f"{record.id} was measured with {', '.join(unknown)}, which does not leave, and its figures hold only so",
            hint="calibrate without, and share that",
            code="not-shared",
        )
    return msgspec.structs.replace(settings, env=settings_alone(settings.env), vllm=vllm)


def _machine(machine: Machine) -> Machine:
    gpus = tuple(
        msgspec.structs.replace(gpu, name=_kept(gpu.name, _CARD) or "a GPU", uuid=None, driver=_kept(gpu.driver, _WORD))
        for gpu in machine.gpus
    )
    return msgspec.structs.replace(machine, gpus=gpus)


def _load(load: Load, numbers: dict[str, str]) -> Load:
    reported = load.reported
    if reported is not None:
        reported = msgspec.structs.replace(reported, version=_kept(reported.version, _WORD))
    return Load(
        request=load.request, outcome=load.outcome, facts=None if load.facts is None else _facts(load.facts),
        idle=_plateau(load.idle, numbers), busy=_plateau(load.busy, numbers), reported=reported,
        speeds=load.speeds, started=load.started,
        ready=load.ready, ended=load.ended, left_bytes=load.left_bytes, settle_seconds=load.settle_seconds,
        cpu_by_others=load.cpu_by_others, request_seconds=load.request_seconds, prompt_tokens=load.prompt_tokens,
    )  # fmt: skip


def _plateau(plateau: Plateau | None, numbers: dict[str, str]) -> Plateau | None:
    if plateau is None:
        return None
    return msgspec.structs.replace(plateau, reason=None, devices=_numbered(plateau.devices, numbers))


def _held(held: Occupancy | None, numbers: dict[str, str]) -> Occupancy | None:
    return None if held is None else Occupancy(devices=_numbered(held.devices, numbers))


def _numbered(devices: dict[str, int], numbers: dict[str, str]) -> dict[str, int]:
    """Bytes by the number of a GPU in place of its UUID; what is numbered already stays so."""
    found: dict[str, int] = {}
    for uuid, size in devices.items():
        name = numbers.get(uuid) or (uuid if re.fullmatch(r"GPU\d{1,3}", uuid) else "GPU")
        found[name] = found.get(name, 0) + size
    return found


def _facts(facts: LoadFacts) -> LoadFacts:
    vllm = facts.vllm
    if vllm is not None:
        workers = tuple(msgspec.structs.replace(one, name=None) for one in vllm.workers)
        words = {field: _kept(getattr(vllm, field), _WORD) for field in ("version", "dtype", "quantization", "failure_class")}
        vllm = msgspec.structs.replace(vllm, workers=workers, **words)
    return msgspec.structs.replace(
        facts,
        dialect=_kept(facts.dialect, _WORD) or "",
        model=None,
        kv_cache_type=_kept(facts.kv_cache_type, re.compile(r"[a-z0-9_]{1,16}(/[a-z0-9_]{1,16})?")),
        failure=None,
        devices={_device(name): _on_device(one) for name, one in facts.devices.items()},
        doubts=(_DOUBT,) if facts.doubts else (),
        checked=(),
        optional_bytes={name: size for name, size in facts.optional_bytes.items() if _WORD.fullmatch(name)},
        unread=Unread(count=facts.unread.count),
        wrapping=(),
        engine_version=_kept(facts.engine_version, _WORD),
        caches=tuple(
            msgspec.structs.replace(one, devices={_device(name): size for name, size in one.devices.items()})
            for one in facts.caches
        ),
        fit=None if facts.fit is None else _fit(facts.fit),
        layer_kinds=_kept(facts.layer_kinds, re.compile(r"[fwrb-]{0,4096}")),
        vllm=vllm,
    )


def _on_device(one: DeviceFacts) -> DeviceFacts:
    return msgspec.structs.replace(one, address=None)


def _fit(fit: FitFacts) -> FitFacts:
    rows = tuple(msgspec.structs.replace(row, device=_device(row.device)) for row in fit.rows)
    return msgspec.structs.replace(fit, rows=rows, used={_device(name): size for name, size in fit.used.items()})


def _device(name: str) -> str:
    """A device's name without address and title; two of one name would be one, so a strange name stays apart by its length."""
    match = re.match(r"[A-Za-z][A-Za-z0-9_]{0,31}", name)
    return match[0] if match is not None else f"device{len(name)}"
