"""`fathom lab`: what sweeps and runs show, and how sure that is."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from fathom.commands.output import Function, Json, columns, print_json
from fathom.errors import UserError
from fathom.lab.intervals import percent

Folders = Positional[tuple[Path, ...]]


def _write(out: Path | None, result: dict[str, Any], figures: dict[str, Any]) -> None:
    """``result`` as ``<name>.json`` and its figures as SVG into folder ``out``, if one is asked for."""
    if out is None:
        return
    from fathom.lab.figures import svg
    from fathom.train.metrics import writing

    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{result['name']}.json").write_text(json.dumps(_finite(result), indent=1) + "\n")
        for name, figure in figures.items():
            (out / f"{name}.svg").write_text(svg(figure), encoding="utf-8")


def _finite(value: Any) -> Any:
    """``value`` with null for infinity, which JSON cannot say: an interval without that end."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _range(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def scaling() -> Function:
    def run(
        runs: Folders,
        budget: float | None = None,
        baseline: str = "prenorm",
        level: float = 0.9,
        draws: int = 2000,
        out: Path | None = None,
        as_json: Json = False,
    ) -> None:
        """Fit loss against compute, with and without an irreducible term, and say what each arm is worth in compute.

        Give sweeps or run folders of several sizes, or `paper` for the paper's own Table 2 (arXiv 2603.15031).

        Args:
            runs: Sweeps, run folders, or the word paper.
            budget: Compute at which arms are compared, in PFLOP/s-days; the largest measured one if not given.
            baseline: The arm that the others are compared with.
            level: Of the intervals.
            draws: Of the bootstrap.
            out: A folder for scaling.json and the figures.
        """
        from fathom.lab import scaling as lab
        from fathom.lab.outcomes import left_out, read_outcomes

        notes: list[str] = []
        if runs == (Path("paper"),):
            points = lab.paper_points()
            budget = lab.paper()["budget"] if budget is None else budget
        else:
            found = read_outcomes(runs)
            points, notes = lab.points_of(found, baseline), left_out(found)
        sizes = len(next(iter(points.values())).losses)
        if not sizes:
            raise UserError("no size has a finished run of every arm")
        largest = max(measured.compute.max() for measured in points.values())
        budget = float(largest if budget is None else budget)
        if not 0.5 * min(measured.compute.min() for measured in points.values()) <= budget <= 2 * largest:
            notes.append(f"{budget:.3g} PFLOP/s-days lies far outside the measured range: this is an extrapolation.")
        forms: dict[str, dict[str, lab.Fitted]] = {}
        for form, irreducible in (("L = A C^-α", False), ("L = E + A C^-α", True)):
            if sizes > 2 + irreducible:
                forms[form] = lab.fit_arms(
                    points, baseline=baseline, budget=budget, irreducible=irreducible, level=level, draws=draws
                )
            else:
                notes.append(f"{form} is not fitted: {sizes} sizes are too few to say how sure it is.")
        if not forms:
            raise UserError(f"{sizes} sizes are too few for a law: at least 3 are needed, 4 with an irreducible term")
        printed = _printed(budget, baseline) if runs == (Path("paper"),) else {}
        result = {
            "name": "scaling", "unit": "PFLOP/s-days", "budget": budget, "level": level, "baseline": baseline,
            "points": {a: {"compute": p.compute.tolist(), "losses": p.losses.tolist()} for a, p in points.items()},
            "fits": {form: {arm: dataclasses.asdict(fit) for arm, fit in fits.items()} for form, fits in forms.items()},
            "printed_multipliers": printed, "notes": notes,
        }  # fmt: skip
        from fathom.lab.figures_sweep import law_figure, residual_figure

        pure = next(iter(forms.values()))
        _write(out, result, {"scaling": law_figure(points, pure, "PFLOP/s-days"),
                             "scaling-residuals": residual_figure(points, pure, "PFLOP/s-days")})  # fmt: skip
        if as_json:
            print_json(_finite(result))
            return
        for form, fits in forms.items():
            rows = [["arm", "E", "A", "α", f"{percent(level)} interval of α", "worst residual"]]
            for arm, fit in fits.items():
                worst = max(map(abs, fit.residuals))
                rows.append([arm, f"{fit.law.floor:.3f}", f"{fit.law.scale:.4g}", f"{fit.law.exponent:.4f}",
                             _range(*fit.exponent.interval, ".4f"), f"{worst:.4f}"])  # fmt: skip
            print(f"{form}, {sizes} sizes, C in PFLOP/s-days\n{columns(rows)}\n")
            if fits[baseline].floor.interval[0] == 0 and form.startswith("L = E"):
                print("The data do not tell E from zero: this form's numbers are uncertain.\n")
            rows = [[f"compute multiplier at {budget:.3g}", "", f"{percent(level)} interval", "width", "leave one out"]]
            for arm, fit in fits.items():
                if arm != baseline and (m := fit.multiplier) is None:
                    rows.append([arm, "none", "", "", ""])
                elif m := fit.multiplier:
                    rows.append([arm, f"{m.value:.2f}x", _range(*m.interval, ".2f"), f"{m.width:.2f}",
                                 _range(*m.leave_one_out, ".2f")])  # fmt: skip
            print(columns(rows) + "\n")
            for arm, fit in fits.items():
                if not fit.law.is_power_law:
                    print(f"The losses of {arm} do not fall like a power law of compute: it has no multiplier.\n")
        for arm, value in printed.items():
            print(f"The laws as the paper prints them give {arm} {value:.2f}x of {baseline}.")
        print("\n".join(notes))

    return run


def _printed(budget: float, baseline: str) -> dict[str, float]:
    from fathom.lab.scaling import Law, multiplier, paper

    laws = {arm: Law(0.0, law["scale"], law["exponent"]) for arm, law in paper()["printed_laws"].items()}
    return {arm: float(multiplier(laws[baseline], law, budget)) for arm, law in laws.items() if arm != baseline}


def ablations() -> Function:
    def run(
        runs: Folders,
        baseline: str = "prenorm",
        level: float = 0.9,
        out: Path | None = None,
        as_json: Json = False,
    ) -> None:
        """Compare every arm with a baseline over paired seeds; no difference is called one when its interval holds zero.

        Args:
            runs: Sweeps or run folders.
            baseline: The arm that the others are compared with.
            level: Of the intervals.
            out: A folder for ablations.json and the figure.
        """
        from fathom.lab.ablations import luck, table
        from fathom.lab.figures_sweep import difference_figure
        from fathom.lab.outcomes import left_out, read_outcomes, unequal_rates

        found = read_outcomes(runs)
        rows, notes = table(found, baseline=baseline, level=level), left_out(found) + unequal_rates(found)
        notes.append(luck(rows, level))
        result = {
            "name": "ablations", "baseline": baseline, "level": level,
            "rows": [
                {"case": row.case, "arm": row.arm, "losses": row.losses, "mean": row.mean,
                 "difference": row.difference and dataclasses.asdict(row.difference),
                 "verdict": row.difference and row.difference.verdict}
                for row in rows
            ],
            "notes": notes,
        }  # fmt: skip
        if any(row.difference for row in rows):
            _write(out, result, {"ablations": difference_figure(rows, baseline, level)})
        else:
            _write(out, result, {})
        if as_json:
            print_json(_finite(result))
            return
        many = len({row.case for row in rows}) > 1
        lines = [["arm", "seeds", "val loss", f"minus {baseline}", f"{percent(level)} interval", "verdict"]]
        for row in rows:
            difference, mean = row.difference, row.mean
            lines.append([
                f"{row.case} {row.arm}" if many else row.arm, str(len(row.losses)), "" if mean is None else f"{mean:.4f}",
                "" if difference is None else f"{difference.mean:+.4f}",
                "" if difference is None else _range(difference.low, difference.high, "+.4f"),
                "" if difference is None else difference.verdict,
            ])  # fmt: skip
        print(columns(lines) + "\n")
        print("\n".join(notes))

    return run


def depth_width() -> Function:
    def run(
        runs: Folders,
        level: float = 0.9,
        out: Path | None = None,
        as_json: Json = False,
    ) -> None:
        """Map the loss over depth, width and heads at equal compute (the paper's Fig. 7), and say how sure its minimum is.

        Args:
            runs: Folders of a depth-width sweep.
            level: Of the intervals that tell shapes apart.
            out: A folder for depth-width.json and a heat map of each arm.
        """
        from fathom.lab.depth_width import maps, sentence
        from fathom.lab.figures_sweep import heat_map
        from fathom.lab.outcomes import left_out, read_outcomes

        found = read_outcomes(runs)
        made = maps(found, level)
        notes = [*map(sentence, made), *left_out(found)]
        values = [value for each in made for row in each.losses for value in row if value is not None]
        result = {
            "name": "depth-width", "level": level, "maps": [dataclasses.asdict(each) for each in made],
            "notes": notes,
        }  # fmt: skip
        _write(out, result, {f"depth-width-{each.arm}": heat_map(each, min(values), max(values)) for each in made})
        if as_json:
            print_json(_finite(result))
            return
        for each in made:
            rows = [[f"{each.arm}: heads/layers", *(f"w/l {column:.3g}" for column in each.columns)]]
            for share, losses in reversed(list(zip(each.rows, each.losses, strict=True))):
                rows.append([f"{share:.3g}", *("" if loss is None else f"{loss:.4f}" for loss in losses)])
            print(columns(rows) + "\n")
        print("\n".join(notes))

    return run


def dynamics() -> Function:
    def run(runs: Folders, as_json: Json = False) -> None:
        """Summarise the dynamics that runs recorded (`fathom train ... --dynamics-every 50`): magnitudes, updates, reads.

        Args:
            runs: Run folders.
        """
        from fathom.lab.dynamics import records
        from fathom.train.config import read_object

        if not runs:
            raise UserError("give at least one run folder")
        results = []
        for folder in runs:
            seen, cost = records(folder)
            results.append({
                "run": str(folder), "cost": cost, "definitions": read_object(folder / "dynamics.json")["definitions"],
                "records": [dataclasses.asdict(each) | {"verdict": each.verdict} for each in seen],
            })  # fmt: skip
            if as_json:
                continue
            rows = [
                [
                    "step",
                    "growth",
                    "",
                    "loudest",
                    "grad ratio",
                    "update/weight",
                    "sources used",
                    "embedding",
                    "newest",
                    "sinks",
                ]
            ]
            for each in seen[:: -max(1, len(seen) // 12)][::-1]:
                shares = [each.effective_share, each.embedding, each.last]
                heavy = " ".join(map(str, each.sinks)) or "none" if each.sinks is not None else ""
                rows.append([
                    f"{each.step:,}", f"{each.growth:+.2f}", each.verdict, f"{each.largest_output:.3g}",
                    f"{each.gradient_ratio:.3g}", f"{each.update_to_weight:.2e}",
                    *("" if share is None else f"{share:.0%}" for share in shares), heavy,
                ])  # fmt: skip
            print(f"{folder} (recording took {cost:.1%} of the training steps' time)\n{columns(rows)}\n")
        if as_json:
            print_json(_finite(results))
        else:
            print(
                "growth: exponent of the output magnitude over depth, 0.5 or more is growing. Definitions: dynamics.json."
            )

    return run


def pruning() -> Function:
    def run(runs: Folders, sequences: int = 16, device: str = "auto", as_json: Json = False) -> None:
        """How much the validation loss rises when a layer writes nothing; kept as pruning.json in each run folder.

        Args:
            runs: Run folders with a checkpoint.
            sequences: Validation sequences to measure on.
            device: cpu, cuda, or auto for the GPU where there is one.
        """
        from fathom.lab.pruning import write_pruning
        from fathom.train.config import read_object

        if not runs:
            raise UserError("give at least one run folder")
        found = {str(folder): read_object(write_pruning(folder, sequences=sequences, device=device)) for folder in runs}
        if as_json:
            print_json(found)
            return
        for folder, measured in found.items():
            print(f"{folder}: loss {measured['loss']:.4f}; rise without")
            rows = [["layer", "both", "attention", "MLP"]]
            sublayers = list(measured["sublayers"].values())
            for layer, rise in enumerate(measured["layers"]):
                rows.append([str(layer + 1), *(f"{v:+.4f}" for v in (rise, *sublayers[2 * layer : 2 * layer + 2]))])
            print(columns(rows) + "\n")

    return run
