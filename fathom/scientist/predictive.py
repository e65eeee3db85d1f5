"""What a posterior predicts: quantiles and moments of mixtures over theories, parameters and noise; scores of held-out rows."""

import math
from typing import Any

import numpy as np

from fathom.errors import UserError
from fathom.scientist import noise as noises
from fathom.scientist.evaluation import degrees
from fathom.scientist.fitting import Fit
from fathom.scientist.information import count_limit
from fathom.scientist.posterior import Posterior

Array = np.ndarray
Components = tuple[Array, Array, Array]
"""Weights [K], means [K] and scales [K] of one design under one theory."""
LEVELS = (0.5, 0.8, 0.9, 0.95)


def quantiles(values: Array, weights: Array, levels: list[float]) -> list[float]:
    """Of weighted draws."""
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weights[order])
    at = np.searchsorted(total, np.array(levels) * total[-1])
    return [float(values[order[min(i, len(values) - 1)]]) for i in at]


def moments(fit: Fit, means: Array, scales: Array) -> tuple[Array, Array]:
    """Mean and variance of each component's outcome; the variance of heavy tails may be infinite."""
    match fit.theory.noise.family:
        case "normal":
            return means, scales**2
        case "student_t":
            nu = degrees(fit.theory)
            return means, scales**2 * (nu / (nu - 2) if nu > 2 else math.inf)
        case "poisson":
            return means, means
    return means * scales, means * scales * (1 - means)


def below(posterior: Posterior, mixture: list[Components], y: float) -> float:
    """P(outcome <= y)."""
    total = 0.0
    for fit, p, (weights, means, scales) in zip(posterior.fits, posterior.probabilities, mixture, strict=True):
        if p > 1e-9:
            total += float(p) * float(weights @ noises.cdf(fit.theory.noise, y, means, scales, degrees(fit.theory)))
    return total


def outcome_quantiles(posterior: Posterior, mixture: list[Components], levels: list[float]) -> list[float]:
    """By bisection on the distribution function; of a count, the least value whose probability reaches the level."""
    reach = [(fit, c) for fit, p, c in zip(posterior.fits, posterior.probabilities, mixture, strict=True) if p > 1e-9]
    if reach[0][0].theory.noise.discrete:
        counts = np.arange(count_limit([(fit.theory.noise, m, s) for fit, (_, m, s) in reach]) + 1.0)
        mass = np.zeros(len(counts))
        for fit, p, (weights, means, scales) in zip(posterior.fits, posterior.probabilities, mixture, strict=True):
            if p > 1e-9:
                mass += float(p) * (
                    np.exp(noises.log_density(fit.theory.noise, counts[:, None], means, scales)) @ weights
                )
        return [float(x) for x in np.minimum(np.searchsorted(np.cumsum(mass), levels), len(counts) - 1)]
    ends: list[float] = []
    for fit, (_, means, scales) in reach:
        centers, variances = moments(fit, means, scales)
        wide = np.where(np.isfinite(variances), np.sqrt(np.maximum(variances, 0)), scales * 10)
        ends += [float((centers - 40 * wide).min()), float((centers + 40 * wide).max())]
    result = []
    for level in levels:
        low, high = min(ends), max(ends)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if below(posterior, mixture, middle) < level else (low, middle)
        result.append(high)
    return result


def score_rows(posterior: Posterior, designs: list[dict[str, Any]], outcomes: Array) -> dict[str, Any]:
    """Mean log score, mean CRPS and the coverage of central intervals over rows that the world has not seen."""
    if posterior.fits[0].theory.noise.discrete:
        raise UserError("scores are for real outcomes: this world's are counts")
    parts = [fit.components(designs, 200) for fit in posterior.fits]
    rows = []
    for i, y in enumerate(outcomes):
        mixture = [(weights, means[i], scales[i]) for weights, means, scales in parts]
        density = sum(
            float(p) * float(w @ np.exp(noises.log_density(fit.theory.noise, np.asarray(y), m, s, degrees(fit.theory))))
            for fit, p, (w, m, s) in zip(posterior.fits, posterior.probabilities, mixture, strict=True)
        )
        rows.append({
            "log_score": math.log(density) if density > 0 else -math.inf, "pit": below(posterior, mixture, float(y)),
            "crps": crps(posterior, mixture, float(y)), "outside_the_data": posterior.world.outside(designs[i]),
        })  # fmt: skip
    pit = np.array([row["pit"] for row in rows])
    return {
        "log_score": float(np.mean([row["log_score"] for row in rows])), "crps": float(np.mean([row["crps"] for row in rows])),
        "coverage": {f"{level:g}": float((np.abs(pit - 0.5) <= level / 2).mean()) for level in LEVELS}, "rows": rows,
    }  # fmt: skip


def crps(posterior: Posterior, mixture: list[Components], y: float) -> float:
    """∫ (F(x) - 1[x >= y])^2 dx over the range that holds the mixture and y."""
    levels = (np.arange(64) + 0.5) / 64
    spread = outcome_quantiles(posterior, mixture, [1e-6, 0.5, 1 - 1e-6])
    middle = outcome_quantiles(posterior, mixture, [0.25, 0.75])
    width = max(middle[1] - middle[0], 1e-300)
    inner = spread[1] + width * np.tan((levels - 0.5) * math.pi * 0.98)
    points = np.unique(np.concatenate([inner, [y, spread[0], spread[2]]]))
    points = points[(points >= min(spread[0], y)) & (points <= max(spread[2], y))]
    values = np.array([below(posterior, mixture, float(x)) for x in points])
    after = points[:-1] >= y
    left, right = values[:-1] - after, values[1:] - after
    # Between two points F is nearly a straight line: integrate its square exactly.
    return float(((left * left + left * right + right * right) / 3 * np.diff(points)).sum())
