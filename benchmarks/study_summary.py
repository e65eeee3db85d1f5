"""Every number and figure of the study, from its committed files alone: ``summarize(RESULTS)`` writes result.json, figures/."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from study_stages import ARMS
from summarize import row

from fathom.errors import UserError
from fathom.lab import ablations, depth_width, figures_sweep, scaling
from fathom.lab.figures import svg
from fathom.lab.figures_paper import figure_4
from fathom.lab.intervals import Difference
from fathom.lab.outcomes import arms, read_outcomes
from fathom.lab.plan import PLAN, Outcome
from fathom.lab.report_sweep import Fit
from fathom.train.metrics import read_metrics

PAPER = {
    "denseformer": 0.001, "mhc": -0.019, "full": -0.029, "full-input-query": -0.035, "full-static": -0.017,
    "full-sigmoid": -0.025, "full-no-key-norm": -0.023, "full-window8": -0.002, "block-s4": -0.020,
    "block-s4-heads": -0.014, "block-s4-no-key-norm": -0.016,
}  # fmt: skip
"""Loss minus the baseline's in Table 4 of arXiv 2603.15031 (436 M parameters, one run each), by the lab's names of its rows."""


UNIT = "nats per token"


def _losses(case: str, arm: str, metric: str, losses: list[float]) -> list[dict[str, Any]]:
    return [row(case, arm, metric, UNIT, losses)] if losses else []


def _gap(case: str, arm: str, metric: str, gap: Difference | None) -> list[dict[str, Any]]:
    """A loss minus PreNorm's over paired seeds, with the 90 % interval."""
    if gap is None:
        return []
    low, high = (gap.mean if end is None else end for end in (gap.low, gap.high))
    return [row(case, arm, metric, UNIT, [gap.mean]) | {"low": low, "high": high, "n": gap.n}]


def _gains(found: list[Outcome]) -> list[dict[str, Any]]:
    """Each arm of each size: its losses, and by how much they differ from PreNorm's; Block's from Full's."""
    rows = []
    for each in ablations.table(found):
        rows += _losses(each.case, each.arm, "val_loss", list(each.losses.values()))
        rows += _gap(each.case, each.arm, "minus_prenorm", each.difference)
    others = [end for end in found if end.planned.arm != "prenorm"]
    full = ablations.table(others, baseline="full") if "full" in arms(others) else []
    return rows + [each for row in full for each in _gap(row.case, row.arm, "minus_full", row.difference)]


def _during(results: Path, found: list[Outcome], of_checks: bool = False) -> list[dict[str, Any]]:
    """By how much each arm, or each check, differs from PreNorm at a quarter, half and three quarters of its steps."""
    rows = []
    for share, eighths in (("1/4", 2), ("1/2", 4), ("3/4", 6)):
        at = [
            replace(
                end, val_loss=_lines(results, end, "val").get(eighths * end.planned.config.eval_every, {}).get("loss")
            )
            for end in found
        ]
        for each in ablations.table(at):
            if of_checks:
                rows += _gap(f"{each.case} at {share}", each.arm, "check_minus_prenorm_during", each.difference)
            elif each.arm in ARMS:
                rows += _gap(f"{each.case} at {share}", each.arm, "minus_prenorm_during", each.difference)
            else:
                rows += _gap(f"{each.arm} at {share}", "here", "row_minus_prenorm_during", each.difference)
    return sorted(rows, key=lambda row: row["case"].split()[0])


def _clipped(results: Path, found: list[Outcome]) -> list[dict[str, Any]]:
    """The share of logged steps after warm-up whose gradients were clipped, seed by seed."""
    shares: dict[tuple[str, str], list[float]] = {}
    for end in found:
        optim, planned = end.planned.config.optim, end.planned
        norms = [line["grad_norm"] for step, line in _lines(results, end, "train").items() if step > optim.warmup]
        if norms:
            case = (planned.case, planned.arm) if planned.arm in ARMS else (planned.arm, "here")
            shares.setdefault(case, []).append(sum(norm > optim.clip for norm in norms) / len(norms))
    return [row(*case, "clipped", "of steps", values) for case, values in shares.items()]


def _lines(results: Path, end: Outcome, kind: str) -> dict[int, dict[str, Any]]:
    """The lines of one kind that a finished run of ``sizes``, ``rows`` or ``checks`` wrote, by step."""
    if end.val_loss is None:
        return {}
    run = next(
        each for stage in ("sizes", "rows", "checks") if (each := results / stage / "runs" / end.planned.name).is_dir()
    )
    return {line["step"]: line for line in read_metrics(run) if line["kind"] == kind}


def _ablations(table: list[ablations.Row]) -> list[dict[str, Any]]:
    """Each row of Table 4, a case of its own: what it is here, and in the paper."""
    rows = []
    for each in table:
        rows += _losses(each.arm, "here", "row_loss", list(each.losses.values()))
        rows += _gap(each.arm, "here", "row_minus_prenorm", each.difference)
        paper = PAPER.get(re.sub(r"heads\d+", "heads", each.arm))
        if paper is not None:
            rows.append(row(each.arm, "paper", "row_minus_prenorm", UNIT, [paper]))
    return rows


def _changes(found: list[Outcome]) -> list[dict[str, Any]]:
    """What one change to Full, or to blocks of four, does: here, and in the paper."""
    rows = []
    for of, name in (("full", "row_minus_full"), ("block-s4", "row_minus_block")):
        variants = [end for end in found if end.planned.arm.startswith(of)]
        for each in ablations.table(variants, baseline=of) if of in arms(variants) else []:
            paper = PAPER.get(re.sub(r"heads\d+", "heads", each.arm))
            if each.difference is not None and paper is not None:
                rows += _gap(each.arm, "here", name, each.difference)
                rows.append(row(each.arm, "paper", name, UNIT, [round(paper - PAPER[of], 4)]))
    return rows


def _checks(found: list[Outcome]) -> list[dict[str, Any]]:
    """What the rows left in doubt, each at its size, beside that size's PreNorm and Full."""
    rows = []
    for baseline in ("prenorm", "full"):
        table = ablations.table(found, baseline=baseline) if baseline in arms(found) else []
        for each in (each for each in table if each.arm not in ARMS):
            if baseline == "prenorm":
                rows += _losses(each.case, each.arm, "check_loss", list(each.losses.values()))
            rows += _gap(each.case, each.arm, f"check_minus_{baseline}", each.difference)
    return rows


def _laws(found: list[Outcome]) -> tuple[list[dict[str, Any]], Fit | None]:
    points = scaling.points_of(found, "prenorm")
    count = len(points["prenorm"].losses)
    if count < 3:
        return [], None
    budget = max(float(each.compute.max()) for each in points.values())
    rows: list[dict[str, Any]] = []
    fits = {}
    for form, irreducible in (("A C^-a", False), ("E + A C^-a", True)):
        if count < 3 + irreducible:
            continue
        fits[irreducible] = scaling.fit_arms(points, baseline="prenorm", budget=budget, irreducible=irreducible)
        for arm, fitted in fits[irreducible].items():
            rows.append(row(f"L = {form}", arm, "largest_residual", UNIT, [max(map(abs, fitted.residuals))]))
            for metric, found_estimate in (("exponent", fitted.exponent), ("compute_multiplier", fitted.multiplier)):
                if found_estimate is not None and all(map(_finite, (*found_estimate.interval, found_estimate.value))):
                    low, high = found_estimate.interval
                    rows.append({
                        "case": f"L = {form}", "arm": arm, "metric": metric, "unit": "" if metric == "exponent" else "x",
                        "median": found_estimate.value, "low": min(low, found_estimate.value),
                        "high": max(high, found_estimate.value), "n": count, "over_prenorm": None,
                    })  # fmt: skip
    return rows, Fit(points, fits[False], scaling.bands(points, irreducible=False), budget)


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _stage(results: Path, name: str) -> list[Outcome]:
    """A stage's outcomes, of the arms of which a run is done."""
    found = read_outcomes([results / name]) if (results / name / PLAN).is_file() else []
    done = {end.planned.arm for end in found if end.val_loss is not None}
    return [end for end in found if end.planned.arm in done]


def summarize(results: Path) -> dict[str, Any]:
    """Write and return the result of the files in ``results``; a stage that is not there, or has no baseline, is left out."""
    if not (results / "study.json").is_file():
        raise UserError(f"{results} holds no study; make one with `python benchmarks/study.py collect OUT {results}`")
    figures: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    for stage in ("rates", "edges", "factors"):
        cases: dict[str, list[float]] = {}
        for end in _stage(results, stage):
            if end.val_loss is not None:
                cases.setdefault(end.planned.case, []).append(end.val_loss)
        for case, losses in cases.items():
            rows += _losses(case, "prenorm", "tuning_loss", losses)
    found = sizes = _stage(results, "sizes")
    with_baseline = "prenorm" in arms(found)
    if with_baseline:
        laws, law = _laws(found)
        rows += [*_gains(found), *laws, *_during(results, found), *_clipped(results, found)]
        if law is not None:
            figures["scaling"] = figure_4(law)
    twins = [end for end in found if end.planned.case == "s1" and end.planned.arm != "block"]
    if (found := _stage(results, "rows")) and with_baseline:
        base = [end for end in twins if end.planned.arm == "prenorm"]
        rows += [*_during(results, found + base), *_clipped(results, found)]
        found += twins
        table = ablations.table(found)
        rows += [*_ablations(table), *_changes(found)]
        notes.append(ablations.luck(table))
        if any(each.difference for each in table):
            figures["rows"] = figures_sweep.difference_figure(table, "prenorm", 0.9)
    if (found := _stage(results, "checks")) and with_baseline:
        checked = {end.planned.case for end in found}
        at_their_sizes = [end for end in sizes if end.planned.case in checked]
        rows += _checks(found + at_their_sizes)
        rows += _during(
            results, found + [end for end in at_their_sizes if end.planned.arm == "prenorm"], of_checks=True
        )
    if found := _stage(results, "shapes"):
        maps = depth_width.maps(found)
        losses = [loss for each in maps for line in each.losses for loss in line if loss is not None]
        for end in found:
            if end.val_loss is not None:
                rows += _losses(end.planned.case, end.planned.arm, "shape_loss", [end.val_loss])
        for gain in ablations.table(found) if "prenorm" in arms(found) else []:
            rows += _gap(gain.case, gain.arm, "shape_minus_prenorm", gain.difference)
        for each in maps:
            figures[f"shapes-{each.arm}"] = figures_sweep.heat_map(each, min(losses), max(losses))
    lines = (results / "spent.jsonl").read_text().splitlines() if (results / "spent.jsonl").is_file() else []
    spent = [json.loads(line) for line in lines]
    where = next((json.loads(path.read_text()) for path in sorted(results.glob("*/runs/*/env.json"))), {})
    result = {
        "name": "study", "date": "2026-11-22", "command": "python benchmarks/study.py run OUT",
        "machine": ", ".join(dict.fromkeys(each["machine"] for each in spent)),
        "versions": {name: value for name, value in where.items() if name in ("python", "torch", "cuda")},
        "gpu_seconds": round(sum(each["seconds"] for each in spent), 1), "notes": notes, "rows": rows,
    }  # fmt: skip
    (results / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (results / "figures").mkdir(exist_ok=True)
    for name, figure in figures.items():
        (results / "figures" / f"{name}.svg").write_text(svg(figure), encoding="utf-8")
    return result
