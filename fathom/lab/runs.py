"""Run folders as values: what a finished (or stopped) run recorded, read once and checked, for figures and the report."""

import hashlib
import itertools
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom.errors import UserError
from fathom.lab.report_reads import FILE, check_reads
from fathom.models.accounting import parameters
from fathom.train.config import RunConfig, load_config, read_object
from fathom.train.metrics import read_metrics


@dataclass(frozen=True)
class Run:
    """One run folder. Losses are in nats per token, times in seconds."""

    path: Path
    label: str
    """The folder's name, numbered where several runs share one."""
    config: RunConfig
    env: dict[str, Any]
    data: dict[str, Any]
    tokenizer: str
    """sha256 of tokenizer.json."""
    train: list[dict[str, Any]]
    """Metric lines of kind train, in the order of the steps; at least one."""
    val: list[dict[str, Any]]
    """Metric lines of kind val; empty if the run stopped before its first validation."""
    depth: dict[str, Any] | None
    """depth.json, if it was measured."""
    reads: dict[str, Any] | None = None
    """reads.json (report_reads.py), if it was measured."""

    @property
    def rule(self) -> str:
        return self.config.model.residual.rule

    @property
    def num_parameters(self) -> int:
        return sum(parameters(self.config.model).values())

    @property
    def steps(self) -> int:
        """Optimizer steps done, which may be fewer than were asked for."""
        return int(max(row["step"] for row in (self.train[-1], *self.val[-1:])))

    @property
    def tokens(self) -> int:
        """Training tokens seen."""
        return int(max(row.get("tokens", 0) for row in (self.train[-1], *self.val[-1:])))

    @property
    def val_loss(self) -> float | None:
        """The last validation loss; None if there was none after the last step."""
        return self.val[-1]["loss"] if self.val and self.val[-1]["step"] == self.steps else None

    @property
    def step_seconds(self) -> float:
        return statistics.median(row["step_seconds"] for row in self.train)

    @property
    def tokens_per_second(self) -> float:
        return statistics.median(row["tokens_per_second"] for row in self.train)

    def seconds(self) -> dict[int, float]:
        """Seconds of training from the start to the end of each logged step, without validation and checkpoints.

        A line stands for the steps since the one before, where a run's lines were thinned.
        """
        steps = [0, *(row["step"] for row in self.train)]
        total = itertools.accumulate(
            row["step_seconds"] * (step - before)
            for row, (before, step) in zip(self.train, itertools.pairwise(steps), strict=True)
        )
        return {0: 0.0} | {row["step"]: seconds for row, seconds in zip(self.train, total, strict=True)}


def _depth(path: Path, rule: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    depth = read_object(path)
    if depth.get("rule") != rule or not {"tokens", "layers", "sites"} <= depth.keys():
        raise UserError(f"{path} is not a measurement of this {rule} run; delete it and measure again")
    return depth


def _reads(path: Path) -> dict[str, Any] | None:
    return check_reads(path, read_object(path)) if path.is_file() else None


def read_runs(folders: list[Path]) -> list[Run]:
    """The runs of ``folders``, in their order. ``UserError`` for none, a folder that is not a run, and a damaged file."""
    if not folders:
        raise UserError("no run is given: name at least one run folder")
    names = [folder.resolve().name for folder in folders]
    runs = []
    for index, (folder, name) in enumerate(zip(folders, names, strict=True)):
        for file in ("config.json", "env.json", "data.json", "tokenizer.json", "metrics.jsonl"):
            if not (folder / file).is_file():
                raise UserError(f"{folder} is not a run folder: it has no {file}")
        rows = read_metrics(folder)
        train = [row for row in rows if row["kind"] == "train"]
        if not train:
            raise UserError(f"{folder} has no training step in its metrics.jsonl yet; report it after its first steps")
        config = load_config(folder / "config.json")
        runs.append(
            Run(
                path=folder,
                label=name if names.count(name) == 1 else f"{name} ({names[: index + 1].count(name)})",
                config=config,
                env=read_object(folder / "env.json"),
                data=read_object(folder / "data.json"),
                tokenizer=hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest(),
                train=train,
                val=[row for row in rows if row["kind"] == "val"],
                depth=_depth(folder / "depth.json", config.model.residual.rule),
                reads=_reads(folder / FILE),
            )
        )
    return runs
