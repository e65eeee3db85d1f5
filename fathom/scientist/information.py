"""Expected information gain of an experiment with one outcome, by quadrature over that outcome.

    I = sum_k p_k ∫ f_k(y) log(f_k(y) / f(y)) dy,    f = sum_k p_k f_k

p_k are the answers to a question (which theory is true, whether an event holds, in which tenth a quantity lies), and f_k what
each answer predicts: a mixture of noise kernels. The integrand summed over k is nowhere negative and its error is relative,
so a small gain is found as accurately as a large one; there is no nested Monte Carlo and no bias of one.
"""

import math
from dataclasses import dataclass

import numpy as np

from fathom.scientist import noise as noises
from fathom.scientist.noise import Noise

Array = np.ndarray


@dataclass(frozen=True)
class Group:
    """What one answer predicts: its probability, and a mixture of the noise's kernels."""

    p: float
    weights: Array
    means: Array
    scales: Array
    noise: Noise
    nu: float = 0.0

    def log_density(self, y: Array) -> Array:
        if self.noise.family == "normal":  # the many calls of a long list of designs end here
            z = (y[:, None] - self.means) / self.scales
            density = np.exp(-0.5 * z * z) @ (self.weights / (self.scales * math.sqrt(2 * math.pi)))
        else:
            kernel = noises.log_density(self.noise, y[:, None], self.means, self.scales, self.nu)
            density = np.exp(kernel) @ self.weights
        with np.errstate(divide="ignore"):
            return np.log(density)

    def moments(self) -> tuple[float, float]:
        mean = float(self.weights @ self.means)
        return mean, math.sqrt(max(float(self.weights @ (self.scales**2 + (self.means - mean) ** 2)), 1e-300))


def entropy(probabilities: Array) -> float:
    """In nats."""
    p = np.asarray(probabilities, float)
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def count_limit(mixtures: list[tuple[Noise, Array, Array]]) -> int:
    """A count that mixtures of noise, means and scales hardly exceed; 20,000 at most."""
    tops = [
        float((means + 10 * np.sqrt(means) + 20).max()) if noise.family == "poisson" else float(np.max(scales))
        for noise, means, scales in mixtures
    ]
    return math.floor(min(max(tops), 20_000))


def grid(groups: list[Group]) -> tuple[Array, Array]:
    """Points of the outcome and their integration weights, dense where any group has its mass."""
    first = groups[0].noise
    if first.discrete:
        points = np.arange(count_limit([(g.noise, g.means, g.scales) for g in groups]) + 1.0)
        return points, np.ones_like(points)
    reach = 60.0 if any(g.noise.family == "student_t" for g in groups) else 8.5
    count = 241 if reach > 10 else 181
    steps = np.sinh(np.linspace(-3, 3, count)) * reach / math.sinh(3)
    sizes = [group.moments() for group in groups]
    if len(groups) > 4:  # answers that lie side by side, such as the tenths of a quantity, share one grid
        total = sum(group.p for group in groups)
        center = sum(group.p * middle for group, (middle, _) in zip(groups, sizes, strict=True)) / total
        inner = min(size for _, size in sizes)
        outer = math.sqrt(
            sum(g.p * (s**2 + (m - center) ** 2) for g, (m, s) in zip(groups, sizes, strict=True)) / total
        )
        sizes = [(center, outer)] if outer < 4 * inner else sizes
    points = np.concatenate([center + size * steps for center, size in sizes])
    points = np.unique(points)
    gaps = np.diff(points)
    weights = np.zeros_like(points)
    weights[:-1] += gaps / 2
    weights[1:] += gaps / 2
    return points, weights


def gain(groups: list[Group]) -> float:
    """Expected information, in nats, of one outcome about which group is true."""
    groups = [group for group in groups if group.p > 1e-12]
    if len(groups) < 2:
        return 0.0
    y, weights = grid(groups)
    shares = np.log([group.p for group in groups])
    heights = np.stack([group.log_density(y) for group in groups]) + shares[:, None]
    top = heights.max(0)
    top = np.where(np.isfinite(top), top, 0.0)
    relative = np.exp(heights - top)
    whole = np.log(np.maximum(relative.sum(0), 1e-300)) + top
    with np.errstate(invalid="ignore"):
        each = np.where(np.isfinite(heights), np.exp(heights) * (heights - shares[:, None] - whole), 0.0)
    return max(float((each.sum(0) * weights).sum()), 0.0)


def gain_about_parameters(group: Group, noise_scales: Array | None = None) -> float:
    """Expected information about a theory's own parameters: entropy of what it predicts less that of its noise.

    Draws stand for the posterior, and a density averaged over N draws is too uneven: its entropy is too low by
    half the sum of Var(f) / f, Var(f) = (mean of k^2 - f^2) / N with k the kernels, which is added again.

    Args:
        noise_scales: The noise scale of each component [K], if the components are not kernels of the noise but exact
            predictions given each noise scale; there is then nothing to correct.
    """
    means, scales = group.means, group.scales
    if group.noise.discrete:
        y, weights = grid([group])
        kernels = noises.log_density(group.noise, y[:, None], means, scales, group.nu)
        inner = (
            -(np.where(np.isfinite(kernels), np.exp(kernels) * kernels, 0.0) * weights[:, None]).sum(0) @ group.weights
        )
    else:
        low, high = float((means - 9 * scales).min()), float((means + 9 * scales).max())
        step = float(scales.min()) / 3
        count = int(min(max((high - low) / step, 400), 4000))
        y = np.linspace(low, high, count)
        weights = np.full(count, y[1] - y[0])
        unit = 0.5 * math.log(2 * math.pi * math.e)
        if group.noise.family == "student_t":
            z = np.linspace(-400, 400, 200_001)
            log = noises.log_density(group.noise, z, np.array(0.0), np.array(1.0), group.nu)
            unit = float(-(np.exp(log) * log).sum() * (z[1] - z[0]))
        inner = unit + float(np.log(scales if noise_scales is None else noise_scales) @ group.weights)
        kernels = noises.log_density(group.noise, y[:, None], means, scales, group.nu)
    each = np.exp(kernels)
    density = each @ group.weights
    seen = density > 0
    outer = -float((density[seen] * np.log(density[seen]) * weights[seen]).sum())
    if noise_scales is None:
        uneven = (each[seen] ** 2 @ group.weights**2 - density[seen] ** 2 * (group.weights**2).sum()) / density[seen]
        outer += 0.5 * float((uneven * weights[seen]).sum())
    return max(outer - inner, 0.0)
