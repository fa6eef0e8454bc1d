"""From what the user run to a run: model, engine, sandbox and meter, chosen once."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import msgspec

from harness.engines.base import Engine, Options, Source
from harness.engines.registry import recipe_of
from harness.engines.running import RunningServer, held_by
from harness.errors import NotFoundError
from harness.inventory.backend import Backend, choose, choose_engine, choose_sandbox, header_address, resolve_name
from harness.inventory.digests import cached_sha256
from harness.inventory.machine import LocalMachine
from harness.measure.calibrate import Session
from harness.measure.plan import Request
from harness.measure.quick import check_quick
from harness.model.record import HeaderSource, Model
from harness.options import RunOptions, shared
from harness.sandboxes.base import GpuRequest
from harness.store.catalog import DEFAULT_MODEL, Catalog, find_catalog, pinned_image, read_catalog
from harness.store.store import Store, model_stem
from harness.text import release


def prepare(run: RunOptions, store: Store, here: Path) -> Session:
    """Resolve everything that can fail without starting an engine.

    Raises:
        HarnessError: the model, engine, sandbox, GPU or store cannot be had.
    """
    name = run.model or DEFAULT_MODEL
    options = Options(**{**shared(run), "gpus": GpuRequest.parse(run.gpus)})
    catalog = read_catalog(find_catalog(here))
    engine_name, reasons = choose_engine(run.engine, run.sandbox, options, name, catalog)
    engine = recipe_of(engine_name)
    engine.policy.check_slots(run.num_parallel)
    place, why = choose_sandbox(engine, run.sandbox, options)
    options = msgspec.structs.replace(options, sandbox=place)
    reasons = (*reasons, *why)
    stack = ExitStack()
    if not run.header_only and name.startswith(("https://", "http://", "hf://")):
        raise NotFoundError(
            f"{name} is an address, and weights are not downloaded", code="no-such-file",
            hint="--header-only measures its memory without them; or download the file and give its path",
        )  # fmt: skip
    if run.header_only:
        name, source, options = _from_header(name, engine, catalog, options, stack)
    else:
        source = engine.resolve(resolve_name(name, engine, catalog, options), options)
    if not name.endswith(".gguf"):
        name = name.partition("@sha256:")[0]  # a digest pins a model; it is no part of its name
        source = msgspec.structs.replace(source, model=_named(source.model, model_stem(name)))
    else:
        source = msgspec.structs.replace(source, model=_named(source.model, Path(name).name))
    source = _with_overrides(source, options)
    choice = choose(engine, place, options, reasons)
    if choice.sandbox == "docker":
        pinned = pinned_image(engine.name, here)
        options = msgspec.structs.replace(options, image=options.image or pinned)
        named = options.image is not None and options.image.partition("@")[0] != pinned
        lent = () if source.lent is None else (f"models of {source.lent}, which are here: nothing is pulled",)
        reasons = (f"image {options.image or 'unknown'}", *lent)
    else:
        named, reasons = options.engine_binary is not None, ()
    options = msgspec.structs.replace(options, named=named)
    servers = LocalMachine().running(engine.name)
    held = held_by(engine.name, servers) if choice.target == "gpu" else ()
    if servers:
        held = (*_other_versions(engine, options, servers), *held)
    choice = msgspec.structs.replace(choice, reasons=(*choice.reasons, *reasons, *held))
    request = Request(
        name=name,
        stem=run.name or model_stem(name),
        source=source,
        contexts=run.contexts,
        loads=run.loads,
        num_batch=run.num_batch,
        variant=run.variant,
        speed=run.speed and not run.header_only and not run.quick,
        force=run.force,
    )
    options = msgspec.structs.replace(options, target=choice.target, memory_limit=memory_budget(choice))
    if run.quick:
        source = msgspec.structs.replace(source, plan_path=source.plan_path or source.path)
        request = msgspec.structs.replace(request, source=source)
        check_quick(options, source)
    return Session(engine=engine, choice=choice, options=options, request=request, store=store, held=stack)


def _from_header(name: str, engine: Engine, catalog: Catalog, options: Options, held: ExitStack) -> tuple[str, Source, Options]:
    """The name under which it is filed, the source, and the options for it, of a model without its weights."""
    if engine.policy.dummy_weights:
        own = engine.resolve(resolve_name(name, engine, catalog, options), options)
        return name, msgspec.structs.replace(own, weights="header"), options
    from harness.headers.read import header_only
    from harness.headers.sources import find, open_client

    with open_client() as client:
        found = find(header_address(name, engine, catalog), client, engine.name)
        if found.parts[0].path is not None:
            digest = cached_sha256(found.parts[0].path)
            parts = (msgspec.structs.replace(found.parts[0], digest=digest), *found.parts[1:])
            found = msgspec.structs.replace(found, parts=parts)
        header = held.enter_context(header_only(found, client))
    source, options = engine.from_header(header, options)
    source = msgspec.structs.replace(source, plan_path=header.parts[0].resolve())
    local = found.parts[0].path is not None  # where it lay is of no use elsewhere
    known = HeaderSource(address=header.name if local else header.source, revision=header.revision)
    return name if name in catalog.models else header.name, msgspec.structs.replace(source, header=known), options


def _other_versions(engine: Engine, options: Options, servers: tuple[RunningServer, ...]) -> tuple[str, ...]:
    """That a server which runs here is of another version than the program that will be measured."""
    if options.sandbox == "docker":
        image, _, version = (options.image or "").partition("@")[0].rpartition(":")
        way = f": --image {image}:{{}} measures that one"
        if release(version) is None:  # a tag like latest
            return ()
    else:
        version, way = engine.version(options, None).version or "", ""
    return tuple(
        f"the {engine.policy.title} that runs here (port {one.port}) is {one.version}, the one measured now {version}"
        f"{way.format(one.version)}"
        for one in servers
        if version and one.version != version
    )


def memory_budget(choice: Backend) -> int | None:
    """What an engine on the host may take: nine tenths of what is available, so that the machine lives on."""
    if choice.target != "host":
        return None
    from harness.meters.host import available_memory

    available = available_memory()
    return None if available is None else available // 10 * 9


def _named(model: Model, name: str) -> Model:
    return msgspec.structs.replace(model, name=name)


def _with_overrides(source: Source, options: Options) -> Source:
    """Honour ``LLAMA_ARG_OVERRIDE_KV``: a context length that the user overrides is the model's now."""
    override = options.env.get("LLAMA_ARG_OVERRIDE_KV", "")
    for item in override.split(","):
        key, _, value = item.partition("=")
        if key == f"{source.model.architecture}.context_length" and value.startswith("int:") and value[4:].isdecimal():
            model = msgspec.structs.replace(source.model, train_context=int(value[4:]))
            return msgspec.structs.replace(source, model=model)
    return source
