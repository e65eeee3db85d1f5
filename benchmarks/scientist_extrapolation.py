"""Extrapolation to larger budgets on public scaling-law runs: the scientist, the same without `beyond`, and Huber + bootstrap.

    python benchmarks/scientist_extrapolation.py FOLDER

`--rehearse` splits the fitted rows once more and looks at no others: the prior of the drift beyond the rows was set there.

FOLDER holds gadre/ (mlfoundations/scaling a003c49, MIT), gemstones/ (mcleish7/gemstone-scaling-laws 5f42047, MIT) and routing/
(google-deepmind/scaling_laws_for_routing 42da0c3, Apache-2.0). Sets, split, theories, priors and opponents stand in this file,
which was committed before any held-out loss was looked at; later changes of it are told in the result's README.

Split: the distinct budgets of a set in order, the largest 30 % held out (rounded up). Every set is predicted once.
Budgets: 6 N D; of routing N, the dense parameters, since all ran equally long.
"""

import argparse
import csv
import gzip
import itertools
import json
import math
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fathom.scientist import Scientist, read
from fathom.scientist import noise as noises
from fathom.scientist.evaluation import degrees
from fathom.scientist.gaussian import resample
from fathom.scientist.posterior import Posterior
from fathom.scientist.scientist import ADEQUATE

DATE = "2026-11-22"
RESULTS = Path(__file__).resolve().parent / "results"
HELD_OUT, SAMPLES, BOOTSTRAPS, HUBER = 0.3, 4000, 50, 1e-3
Array = np.ndarray
Row = dict[str, Any]
Points = list[dict[str, float]]
"""Each has N, D (or N, E), budget and y, the log of the loss."""


def gadre(folder: Path) -> dict[str, Points]:
    """Loss on C4 of models trained on each of three texts."""
    sets: dict[str, Points] = {}
    for path in sorted((folder / "gadre" / "exp_data" / "models").glob("*.json")):
        model = json.loads(path.read_text())
        losses = [each["loss"] for each in model["results"] if any("c4_val/" in name for name in each["val_data"])]
        n, d = float(model["hyperparameters"]["params"]), float(model["hyperparameters"]["tokens"])
        if losses:
            point = {"N": n, "D": d, "budget": 6 * n * d, "y": math.log(losses[0])}
            sets.setdefault(f"gadre-{model['dataset_name']}", []).append(point)
    return sets


def gemstones(folder: Path) -> dict[str, Points]:
    """22 shapes at several lengths of training, in four schedules."""
    sets = {}
    for name in ("cool_end", "hot", "lr_ablation_hot", "hot_100b+"):
        lines = (folder / "gemstones" / f"wandb_df_for_fitting_{name}.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        sets[f"gemstones-{name.replace('_', '-')}"] = [
            {"N": float(r["params_active_precise"]), "D": float(r["tokens"]),
             "budget": 6.0 * r["params_active_precise"] * r["tokens"], "y": math.log(r["final_loss"])}
            for r in rows if r["final_loss"] is not None and r["final_loss"] > 0
        ]  # fmt: skip
    return sets


def routing(folder: Path) -> dict[str, Points]:
    """Each router with the dense models as one expert: the last validation loss, of k = 1 and routing in every other layer."""
    with gzip.open(folder / "routing" / "curves.csv.gz", "rt") as file:
        rows = list(csv.DictReader(file))
    last: dict[str, Row] = {}
    for row in rows:
        if row["loss_validation"] and int(row["step"]) >= int(last.get(row["hyper_id"], row)["step"]):
            last[row["hyper_id"]] = row
    kept = [
        row for row in last.values()
        if float(row["k"] or 1) == 1 and float(row["routing_frequency"]) == 0.5 and int(row["step"]) > 240_000
    ]  # fmt: skip
    sets: dict[str, Points] = {}
    for router in ("Hash", "S-Base", "RL-R"):
        sets[f"routing-{router}"] = [
            {"N": float(r["dense_parameter_count"]), "E": float(r["num_experts"]), "budget": float(r["dense_parameter_count"]),
             "y": math.log(float(r["loss_validation"]))}
            for r in kept if r["router_type"] in ("Dense", router)
        ]  # fmt: skip
    return sets


def split(points: Points) -> tuple[Points, Points]:
    budgets = sorted({point["budget"] for point in points})
    edge = budgets[len(budgets) - math.ceil(HELD_OUT * len(budgets)) - 1]
    return [p for p in points if p["budget"] <= edge], [p for p in points if p["budget"] > edge]


def document(points: Points, train: Points, *, beyond: bool) -> dict[str, Any]:
    """The world of a set: theories and priors are the same for every set of its kind."""
    other = "D" if "D" in points[0] else "E"
    middle = {k: math.exp(float(np.mean([math.log(p[k]) for p in train]))) for k in ("N", other)}
    n, d = f"(N/{middle['N']:.4g})", f"({other}/{middle[other]:.4g})"
    chinchilla = "log(exp(e) + exp(a)*{n}**(0 - alpha) + exp(b)*{d}**(0 - beta))"
    shared = {"e": "normal(0.5, 0.5)", "a": "normal(-0.5, 1)", "b": "normal(-0.5, 1)", "s": "halfnormal(0.02)"}
    if other == "D":
        theories = {
            "two-exponents": (chinchilla, shared | {"alpha": "lognormal(-1, 0.4)", "beta": "lognormal(-1, 0.4)"}),
            "one-exponent": (chinchilla.replace("beta", "alpha"), shared | {"alpha": "lognormal(-1, 0.4)"}),
        }
        noise = "student_t(4, s)"
    else:
        line = "a - alpha*log({n}) - beta*log(E) + gamma*log({n})*log(E)"
        priors = {"a": "normal(1, 0.5)", "alpha": "normal(0.08, 0.05)", "beta": "normal(0.03, 0.03)",
                  "gamma": "normal(0, 0.01)", "s": "halfnormal(0.02)"}  # fmt: skip
        floor = "a + log(share + (1 - share)*exp(0 - alpha*log({n}) - beta*log(E) + gamma*log({n})*log(E)))"
        floored = priors | {"share": "beta(2, 2)", "alpha": "lognormal(-1.7, 0.5)", "beta": "normal(0.06, 0.06)",
                            "gamma": "normal(0, 0.02)"}  # fmt: skip
        theories = {"power-law": (line, priors), "with-a-floor": (floor, floored)}
        noise = "normal(s)"
    made = []
    for name, (mean, params) in theories.items():
        used = {k: v for k, v in params.items() if k != "b" or other == "D"}
        made.append({"id": name, "params": used, "mean": mean.replace("{n}", n).replace("{d}", d), "noise": noise})
        if beyond:
            made[-1]["beyond"] = {"budget": "6*N*D" if other == "D" else "N"}
    designs = {
        k: {"log": True, "low": min(p[k] for p in points) * 0.9, "high": max(p[k] for p in points) * 1.1}
        for k in ("N", other)
    }
    data = [{"N": p["N"], other: p[other], "log_loss": p["y"]} for p in train]
    return {"world": "set", "outcome": {"name": "log_loss", "center": 1.0, "spread": 0.6, "noise": 0.005},
            "designs": designs, "theories": made, "evidence": [{"kind": "measured", "data": data}]}  # fmt: skip


def posterior_of(given: dict[str, Any]) -> tuple[Posterior, Scientist]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "world.json"
        path.write_text(json.dumps(given))
        scientist = Scientist(read(path))
    return scientist.posterior, scientist


def samples_of(posterior: Posterior, test: Points) -> Array:
    """SAMPLES outcomes of each held-out row [m, SAMPLES], theories by their probability.

    Where the scientist abstains because T_other beats the named theories, what those say is scored, and the set is marked.
    """
    designs = [{name: point[name] for name in posterior.world.designs} for point in test]
    random = np.random.default_rng(0)
    probabilities = posterior.probabilities.copy()
    if probabilities[-1] > ADEQUATE:
        probabilities[-1] = 0.0
    counts = np.bincount(resample(probabilities, SAMPLES, random), minlength=len(posterior.fits))
    drawn = []
    for fit, count in zip(posterior.fits, counts, strict=True):
        if count:
            weights, means, scales = fit.components(designs)
            kept = random.permutation(resample(weights, count, random))
            drawn.append(noises.draw(fit.theory.noise, random, means[:, kept], scales[:, kept], degrees(fit.theory)))
    return np.concatenate(drawn, 1)


def huber(train: Points, test: Points) -> Array:
    """Huber's loss on log losses (delta 1e-3), 50 bootstraps of the rows, each prediction with a resampled residual."""
    random = np.random.default_rng(1)
    other = "D" if "D" in train[0] else "E"
    middle = {k: float(np.mean([math.log(p[k]) for p in train])) for k in ("N", other)}

    def table(points: Points) -> tuple[Array, Array]:
        return tuple(np.array([math.log(p[k]) for p in points]) - middle[k] for k in ("N", other))  # type: ignore[return-value]

    y = np.array([p["y"] for p in train])
    (n, d), at = table(train), table(test)
    fit, predict = (_fit_law, _law) if other == "D" else (_fit_line, _line)
    best = fit(n, d, y, None)
    residual = y - predict(best, n, d)
    drawn = []
    for _ in range(BOOTSTRAPS):
        rows = random.integers(len(y), size=len(y))
        own = fit(n[rows], d[rows], y[rows], best)
        drawn.append(predict(own, *at)[:, None] + random.choice(residual, (len(test), SAMPLES // BOOTSTRAPS)))
    return np.concatenate(drawn, 1)


def _line(p: Array, n: Array, d: Array) -> Array:
    return np.stack([np.ones_like(n), n, d, n * d], 1) @ p


def _fit_line(n: Array, d: Array, y: Array, start: Array | None) -> Array:
    features = np.stack([np.ones_like(n), n, d, n * d], 1)
    p = np.linalg.lstsq(features, y, rcond=None)[0]
    for _ in range(50):
        weight = np.sqrt(np.minimum(1, HUBER / np.maximum(np.abs(y - features @ p), 1e-12)))
        p = np.linalg.lstsq(features * weight[:, None], y * weight, rcond=None)[0]
    return p


def _law(p: Array, n: Array, d: Array) -> Array:
    alpha, beta = math.exp(p[3]), math.exp(p[4])
    return np.asarray(np.logaddexp(np.logaddexp(p[0], p[1] - alpha * n), p[2] - beta * d))


def _fit_law(n: Array, d: Array, y: Array, start: Array | None) -> Array:
    """Levenberg-Marquardt on reweighted squares, from several starts or from a known optimum."""
    grid = itertools.product((0.0, 0.5, 0.8), (-1.0, 0.3), (-1.0, 0.3), (0.25, 0.5))
    starts = [np.array([e, a, b, math.log(x), math.log(x)]) for e, a, b, x in grid] if start is None else [start]
    best, lowest = starts[0], math.inf
    for given in starts:
        p, damping = given.copy(), 1e-2
        value = _huber_loss(y - _law(p, n, d))
        for _ in range(200):
            residual = y - _law(p, n, d)
            weight = np.minimum(1, HUBER / np.maximum(np.abs(residual), 1e-12))
            jacobian = np.stack([(_law(p + h, n, d) - _law(p - h, n, d)) / 2e-6 for h in np.eye(5) * 1e-6], 1)
            gram = (jacobian * weight[:, None]).T @ jacobian
            step = np.linalg.solve(gram + damping * np.diag(np.diag(gram) + 1e-9), jacobian.T @ (weight * residual))
            trial = p + np.clip(step, -1, 1)
            after = _huber_loss(y - _law(trial, n, d))
            if after < value:
                done = value - after < 1e-10 * value
                p, value, damping = trial, after, damping / 3
                if done:
                    break
            else:
                damping *= 4
                if damping > 1e12:
                    break
        if value < lowest:
            best, lowest = p, value
    return best


def _huber_loss(residual: Array) -> float:
    size = np.abs(residual)
    return float(np.where(size <= HUBER, 0.5 * size**2, HUBER * (size - 0.5 * HUBER)).sum())


def score(samples: Array, y: Array) -> dict[str, Array]:
    ordered = np.sort(samples, 1)
    count = ordered.shape[1]
    spread = (ordered * (2 * np.arange(1, count + 1) - count - 1)).sum(1) / count**2
    low, high = (np.quantile(ordered, q, axis=1) for q in (0.05, 0.95))
    return {
        "crps": np.abs(ordered - y[:, None]).mean(1) - spread, "inside": ((low <= y) & (y <= high)).astype(float),
        "width": high - low, "pit": (ordered < y[:, None]).mean(1), "error": np.median(ordered, 1) - y,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="sets whose name contains this; writes nothing")
    parser.add_argument("--rehearse", action="store_true", help="on the fitted rows alone: split those once more")
    arguments = parser.parse_args()
    sets = gadre(arguments.folder) | gemstones(arguments.folder) | routing(arguments.folder)
    rows: list[Row] = []
    pooled: dict[str, list[Array]] = {}
    for name, points in sets.items():
        if arguments.only not in name:
            continue
        train, test = split(split(points)[0] if arguments.rehearse else points)
        y = np.array([p["y"] for p in test])
        scored: dict[str, dict[str, Array]] = {}
        note, begin = "", time.process_time()
        for arm, beyond in (("fathom", True), ("plain Bayes", False)):
            posterior, scientist = posterior_of(document(points, train, beyond=beyond))
            scored[arm] = score(samples_of(posterior, test), y)
            if beyond:
                rates = [
                    f"{f.theory.id} {float(f.edge.rates[0] @ f.edge.rates[1]):.4f}"
                    for f in posterior.fits
                    if f.edge is not None
                ]
                other = float(posterior.probabilities[-1])
                abstain = scientist.theories().abstain or ("T_other" if other > 0.5 else None)
                note = f"rate {', '.join(rates)}; P(T_other) {other:.2g}; abstains: {abstain}"
                rows.append(_row(name, arm, "p_other", "1", other, len(train)))
        scored["Huber + bootstrap"] = score(huber(train, test), y)
        edge = max(math.log10(p["budget"]) for p in train)
        beyond_by = np.array([math.log10(p["budget"]) - edge for p in test])
        print(
            f"{name}: {len(train)} rows, {len(test)} held out, {time.process_time() - begin:.0f} s; {note}", flush=True
        )
        for arm, found in scored.items():
            crps, inside = 1000 * float(found["crps"].mean()), float(found["inside"].mean())
            rows += [_row(name, arm, "crps", "1e-3 log loss", crps, len(test)),
                     _row(name, arm, "coverage90", "1", inside, len(test)),
                     _row(name, arm, "width90", "1e-3 log loss", 1000 * float(found["width"].mean()), len(test))]  # fmt: skip
            print(f"   {arm:18} CRPS {crps:7.2f}  coverage {inside:.2f}  width {1000 * found['width'].mean():6.1f}"
                  f"  bias {1000 * found['error'].mean():+.1f}")  # fmt: skip
            pooled.setdefault(arm, []).append(np.stack([beyond_by, found["crps"], found["inside"], found["width"]]))
    for arm, parts in pooled.items():
        mean = [float(np.mean([part[k].mean() for part in parts])) for k in (1, 2)]
        rows += [_row("mean-of-sets", arm, "crps", "1e-3 log loss", 1000 * mean[0], len(parts)),
                 _row("mean-of-sets", arm, "coverage90", "1", mean[1], len(parts))]  # fmt: skip
        print(f"{arm:18} mean of {len(parts)} sets: CRPS {1000 * mean[0]:.2f}, coverage {mean[1]:.3f}")
    # Risk against coverage: of the rows that are answered when one abstains beyond some distance.
    for arm, parts in pooled.items():
        far, crps, inside, _ = np.concatenate(parts, 1)
        for limit in (0.1, 0.25, 0.5, 1.0, math.inf):
            near = far <= limit
            label = f"within-{limit:g}-decades"
            if near.any():
                rows += [_row(label, arm, "answered", "1", float(near.mean()), len(near)),
                         _row(label, arm, "missed90", "1", float(1 - inside[near].mean()), int(near.sum())),
                         _row(label, arm, "crps", "1e-3 log loss", 1000 * float(crps[near].mean()), int(near.sum()))]  # fmt: skip
    if arguments.only or arguments.rehearse:
        return
    out = RESULTS / f"{DATE}_scientist-extrapolation"
    out.mkdir(parents=True, exist_ok=True)
    result = {
        "name": "scientist-extrapolation", "date": DATE, "command": "python benchmarks/scientist_extrapolation.py FOLDER",
        "machine": f"2 CPU cores, {platform.machine()}, shared",
        "versions": {"python": platform.python_version(), "numpy": np.__version__}, "rows": rows,
    }  # fmt: skip
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")


def _row(case: str, arm: str, metric: str, unit: str, value: float, n: int) -> Row:
    return {"case": case, "arm": arm, "metric": metric, "unit": unit, "median": value, "low": value, "high": value, "n": n,
            "over_prenorm": None}  # fmt: skip


if __name__ == "__main__":
    main()
