"""``harness recalibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from harness.cli.context import command, store_at
from harness.cli.options import allowed_of, options_of, query_options, store_option, trust_options
from harness.cli.output import Output
from harness.errors import UsageError
from harness.options import Overrides
from harness.text import clean

if TYPE_CHECKING:
    from harness.maintain.recalibrate import Candidate, Recalibration


@click.command()
@click.argument("names", metavar="[MODEL]...", nargs=-1)
@click.option("--stale", is_flag=True, help="Only those whose engine, model, driver or GPU is not what it was.")
@click.option("--dry-run", is_flag=True, help="Say what is stale and why, and what would be measured.")
@options_of(
    Overrides, "image", "engine_binary", "models", "gpus", "env", "timeout", "force",
    image="Image of the engine instead of the pinned one.", env="Value of a secret that was redacted in the record.",
    force="Replace calibrations of another GPU.",
)  # fmt: skip
@trust_options
@query_options("engine")
@store_option
@command
def cli(names: tuple[str, ...], stale: bool, dry_run: bool, output: Output, **given: Any) -> None:
    """Measure calibrations again, with their recorded settings and plan, on what is here now.

    MODEL is a name or an id; without one it is every calibration of the store.
    """
    from harness.inventory.installed import Installed
    from harness.maintain.recalibrate import recalibrate, survey

    store = store_at(given["store"])
    here = Overrides.of(given, allowed=allowed_of(given))
    engine = None if here.engine == "auto" else here.engine
    finder = Installed(store, here, Path.cwd())
    targets = survey(store, names, finder, engine, output.warn)
    engines = sorted({one.calibration.engine for one in targets if one.calibration.metadata.machine.sandbox == "docker"})
    if here.image is not None and len(engines) > 1:
        raise UsageError(f"--image is of one engine, and there are {' and '.join(engines)}", hint=f"--engine {engines[0]}")
    for one in targets:
        if one.imported and names:
            output.warn(f"{one.key} was imported: harness has not measured it and cannot measure it again")
    wanted = [one for one in targets if one.answers is None and not one.imported and (one.stale or not stale)]
    if dry_run:
        if not output.as_json:
            _survey(targets, stale)
        output.done({"calibrations": [target_json(one, one in wanted) for one in targets]})
    from harness.cli.progress import watcher

    asked = [*sorted(names), f"stale={stale}", f"image={here.image}", f"binary={here.engine_binary}", f"engine={engine}"]
    with watcher(quiet=output.as_json) as watch:
        outcomes = recalibrate(wanted, store, finder, watch, asked=asked, force=here.force)
    if not output.as_json:
        _outcomes(outcomes, targets, stale)
    data = {"calibrations": [outcome_json(one) for one in outcomes]}
    failed = [one for one in outcomes if one.error is not None]
    if failed and failed[0].error is not None:
        output.failed(failed[0].error, data)
    output.done(data)


def target_json(target: Candidate, wanted: bool) -> dict[str, Any]:
    """One calibration of ``recalibrate --dry-run --json``; ``wanted`` says that it would be measured."""
    from harness.maintain.recalibrate import plan_of

    return {
        "calibration": target.key,
        "path": str(target.path),
        "stale": target.stale,
        "wanted": wanted,
        "reasons": [{"name": one.name, "old": one.old, "new": one.new} for one in target.age.reasons],
        "unknown": list(target.age.unknown),
        "answers_here": target.answers,
        "loads": [{"context": load.context, "num_batch": load.num_batch} for load in plan_of(target.calibration)],
    }


def outcome_json(outcome: Recalibration) -> dict[str, Any]:
    """One calibration of ``recalibrate --json``."""
    from harness.cli.diff import pair_json

    error = outcome.error
    return {
        **target_json(outcome.target, True),
        "status": outcome.status,
        "record": None if outcome.record is None else str(outcome.record),
        "drift": None if outcome.new is None else pair_json(_pair(outcome)),
        "error": None if error is None else {"code": error.code, "message": clean(error.message)},
    }


def _pair(outcome: Recalibration) -> Any:
    from harness.maintain.diff import Pair

    return Pair(key=outcome.target.key, old=outcome.target.calibration, new=outcome.new, drift=outcome.drift)


def _survey(targets: list[Candidate], only_stale: bool) -> None:
    from harness.render.drift import show

    for target in targets:
        word, colour = ("stale", "yellow") if target.stale else ("as measured", "green")
        if target.answers is not None:
            word, colour = f"of another GPU; here {target.answers} answers", "blue"
        elif not target.stale and target.age.unknown:
            word = f"as measured, as far as can be seen (unknown: {', '.join(target.age.unknown)})"
        click.echo(f"{click.style(clean(target.key), bold=True)}  {click.style(clean(word), fg=colour)}")
        for reason in target.age.reasons:
            click.echo(f"  {reason.name}: {show(reason.old)} → {show(reason.new)}")
        if target.stale or not only_stale:
            loads = target.calibration.metadata.quality.loads
            plan = ", ".join(f"{load.context:,} at batch {load.num_batch}" for load in loads)
            click.echo(click.style(f"  would load {plan}", dim=True))
    if not targets:
        click.echo("no calibrations")


def _outcomes(outcomes: list[Recalibration], targets: list[Candidate], only_stale: bool) -> None:
    from harness.cli.diff import show_pairs

    if not outcomes:
        click.echo(f"nothing is stale in {len(targets)} calibrations" if only_stale else "no calibrations")
    show_pairs([_pair(one) for one in outcomes if one.new is not None])
    for outcome in outcomes:
        if outcome.error is not None:
            click.echo(f"{click.style(clean(outcome.target.key), bold=True)}  {click.style('failed', fg='red')}")
            click.echo(f"  {clean(outcome.error.message)}")
            if outcome.error.hint:
                click.echo(f"  {clean(outcome.error.hint)}")
