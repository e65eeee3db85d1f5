"""One theory after the evidence: its evidence, draws of its parameters, its predictions.

The way is chosen by the theory's form, exact where that is possible:

    enumerated    every parameter is a choice(...)
    conjugate     beta with bernoulli or binomial, gamma with poisson
    linear        affine mean, normal priors, normal noise: exact given the noise scale, a grid over that (gaussian.py)
    sampled       anything else: SMC and adaptive importance sampling, twice (sampler.py)

Seeds come from the numbers of the world alone: neither names nor free text move an answer.
"""

import hashlib
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fathom.errors import UserError
from fathom.scientist import noise as noises
from fathom.scientist.diagnostics import effective_size, pareto_k
from fathom.scientist.evaluation import (
    Unsaid,
    Values,
    columns,
    features_of,
    log_claims,
    log_likelihood,
    log_rows,
    quantities,
    spread,
    value,
)  # fmt: skip
from fathom.scientist.expression import Name, Node, calls, evaluate, names
from fathom.scientist.extrapolation import Edge
from fathom.scientist.gaussian import Linear, LinearPosterior, mixed, solve
from fathom.scientist.priors import Prior
from fathom.scientist.reference import LEVEL, WIGGLE
from fathom.scientist.sampler import LADDER, Effort, sample
from fathom.scientist.world import Theory, World

Array = np.ndarray
MAX_K, MIN_ESS, MAX_GAP = 0.7, 400.0, 0.2
"""The gates: Pareto k, effective sample size, agreement of the replicates' log evidences."""
MANY = 4096
"""Draws that stand for a posterior beyond its rows."""


@dataclass(frozen=True)
class Report:
    """How a theory's evidence was found and how far it can be trusted."""

    method: str
    k_hat: float | None = None
    ess: float | None = None
    replicate_gap: float | None = None
    evals: int = 0

    @property
    def trusted(self) -> bool:
        if self.k_hat is None or self.ess is None:
            return True
        return self.k_hat <= MAX_K and self.ess >= MIN_ESS and (self.replicate_gap or 0.0) <= MAX_GAP


@dataclass(frozen=True)
class Fit:
    """One theory after the evidence."""

    world: World
    theory: Theory
    log_evidence: float
    report: Report
    make_draws: Callable[[], tuple[dict[str, Array], Array]]
    linear: LinearPosterior | None = None
    edge: Edge | None = None

    @cached_property
    def draws(self) -> tuple[dict[str, Array], Array]:
        """Parameters [P] and their normalised weights [P]."""
        return self.make_draws()

    def value(self, tree: Node, design: Values | None = None) -> Array:
        """An expression over quantities and ``mean(...)``, for every draw [P].

        Args:
            design: Values of further names, such as the outcome's.

        Raises:
            Unsaid: the theory does not say what one of its quantities is.
            UserError: an unknown name or a wrong design.
        """
        said = set(self.theory.quantities) | set(self.world.quantities)
        if unsaid := sorted((names(tree) | calls(tree)) & quantities(self.world) - said):
            raise Unsaid(unsaid[0])
        params, weights = self.draws
        return np.broadcast_to(value(self.world, self.theory, tree, params, design or {}), weights.shape)

    def components(self, designs: list[Values], count: int | None = None) -> tuple[Array, Array, Array]:
        """The posterior predictive as a mixture of the theory's noise: weights [K], means and scales [m, K].

        Args:
            count: About how many components at most; all if not given.
        """
        beyond = self.edge.distance(designs) if self.edge is not None else np.zeros(1)
        if self.edge is not None and beyond.any():
            return self._beyond(self.edge, beyond, designs, count)
        if self.linear is not None:
            table = columns(self.world, designs)
            offset, features = features_of(self.theory, table, len(designs))
            weights, means, scales = self.linear.predictive(features)
            means = means + offset[:, None]
            kept = _thin(weights, count)
            return (weights if kept is None else np.full(len(kept), 1 / len(kept)), *(
                (means, scales) if kept is None else (means[:, kept], scales[:, kept])))  # fmt: skip
        params, weights = self.draws
        kept = _thin(weights, count)
        if kept is not None:
            params = {name: each[kept] for name, each in params.items()}
            weights = np.full(len(kept), 1 / len(kept))
        table = columns(self.world, designs)
        environment = {name: each[None, :] for name, each in table.items()} | {
            name: each[:, None] for name, each in params.items()
        }
        shape = (len(weights), len(designs))
        mean = np.broadcast_to(evaluate(self.theory.mean, environment), shape)
        return weights, mean.T, np.broadcast_to(spread(self.theory, environment), shape).T

    def _beyond(
        self, edge: Edge, beyond: Array, designs: list[Values], count: int | None
    ) -> tuple[Array, Array, Array]:
        """``components`` where some designs lie beyond the rows: each component has a bias of its own."""
        inside = replace(few(self, count or MANY), edge=None)
        weights, means, scales = inside.components(designs)
        return weights, means + np.sqrt(beyond)[:, None] * edge.biases(len(weights)), scales

    def log_rows(self) -> Array:
        """Log density of every row under every draw [P, n]."""
        params, _ = self.draws
        return log_rows(self.world, self.theory, params)


def _thin(weights: Array, count: int | None) -> Array | None:
    """Indices of ``count`` equally weighted components, spread evenly over the weights; None to keep all."""
    if count is None or len(weights) <= count:
        return None
    points = (np.arange(count) + 0.5) / count
    return np.minimum(np.searchsorted(np.cumsum(weights), points), len(weights) - 1)


def few(fit: Fit, count: int) -> Fit:
    """``fit`` with at most ``count`` equally weighted draws of its posterior, and no closed form."""
    params, weights = fit.draws
    count = min(count, len(weights))
    points = (np.arange(count) + 0.5) / count
    kept = np.minimum(np.searchsorted(np.cumsum(weights), points), len(weights) - 1)
    lighter = {name: each[kept] for name, each in params.items()}
    return replace(fit, linear=None, make_draws=lambda: (lighter, np.full(count, 1 / count)))


def seed(world: World, *also: int) -> np.random.Generator:
    """A generator that depends on the numbers of the world, not on its words."""
    text = hashlib.sha256(world.y.tobytes() + world.extra.tobytes() + repr(also).encode()).digest()
    return np.random.default_rng(int.from_bytes(text[:16], "big"))


def fit(world: World, index: int, effort: Effort) -> Fit:
    """Theory ``index`` of a world after its evidence."""
    found = _fit(world, index, effort)
    theory = world.theories[index]
    if theory.edge is None:
        return found
    return replace(found, edge=Edge(world, theory.edge, theory.edge_rate, lambda fewer: _fit(fewer, index, LADDER[0])))


def _fit(world: World, index: int, effort: Effort) -> Fit:
    theory = world.theories[index]
    if theory.linear:
        found = _linear(world, theory, index)
    elif all(prior.family == "choice" for prior in theory.params.values()):
        return _enumerated(world, theory)
    elif (exact := _conjugate(world, theory, index)) is not None:
        found = exact
    else:
        return _sampled(world, theory, index, effort)
    if not world.claims:
        return found
    params, weights = found.draws
    said = log_claims(world, theory, params, len(weights))
    log_weights = np.log(weights) + said
    total = float(np.logaddexp.reduce(log_weights))
    k, size = pareto_k(log_weights), effective_size(log_weights)
    if (k > MAX_K or size < MIN_ESS) and not any(prior.relative for prior in theory.params.values()):
        return _sampled(world, theory, index, effort)  # a precise claim leaves too few of the exact draws
    report = Report(f"{found.report.method}, reweighted by claims", k, size)
    return replace(
        found, log_evidence=found.log_evidence + total, linear=None, report=report,
        make_draws=lambda: (params, np.exp(log_weights - total)),
    )  # fmt: skip


def _linear(world: World, theory: Theory, index: int) -> Fit:
    offset, features = features_of(theory, world.data, len(world.y))
    inner = [name for name in theory.params if name != theory.scale]
    priors = [theory.params[name] for name in inner]
    scale = theory.params[theory.scale] if theory.scale else None
    if scale is not None and scale.support != "positive":
        raise UserError(f"theory {theory.id}: the noise scale's prior must be of a positive number")
    problem = Linear(
        features, world.y - offset, world.extra**2, np.array([prior.args[0] for prior in priors]),
        np.array([prior.args[1] for prior in priors]), np.array([prior.relative for prior in priors], bool),
        scale if scale is not None else float(evaluate(theory.noise.args[0], {})),
    )  # fmt: skip
    bends, levels = (np.array([name.startswith(letter) for name in inner], bool) for letter in (WIGGLE, LEVEL))
    factors = [np.where(bends, one, np.where(levels, two, 1.0)) for one, two in theory.sizes or ((1.0, 1.0),)]
    posterior = mixed([solve(replace(problem, deviations=each * problem.deviations)) for each in factors])

    def draws() -> tuple[dict[str, Array], Array]:
        count = 2**15 if len(inner) <= 8 else 2**12
        w, s = posterior.draw(count, seed(world, index, 0))
        params = dict(zip(inner, w.T, strict=True))
        if theory.scale:
            params[theory.scale] = s
        return params, np.full(count, 1 / count)

    return Fit(world, theory, posterior.log_evidence, Report("linear"), draws, posterior)


def _enumerated(world: World, theory: Theory) -> Fit:
    values = [prior.args for prior in theory.params.values()]
    count = math.prod(map(len, values))
    if count > 200_000:
        raise UserError(f"theory {theory.id}: its choices make {count:,} combinations; 200,000 are enumerated at most")
    grid = np.array(list(itertools.product(*values)), float).reshape(count, len(values))
    params = dict(zip(theory.params, grid.T, strict=True))
    joint = log_likelihood(world, theory, params, count) + log_claims(world, theory, params, count) - math.log(count)
    total = float(np.logaddexp.reduce(joint))
    weights = np.exp(joint - total) if math.isfinite(total) else np.full(count, 1 / count)
    return Fit(world, theory, total, Report("enumerated", evals=count), lambda: (params, weights))


def _conjugate(world: World, theory: Theory, index: int) -> Fit | None:
    if not isinstance(theory.mean, Name) or list(theory.params) != [theory.mean.id]:
        return None
    name = theory.mean.id
    prior = theory.params[name]
    y, family = world.y, theory.noise.family
    if prior.family == "gamma" and family == "poisson":
        a, b = prior.args[0] + y.sum(), prior.args[1] + len(y)
        total = prior.args[0] * math.log(prior.args[1]) - math.lgamma(prior.args[0]) + math.lgamma(a) - a * math.log(b)
        total -= float(noises.log_gamma(y + 1).sum())
        after = Prior("gamma", (a, b))
    elif prior.family == "beta" and family in ("bernoulli", "binomial"):
        trials = np.broadcast_to(spread(theory, dict(world.data)), y.shape)
        after = Prior("beta", (prior.args[0] + y.sum(), prior.args[1] + (trials - y).sum()))
        log_beta = [math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b) for a, b in (after.args, prior.args)]
        choose = noises.log_gamma(trials + 1) - noises.log_gamma(y + 1) - noises.log_gamma(trials - y + 1)
        total = log_beta[0] - log_beta[1] + float(choose.sum())
    else:
        return None
    count = 2**15
    return Fit(
        world, theory, float(total), Report("conjugate"),
        lambda: ({name: after.draw(seed(world, index, 0), count)}, np.full(count, 1 / count)),
    )  # fmt: skip


def _sampled(world: World, theory: Theory, index: int, effort: Effort) -> Fit:
    priors = list(theory.params.values())

    def params_of(points: Array) -> dict[str, Array]:
        return {name: prior.constrain(points[:, j]) for j, (name, prior) in enumerate(theory.params.items())}

    def prior_density(points: Array) -> Array:
        return sum((prior.log_density(points[:, j]) for j, prior in enumerate(priors)), np.zeros(len(points)))

    def likelihood(points: Array) -> Array:
        params = params_of(points)
        return log_likelihood(world, theory, params, len(points)) + log_claims(world, theory, params, len(points))

    replicates = []
    for replicate in (1, 2):
        random = seed(world, index, replicate, effort.draws)
        start = np.stack([prior.unconstrain(prior.draw(random, effort.particles)) for prior in priors], 1)
        replicates.append(sample(prior_density, likelihood, start, effort, random))
    first, second = replicates
    evidences = np.array([first.log_evidence, second.log_evidence])
    gap = float(abs(evidences[0] - evidences[1])) if np.isfinite(evidences).all() else math.inf
    report = Report("sampled", max(first.k_hat, second.k_hat), first.ess + second.ess, gap, first.evals + second.evals)
    total = float(np.logaddexp.reduce(evidences) - math.log(2))
    log_weights = np.concatenate(
        [each.log_weights + (each.log_evidence if math.isfinite(total) else 0) for each in replicates]
    )
    weights = np.exp(log_weights - np.logaddexp.reduce(log_weights))
    kept = weights > 0
    params = params_of(np.concatenate([each.points for each in replicates])[kept])
    return Fit(world, theory, total, report, lambda: (params, weights[kept]))
