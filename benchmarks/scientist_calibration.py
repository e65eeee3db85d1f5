"""Calibration on worlds whose truth is known: ranks, the probability of the true theory, and truths that no theory says.

    python benchmarks/scientist_calibration.py sbc           every theory of every ready-made world: ranks in simultaneous bands
    python benchmarks/scientist_calibration.py identity      the probability of the true theory: reliable? and false alarms
    python benchmarks/scientist_calibration.py misspecified  truths outside the list: how often is that said?

Each writes benchmarks/results/2026-11-22_scientist-NAME/result.json.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fathom.scientist import World, read
from fathom.scientist.adequacy import surprise
from fathom.scientist.build import ready_made
from fathom.scientist.calibration import band, departure, ranks, reliability, simulate
from fathom.scientist.posterior import infer
from fathom.scientist.scientist import ADEQUATE, SURPRISE

DATE = "2026-11-22"
RESULTS = Path(__file__).resolve().parent / "results"
Array = np.ndarray
Row = dict[str, Any]


def row(
    case: str, arm: str, metric: str, value: float, low: float | None = None, high: float | None = None, n: int = 1
) -> Row:
    return {"case": case, "arm": arm, "metric": metric, "unit": "1", "median": value, "low": value if low is None else low,
            "high": value if high is None else high, "n": n, "over_prenorm": None}  # fmt: skip


def with_rows(world: World, designs: list[dict[str, Any]]) -> World:
    """``world`` with rows at these designs, whose outcomes are yet to be drawn."""
    data = {
        name: np.array([design[name] for design in designs], dtype=object if kind.levels else float)
        for name, kind in world.designs.items()
    }
    count = len(designs)
    return replace(
        world, data=data, y=np.zeros(count), extra=np.zeros(count), sources=tuple(map(str, range(count))), claims=()
    )


def worlds() -> dict[str, World]:
    """Every ready-made world with rows: its own, or a grid where it has none."""
    found = {name: read(name) for name in ready_made()}
    places = ((10.0, 0.3), (20.0, 0.5), (35.0, 0.4), (60.0, 0.6), (90.0, 0.5))
    shapes = [{"shape": s, "heads": h, "arch": a} for s, h in places for a in ("prenorm", "block")]
    found["depth-width"] = with_rows(found["depth-width"], shapes)
    return found


def sbc(count: int, only: str) -> list[Row]:
    rows: list[Row] = []
    outside = total = 0
    for name, world in worlds().items():
        for index, theory in enumerate(world.theories):
            if only not in name:
                continue
            begin = time.process_time()
            number = count // 5 if theory.role == "other" else count if theory.linear else count // 2
            found, failed = ranks(world, index, number, np.random.default_rng(100 + index))
            limit = band(number - failed) if number > failed else math.inf
            worst = {key: departure(each) for key, each in found.items() if len(each)}
            key = max(worst, key=lambda each: worst[each]) if worst else ""
            over = sum(value > limit for value in worst.values())
            outside, total = outside + over, total + len(worst)
            rows += [row(name, theory.id, "largest_departure_over_band", worst[key] / limit if worst else math.nan, n=number),
                     row(name, theory.id, "parameters_outside_band", over, n=len(worst)),
                     row(name, theory.id, "failed_gates", failed, n=number)]  # fmt: skip
            took = time.process_time() - begin
            print(f"{name:13} {theory.id:25} {number} runs, {len(worst)} parameters, {over} outside; worst {key} "
                  f"{worst.get(key, math.nan) / limit:.2f} of the band; {failed} failed; {took:.0f} s", flush=True)  # fmt: skip
    rows.append(row("all-worlds", "fathom", "parameters_outside_band", outside, n=total))
    print(f"{outside} of {total} parameters outside their 95 % band")
    return rows


def identity(count: int, only: str) -> list[Row]:
    rows: list[Row] = []
    for name, world in worlds().items():
        if only not in name:
            continue
        random = np.random.default_rng(7)
        priors = np.array([theory.prior for theory in world.theories])
        p, happened, alarms, bets = [], [], 0, []
        for _ in range(count):
            truth = int(random.choice(len(priors), p=priors))
            simulated, _ = simulate(world, truth, random)
            posterior = infer(simulated)
            if posterior.untrusted:
                continue
            p.append(posterior.probabilities)
            happened.append(np.arange(len(priors)) == truth)
            if truth != len(priors) - 1:
                bets.append(surprise(posterior))
                alarms += bets[-1] > SURPRISE or posterior.probabilities[-1] > ADEQUATE
        found = reliability(np.concatenate(p), np.concatenate(happened))
        rows += [
            row(name, "fathom", "miscalibration_of_brier", found.miscalibration, 0.0, found.by_chance, len(p)),
            row(name, "fathom", "brier", found.brier, n=len(p)), row(name, "fathom", "uncertainty", found.uncertainty, n=len(p)),
            row(name, "fathom", "discrimination", found.discrimination, n=len(p)),
            row(name, "fathom", "false_alarms", alarms / len(bets), n=len(bets)),
        ]  # fmt: skip
        order = np.sort(np.array([each.max() for each in p]))[::-1]
        right = np.array([h[np.argmax(q)] for q, h in zip(p, happened, strict=True)])[
            np.argsort([-each.max() for each in p], kind="stable")
        ]
        for share in (0.25, 0.5, 0.75, 1.0):  # the risk of naming the best theory, answering only the surest
            kept = max(int(share * len(order)), 1)
            rows.append(row(name, f"surest-{share:.0%}", "named_wrongly", float(1 - right[:kept].mean()), n=kept))
        wrong = " ".join(f"{each['median']:.2f}" for each in rows[-4:])
        print(f"{name:13} {len(p)} of {count} answered: miscalibration {found.miscalibration:.4f} (by chance up to "
              f"{found.by_chance:.4f}), Brier {found.brier:.3f} of {found.uncertainty:.3f}; false alarms "
              f"{alarms}/{len(bets)}, mean bet {np.mean(np.minimum(bets, 1e3)):.2f}; wrong {wrong}", flush=True)  # fmt: skip
    return rows


def misspecified(count: int, only: str) -> list[Row]:
    """Truths outside the multiplier world's list, 12 sizes and two arms."""
    world = read("multiplier")
    sizes = np.geomspace(0.6, 18, 12)
    world = with_rows(world, [{"C": c, "arch": arch} for c in sizes for arch in ("prenorm", "block")])
    log_c = np.log(world.data["C"] / 2)
    block = (world.data["arch"] == "block").astype(float)
    law = 0.6 - 0.06 * log_c - 0.012 * block
    size = 0.003
    middle = 0.03 * block * np.exp(-((log_c / 0.6) ** 2))
    place = (log_c - log_c.min()) / np.ptp(log_c)
    cases: dict[str, Callable[[np.random.Generator], Array]] = {
        "none (well specified)": lambda r: law + size * r.standard_normal(24),
        "one arm breaks in the middle": lambda r: law + 0.03 * block * np.maximum(log_c - 0.5, 0) + size * r.standard_normal(24),
        "rule helps at middle sizes only": lambda r: law - middle + size * r.standard_normal(24),
        "losses wave along compute": lambda r: law + 0.015 * np.sin(3 * log_c) + size * r.standard_normal(24),
        "heavy tails (t, 1.5)": lambda r: law + size * r.standard_t(1.5, 24),
        "noise grows thirtyfold": lambda r: law + 0.001 * 10**(1.5 * place) * r.standard_normal(24),
        "both arms of a size share their luck": lambda r: (
            law + np.repeat(0.02 * r.standard_normal(12), 2) + 0.001 * r.standard_normal(24)),
    }  # fmt: skip
    rows = []
    for name, draw in cases.items():
        if only not in name:
            continue
        random = np.random.default_rng(2026)  # not the numbers that the bet was tuned with
        by_other = by_bet = by_either = 0
        bets = []
        for _ in range(count):
            posterior = infer(replace(world, y=draw(random)))
            other = float(posterior.probabilities[-1]) > ADEQUATE
            bets.append(surprise(posterior))
            by_other, by_bet = by_other + other, by_bet + (bets[-1] > SURPRISE)
            by_either += other or bets[-1] > SURPRISE
        rows += [row(name, "T_other or the bet", "flagged", by_either / count, n=count),
                 row(name, "T_other", "flagged", by_other / count, n=count),
                 row(name, "the bet", "flagged", by_bet / count, n=count)]  # fmt: skip
        print(f"{name:38} flagged {by_either / count:.2f} (T_other {by_other / count:.2f}, bet {by_bet / count:.2f}; bets "
              f"{np.array2string(np.quantile(bets, (0.1, 0.5, 0.9)), precision=2)})", flush=True)  # fmt: skip
    return rows


MEASURES = {"sbc": (sbc, 200), "identity": (identity, 60), "misspecified": (misspecified, 25)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MEASURES)
    parser.add_argument("--count", type=int, default=None, help="simulations of each case")
    parser.add_argument("--only", default="", help="worlds or cases whose name contains this; writes nothing")
    given = parser.parse_args()
    measure, count = MEASURES[given.name]
    rows = measure(given.count or count, given.only)
    if given.only or given.count:
        return
    out = RESULTS / f"{DATE}_scientist-{given.name}"
    out.mkdir(parents=True, exist_ok=True)
    result = {
        "name": f"scientist-{given.name}", "date": DATE, "command": f"python benchmarks/scientist_calibration.py {given.name}",
        "machine": f"2 CPU cores, {platform.machine()}, shared",
        "versions": {"python": platform.python_version(), "numpy": np.__version__}, "rows": rows,
    }  # fmt: skip
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
