"""Posterior draws and evidence of any theory: tempered SMC to find the mass, adaptive importance sampling to weigh it.

SMC carries particles from the prior to the posterior, so that nothing has to be known of the posterior beforehand; its
evidence is too noisy to rank theories. A Student-t mixture fitted to its particles then proposes, and is refitted, for a few
rounds, each weighted by the mixture of all rounds' proposals (AMIS: Cornuet, Marin, Mira, Robert 2012). Two independent
replicates tell how far the evidence is off.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fathom.scientist.diagnostics import effective_size, pareto_k
from fathom.scientist.gaussian import resample, root

Array = np.ndarray
Target = Callable[[Array], Array]
"""Log joint density of points [P, d] on the real line, -inf where there is none."""
NU, ROUNDS = 5.0, 3


@dataclass(frozen=True)
class Effort:
    """How hard to try: SMC particles and moves, draws of a round of AMIS, components of its proposal."""

    particles: int
    moves: int
    draws: int
    components: int


LADDER = (Effort(400, 5, 3000, 1), Effort(600, 10, 12000, 1), Effort(1500, 15, 20000, 5))
"""Tried in turn until the gates are passed."""


@dataclass(frozen=True)
class Sample:
    points: Array
    log_weights: Array
    log_evidence: float
    k_hat: float
    ess: float
    evals: int


def sample(prior: Target, likelihood: Target, start: Array, effort: Effort, random: np.random.Generator) -> Sample:
    """One replicate; ``start`` are draws from the prior, at least ``effort.particles``."""
    points = start[: effort.particles]
    points, evals = _temper(prior, likelihood, points, effort.moves, random)
    proposal = _fit(points, np.full(len(points), 1 / len(points)), effort.components, random)
    proposals, drawn, joint = [], np.empty((0, points.shape[1])), np.empty(0)
    for _ in range(ROUNDS):
        proposals.append(proposal)
        new = proposal.draw(effort.draws, random)
        evals += len(new)
        drawn = np.concatenate([drawn, new])
        joint = np.concatenate([joint, _joint(prior, likelihood, new)])
        heights = np.stack([each.log_density(drawn) for each in proposals])
        log_weights = joint - (np.logaddexp.reduce(heights) - math.log(len(proposals)))
        if not np.isfinite(log_weights).any():
            break
        # The refit leans on many points rather than on the few heaviest.
        weights = np.exp(np.minimum(log_weights - log_weights.max(), 0))
        weights = np.minimum(weights, np.sort(weights)[-max(len(weights) // 100, 1)])
        proposal = _fit(drawn, weights / weights.sum(), effort.components, random)
    if not np.isfinite(log_weights).any():
        return Sample(drawn, np.full(len(drawn), -math.log(len(drawn))), -math.inf, math.inf, 0.0, evals)
    total = float(np.logaddexp.reduce(log_weights))
    return Sample(
        drawn,
        log_weights - total,
        total - math.log(len(drawn)),
        pareto_k(log_weights),
        effective_size(log_weights),
        evals,
    )


def _joint(prior: Target, likelihood: Target, points: Array) -> Array:
    value = prior(points) + likelihood(points)
    return np.where(np.isnan(value) | (value == np.inf), -np.inf, value)


def _temper(
    prior: Target, likelihood: Target, points: Array, moves: int, random: np.random.Generator
) -> tuple[Array, int]:
    """Particles of the posterior by steps of the likelihood's power, each keeping half of the effective size."""
    count, dim = points.shape
    before, fit = prior(points), np.nan_to_num(likelihood(points), nan=-np.inf, posinf=-np.inf)
    power, evals, size = 0.0, count, 2.38 / math.sqrt(dim)
    while power < 1:
        if not np.isfinite(fit).any():
            return points, evals
        low, high = 0.0, 1 - power
        if effective_size(high * fit) < 0.5 * count:
            for _ in range(40):
                middle = (low + high) / 2
                low, high = (middle, high) if effective_size(middle * fit) > 0.5 * count else (low, middle)
            high = max(low, 1e-12)
        power = min(1.0, power + high)
        weights = np.exp(high * (fit - fit.max()))
        kept = resample(weights, count, random)
        points, before, fit = points[kept], before[kept], fit[kept]
        step = root(np.cov(points.T).reshape(dim, dim), 1e-9)
        accepted = 0.0
        for _ in range(moves):
            proposed = points + size * random.standard_normal(points.shape) @ step.T
            prior_there, fit_there = prior(proposed), np.nan_to_num(likelihood(proposed), nan=-np.inf, posinf=-np.inf)
            evals += count
            with np.errstate(invalid="ignore"):
                gain = prior_there - before + power * (fit_there - fit)
            better = np.log(random.random(count)) < np.where(np.isnan(gain), -np.inf, gain)
            points = np.where(better[:, None], proposed, points)
            before, fit = np.where(better, prior_there, before), np.where(better, fit_there, fit)
            accepted += better.mean() / moves
        size *= math.exp(accepted - 0.25)
    return points, evals


@dataclass(frozen=True)
class _Mixture:
    """Student-t components: weights [K], centres [K, d] and matrix roots of their scales [K, d, d]."""

    weights: Array
    centers: Array
    roots: Array

    def draw(self, count: int, random: np.random.Generator) -> Array:
        which = resample(self.weights, count, random)
        normal = random.standard_normal((count, self.centers.shape[1]))
        normal *= np.sqrt(NU / random.chisquare(NU, (count, 1)))
        return self.centers[which] + np.einsum("pij,pj->pi", self.roots[which], normal)

    def log_density(self, points: Array) -> Array:
        dim = points.shape[1]
        constant = math.lgamma((NU + dim) / 2) - math.lgamma(NU / 2) - dim / 2 * math.log(NU * math.pi)
        heights = []
        for weight, center, scale in zip(self.weights, self.centers, self.roots, strict=True):
            z = np.linalg.solve(scale, (points - center).T)
            height = constant - (NU + dim) / 2 * np.log1p((z**2).sum(0) / NU) - np.linalg.slogdet(scale)[1]
            heights.append(height + math.log(weight))
        return np.logaddexp.reduce(np.stack(heights))


def _fit(points: Array, weights: Array, components: int, random: np.random.Generator) -> _Mixture:
    """A mixture with the moments of weighted points, by clusters if it has several components."""
    groups = np.zeros(len(points), int) if components == 1 else _clusters(points, weights, components, random)
    shares, centers, roots = [], [], []
    for group in range(components):
        inside = groups == group
        share = weights[inside].sum()
        if share < 1e-3 or inside.sum() < 4 * points.shape[1]:
            continue
        own = weights[inside] / share
        center = own @ points[inside]
        away = points[inside] - center
        shares.append(share)
        centers.append(center)
        roots.append(root(1.1 * (away * own[:, None]).T @ away, 1e-9))
    if not shares:
        return _fit(points, weights, 1, random)
    return _Mixture(np.array(shares) / sum(shares), np.array(centers), np.array(roots))


def _clusters(points: Array, weights: Array, count: int, random: np.random.Generator) -> Array:
    """k-means on whitened points, seeded far apart."""
    sub = points[resample(weights, 1000, random)]
    deviation = np.maximum(sub.std(0), 1e-12)
    centers = sub[:1]
    for _ in range(count - 1):
        distance = (((sub[:, None] - centers) / deviation) ** 2).sum(-1).min(1)
        centers = np.concatenate([centers, sub[resample(distance + 1e-12, 1, random)]])
    for _ in range(20):
        nearest = (((sub[:, None] - centers) / deviation) ** 2).sum(-1).argmin(1)
        centers = np.stack([sub[nearest == k].mean(0) if (nearest == k).any() else centers[k] for k in range(count)])
    return (((points[:, None] - centers) / deviation) ** 2).sum(-1).argmin(1)
