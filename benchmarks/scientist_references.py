"""The sampler against posteriors that another way finds: eight models like posteriordb's, and the six-parameter law's evidence.

    python benchmarks/scientist_references.py

Data are eight schools' own and synthetic ones of the other models' shapes. References integrate on grids: over the noise scale
(or tau) alone where the rest is Gaussian algebra, over all parameters of the garch and Gaussian-process models. Every model is
sampled here, also where the scientist would be exact. Writes benchmarks/results/2026-11-22_scientist-references/result.json.
"""

import itertools
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scientist import law_world

from fathom.scientist import read
from fathom.scientist.calibration import tried
from fathom.scientist.evaluation import log_likelihood
from fathom.scientist.fitting import MAX_GAP, MAX_K, MIN_ESS
from fathom.scientist.sampler import LADDER, Effort, Sample, sample

DATE = "2026-11-22"
RESULTS = Path(__file__).resolve().parent / "results"
Array = np.ndarray
Row = dict[str, Any]
Moments = dict[str, tuple[float, float]]
Target = Callable[[Array], Array]


def row(
    case: str, arm: str, metric: str, unit: str, value: float, low: float | None = None, high: float | None = None
) -> Row:
    return {"case": case, "arm": arm, "metric": metric, "unit": unit, "median": value, "low": value if low is None else low,
            "high": value if high is None else high, "n": 1, "over_prenorm": None}  # fmt: skip


def moments(values: Array, weights: Array) -> tuple[float, float]:
    mean = float(weights @ values)
    return mean, math.sqrt(float(weights @ (values - mean) ** 2))


# --- regressions: kidiq (two), earnings, arK, mesquite ----------------------------------------------------------------


def regression(names: list[str], x: Array, y: Array, deviations: Array, scale: float) -> tuple[Moments, Moments, float]:
    """y ~ N(x w, s^2), w_j ~ N(0, d_j^2), s ~ halfnormal(scale): sampled, and by a grid over s."""
    columns = [name for name in names if name != "one"]
    priors = {f"b_{name}": f"normal(0, {d:g})" for name, d in zip(names, deviations, strict=True)}
    terms = " + ".join(f"b_{name}" + ("" if name == "one" else f"*{name}") for name in names)
    found = _of_world({
        "outcome": {"name": "y", "center": 0, "spread": float(deviations[0]), "noise": scale},
        "designs": {name: {"low": -1e4, "high": 1e4} for name in columns},
        # The vanishing term makes the mean no affine one, so that the sampler has to find it.
        "theories": [{"id": "one", "params": priors | {"s": f"halfnormal({scale:g})"},
                      "mean": f"{terms} + 0*tanh(b_{names[0]})", "noise": "normal(s)"}],
        "evidence": [{"kind": "measured", "data": [
            {name: float(row[names.index(name)]) for name in columns} | {"y": float(v)} for row, v in zip(x, y, strict=True)]}],
    })  # fmt: skip
    u = np.linspace(math.log(scale) - 8, math.log(scale) + 3, 3001)
    log, means, covariances = np.zeros(len(u)), [], []
    for i, s in enumerate(np.exp(u)):
        precision = x.T @ x / s**2 + np.diag(1 / deviations**2)
        mean = np.linalg.solve(precision, x.T @ y / s**2)
        residual = y - x @ mean
        log[i] = (-0.5 * (residual @ residual / s**2 + (mean**2 / deviations**2).sum() + np.linalg.slogdet(precision)[1])
                  - len(y) * u[i] - 0.5 * (s / scale) ** 2 + u[i])  # fmt: skip
        means.append(mean)
        covariances.append(np.linalg.inv(precision))
    weights = np.exp(log - log.max())
    weights /= weights.sum()
    exact = {"s": moments(np.exp(u), weights)}
    for j, name in enumerate(names):
        center, own = np.array(means)[:, j], np.array(covariances)[:, j, j]
        middle = float(weights @ center)
        exact[f"b_{name}"] = (middle, math.sqrt(float(weights @ (own + (center - middle) ** 2))))
    return found[0], exact, found[1]


def _of_world(document: dict[str, Any]) -> tuple[Moments, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "world.json"
        path.write_text(json.dumps({"world": "reference"} | document))
        world = read(path)
    start = time.process_time()
    fit = tried(world, 0)
    assert fit.report.method == "sampled" and fit.report.trusted, fit.report
    params, weights = fit.draws
    return {name: moments(each, weights) for name, each in params.items()}, time.process_time() - start


def eight_schools() -> tuple[Moments, Moments, float]:
    """Non-centred: y_j ~ N(mu + tau eta_j, sigma_j), tau halfnormal(10) instead of a half-Cauchy."""
    y = np.array([28.0, 8, -3, 7, -1, 1, 18, 12])
    sigma = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])
    schools = "ABCDEFGH"
    params = {"mu": "normal(0, 5)", "tau": "halfnormal(10)"} | {f"eta{k}": "normal(0, 1)" for k in schools}
    mean = "mu + tau*(" + " + ".join(f"eta{k}*is(school, '{k}')" for k in schools) + ")"
    found, seconds = _of_world({
        "outcome": {"name": "y", "center": 0, "spread": 10, "noise": 10}, "designs": {"school": {"levels": list(schools)}},
        "theories": [{"id": "one", "params": params, "mean": mean, "noise": "normal(0.000001)"}],
        "evidence": [{"kind": "reported", "noise": s, "data": [{"school": k, "y": v}]}
                     for k, v, s in zip(schools, y.tolist(), sigma.tolist(), strict=True)],
    })  # fmt: skip
    tau = (np.arange(20_000) + 0.5) * 80 / 20_000
    variance = tau[:, None] ** 2 + sigma**2
    precision = 1 / 25 + (1 / variance).sum(1)
    middle = (y / variance).sum(1) / precision
    log = (-0.5 * np.log(precision) - 0.5 * np.log(variance).sum(1) - 0.5 * ((y**2 / variance).sum(1) - middle**2 * precision)
           - 0.5 * (tau / 10) ** 2)  # fmt: skip
    weights = np.exp(log - log.max())
    weights /= weights.sum()
    exact = {"tau": moments(tau, weights)}
    center = float(weights @ middle)
    exact["mu"] = (center, math.sqrt(float(weights @ (1 / precision + (middle - center) ** 2))))
    for j, k in enumerate(schools):  # eta_j given tau and mu is normal, and its mean is affine in mu
        slope = tau / variance[:, j]
        mean_j = slope * (y[j] - middle)
        own = sigma[j] ** 2 / variance[:, j] + slope**2 / precision
        value = float(weights @ mean_j)
        exact[f"eta{k}"] = (value, math.sqrt(float(weights @ (own + (mean_j - value) ** 2))))
    return found, exact, seconds


# --- models that are no worlds: garch(1,1), and a Gaussian process on 11 points -----------------------------------------


def sampled(prior: Target, likelihood: Target, draw: Callable[[np.random.Generator, int], Array]) -> Sample:
    """Both replicates of each rung until the gates are passed, as fitting.py does for theories."""
    for effort in LADDER:
        both = []
        for seed in (1, 2):
            random = np.random.default_rng(seed)
            both.append(sample(prior, likelihood, draw(random, effort.particles), effort, random))
        gap = abs(both[0].log_evidence - both[1].log_evidence)
        if max(each.k_hat for each in both) <= MAX_K and sum(each.ess for each in both) >= MIN_ESS and gap <= MAX_GAP:
            break
    log_weights = np.concatenate([each.log_weights for each in both]) - math.log(2)
    return replace(both[0], points=np.concatenate([each.points for each in both]), log_weights=log_weights)


def by_grid(prior: Target, likelihood: Target, found: Sample, points: int, reach: float) -> tuple[Array, Array]:
    """Points [P, d] of a lattice about the sample, in its principal axes, and their posterior weights."""
    weights = np.exp(found.log_weights)
    center = weights @ found.points
    away = found.points - center
    axes = np.linalg.cholesky((away * weights[:, None]).T @ away)
    line = np.linspace(-reach, reach, points)
    lattice = np.array(list(itertools.product(line, repeat=len(center))))
    where = center + lattice @ axes.T
    log = np.concatenate(
        [prior(part) + likelihood(part) for part in np.array_split(where, max(len(where) // 50_000, 1))]
    )
    heights = np.exp(log - log.max())
    return where, heights / heights.sum()


def compared(
    prior: Target, likelihood: Target, draw: Any, names: list[str], points: int, reach: float
) -> tuple[Moments, Moments, float]:
    start = time.process_time()
    found = sampled(prior, likelihood, draw)
    seconds = time.process_time() - start
    where, heights = by_grid(prior, likelihood, found, points, reach)
    weights = np.exp(found.log_weights)
    return (
        {name: moments(found.points[:, j], weights / weights.sum()) for j, name in enumerate(names)},
        {name: moments(where[:, j], heights) for j, name in enumerate(names)}, seconds,
    )  # fmt: skip


def garch() -> tuple[Moments, Moments, float]:
    """mu, log a0, logit a1, logit of b1's share of what a1 leaves; all standard-normal-like priors on that scale."""
    random = np.random.default_rng(3)
    y, variance = np.zeros(200), 1.0
    for t in range(200):
        variance = 0.5 + 0.3 * (y[t - 1] - 1) ** 2 + 0.4 * variance if t else 1.5
        y[t] = 1 + math.sqrt(variance) * random.standard_normal()
    widths = np.array([5.0, 1.0, 1.5, 1.5])

    def prior(u: Array) -> Array:
        return -0.5 * ((u / widths) ** 2).sum(1)

    def likelihood(u: Array) -> Array:
        mu, a0 = u[:, 0], np.exp(u[:, 1])
        a1 = 1 / (1 + np.exp(-u[:, 2]))
        b1 = (1 - a1) / (1 + np.exp(-u[:, 3]))
        variance, total = np.full(len(u), 1.5), np.zeros(len(u))
        for t, value in enumerate(y):
            if t:
                variance = a0 + a1 * (y[t - 1] - mu) ** 2 + b1 * variance
            total -= 0.5 * ((value - mu) ** 2 / variance + np.log(variance))
        return total

    return compared(
        prior, likelihood, lambda r, n: r.standard_normal((n, 4)) * widths, ["mu", "a0", "a1", "b1"], 25, 6.0
    )


def process() -> tuple[Moments, Moments, float]:
    """Eleven points; logs of length, amplitude and noise with normal priors."""
    random = np.random.default_rng(4)
    x = np.linspace(-5, 5, 11)
    y = 1.5 * np.sin(x / 1.5) + 0.3 * random.standard_normal(11)
    centers, widths = np.array([0.7, 0.3, -1.0]), np.array([0.6, 0.6, 0.7])
    gaps = (x[:, None] - x) ** 2

    def prior(u: Array) -> Array:
        return -0.5 * (((u - centers) / widths) ** 2).sum(1)

    def likelihood(u: Array) -> Array:
        length, amplitude, noise = np.exp(u.T)[:, :, None, None]
        covariance = amplitude**2 * np.exp(-0.5 * gaps / length**2) + noise**2 * np.eye(11)
        _, size = np.linalg.slogdet(covariance)
        solved = np.linalg.solve(covariance, np.broadcast_to(y[:, None], (len(u), 11, 1)))[..., 0]
        return np.asarray(-0.5 * (solved @ y) - 0.5 * size)

    draw = lambda r, n: centers + widths * r.standard_normal((n, 3))  # noqa: E731
    return compared(prior, likelihood, draw, ["length", "amplitude", "noise"], 61, 7.0)


def models() -> dict[str, Callable[[], tuple[Moments, Moments, float]]]:
    random = np.random.default_rng(0)
    iq = random.normal(100, 15, 434)
    school = (random.random(434) < 0.8).astype(float)
    score = 6 + 0.6 * iq + 5 * school + 18 * random.standard_normal(434)
    centred = (iq - 100) / 15
    one = np.ones(434)
    height = random.normal(0, 1, 1192)
    pay = 9 + 0.25 * height + 0.9 * random.standard_normal(1192)
    series = np.zeros(205)
    for t in range(5, 205):
        series[t] = 0.5 * series[t - 1] - 0.2 * series[t - 2] + 0.2 * series[t - 3] + random.standard_normal()
    lags = np.stack([np.ones(195)] + [series[10 - k : 205 - k] for k in range(1, 6)], 1)
    bush = random.standard_normal((46, 6)) @ (np.eye(6) + 0.5)
    weight = 5 + bush @ np.array([0.4, 1.1, 0.4, 0.4, 0.1, -0.6]) + 0.35 * random.standard_normal(46)
    return {
        "eight-schools": eight_schools,
        "kidiq-iq": lambda: regression(["one", "iq"], np.stack([one, centred], 1), score, np.array([100.0, 50]), 20),
        "kidiq-interaction": lambda: regression(
            ["one", "iq", "school", "both"], np.stack([one, centred, school, centred * school], 1), score,
            np.array([100.0, 50, 50, 50]), 20),
        "earnings": lambda: regression(["one", "height"], np.stack([np.ones(1192), height], 1), pay, np.array([20.0, 5]), 2),
        "arK": lambda: regression(["one", "l1", "l2", "l3", "l4", "l5"], lags, series[10:], np.full(6, 10.0), 2.5),
        "mesquite": lambda: regression(
            ["one", "d1", "d2", "ht", "th", "de", "gr"], np.concatenate([np.ones((46, 1)), bush], 1), weight,
            np.full(7, 10.0), 1),
        "garch": garch,
        "gaussian-process": process,
    }  # fmt: skip


def law() -> list[Row]:
    """log p(y) of the six-parameter law: Gauss-Hermite products about the posterior, and a sampler of fifty times the effort."""
    world = law_world()
    theory = world.theories[0]
    fit = tried(world, 0)
    params, weights = fit.draws
    priors = list(theory.params.values())
    u = np.stack([prior.unconstrain(params[name]) for name, prior in theory.params.items()], 1)
    center = weights @ u
    axes = np.linalg.cholesky(((u - center) * weights[:, None]).T @ (u - center))

    def joint(points: Array) -> Array:
        given = {name: prior.constrain(points[:, j]) for j, (name, prior) in enumerate(theory.params.items())}
        own = sum((prior.log_density(points[:, j]) for j, prior in enumerate(priors)), np.zeros(len(points)))
        return own + log_likelihood(world, theory, given, len(points))

    rows, found = [], []
    for order in (5, 7, 9):
        nodes, shares = np.polynomial.hermite_e.hermegauss(order)
        z = np.array(list(itertools.product(nodes, repeat=6)))
        log_share = np.log(np.array(list(itertools.product(shares, repeat=6)))).sum(1)
        parts = [joint(center + part @ axes.T) for part in np.array_split(z, max(len(z) // 40_000, 1))]
        # The rule weighs by exp(-z^2 / 2), which the integrand has to give back.
        log = np.concatenate(parts) + 0.5 * (z**2).sum(1) + log_share + np.linalg.slogdet(axes)[1]
        found.append(float(np.logaddexp.reduce(log)))
        rows.append(row("law-6-parameters-240-points", f"Gauss-Hermite {order}^6", "log_evidence", "nats", found[-1]))
    random = np.random.default_rng(99)
    effort = Effort(2000, 20, 150_000, 5)
    start = np.stack([prior.unconstrain(prior.draw(random, effort.particles)) for prior in priors], 1)

    def prior_density(points: Array) -> Array:
        return sum((prior.log_density(points[:, j]) for j, prior in enumerate(priors)), np.zeros(len(points)))

    long = sample(prior_density, lambda p: joint(p) - prior_density(p), start, effort, random)
    rows += [row("law-6-parameters-240-points", "long run", "log_evidence", "nats", long.log_evidence),
             row("law-6-parameters-240-points", "long run", "k_hat", "1", long.k_hat),
             row("law-6-parameters-240-points", "fathom", "log_evidence", "nats", fit.log_evidence)]  # fmt: skip
    print(
        f"law: fathom {fit.log_evidence:.4f}, Gauss-Hermite {found}, long run {long.log_evidence:.4f} (k {long.k_hat:.2f})"
    )
    return rows


def main() -> None:
    rows = []
    for name, model in models().items():
        found, exact, seconds = model()
        off = max(abs(found[key][0] - exact[key][0]) / exact[key][1] for key in exact)
        ratios = [found[key][1] / exact[key][1] for key in exact]
        rows += [row(name, "fathom", "largest_error_of_a_mean", "posterior sd", off),
                 row(name, "fathom", "sd_over_exact", "1", float(np.median(ratios)), min(ratios), max(ratios)),
                 row(name, "fathom", "cpu_seconds", "s", seconds)]  # fmt: skip
        print(
            f"{name:18} mean off by {off:.4f} sd at most, sd ratio {min(ratios):.4f} to {max(ratios):.4f}, {seconds:.1f} s",
            flush=True,
        )
    rows += law()
    out = RESULTS / f"{DATE}_scientist-references"
    out.mkdir(parents=True, exist_ok=True)
    result = {
        "name": "scientist-references", "date": DATE, "command": "python benchmarks/scientist_references.py",
        "machine": f"2 CPU cores, {platform.machine()}, shared",
        "versions": {"python": platform.python_version(), "numpy": np.__version__}, "rows": rows,
    }  # fmt: skip
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
