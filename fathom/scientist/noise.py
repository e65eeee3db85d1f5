"""How an outcome scatters about a theory's mean: densities, distribution functions and draws.

normal(s)          a real outcome, standard deviation s (of reported evidence: the reporter's in quadrature)
student_t(nu, s)   the same with heavy tails
bernoulli()        0 or 1; the mean is the probability of 1
binomial(n)        a count out of n, a design or a number; the mean is the probability of one
poisson()          a count; the mean is its rate
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fathom.scientist.expression import Node
from fathom.scientist.priors import normal_cdf, student_t_cdf, student_t_log_density

Array = np.ndarray
FAMILIES = {"normal": 1, "student_t": 2, "bernoulli": 0, "binomial": 1, "poisson": 0}
"""Families and how many arguments each takes."""
_lgamma = np.frompyfunc(math.lgamma, 1, 1)


def log_gamma(x: Array) -> Array:
    return np.asarray(_lgamma(np.asarray(x, float)), dtype=float)


@dataclass(frozen=True)
class Noise:
    family: str
    args: tuple[Node, ...]

    @property
    def discrete(self) -> bool:
        return self.family in ("bernoulli", "binomial", "poisson")

    @property
    def spread(self) -> Node | None:
        """The argument that stands for the scale (of a binomial: the number of trials)."""
        return self.args[-1] if self.args else None


def log_density(noise: Noise, y: Array, mean: Array, scale: Array, nu: float = 0.0) -> Array:
    """Log probability (density) of ``y``; -inf where the mean or scale is no parameter of the family."""
    with np.errstate(all="ignore"):
        match noise.family:
            case "normal":
                value = -0.5 * ((y - mean) / scale) ** 2 - np.log(scale) - 0.5 * math.log(2 * math.pi)
            case "student_t":
                value = student_t_log_density((y - mean) / scale, nu) - np.log(scale)
            case "poisson":
                value = y * np.log(mean) - mean - log_gamma(np.asarray(y) + 1)
                value = np.where((mean == 0) & (y == 0), 0.0, value)
            case _:
                rest = np.maximum(np.asarray(scale) - y, 0)
                choose = log_gamma(np.asarray(scale) + 1) - log_gamma(np.asarray(y) + 1) - log_gamma(rest + 1)
                yes = np.where(np.asarray(y) == 0, 0.0, y * np.log(mean))
                no = np.where(np.asarray(y) == scale, 0.0, (scale - y) * np.log1p(-mean))
                value = np.where((mean >= 0) & (mean <= 1) & (y <= scale), choose + yes + no, -np.inf)
    return np.where(np.isnan(value) | (value == np.inf), -np.inf, value)


def cdf(noise: Noise, y: Any, mean: Array, scale: Array, nu: float = 0.0) -> Array:
    """P(outcome <= y); of counts for one y, of real outcomes for an array as well."""
    if noise.family == "normal":
        return normal_cdf((y - mean) / scale)
    if noise.family == "student_t":
        return student_t_cdf((y - mean) / scale, nu)
    if y < 0:
        return np.zeros_like(np.asarray(mean, float))
    counts = np.arange(math.floor(y) + 1.0)
    if noise.family != "poisson":
        counts = counts[counts <= np.max(scale)]
    return np.exp(log_density(noise, counts, np.asarray(mean)[..., None], np.asarray(scale)[..., None])).sum(-1)


def draw(noise: Noise, random: np.random.Generator, mean: Array, scale: Array, nu: float = 0.0) -> Array:
    match noise.family:
        case "normal":
            return random.normal(mean, scale)
        case "student_t":
            return mean + scale * random.standard_t(nu, np.shape(mean))
        case "poisson":
            return random.poisson(mean).astype(float)
    return random.binomial(np.asarray(scale).astype(int), mean).astype(float)
