"""Whether a set of importance weights can be trusted: effective sample size and the Pareto shape k of its tail.

k is fitted to the largest weights as in Vehtari, Simpson, Gelman, Yao, Gabry (arXiv 1507.02646), with the estimator of
Zhang and Stephens (2009). Above 0.7 the mean of the weights converges too slowly to be reported.
"""

import math

import numpy as np

Array = np.ndarray


def effective_size(log_weights: Array) -> float:
    """(sum w)^2 / sum w^2."""
    weights = np.exp(log_weights - log_weights.max())
    return float(weights.sum() ** 2 / (weights**2).sum())


def pareto_k(log_weights: Array) -> float:
    """The Pareto shape of the upper tail of ``log_weights``; inf if there is too little tail, -inf if it is flat."""
    count = len(log_weights)
    tail = int(min(0.2 * count, 3 * math.sqrt(count)))
    if tail < 5:
        return math.inf
    ordered = np.sort(log_weights)
    if not np.isfinite(ordered[-tail - 1]):
        return math.inf
    cut = np.exp(ordered[-tail - 1] - ordered[-1])
    excess = np.exp(ordered[-tail:] - ordered[-1]) - cut
    if excess[-1] <= 1e-12:
        return -math.inf
    excess = np.maximum(excess, 1e-300)
    grid = 30 + int(math.sqrt(tail))
    quartile = excess[int(tail / 4 + 0.5) - 1]
    theta = 1 / excess[-1] + (1 - np.sqrt(grid / (np.arange(1, grid + 1) - 0.5))) / (3 * quartile)
    shape = np.log1p(-theta[:, None] * excess).mean(1)
    with np.errstate(all="ignore"):
        profile = tail * (np.log(-theta / shape) - shape - 1)
    profile = np.where(np.isfinite(profile), profile, -np.inf)
    weights = np.exp(profile - profile.max())
    best = float((theta * weights).sum() / weights.sum())
    k = float(np.log1p(-best * excess).mean())
    return (tail * k + 10 * 0.5) / (tail + 10)  # a weak pull to 1/2, as the paper advises for short tails
