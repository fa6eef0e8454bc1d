"""``harness recalibrate``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from harness.cli.context import as_json, command, store_at
from harness.cli.options import allowed_of, options_of, query_options, store_option, trust_options
from harness.cli.output import CommandResult, warn
from harness.errors import UsageError
from harness.options import Overrides
from harness.render import drift
from harness.text import clean, written

if TYPE_CHECKING:
    from harness.maintain.recalibrate import Recalibration, SurveyedCalibration


@click.command()
@click.argument("names", metavar="[MODEL[@VARIANT]]...", nargs=-1)
@click.option("--stale", is_flag=True, help="Only those whose engine, model, driver or GPU is not what it was.")
@click.option("--dry-run", is_flag=True, help="Say what is stale and why, and what would be measured.")
@options_of(
    Overrides, "image", "engine_binary", "models", "gpus", "env", "timeout", "header_only", "force",
    image="Image of the engine instead of the pinned one.", env="Value of a secret that was redacted in the record.",
    force="Replace calibrations of another GPU, or of a longer range.",
)  # fmt: skip
@trust_options
@query_options("engine")
@store_option
@command
def cli(names: tuple[str, ...], stale: bool, dry_run: bool, **given: Any) -> CommandResult:
    """Measure calibrations again, with their recorded settings and plan, on what is here now.

    MODEL is a name or an id; without one it is every calibration of the store.
    """
    from harness.inventory.installed import Installed
    from harness.maintain.recalibrate import recalibrate, survey

    store = store_at(given["store"])
    here = Overrides.of(given, allowed=allowed_of(given))
    engine = None if here.engine == "auto" else here.engine
    finder = Installed(store, here, Path.cwd())
    targets = survey(store, names, finder, engine, warn)
    engines = sorted({one.calibration.engine for one in targets if one.calibration.metadata.machine.sandbox == "docker"})
    if here.image is not None and len(engines) > 1:
        raise UsageError(f"--image is of one engine, and there are {' and '.join(engines)}", hint=f"--engine {engines[0]}")
    for one in targets:
        if one.imported and names:
            warn(f"{one.key} was imported: harness has not measured it and cannot measure it again")
    wanted = [one for one in targets if one.answers is None and not one.imported and (one.stale or not stale)]
    if dry_run:
        return CommandResult(
            data={"calibrations": [target_json(one, one in wanted) for one in targets]},
            ids=tuple(written(one.key) for one in wanted),
            text=partial(drift.survey_text, targets, store.root, stale),
        )
    from harness.cli.progress import watcher

    asked = [*sorted(names), f"stale={stale}", f"image={here.image}", f"binary={here.engine_binary}", f"engine={engine}"]
    with watcher(quiet=as_json()) as watch:
        outcomes = recalibrate(wanted, store, finder, watch, asked=asked, force=here.force)
    return CommandResult(
        data={"calibrations": [outcome_json(one) for one in outcomes]},
        text=partial(drift.outcomes_text, outcomes, len(targets), store.root, stale),
        failure=next((one.error for one in outcomes if one.error is not None), None),
    )


def target_json(target: SurveyedCalibration, wanted: bool) -> dict[str, Any]:
    """One calibration of ``recalibrate --dry-run --json``; ``wanted`` says that it would be measured."""
    return {
        "calibration": target.key,
        "path": str(target.path),
        "stale": target.stale,
        "wanted": wanted,
        "reasons": msgspec.to_builtins(target.age.reasons),
        "unknown": list(target.age.unknown),
        "answers_here": target.answers,
        "loads": [{"context": load.context, "num_batch": load.num_batch} for load in target.loads],
    }


def outcome_json(outcome: Recalibration) -> dict[str, Any]:
    """One calibration of ``recalibrate --json``."""
    error = outcome.error
    return {
        **target_json(outcome.target, True),
        "status": outcome.status,
        "record": None if outcome.record is None else str(outcome.record),
        "drift": None if outcome.new is None else drift.document(outcome.pair()),
        "error": None if error is None else {"code": error.code, "message": clean(error.message)},
    }
