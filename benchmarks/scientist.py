"""The scientist against what is known: closed forms, an independent sampler, published tables. One folder of results each.

    python benchmarks/scientist.py table2        the paper's Table 2: compute multiplier, sensitivity to priors, time to answer
    python benchmarks/scientist.py evidence      log evidence: closed forms, and dynesty where it is installed
    python benchmarks/scientist.py information   expected information against closed forms, and the time of 1000 candidates
    python benchmarks/scientist.py bandit        the exploding bandit of arXiv 2408.05284: reward, deaths, broken bounds
    python benchmarks/scientist.py location      location finding: random and greedy designs

Times are CPU seconds of one thread, since the machine is shared.
Each writes benchmarks/results/2026-11-22_scientist-NAME/result.json. dynesty is an oracle for checking and no dependency.
"""

import argparse
import json
import math
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fathom.scientist import Scientist, World, read
from fathom.scientist.bounds import cautious_set
from fathom.scientist.build import ready_made
from fathom.scientist.expression import parse
from fathom.scientist.fitting import fit
from fathom.scientist.gaussian import Linear, resample, solve
from fathom.scientist.information import Group, gain, gain_about_parameters
from fathom.scientist.noise import Noise
from fathom.scientist.priors import Prior, normal_cdf
from fathom.scientist.sampler import LADDER

RESULTS = Path(__file__).resolve().parent / "results"
DATE = "2026-11-22"
Array = np.ndarray
Row = dict[str, Any]
NORMAL = Noise("normal", (parse("s"),))


def row(case: str, arm: str, metric: str, unit: str, value: float, low: float | None = None, high: float | None = None,
        n: int = 1) -> Row:  # fmt: skip
    return {"case": case, "arm": arm, "metric": metric, "unit": unit, "median": value, "low": value if low is None else low,
            "high": value if high is None else high, "n": n, "over_prenorm": None}  # fmt: skip


def table2() -> list[Row]:
    text = ready_made()["paper-table2"].read_text()
    world = read("paper-table2")
    seconds = []
    for _ in range(7):
        start = time.process_time()
        Scientist(world).prob("multiplier(C=5.6) > 1")
        seconds.append(1000 * (time.process_time() - start))
    rows = [
        row(
            "answer",
            "fathom",
            "first_answer_cpu_ms",
            "ms",
            float(np.median(seconds)),
            min(seconds),
            max(seconds),
            len(seconds),
        )
    ]
    changes = {
        "as published": {},
        "noise x 3": {"root_inverse_gamma(1, 9e-6)": "root_inverse_gamma(1, 81e-6)"},
        "noise / 3": {"root_inverse_gamma(1, 9e-6)": "root_inverse_gamma(1, 1e-6)"},
        "noise halfnormal": {"root_inverse_gamma(1, 9e-6)": "halfnormal(0.003)"},
        "slope and shift x 3": {"normal(0.05, 0.05)": "normal(0.05, 0.15)", "normal(0, 0.03)": "normal(0, 0.09)",
                                "normal(0, 0.01)": "normal(0, 0.03)"},
        "tilt / 3": {"normal(0, 0.01)": "normal(0, 0.0033)"},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for name, change in changes.items():
            changed = text
            for old, new in change.items():
                assert old in changed
                changed = changed.replace(old, new)
            path = Path(folder) / "world.yaml"
            path.write_text(changed)
            scientist = Scientist.open(path)
            for theory, each in scientist.interval("multiplier(C=5.6)")["epistemic"]["by_theory"].items():
                if theory != "no-difference":
                    rows.append(row(name, theory, "multiplier", "x", each["median"], each["lower"], each["upper"]))
                rows.append(row(name, theory, "probability", "1", each["p"]))
            for bound in (1.0, 1.1):
                answer = scientist.prob(f"multiplier(C=5.6) > {bound}")
                rows.append(row(name, "all theories", f"p_above_{bound:g}", "1", answer["p"]))
    return rows


def evidence() -> list[Row]:
    rows = []
    random = np.random.default_rng(0)
    errors = []
    for _ in range(200):
        n, p = int(random.integers(1, 60)), int(random.integers(1, 7))
        noise = float(10 ** random.uniform(-3, 1))
        x, k = random.standard_normal((n, p)), 10 ** random.uniform(-1, 2, p)
        y = noise * (x @ random.standard_normal(p) * 3 + random.standard_normal(n))
        a, b = float(random.uniform(0.5, 4)), noise**2 * float(random.uniform(0.3, 3))
        problem = Linear(x, y, np.zeros(n), np.zeros(p), k, np.ones(p, bool), Prior("root_inverse_gamma", (a, b)))
        covariance = np.eye(n) + (x * k**2) @ x.T
        quadratic = y @ np.linalg.solve(covariance, y)
        exact = (math.lgamma(a + n / 2) - math.lgamma(a) + a * math.log(b) - (a + n / 2) * math.log(b + quadratic / 2)
                 - n / 2 * math.log(2 * math.pi) - np.linalg.slogdet(covariance)[1] / 2)  # fmt: skip
        errors.append(abs(solve(problem).log_evidence - exact))
    rows.append(
        row(
            "normal-inverse-gamma",
            "fathom",
            "abs_error",
            "nats",
            float(np.median(errors)),
            min(errors),
            max(errors),
            200,
        )
    )
    return rows + law_evidence()


LAW = """world: law
outcome: {name: y, center: 1, spread: 1, noise: 0.02}
designs:
  N: {low: 1.0e7, high: 1.0e10, log: true}
  D: {low: 1.0e8, high: 1.0e11, log: true}
theories:
  - id: law
    params:
      lE: normal(0.5, 0.5)
      lA: normal(6, 2)
      lB: normal(7, 2)
      alpha: lognormal(-1, 0.4)
      beta: lognormal(-1, 0.4)
      s: halfnormal(0.02)
    mean: log(exp(lE) + exp(lA)*N**(0 - alpha) + exp(lB)*D**(0 - beta))
    noise: student_t(4, s)
evidence: [{kind: measured, file: runs.csv}]
"""


def law_points() -> tuple[Array, Array, Array]:
    """N, D and y of 240 synthetic runs."""
    random = np.random.default_rng(7)
    n, d = 10 ** random.uniform(7.2, 9.8, 240), 10 ** random.uniform(8.2, 10.8, 240)
    return n, d, np.log(1.82 + 482 * n**-0.348 + 2085 * d**-0.366) + 0.008 * random.standard_t(4, 240)


def law_world() -> World:
    with tempfile.TemporaryDirectory() as folder:
        rows = zip(*(each.tolist() for each in law_points()), strict=True)
        (Path(folder) / "runs.csv").write_text("N,D,y\n" + "".join(f"{a!r},{b!r},{c!r}\n" for a, b, c in rows))
        (Path(folder) / "world.yaml").write_text(LAW)
        return read(Path(folder) / "world.yaml")


def law_evidence() -> list[Row]:
    """A law of six parameters on 240 synthetic points: five seeds of the sampler, and dynesty with 400 live points."""
    n, d, y = law_points()
    world = law_world()
    rows, found, seconds, gaps = [], [], [], []
    for seed in range(5):
        # Seeds come from the evidence's numbers, so a change far below their noise is another seed.
        moved = replace(world, y=world.y * (1 + seed * 1e-13))
        start = time.process_time()
        one = fit(moved, 0, LADDER[0])
        seconds.append(time.process_time() - start)
        found.append(one.log_evidence)
        gaps.append(one.report.k_hat)
    rows.append(
        row(
            "law-6-parameters-240-points",
            "fathom",
            "log_evidence",
            "nats",
            float(np.mean(found)),
            min(found),
            max(found),
            5,
        )
    )
    rows.append(
        row("law-6-parameters-240-points", "fathom", "sd_between_seeds", "nats", float(np.std(found, ddof=1)), n=5)
    )
    rows.append(
        row("law-6-parameters-240-points", "fathom", "k_hat", "1", float(np.median(gaps)), min(gaps), max(gaps), 5)
    )
    rows.append(
        row(
            "law-6-parameters-240-points",
            "fathom",
            "cpu_seconds",
            "s",
            float(np.median(seconds)),
            min(seconds),
            max(seconds),
            5,
        )
    )
    try:
        import dynesty
        from scipy import stats
    except ImportError:
        return rows

    def transform(u: Array) -> Array:
        z = stats.norm.ppf(u)
        return np.array([0.5 + 0.5 * z[0], 6 + 2 * z[1], 7 + 2 * z[2], math.exp(-1 + 0.4 * z[3]), math.exp(-1 + 0.4 * z[4]),
                         0.02 * stats.norm.ppf(0.5 + u[5] / 2)])  # fmt: skip

    constant = math.lgamma(2.5) - math.lgamma(2) - 0.5 * math.log(4 * math.pi)

    def likelihood(v: Array) -> float:
        mean = np.log(np.exp(v[0]) + np.exp(v[1]) * n ** -v[3] + np.exp(v[2]) * d ** -v[4])
        value = (constant - 2.5 * np.log1p(((y - mean) / v[5]) ** 2 / 4) - math.log(v[5])).sum()
        return float(value) if math.isfinite(value) else -1e300

    start = time.process_time()
    sampler = dynesty.NestedSampler(
        likelihood, transform, 6, nlive=400, sample="rslice", rstate=np.random.default_rng(1)
    )
    sampler.run_nested(dlogz=0.1, print_progress=False)
    took = time.process_time() - start
    value, error = float(sampler.results.logz[-1]), float(sampler.results.logzerr[-1])
    rows.append(
        row("law-6-parameters-240-points", "dynesty", "log_evidence", "nats", value, value - error, value + error)
    )
    rows.append(row("law-6-parameters-240-points", "dynesty", "cpu_seconds", "s", took))
    return rows


def information() -> list[Row]:
    rows = []
    one = np.ones(1)
    for distance, exact in ((0.5, 0.03031), (1, 0.11142), (2, 0.33683), (4, 0.63272)):
        value = gain([Group(0.5, one, np.array([center]), one, NORMAL) for center in (0.0, float(distance))])
        rows += [row(f"two-theories-shift-{distance:g}", "fathom", "nats", "nats", value),
                 row(f"two-theories-shift-{distance:g}", "closed form", "nats", "nats", exact)]  # fmt: skip
    random = np.random.default_rng(0)
    for ratio in (2.0, 6.0, 30.0):
        exact = 0.5 * math.log(1 + ratio**2)
        draws = [
            gain_about_parameters(Group(1.0, np.full(1000, 1e-3), random.normal(0, ratio, 1000), np.ones(1000), NORMAL))
            for _ in range(20)
        ]
        rows += [row(f"linear-gaussian-{ratio:g}", "fathom, 1000 draws", "nats", "nats", float(np.mean(draws)),
                     min(draws), max(draws), 20),
                 row(f"linear-gaussian-{ratio:g}", "closed form", "nats", "nats", exact)]  # fmt: skip
    scientist = Scientist.open("paper-table2")
    candidates = [{"C": c, "arch": arch} for c in np.geomspace(0.6, 15, 500).tolist() for arch in ("prenorm", "block")]
    for about in ("theories", "multiplier(C=5.6)"):
        scientist.recommend(candidates[:2], about=about)
        start = time.process_time()
        scientist.recommend(candidates, about=about)
        rows.append(row("1000-candidates", about, "cpu_seconds", "s", time.process_time() - start))
    return rows


def bandit(episodes: int = 2000) -> list[Row]:
    """Ten arms, 1024 theories, 25 steps; settings of the authors' public configuration, written anew from the formulas."""
    rows = []
    for threshold in (0.1, 0.01):
        for name in (
            "none",
            "posterior mean",
            "cheating",
            "iid (3.4)",
            "4.6 alpha 1e-4",
            "4.6 alpha 0.01",
            "4.6 alpha 1",
            "weak (4.4)",
        ):
            reward, dead, broken = play(name, threshold, episodes, np.random.default_rng(5))
            case = f"bandit-threshold-{threshold:g}"
            for metric, values in (("reward", reward), ("deaths", dead), ("ever_under_estimates", broken)):
                mean, error = float(values.mean()), float(values.std(ddof=1) / math.sqrt(episodes))
                rows.append(row(case, name, metric, "1", mean, mean - 2 * error, mean + 2 * error, episodes))
    return rows


def play(name: str, threshold: float, episodes: int, random: np.random.Generator) -> tuple[Array, Array, Array]:
    """Reward, death and whether the bound of any arm was ever below its true harm, of each episode."""
    arms, dim, steps, limit, beta = 10, 10, 25, 4.0, 0.5
    theories = ((np.arange(2**dim)[:, None] >> np.arange(dim)) & 1).astype(float)
    harm_of = 1 - normal_cdf(limit - np.arange(dim + 1.0))
    rewards, deaths, broken = np.zeros(episodes), np.zeros(episodes), np.zeros(episodes)
    for episode in range(episodes):
        truth = random.integers(0, 2, dim).astype(float)
        features = random.integers(0, 2, (arms, dim)).astype(float)
        means = features @ theories.T
        harm, true_harm = harm_of[means.astype(int)], harm_of[(features @ truth).astype(int)]
        log = np.full(2**dim, -dim * math.log(2))
        for step in range(steps):
            posterior = np.exp(log - np.logaddexp.reduce(log))
            estimate = _estimate(name, posterior, harm, true_harm)
            broken[episode] = max(broken[episode], float((estimate < true_harm - 1e-12).any()))
            allowed = estimate <= threshold
            if not allowed.any():
                break
            preference = np.where(allowed, np.exp(beta * (means @ posterior)), 0.0)
            arm = random.choice(arms, p=preference / preference.sum())
            reward = random.normal(means[arm] @ (theories == truth).all(1), 1.0)
            rewards[episode] += reward
            log = log - 0.5 * (reward - means[arm]) ** 2
            if reward > limit:
                deaths[episode] = float(step < steps - 1)  # the authors' code counts no death in the last step
                break
    return rewards, deaths, broken


def _estimate(name: str, posterior: Array, harm: Array, true_harm: Array) -> Array:
    if name == "none":
        return np.zeros(len(harm))
    if name == "cheating":
        return true_harm
    if name == "posterior mean":
        return harm @ posterior
    if name.startswith("iid"):
        return harm[np.arange(len(harm)), (harm * posterior).argmax(1)]
    if name.startswith("weak"):
        return np.minimum((harm * posterior).max(1) / (0.1 / 1024), 1.0)
    return harm[:, cautious_set(posterior, float(name.split()[-1]), ties=False)].max(1)


def location(rollouts: int = 48) -> list[Row]:
    """Two sources in the plane, T measurements of their summed signal; sPCE lower bound with L draws of the prior."""
    rows = []
    for steps, draws, count in ((10, 200_000, 256), (30, 500_000, 64)):
        values = [_rollout(steps, draws, np.random.default_rng(seed), greedy=False) for seed in range(count)]
        rows.append(_bound(f"location-T{steps}", "random", values))
    values = [_rollout(10, 1_000_000, np.random.default_rng(1000 + seed), greedy=True) for seed in range(rollouts)]
    rows.append(_bound("location-T10", "greedy quadrature", values))
    return rows


def _bound(case: str, arm: str, values: list[float]) -> Row:
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / math.sqrt(len(values)))
    return row(case, arm, "spce_lower", "nats", mean, mean - 2 * error, mean + 2 * error, len(values))


SIGMA = 0.5


def _signal(sources: Array, at: Array) -> Array:
    """Log signal [P] at a place [2] of sources [P, 2, 2]."""
    return np.log(0.1 + (1 / (1e-4 + ((sources - at) ** 2).sum(-1))).sum(-1))


def _rollout(steps: int, draws: int, random: np.random.Generator, *, greedy: bool) -> float:
    truth = random.standard_normal((1, 2, 2))
    places, seen = [], []
    particles = random.standard_normal((4000, 2, 2))
    for step in range(steps):
        place = _best(particles, random, step) if greedy else random.standard_normal(2)
        places.append(place)
        seen.append(float(_signal(truth, place)[0] + SIGMA * random.standard_normal()))
        if greedy:
            particles = _update(particles, places, seen, random)

    def fit_of(sources: Array) -> Array:
        return sum(-0.5 * ((y - _signal(sources, at)) / SIGMA) ** 2 for at, y in zip(places, seen, strict=True))  # type: ignore[return-value]

    own = float(fit_of(truth)[0])
    total = [own]
    for _ in range(draws // 100_000):
        total.append(float(np.logaddexp.reduce(fit_of(random.standard_normal((100_000, 2, 2))))))
    return own - (float(np.logaddexp.reduce(total)) - math.log(draws + 1))


def _best(particles: Array, random: np.random.Generator, step: int) -> Array:
    few = particles[random.choice(len(particles), 300, replace=False)]
    near = few[:, 0][:48] + 0.15 * random.standard_normal((48, 2))
    candidates = np.concatenate([near, few[:, 1][:24], random.standard_normal((24, 2))])
    y = np.linspace(-5, 12, 220)
    best, choice = -math.inf, candidates[0]
    for place in candidates:
        mean = _signal(few, place)
        density = np.exp(-0.5 * ((y[:, None] - mean) / SIGMA) ** 2).mean(1) / (SIGMA * math.sqrt(2 * math.pi))
        entropy = -float((density * np.log(np.maximum(density, 1e-300))).sum()) * (y[1] - y[0])
        if entropy > best:  # the noise is the same everywhere, so the most uncertain outcome tells most
            best, choice = entropy, place
    return choice


def _update(particles: Array, places: list[Array], seen: list[float], random: np.random.Generator) -> Array:
    fit = -0.5 * ((seen[-1] - _signal(particles, places[-1])) / SIGMA) ** 2
    particles = particles[resample(np.exp(fit - fit.max()), len(particles), random)]

    def target(sources: Array) -> Array:
        total = -0.5 * (sources**2).sum((-1, -2))
        for at, y in zip(places, seen, strict=True):
            total = total - 0.5 * ((y - _signal(sources, at)) / SIGMA) ** 2
        return total

    now = target(particles)
    for move in range(12):
        if move % 3 == 0:  # differences of particles reach along whatever shape the posterior has
            first, second = particles[random.permutation(len(particles))], particles[random.permutation(len(particles))]
            step = (1.0 if move % 6 == 0 else 0.5) * (first - second) + 1e-3 * random.standard_normal(particles.shape)
        else:
            spread = particles.std(0) * (0.3 if move % 3 == 1 else 0.05)
            step = spread * random.standard_normal(particles.shape)
        proposed = particles + step
        there = target(proposed)
        better = np.log(random.random(len(particles))) < there - now
        particles = np.where(better[:, None, None], proposed, particles)
        now = np.where(better, there, now)
    return particles


MEASURES = {"table2": table2, "evidence": evidence, "information": information, "bandit": bandit, "location": location}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MEASURES)
    name = parser.parse_args().name
    folder = RESULTS / f"{DATE}_scientist-{name}"
    rows = MEASURES[name]()
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        "name": f"scientist-{name}", "date": DATE, "command": f"python benchmarks/scientist.py {name}",
        "machine": f"2 CPU cores, {platform.machine()}, shared",
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
        "rows": rows,
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    for each in rows:
        print(
            f"{each['case']:32} {each['arm']:22} {each['metric']:22} {each['median']:.5g} [{each['low']:.5g}, {each['high']:.5g}]"
        )


if __name__ == "__main__":
    main()
