"""A sweep on disk: which runs it has, and how far each is, read from the run folders themselves.

    sweep.json     the plan: every run's name, case, arm, seed, cost and whole RunConfig; threads of each run
    runs/NAME/     a run folder (fathom/train/loop.py); diverged.json in it if its numbers stopped being finite
    logs/NAME.log  what the run wrote to standard error, the newest attempt last

A *case* is what must be equal before losses are compared (a size, a shape); an *arm* is what is compared (a residual rule).
"""

import fcntl
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from fathom.errors import UserError
from fathom.models.accounting import flops_per_token
from fathom.models.config import ModelConfig
from fathom.train.config import RunConfig, from_dict, load_config, read_object, to_dict
from fathom.train.metrics import read_metrics, writing

State = Literal["waiting", "started", "done", "diverged", "damaged"]
PLAN = "sweep.json"


@dataclass(frozen=True)
class Planned:
    """One run of a sweep."""

    name: str
    case: str
    arm: str
    seed: int
    config: RunConfig

    @property
    def tokens(self) -> int:
        return self.config.steps * self.config.data.batch * self.config.model.context


@cache
def flops_of(model: ModelConfig, context: int) -> float:
    """Training FLOPs of one token, by models/accounting.py: a backward pass counts twice a forward one."""
    return 3 * sum(flops_per_token(model, context).values())


def training_flops(config: RunConfig) -> float:
    """Floating-point operations of the whole run."""
    return flops_of(config.model, config.model.context) * config.steps * config.data.batch * config.model.context


@dataclass(frozen=True)
class Sweep:
    """A plan read from or to be written to ``folder``."""

    folder: Path
    recipe: str
    threads: int
    """CPU threads of one run: part of the plan, because float sums depend on it."""
    runs: list[Planned]
    flops: list[float]
    """Training FLOPs of each run, the measure of its cost."""

    def run_folder(self, planned: Planned) -> Path:
        return self.folder / "runs" / planned.name

    def log(self, planned: Planned) -> Path:
        return self.folder / "logs" / f"{planned.name}.log"


def _plan(sweep: Sweep) -> dict[str, Any]:
    runs = [
        {"name": run.name, "case": run.case, "arm": run.arm, "seed": run.seed, "flops": flops, "config": to_dict(run.config)}
        for run, flops in zip(sweep.runs, sweep.flops, strict=True)
    ]  # fmt: skip
    return {"recipe": sweep.recipe, "threads": sweep.threads, "runs": runs}


def make_sweep(folder: Path, recipe: str, runs: list[Planned], *, threads: int) -> Sweep:
    """Write the plan of a new sweep, or return the one in ``folder`` if it is the same.

    Raises:
        UserError: two runs of one name, a folder that is something else, or one that holds another plan.
    """
    names = [run.name for run in runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"the sweep has two runs named {twice}")
    if not runs:
        raise UserError("the sweep has no runs")
    sweep = Sweep(folder, recipe, threads, runs, [training_flops(run.config) for run in runs])
    if (folder / PLAN).is_file():
        found = read_sweep(folder)
        if (found.recipe, found.threads, found.runs) != (recipe, threads, runs):
            raise UserError(
                f"{folder} holds another sweep ({_first_difference(found, sweep)}); give another --out, or continue that one "
                f"with `fathom sweep {folder}`"
            )
        return found
    if folder.exists() and any(path.name != ".lock" for path in (folder.iterdir() if folder.is_dir() else [folder])):
        raise UserError(f"{folder} exists already and is not a sweep; delete it or give another --out")
    with locked(folder), writing(folder):
        temporary = folder / "sweep.tmp"
        temporary.write_text(json.dumps(_plan(sweep), indent=1) + "\n")
        temporary.replace(folder / PLAN)
    return sweep


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of the sweep in ``folder``, which is made if need be; ``UserError`` if another process does."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another sweep runs in {folder}; wait for it, or give another --out") from None
        yield


def _first_difference(found: Sweep, wanted: Sweep) -> str:
    if found.recipe != wanted.recipe:
        return f"recipe {found.recipe}"
    if found.threads != wanted.threads:
        return f"{found.threads} threads a run"
    if [run.name for run in found.runs] != [run.name for run in wanted.runs]:
        return f"{len(found.runs)} runs, from {found.runs[0].name} to {found.runs[-1].name}"
    changed = next(a.name for a, b in zip(found.runs, wanted.runs, strict=True) if a != b)
    return f"{changed} has other settings"


def read_sweep(folder: Path) -> Sweep:
    """The plan in ``folder``; ``UserError`` if it is not a sweep or the plan is damaged."""
    path = folder / PLAN
    if not path.is_file():
        raise UserError(f"{folder} is not a sweep: it has no {PLAN}")
    values = read_object(path)
    try:
        runs = [
            Planned(run["name"], run["case"], run["arm"], run["seed"], from_dict(RunConfig, run["config"]))
            for run in values["runs"]
        ]
        if not runs:
            raise UserError("it has no runs")
        flops = [float(run["flops"]) for run in values["runs"]]
        return Sweep(folder, values["recipe"], values["threads"], runs, flops)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not a sweep's plan: {error!r}") from None


@dataclass(frozen=True)
class Outcome:
    """How far a run is, and its loss if that counts."""

    planned: Planned
    flops: float
    state: State
    step: int
    val_loss: float | None
    """Final validation loss in nats per token; only of a run that is done."""
    note: str
    """Why a run diverged, or what of it cannot be read."""


def outcome(run: Path, planned: Planned, flops: float) -> Outcome:
    """Read the state of ``planned`` from its folder.

    A run that ends with a loss worse than guessing (ln V) counts as diverged, though all its numbers were finite. One whose
    files cannot be read is damaged: it is in no mean, and a sweep takes it up again from its checkpoint.
    """
    try:
        return _read_outcome(run, planned, flops)
    except UserError as error:
        return Outcome(planned, flops, "damaged", 0, None, str(error))


def _read_outcome(run: Path, planned: Planned, flops: float) -> Outcome:
    if (run / "diverged.json").is_file():
        note = str(_fields(run / "diverged.json", "message")[0])
        return Outcome(planned, flops, "diverged", _step(run), None, note)
    if (run / "summary.json").is_file():
        step, loss = _fields(run / "summary.json", "steps", "val_loss")
        if not (isinstance(step, int) and isinstance(loss, float)):
            raise UserError(f"{run / 'summary.json'} is damaged: steps and val_loss are not numbers")
        if step == planned.config.steps:
            guess = math.log(load_config(run / "config.json").model.vocab_size)
            if not loss < guess:  # NaN is not
                note = f"it ended at {loss:.3f}, no better than guessing ({guess:.3f})"
                return Outcome(planned, flops, "diverged", step, None, note)
            return Outcome(planned, flops, "done", step, loss, "")
    step = _step(run)
    return Outcome(planned, flops, "started" if step else "waiting", step, None, "")


def _fields(path: Path, *names: str) -> list[Any]:
    values = read_object(path)
    if missing := [name for name in names if name not in values]:
        raise UserError(f"{path} is damaged: it has no {missing[0]}")
    return [values[name] for name in names]


def _step(run: Path) -> int:
    if not (run / "metrics.jsonl").is_file():
        return 0
    return max((int(row["step"]) for row in read_metrics(run)), default=0)


def outcomes(sweep: Sweep) -> list[Outcome]:
    """Every run's outcome, in the order of the plan."""
    return [
        outcome(sweep.run_folder(run), run, flops) for run, flops in zip(sweep.runs, sweep.flops, strict=True)
    ]  # fmt: skip
