"""Runs as rows of evidence and as candidates for the next one: facts of each run, its loss, and what it cost or would cost."""

import csv
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom.errors import UserError
from fathom.lab.outcomes import read_outcomes
from fathom.lab.plan import PLAN, Outcome, read_sweep
from fathom.lab.scaling import PFLOPS_DAY
from fathom.models.config import ModelConfig
from fathom.train.config import read_object

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """``rows`` of the runs that are done; ``planned`` of every run, done or not, without a loss."""

    rows: list[Row]
    planned: list[Row]
    missing: list[str]
    """Names of planned runs that no row is from: a conclusion that leaves them out should say so."""


def sublayers_of_a_block(model: ModelConfig) -> int | None:
    """S: 1 for Full AttnRes, None for a rule without blocks."""
    residual = model.residual
    if residual.rule == "full":
        return 1
    if residual.rule != "block":
        return None
    return residual.block_size or -(-model.num_sublayers // (residual.num_blocks or 8))


def _facts(end: Outcome, minutes: float | None) -> Row:
    planned, model = end.planned, end.planned.config.model
    return {
        "run": planned.name, "arm": planned.arm, "case": planned.case, "seed": planned.seed,
        "C": end.flops / PFLOPS_DAY, "S": sublayers_of_a_block(model), "shape": model.dim / model.num_layers,
        "heads": model.num_heads / model.num_layers, "layers": model.num_layers, "dim": model.dim,
        "tokens": planned.tokens, "flops": end.flops, "minutes": minutes,
    }  # fmt: skip


def _seconds(folders: Iterable[Path]) -> dict[str, float]:
    """Seconds of training of each run that has ended, by name."""
    found = {}
    for folder in folders:
        runs = [folder]
        if (folder / PLAN).is_file():
            sweep = read_sweep(folder)
            runs = [sweep.run_folder(run) for run in sweep.runs]
        for run in runs:
            if (run / "summary.json").is_file() and "seconds" in (summary := read_object(run / "summary.json")):
                found[run.resolve().name] = float(summary["seconds"])
    return found


def table(folders: tuple[Path, ...]) -> Table:
    """Every run of sweeps and run folders as a row.

    A run's minutes are its own if it has ended, else those of its FLOPs at the median pace of its arm, or of all runs.

    Raises:
        UserError: as ``read_outcomes``.
    """
    found, seconds = read_outcomes(folders), _seconds(folders)
    pace: dict[str, list[float]] = {}
    for end in found:
        if end.planned.name in seconds and end.state == "done":
            for arm in (end.planned.arm, ""):
                pace.setdefault(arm, []).append(seconds[end.planned.name] / end.flops)
    rows, planned, missing = [], [], []
    for end in found:
        own = end.planned.name in seconds and end.state == "done"
        typical = pace.get(end.planned.arm) or pace.get("")
        minutes = seconds[end.planned.name] / 60 if own else None
        if not own and typical:
            minutes = end.flops * statistics.median(typical) / 60
        facts = _facts(end, minutes)
        planned.append(facts)
        if end.val_loss is None:
            missing.append(end.planned.name)
        else:
            rows.append(facts | {"loss": end.val_loss})
    return Table(rows, planned, missing)


def write_csv(path: Path, rows: list[Row]) -> None:
    """Rows with equal keys; a None is an empty cell."""
    if not rows:
        raise UserError(f"there is nothing to write to {path.name}")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
