"""Evidence and posteriors against closed forms, against each other, and the gates against cases that must not pass."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fathom.errors import UserError
from fathom.scientist.diagnostics import effective_size, pareto_k
from fathom.scientist.fitting import Fit, fit
from fathom.scientist.gaussian import Linear, resample, solve
from fathom.scientist.posterior import Budget, infer
from fathom.scientist.priors import Prior, normal_cdf, student_t_cdf
from fathom.scientist.sampler import LADDER, Effort, sample
from fathom.scientist.world import World

Made = Callable[[Any], World]
PRIORS = [
    Prior("normal", (0.3, 2.0)), Prior("student_t", (4.0, 0.1, 0.7)), Prior("lognormal", (-1.0, 0.5)),
    Prior("halfnormal", (0.2,)), Prior("gamma", (2.5, 3.0)), Prior("root_inverse_gamma", (2.0, 0.3)),
    Prior("uniform", (-1.0, 4.0)), Prior("beta", (2.0, 5.0)),
]  # fmt: skip


@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_a_priors_density_integrates_to_one_and_is_of_its_draws(prior: Prior) -> None:
    u = np.linspace(-40, 40, 200_001)
    density = np.exp(prior.log_density(u))
    assert density.sum() * (u[1] - u[0]) == pytest.approx(1, abs=2e-3)
    drawn = prior.unconstrain(prior.draw(np.random.default_rng(0), 200_000))
    for q in (0.1, 0.5, 0.9):
        below = density[u <= np.quantile(drawn, q)].sum() * (u[1] - u[0])
        assert below == pytest.approx(q, abs=5e-3)
    np.testing.assert_allclose(prior.unconstrain(prior.constrain(np.array([-2.0, 0.5]))), [-2.0, 0.5], atol=1e-9)


def test_distribution_functions() -> None:
    z = np.array([-2.0, 0.0, 1.5])
    np.testing.assert_allclose(student_t_cdf(z, 1.0), 0.5 + np.arctan(z) / math.pi, atol=1e-12)
    np.testing.assert_allclose(student_t_cdf(z, 2.0), 0.5 + z / (2 * np.sqrt(2 + z * z)), atol=1e-12)
    np.testing.assert_allclose(student_t_cdf(z, 1e5), normal_cdf(z), atol=1e-5)


def nig_log_evidence(x: np.ndarray, y: np.ndarray, k: np.ndarray, a: float, b: float) -> float:
    """Normal-inverse-gamma in closed form: w ~ N(0, s^2 diag k^2), s^2 ~ IG(a, b)."""
    covariance = np.eye(len(y)) + (x * k**2) @ x.T
    quadratic = y @ np.linalg.solve(covariance, y)
    half = len(y) / 2
    return float(
        math.lgamma(a + half) - math.lgamma(a) + a * math.log(b) - (a + half) * math.log(b + quadratic / 2)
        - half * math.log(2 * math.pi) - np.linalg.slogdet(covariance)[1] / 2
    )  # fmt: skip


@pytest.mark.parametrize(("n", "p", "noise"), [(5, 2, 0.003), (12, 3, 1.0), (400, 6, 0.2), (1, 1, 5.0), (0, 2, 1.0)])
def test_evidence_is_the_normal_inverse_gammas(n: int, p: int, noise: float) -> None:
    random = np.random.default_rng(n)
    x, k = random.standard_normal((n, p)), np.linspace(0.5, 20, p)
    y = x @ random.standard_normal(p) * noise * 3 + noise * random.standard_normal(n)
    a, b = 1.5, 1.5 * noise**2
    problem = Linear(x, y, np.zeros(n), np.zeros(p), k, np.ones(p, bool), Prior("root_inverse_gamma", (a, b)))
    assert solve(problem).log_evidence == pytest.approx(nig_log_evidence(x, y, k, a, b), abs=1e-3)


def test_evidence_with_known_and_reported_noise_is_the_gaussians() -> None:
    random = np.random.default_rng(0)
    x, y, extra = random.standard_normal((20, 3)), random.standard_normal(20), random.random(20)
    deviations, means = np.array([0.5, 2.0, 30.0]), np.array([0.1, -1.0, 3.0])
    posterior = solve(Linear(x, y, extra, means, deviations, np.zeros(3, bool), 0.4))
    covariance = (x * deviations**2) @ x.T + np.diag(0.16 + extra)
    error = y - x @ means
    exact = -0.5 * (error @ np.linalg.solve(covariance, error) + np.linalg.slogdet(2 * math.pi * covariance)[1])
    assert posterior.log_evidence == pytest.approx(exact, abs=1e-8)
    at = random.standard_normal((1, 3))
    _, mean, deviation = posterior.predictive(at)
    gain = at * deviations**2 @ x.T
    expected = at @ means + gain @ np.linalg.solve(covariance, error)
    variance = (at * deviations**2 @ at.T - gain @ np.linalg.solve(covariance, gain.T)) + 0.16
    assert float(mean[0, 0]) == pytest.approx(float(expected[0]), abs=1e-8)
    assert float(deviation[0, 0]) == pytest.approx(math.sqrt(float(variance[0, 0])), abs=1e-8)


def counts(noise: str, prior: str, data: list[dict[str, float]], mean: str = "p") -> dict[str, Any]:
    return {
        "world": "counts", "outcome": {"name": "k"}, "designs": {"n": {"low": 1, "high": 50}},
        "theories": [{"id": "one", "params": {"p": prior}, "mean": mean, "noise": noise}],
        "evidence": [{"kind": "measured", "data": data}],
    }  # fmt: skip


def test_counts_have_their_closed_evidence_and_the_sampler_finds_it(made: Made) -> None:
    data = [{"n": 10, "k": 7}, {"n": 5, "k": 2}, {"n": 30, "k": 21}]
    total = sum(math.lgamma(r["n"] + 1) - math.lgamma(r["k"] + 1) - math.lgamma(r["n"] - r["k"] + 1) for r in data)
    after = [math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b) for a, b in ((32.0, 18.0), (2.0, 3.0))]
    exact = total + after[0] - after[1]
    conjugate = fit(made(counts("binomial(n)", "beta(2, 3)", data)), 0, LADDER[0])
    sampled = fit(made(counts("binomial(n)", "beta(2, 3)", data, mean="p + 0")), 0, LADDER[0])
    assert (conjugate.report.method, sampled.report.method) == ("conjugate", "sampled")
    assert conjugate.log_evidence == pytest.approx(exact, abs=1e-9)
    assert sampled.log_evidence == pytest.approx(exact, abs=0.01)

    rates = [{"n": 1, "k": value} for value in (3, 0, 5, 2)]
    a, b = 2.0, 1.0
    exact = a * math.log(b) - math.lgamma(a) + math.lgamma(a + 10) - (a + 10) * math.log(b + 4)
    exact -= sum(math.lgamma(row["k"] + 1) for row in rates)
    assert fit(made(counts("poisson()", "gamma(2, 1)", rates)), 0, LADDER[0]).log_evidence == pytest.approx(
        exact, abs=1e-9
    )
    sampled = fit(made(counts("poisson()", "gamma(2, 1)", rates, mean="p*1")), 0, LADDER[0])
    assert sampled.log_evidence == pytest.approx(exact, abs=0.01)


def test_enumeration_is_the_sum_over_choices(made: Made) -> None:
    world = made(counts("bernoulli()", "choice(0.2, 0.5, 0.9)", [{"n": 1, "k": 1}, {"n": 1, "k": 1}, {"n": 1, "k": 0}]))
    found = fit(world, 0, LADDER[0])
    joint = np.array([p * p * (1 - p) / 3 for p in (0.2, 0.5, 0.9)])
    assert found.log_evidence == pytest.approx(math.log(joint.sum()), abs=1e-12)
    np.testing.assert_allclose(found.draws[1], joint / joint.sum(), atol=1e-12)


def test_the_sampler_agrees_with_the_exact_way(made: Made, line: dict[str, Any]) -> None:
    exact = fit(made(line), 0, LADDER[0])
    line["theories"][0]["mean"] = "a + log(exp(b))*x"
    sampled = fit(made(line), 0, LADDER[0])
    assert (exact.report.method, sampled.report.method) == ("linear", "sampled")
    assert sampled.log_evidence == pytest.approx(exact.log_evidence, abs=0.03)
    assert sampled.report.trusted
    for name in ("a", "b", "s"):
        first, second = moments(exact, name), moments(sampled, name)
        assert abs(first[0] - second[0]) < 0.05 * first[1] and second[1] == pytest.approx(first[1], rel=0.05)
    ways = [each.components([{"x": 3.5}]) for each in (exact, sampled)]
    means = [float((weights * mean[0]).sum()) for weights, mean, _ in ways]
    assert means[0] == pytest.approx(means[1], abs=0.01)


def moments(found: Fit, name: str) -> tuple[float, float]:
    params, weights = found.draws
    mean = float((weights * params[name]).sum())
    return mean, math.sqrt(float((weights * (params[name] - mean) ** 2).sum()))


def test_resampling_keeps_weights_to_within_one() -> None:
    weights = np.array([0.5, 0.0, 0.3, 0.2])
    assert np.bincount(resample(weights, 1000, np.random.default_rng(0)), minlength=4).tolist() == [500, 0, 300, 200]


def test_pareto_k_finds_the_shape_of_a_tail() -> None:
    random = np.random.default_rng(0)
    for shape in (0.2, 0.5, 1.0):
        fits = [pareto_k(np.log(random.pareto(1 / shape, 20_000) + 1)) for _ in range(8)]
        assert np.mean(fits) == pytest.approx(shape, abs=0.08)
    assert pareto_k(np.zeros(1000)) == -math.inf and effective_size(np.zeros(1000)) == pytest.approx(1000)


def log_normal(points: np.ndarray, mean: float, deviation: float) -> np.ndarray:
    z = (points - mean) / deviation
    return (-0.5 * z**2 - math.log(deviation) - 0.5 * math.log(2 * math.pi)).sum(1)


def test_several_components_find_what_one_misses() -> None:
    """Two far modes: the ladder's last rung knows the evidence."""
    random = np.random.default_rng(1)

    def likelihood(points: np.ndarray) -> np.ndarray:
        return np.logaddexp(log_normal(points, -4, 0.05), log_normal(points, 4, 0.1))

    exact = float(
        np.logaddexp(*(2 * -0.5 * (16 / (25 + d * d)) - math.log(2 * math.pi * (25 + d * d)) for d in (0.05, 0.1)))
    )
    start = random.normal(0, 5, (LADDER[-1].particles, 2))
    found = sample(lambda points: log_normal(points, 0, 5), likelihood, start, LADDER[-1], random)
    assert found.log_evidence == pytest.approx(exact, abs=0.05) and found.k_hat < 0.7


def test_a_hopeless_posterior_does_not_pass_the_gates() -> None:
    """A tail far heavier than the proposal's."""
    random = np.random.default_rng(0)
    effort = Effort(300, 3, 3000, 1)
    start = random.standard_cauchy((300, 2)) ** 3
    found = sample(lambda u: -(np.log1p(np.abs(u)) * 1.05).sum(1), lambda u: np.zeros(len(u)), start, effort, random)
    assert found.k_hat > 0.7


def test_no_budget_no_escalation(made: Made, line: dict[str, Any]) -> None:
    line["theories"][0] |= {"mean": "a + b*x*tanh(1e3*(b - 1))", "noise": "student_t(1, s)"}
    world = made(line)
    small = infer(world, Budget(evals=1))
    assert small.fits[0].report.evals < 200_000


def test_impossible_evidence_is_one_line(made: Made) -> None:
    world = counts("bernoulli()", "choice(0, 1)", [{"n": 1, "k": 1}, {"n": 1, "k": 0}])
    assert infer(made(world)).probabilities[0] == 0
    world["evidence"][0]["data"][0]["k"] = 7
    with pytest.raises(UserError, match="no theory gives this evidence any probability"):
        infer(made(world))
