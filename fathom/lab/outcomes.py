"""Finished runs as rows to compare: from sweeps, from plain run folders, or both; pairs are runs of one case and seed."""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fathom.errors import UserError
from fathom.lab.plan import PLAN, Outcome, Planned, outcome, outcomes, read_sweep, training_flops
from fathom.models.config import ResidualConfig
from fathom.train.config import load_config, read_object


def arm_of(residual: ResidualConfig) -> str:
    """``block``, or with the settings that are not the rule's defaults: ``block-block_size4``."""
    default = ResidualConfig(rule=residual.rule)
    changed = [
        f"{field.name}{getattr(residual, field.name)}"
        for field in dataclasses.fields(residual)
        if getattr(residual, field.name) != getattr(default, field.name)
    ]
    return "-".join([residual.rule, *changed])


def _planned(run: Path) -> Planned:
    """A run folder that belongs to no sweep: its case is its shape and length of training."""
    config = load_config(run / "config.json")
    model = config.model
    tokens = config.steps * config.data.batch * model.context
    case = f"d{model.dim}-l{model.num_layers}-h{model.num_heads}-{tokens / 1e6:.4g}M"
    return Planned(run.resolve().name, case, arm_of(model.residual), config.seed, config)


def read_outcomes(folders: Iterable[Path]) -> list[Outcome]:
    """Every run of the sweeps and run folders in ``folders``.

    Raises:
        UserError: no folder, one that is neither a sweep nor a run, two runs of one case, arm and seed, or done runs whose
            losses do not measure the same thing.
    """
    found: list[Outcome] = []
    measures: dict[tuple[Any, ...], Path] = {}
    for folder in folders:
        if (folder / PLAN).is_file():
            sweep = read_sweep(folder)
            rows = list(zip((sweep.run_folder(run) for run in sweep.runs), outcomes(sweep), strict=True))
        elif (folder / "config.json").is_file():
            planned = _planned(folder)
            rows = [(folder, outcome(folder, planned, training_flops(planned.config)))]
        else:
            raise UserError(f"{folder} is neither a sweep nor a run folder")
        for run, end in rows:
            if end.state == "done":
                try:
                    tokens = read_object(run / "data.json").get("tokens_hash")
                except UserError as error:
                    found.append(replace(end, state="damaged", val_loss=None, note=str(error)))
                    continue
                config = end.planned.config
                measures.setdefault((tokens, config.model.context, config.eval_sequences), run)
            found.append(end)
    if not found:
        raise UserError("no run is given: name a sweep or run folders")
    _require_equal_cases(found)
    if len(measures) > 1:
        first, second = list(measures.values())[:2]
        raise UserError(
            f"{first} and {second} differ in data, context or validation sequences, so their losses cannot be compared"
        )
    keys = [(end.planned.case, end.planned.arm, end.planned.seed) for end in found]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError(f"case {twice[0]}, arm {twice[1]}, seed {twice[2]} is given twice")
    return found


def _require_equal_cases(found: list[Outcome]) -> None:
    """Runs of one case may differ in rule, seed and rates; not in shape, batch or length."""
    first: dict[str, Planned] = {}
    for planned in (end.planned for end in found):
        other = first.setdefault(planned.case, planned)
        for part in (
            lambda p: replace(p.config.model, residual=ResidualConfig()),
            lambda p: (p.config.steps, p.config.data.batch),
        ):
            if part(planned) != part(other):
                raise UserError(
                    f"{other.name} and {planned.name} are both of case {planned.case}, but differ in shape, batch or steps"
                )


def by_seed(found: list[Outcome], case: str, arm: str) -> dict[int, float]:
    """Validation loss by seed of the runs of ``case`` and ``arm`` that are done."""
    return {
        end.planned.seed: end.val_loss
        for end in found
        if (end.planned.case, end.planned.arm) == (case, arm) and end.val_loss is not None
    }


def distinct(found: list[Outcome], of: Callable[[Planned], str]) -> list[str]:
    """The cases or arms there are, in their order."""
    return list(dict.fromkeys(of(end.planned) for end in found))


def cases(found: list[Outcome]) -> list[str]:
    return distinct(found, lambda planned: planned.case)


def arms(found: list[Outcome]) -> list[str]:
    return distinct(found, lambda planned: planned.arm)


def unequal_rates(found: list[Outcome]) -> list[str]:
    """A sentence for each case whose finished runs differ in learning rate, schedule or optimizer."""
    notes = []
    for case in cases(found):
        done = [end.planned for end in found if end.planned.case == case and end.state == "done"]
        other = next((planned for planned in done if planned.config.optim != done[0].config.optim), None)
        if other:
            notes.append(
                f"{done[0].name} and {other.name} differ in their optimizer's settings: part of a gap may be theirs."
            )
    return notes


def require_arm(found: list[Outcome], arm: str) -> None:
    if arm not in arms(found):
        raise UserError(f"there is no arm {arm!r} to compare with; there are {', '.join(arms(found))}")


def left_out(found: list[Outcome]) -> list[str]:
    """A sentence for each run that no mean contains."""
    reasons = {
        "diverged": lambda end: f"{end.planned.name} diverged: {end.note}",
        "damaged": lambda end: f"{end.planned.name} cannot be read: {end.note}",
        "started": lambda end: f"{end.planned.name} stopped at step {end.step:,} of {end.planned.config.steps:,}",
        "waiting": lambda end: f"{end.planned.name} has not started",
    }
    return [reasons[end.state](end) for end in found if end.state != "done"]
