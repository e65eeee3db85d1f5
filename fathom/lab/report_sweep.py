"""What the report says of sweeps: scaling laws with their bands and multipliers, and differences over paired seeds."""

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fathom.errors import UserError
from fathom.lab import ablations, report_data, scaling
from fathom.lab.intervals import LEVEL, percent
from fathom.lab.outcomes import cases, left_out, read_outcomes, unequal_rates
from fathom.lab.plan import PLAN, Outcome, read_sweep
from fathom.lab.report_html import NONE, cards, chart, number, section, table

DRAWS = 2000
BASELINE = "prenorm"


@dataclass(frozen=True)
class Given:
    """What the command line named: run folders, in order, and which of them are to be measured by depth."""

    runs: list[Path]
    measured: list[Path]
    """Single runs, and of a sweep the runs of its largest case and first seed: one an arm."""
    outcomes: list[Outcome]
    """Of the sweeps alone."""


def read_given(folders: list[Path]) -> Given:
    """The runs in ``folders``, each a run or a sweep; of a sweep those that have begun. ``UserError`` as ``read_outcomes``."""
    runs, measured = [], []
    sweeps = [folder for folder in folders if (folder / PLAN).is_file()]
    found = read_outcomes(sweeps) if sweeps else []
    for folder in folders:
        if folder not in sweeps:
            runs.append(folder)
            measured.append(folder)
            continue
        sweep = read_sweep(folder)
        begun = [planned for planned in sweep.runs if (sweep.run_folder(planned) / "tokenizer.json").is_file()]
        runs += [sweep.run_folder(planned) for planned in begun]
        largest = sweep.runs[max(range(len(sweep.runs)), key=lambda at: sweep.flops[at])].case
        measured += [
            sweep.run_folder(p) for p in begun if (p.case, p.seed) == (largest, min(run.seed for run in sweep.runs))
        ]
    if folders and not runs:
        raise UserError(f"{folders[0]} is a sweep of which no run has begun")
    return Given(runs, measured, found)


@dataclass(frozen=True)
class Fit:
    """The laws of a sweep of several sizes, without an irreducible term, as the paper fits them."""

    points: dict[str, scaling.Points]
    fitted: dict[str, scaling.Fitted]
    bands: dict[str, Any]
    budget: float
    """PFLOP/s-days, the largest measured compute."""


def fit(found: list[Outcome]) -> Fit | None:
    """None where there are fewer than three sizes with a finished run of every arm, or no baseline."""
    if BASELINE not in {end.planned.arm for end in found}:
        return None
    points = scaling.points_of(found, BASELINE)
    if len(points[BASELINE].losses) < 3 or len(cases(found)) < 3:
        return None
    budget = max(float(each.compute.max()) for each in points.values())
    # Shapes of equal compute (Fig. 7) are cases too, but no law can be seen in them.
    if budget < 2 * min(float(each.compute.min()) for each in points.values()):
        return None
    fitted = scaling.fit_arms(points, baseline=BASELINE, budget=budget, irreducible=False, draws=DRAWS)
    return Fit(points, fitted, scaling.bands(points, irreducible=False, draws=DRAWS), budget)


def _range(pair: tuple[float, float] | None, form: str) -> str:
    return NONE if pair is None else f"{number(pair[0], form)} to {number(pair[1], form)}"


def _laws(found: Fit) -> str:
    rows, told = [], []
    for arm, each in found.fitted.items():
        times = each.multiplier
        rows.append([
            arm, number(each.law.scale), number(each.law.exponent), _range(each.exponent.interval, ".4f"),
            number(max(map(abs, each.residuals))), NONE if times is None else f"{times.value:.2f}×",
            NONE if times is None else _range(times.interval, ".2f"),
        ])  # fmt: skip
        if times is not None:
            told.append(f"{arm} {times.value:.2f} ({_range(times.interval, '.2f')})")
    head = [
        "arm",
        "A",
        "α",
        f"{percent(LEVEL)} interval of α",
        "worst residual",
        "multiplier",
        f"{percent(LEVEL)} interval",
    ]
    sizes = len(found.points[BASELINE].losses)
    sizes_table = [
        [arm, *(f"{number(loss)} at {compute:.3g}" for compute, loss in zip(each.compute, each.losses, strict=True))]
        for arm, each in found.points.items()
    ]
    return chart(
        "scaling", "Loss against compute",
        f"Line chart of validation loss by compute over {sizes} sizes with fitted power laws. Compute multipliers at "
        f"{found.budget:.3g} PFLOP/s-days: {'; '.join(told) or 'none'}.",
        f"Marks: sizes, mean over seeds. Lines: L = A C^−α fitted to each arm; bands: {percent(LEVEL)} intervals of the law. The "
        f"multiplier is the compute that {BASELINE} needs for the arm's loss at {found.budget:.3g} PFLOP/s-days, over that.",
        table(head, rows, "Fitted laws, C in PFLOP/s-days") +
        table(["arm", *(f"size {at + 1}" for at in range(sizes))], sizes_table, "Validation loss, and compute of each size"),
    )  # fmt: skip


def _differences(found: list[Outcome]) -> str:
    rows = ablations.table(found, baseline=BASELINE)
    many = len({row.case for row in rows}) > 1
    lines = []
    for row in rows:
        gap = row.difference
        lines.append([
            f"{row.case} {row.arm}" if many else row.arm, len(row.losses), number(row.mean),
            NONE if gap is None else number(gap.mean, "+.4f"),
            NONE if gap is None or gap.low is None or gap.high is None else _range((gap.low, gap.high), "+.4f"),
            NONE if gap is None else gap.verdict,
        ])  # fmt: skip
    head = ["arm", "seeds", "validation loss", f"minus {BASELINE}", f"{percent(LEVEL)} interval", "verdict"]
    return table(
        head, lines, f"Mean loss, and the difference to {BASELINE} over paired seeds, nats per token", shown=True
    )


def sections(found: list[Outcome]) -> tuple[list[str], dict[str, Any], Fit | None]:
    """The page's sections on sweeps, their charts' data, and the fit if there is one."""
    parts, charts, law = [], {}, fit(found)
    if law is not None:
        parts.append(section("Scaling", cards(_laws(law))))
        charts["scaling"] = report_data.laws(law.points, law.fitted, law.bands)
    if BASELINE in {end.planned.arm for end in found}:
        rows = ablations.table(found, baseline=BASELINE)
        notes = [ablations.luck(rows), *unequal_rates(found), *left_out(found)]
        told = "".join(f'<p class="quiet">{note}</p>' for note in map(escape, notes))
        parts.append(section("Differences over seeds", _differences(found), told))
    return parts, charts, law
