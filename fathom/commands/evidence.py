"""`fathom lab evidence`: a ready-made world of the scientist about one's own runs, and the runs that it could ask for next."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from fathom.commands.output import Function
from fathom.errors import UserError

Row = dict[str, Any]
DESIGNS = {"multiplier": "C", "block-size": "S", "depth-width": "shape"}
ROWS = {
    "multiplier": "C: C, arch: arm",
    "block-size": "S: S",
    "depth-width": "shape: shape, heads: heads, arch: arm",
}
"""How the columns of runs.csv become the designs of each world."""


def evidence() -> Function:
    def run(
        runs: Positional[tuple[Path, ...]],
        out: Path,
        world: Literal["multiplier", "block-size", "depth-width"] = "multiplier",
        baseline: str = "prenorm",
        arm: str = "block",
        noise: float = 0.003,
        cost: Literal["flops", "minutes"] = "flops",
    ) -> None:
        """Write a world about your runs: world.yaml, its evidence in runs.csv, and candidates.csv for `fathom ask next`.

        Args:
            runs: Sweeps or run folders.
            out: A folder for the three files.
            world: What the theories are about.
            baseline: The arm that the other is compared with; block-size does not use it.
            arm: The other arm; block-size uses every run of Full and Block.
            noise: How far the log of the loss is known to scatter between seeds: a prior, so not from these runs.
            cost: What candidates.csv gives as each run's cost.
        """
        from fathom.lab.evidence import table, write_csv
        from fathom.scientist.build import read, ready_made
        from fathom.train.metrics import writing

        if not 0 < noise < 1:
            raise UserError(f"--noise {noise:g}: the scatter of the log of the loss lies between 0 and 1")
        if (out / "world.yaml").exists():
            raise UserError(
                f"{out / 'world.yaml'} exists: a world is not written over; delete it or give another --out"
            )
        found = table(runs)
        _check(world, found.planned, baseline, arm)
        wanted = _wanted(world, baseline, arm)
        rows, planned = ([row for row in part if wanted(row)] for part in (found.rows, found.planned))
        if not rows:
            raise UserError(f"no run that is done belongs in the world {world}: there are {_arms(found.planned)}")
        text = _about(ready_made()[world].read_text(), world, planned, baseline, arm, noise)
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            (out / "world.yaml").write_text(text)
            write_csv(out / "runs.csv", rows)
            write_csv(out / "candidates.csv", _candidates(world, planned, rows, cost))
        frozen = read(out / "world.yaml")
        pairs = "" if world == "block-size" else " --together case"
        left = sum(row["run"] in found.missing for row in planned)
        print(f"{len(rows)} runs as evidence, {left} planned runs without a loss: world {frozen.hash[:12]}")
        print(f"fathom ask theories {out / 'world.yaml'}")
        print(f"fathom ask next {out / 'world.yaml'} {out / 'candidates.csv'} --cost {cost}{pairs}")

    return run


def _check(world: str, planned: list[Row], baseline: str, arm: str) -> None:
    """Runs that do not belong in one world are refused before anything is written."""
    if world == "block-size":
        if len(sizes := {row["case"] for row in planned if row["S"] is not None}) > 1:
            raise UserError(f"block-size is about one size of network; these runs are of {', '.join(sorted(sizes))}")
        return
    for name in (baseline, arm):
        if name not in {row["arm"] for row in planned}:
            raise UserError(f"there is no arm {name!r}; there are {_arms(planned)}")


def _wanted(world: str, baseline: str, arm: str) -> Callable[[Row], bool]:
    if world == "block-size":
        return lambda row: row["S"] is not None
    return lambda row: row["arm"] in (baseline, arm)


def _arms(rows: list[Row]) -> str:
    return ", ".join(sorted({row["arm"] for row in rows}))


def _about(text: str, world: str, planned: list[Row], baseline: str, arm: str, noise: float) -> str:
    """A ready-made world's text with the plan's range of designs, the arms and the noise, and runs.csv as its evidence.

    Only the plan sets the theories' priors, never a loss.
    """
    design, low, high = DESIGNS[world], *_range(world, planned)
    middle = math.sqrt(low * high)
    body = text[text.index("world: ") : text.index("\nevidence:")]
    body = re.sub(rf"(  {design}: .*)low: \S+, high: [^}}]+", rf"\g<1>low: {low:.3g}, high: {high:.3g}", body)
    for old, new in {
        "9e-06": f"{noise**2:.3g}", "noise: 0.003": f"noise: {noise:g}", "[prenorm, block]": f"[{baseline}, {arm}]",
        "'block'": f"'{arm}'", "C/2": f"C/{middle:.3g}", "shape/45": f"shape/{middle:.3g}",
        "normal(3.8,": f"normal({math.log(middle):.3g},", "shape=60": f"shape={middle * 1.4:.3g}",
        "shape=30": f"shape={middle / 1.4:.3g}",
    }.items():  # fmt: skip
        body = body.replace(old, new)
    rows = f"{ROWS[world]}, log_loss: log(loss), source: run"
    return (
        f"# The ready-made world {world} about {len(planned)} planned runs, written by `fathom lab evidence`.\n{body}\n"
        f"evidence:\n  - kind: measured\n    file: runs.csv\n    rows: {{{rows}}}\n"
    )


def _range(world: str, planned: list[Row]) -> tuple[float, float]:
    """The plan's designs with room on both sides; a block has at least one sublayer."""
    values = [row[DESIGNS[world]] for row in planned]
    return (1.0 if world == "block-size" else min(values) / 3), max(values) * 3


def _candidates(world: str, planned: list[Row], rows: list[Row], cost: str) -> list[Row]:
    """Each design of a planned run that is not done, or of every run for another seed if all are."""
    done = {row["run"] for row in rows}
    open_ = [row for row in planned if row["run"] not in done] or planned
    names = [name for name in ("C", "S", "shape", "heads", "arch") if name in re.findall(r"(\w+):", ROWS[world])]
    made: dict[tuple[Any, ...], Row] = {}
    for row in open_:
        if row[cost] is None:
            raise UserError("no run has ended yet, so minutes are not known: give --cost flops")
        design = {name: row["arm"] if name == "arch" else row[name] for name in names}
        made.setdefault(
            tuple(design.values()),
            ({} if world == "block-size" else {"case": row["case"]}) | {**design, cost: row[cost]},
        )
    return list(made.values())
