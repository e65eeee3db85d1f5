"""Whether the rows look like draws from the named theories: each row predicted from all the others, and a bet against that.

If a named theory holds, the normal scores z of the rows (each left out in turn) are about standard normal. The bet pays the
mean over alternatives of f(z) / prod normal(z_i): heavier tails; noise that is larger or smaller than stated, or changes
along a design; errors that rows near each other share, as they do where a curve is missed. Were the scores independent
draws, its expected pay-off would be 1, and by Markov's inequality it would reach 1/δ with probability δ at most; they are
nearly so, and false alarms are measured (benchmarks/scientist_calibration.py identity).
"""

import math
from dataclasses import replace

import numpy as np

from fathom.scientist import noise as noises
from fathom.scientist.evaluation import degrees, features_of, log_rows
from fathom.scientist.fitting import Fit, few
from fathom.scientist.posterior import Posterior
from fathom.scientist.priors import normal_cdf, student_t_log_density
from fathom.scientist.world import World

Array = np.ndarray
LEAST_ROWS, MOST_ROWS, LARGEST_SCORE, DRAWS = 6, 300, 8.0, 4000
"""A world of more rows is judged by so many of them, evenly chosen."""


def left_out(fit: Fit, world: World) -> tuple[Array, Array]:
    """Of each row of ``world`` under one theory fitted to all others: P(outcome <= row) [n] and the row's log density [n].

    Args:
        world: The fit's own, or some of its rows.
    """
    if fit.linear is not None:
        posterior = fit.linear
        offset, features = features_of(fit.theory, world.data, len(world.y))
        noise = posterior.scales**2 + world.extra[:, None] ** 2
        spread = np.einsum("np,spq,nq->ns", features, posterior.covariances, features, optimize=True)
        free = np.maximum(1 - spread / noise, 1e-12)
        residual = (world.y - offset)[:, None] - features @ posterior.means.T
        z = residual / np.sqrt(noise * free)
        log_density = -0.5 * z**2 - 0.5 * np.log(2 * math.pi * noise / free)
        heights = np.log(posterior.weights) - log_density
        total = np.logaddexp.reduce(heights, 1)
        return (np.exp(heights - total[:, None]) * normal_cdf(z)).sum(1), -total
    lighter = replace(few(fit, DRAWS), edge=None)
    params, weights = lighter.draws
    heights = np.log(weights)[:, None] - log_rows(world, fit.theory, params)
    total = np.logaddexp.reduce(heights, 0)
    rows = [{name: each[i] for name, each in world.data.items()} for i in range(len(world.y))]
    _, means, scales = lighter.components(rows)
    below = noises.cdf(
        fit.theory.noise, world.y[:, None], means, np.sqrt(scales**2 + world.extra[:, None] ** 2),
        degrees(fit.theory),
    )  # fmt: skip
    return (np.exp(heights - total).T * below).sum(1), -total


def scores(posterior: Posterior, world: World) -> Array:
    """Normal score of each row of ``world`` under the named theories fitted to all others [n]; empty for counts and few rows."""
    if len(world.y) < LEAST_ROWS or posterior.fits[0].theory.noise.discrete:
        return np.zeros(0)
    below, shares = [], []
    for fit, p in zip(posterior.fits[:-1], posterior.probabilities[:-1], strict=True):
        if p > 1e-4 * posterior.probabilities[:-1].max():
            at, log_density = left_out(fit, world)
            below.append(at)
            shares.append(math.log(p) - log_density)  # the theory's probability without the row
    heights = np.stack(shares)
    weights = np.exp(heights - np.logaddexp.reduce(heights, 0))
    u = np.clip((weights * np.stack(below)).sum(0), 1e-15, 1 - 1e-15)
    return np.clip(_normal_quantile(u), -LARGEST_SCORE, LARGEST_SCORE)


def surprise(posterior: Posterior) -> float:
    """What the bet against the named theories pays: at most about 1 if one holds, large if the rows scatter as none says."""
    world = posterior.world
    if len(world.y) > MOST_ROWS:
        world = world.keeping(np.linspace(0, len(world.y) - 1, MOST_ROWS).astype(int))
    z = scores(posterior, world)
    if not len(z):
        return 1.0
    normal = -0.5 * z**2 - 0.5 * math.log(2 * math.pi)
    tails = [student_t_log_density(z / s, 2.0) - math.log(s) for s in (0.3, 0.6, 1.0)]
    tails.append(np.logaddexp(math.log(0.9) + _normal(z, 0.4), math.log(0.1) + _normal(z, 3.0)))
    sizes = [_normal(z, s) for s in (0.5, 1.6)]
    places = [
        (place - place.mean()) / max(float(place.std()), 1e-12)
        for name, design in world.designs.items() if not design.levels
        for place in [design.position(world.data[name])]
    ]  # fmt: skip
    for place in places:
        for tilt in (-0.8, 0.8):
            s = np.exp(tilt * place) / math.sqrt(float(np.exp(2 * tilt * place).mean()))
            sizes.append(_normal(z, s))
    pays = [float((bet - normal).sum()) for bet in (*tails, *sizes)]
    pays += [_together(z, kernel) for kernel in _kernels(world, places)]
    return float(np.exp(min(np.logaddexp.reduce(pays) - math.log(len(pays)), 300.0)))


def _normal(z: Array, s: Array | float) -> Array:
    return np.asarray(-0.5 * (z / s) ** 2 - 0.5 * math.log(2 * math.pi) - np.log(s))


def _kernels(world: World, places: list[Array]) -> list[Array]:
    """Which rows may share an error: neighbours along each design, of any level and of the same one."""
    same = np.ones((len(world.y), len(world.y)))
    for name, design in world.designs.items():
        if design.levels:
            same = same * (world.data[name][:, None] == world.data[name][None])
    blocks = [np.ones_like(same)] if same.all() else [np.ones_like(same), same]
    return [
        np.exp(-0.5 * ((place[:, None] - place[None]) / length) ** 2) * block
        for place in places for length in (0.05, 0.3, 0.8) for block in blocks
    ]  # fmt: skip


def _together(z: Array, kernel: Array) -> float:
    """The log pay-off of betting that errors are correlated as ``kernel`` says, by half or by nearly all."""
    found = []
    for share in (0.5, 0.95):
        correlation = share * kernel + (1 - share) * np.eye(len(z))
        _, size = np.linalg.slogdet(correlation)
        found.append(-0.5 * float(z @ np.linalg.solve(correlation, z) - z @ z + size))
    return float(np.logaddexp.reduce(found) - math.log(2))


def _normal_quantile(u: Array) -> Array:
    from statistics import NormalDist

    inverse = NormalDist().inv_cdf
    return np.array([inverse(float(each)) for each in u])
