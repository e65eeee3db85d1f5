"""Theories that are linear with normal priors: exact given the noise scale, which is integrated on a grid that refines itself.

    y = o + X w + e,   e_i ~ N(0, s^2 + v_i),   w_j ~ N(m_j, d_j^2)   (d_j may be a multiple of s),   s ~ its prior

Given s the evidence and the posterior of w are Gaussian algebra; p(s | y) is one-dimensional. With d_j = k_j s and
``root_inverse_gamma`` this is the conjugate normal-inverse-gamma model.
"""

from dataclasses import dataclass

import numpy as np

from fathom.scientist.priors import Prior

Array = np.ndarray
GRID = 129


@dataclass(frozen=True)
class Linear:
    """A linear theory's numbers: X [n, p], r = y - o [n], v [n] and the priors of w and s."""

    features: Array
    residual: Array
    variance: Array
    means: Array
    deviations: Array
    relative: Array
    """Whether a prior's deviation is a multiple of s [p]."""
    scale: Prior | float
    """The prior of s, or s itself."""

    def given(self, u: Array) -> tuple[Array, Array, Array]:
        """At each log s [S]: log evidence [S], posterior mean [S, p] and covariance [S, p, p] of w."""
        s = np.exp(u)
        prior_variance = (self.deviations * np.where(self.relative, s[:, None], 1.0)) ** 2
        noise = s[:, None] ** 2 + self.variance
        if not self.variance.any():
            gram = (self.features.T @ self.features)[None] / s[:, None, None] ** 2
            right = (self.features.T @ self.residual)[None] / s[:, None] ** 2
        else:
            gram = np.einsum("sn,np,nq->spq", 1 / noise, self.features, self.features, optimize=True)
            right = (self.residual / noise) @ self.features
        diagonal = np.arange(len(self.means))
        # Scaled by the prior's deviations, the precision is the identity plus what the data add: it stays well conditioned.
        root = np.sqrt(prior_variance)
        precision = gram * root[:, :, None] * root[:, None, :]
        precision[:, diagonal, diagonal] += 1
        right = (right - np.einsum("spq,q->sp", gram, self.means)) * root
        inverse = np.linalg.inv(precision)
        step = np.einsum("spq,sq->sp", inverse, right)
        mean = self.means + step * root
        covariance = inverse * root[:, :, None] * root[:, None, :]
        error = self.residual - mean @ self.features.T
        quadratic = (error**2 / noise).sum(-1) + (step**2).sum(-1)
        _, determinant = np.linalg.slogdet(precision)
        evidence = -0.5 * (quadratic + determinant + np.log(2 * np.pi * noise).sum(-1))
        return evidence, mean, covariance


@dataclass(frozen=True)
class LinearPosterior:
    log_evidence: float
    scales: Array
    """s at the nodes of the grid [S]."""
    weights: Array
    """p(s | y) over the nodes [S]."""
    means: Array
    covariances: Array

    def draw(self, count: int, random: np.random.Generator) -> tuple[Array, Array]:
        """``count`` equally weighted draws: w [count, p] and s [count]."""
        node = resample(self.weights, count, random)
        normal = random.standard_normal((count, self.means.shape[1]))
        used, which = np.unique(node, return_inverse=True)
        roots = root(self.covariances[used])
        return self.means[node] + np.einsum("pij,pj->pi", roots[which], normal), self.scales[node]

    def predictive(self, features: Array) -> tuple[Array, Array, Array]:
        """Weights [S], means [m, S] and standard deviations [m, S] of outcomes at ``features`` [m, p]."""
        mean = features @ self.means.T
        spread = np.einsum("mp,spq,mq->ms", features, self.covariances, features, optimize=True)
        return self.weights, mean, np.sqrt(np.maximum(spread, 0) + self.scales**2)


def root(covariance: Array, least: float = 0.0) -> Array:
    """R [..., p, p] with R R^T the covariance; eigenvalues of its correlation below ``least`` are raised to that."""
    scale = np.sqrt(np.maximum(np.diagonal(covariance, axis1=-2, axis2=-1), 1e-300))
    correlation = covariance / scale[..., :, None] / scale[..., None, :]
    values, vectors = np.linalg.eigh((correlation + np.swapaxes(correlation, -1, -2)) / 2)
    return scale[..., :, None] * (vectors * np.sqrt(np.maximum(values, least))[..., None, :])


def resample(weights: Array, count: int, random: np.random.Generator) -> Array:
    """Systematic resampling: ``count`` indices, each as often as its weight says, to within one."""
    points = (random.random() + np.arange(count)) / count
    return np.minimum(np.searchsorted(np.cumsum(weights), points * weights.sum()), len(weights) - 1)


def mixed(parts: list[LinearPosterior]) -> LinearPosterior:
    """One posterior of several equally probable priors: a grid of all their nodes."""
    if len(parts) == 1:
        return parts[0]
    evidences = np.array([part.log_evidence for part in parts])
    total = np.logaddexp.reduce(evidences)
    shares = np.exp(evidences - total)
    weights = np.concatenate([share * part.weights for share, part in zip(shares, parts, strict=True)])
    kept = weights > 1e-12
    return LinearPosterior(
        float(total - np.log(len(parts))), np.concatenate([part.scales for part in parts])[kept],
        weights[kept] / weights[kept].sum(), np.concatenate([part.means for part in parts])[kept],
        np.concatenate([part.covariances for part in parts])[kept],
    )  # fmt: skip


def solve(problem: Linear) -> LinearPosterior:
    """Evidence and posterior, with the scale integrated by the trapezoid rule over log s."""
    if isinstance(problem.scale, float):
        evidence, means, covariances = problem.given(np.log(np.array([problem.scale])))
        return LinearPosterior(float(evidence[0]), np.array([problem.scale]), np.ones(1), means, covariances)
    u = np.linspace(-60, 40, 2001)
    likely = u[problem.scale.log_density(u) > problem.scale.log_density(u).max() - 40]
    # Below a millionth of what the parameters can explain, the algebra has no digits left.
    signal = np.sqrt(((problem.features * problem.deviations) ** 2)[:, ~problem.relative].sum(1).max(initial=0))
    low, high = likely[0], likely[-1]
    if signal > 0:
        low = min(max(low, np.log(1e-6 * signal)), high - 1e-3)
    for _ in range(4):
        u = np.linspace(low, high, GRID)
        evidence, means, covariances = problem.given(u)
        height = evidence + problem.scale.log_density(u)
        height = np.where(np.isfinite(height), height, -np.inf)
        inside = np.flatnonzero(height > height.max() - 32)
        if len(inside) > 0.6 * len(u):
            break
        low, high = u[max(inside[0] - 1, 0)], u[min(inside[-1] + 1, len(u) - 1)]
    relative = np.exp(height - height.max())
    weights = relative / relative.sum()
    # The ends are 32 nats down, so the trapezoid rule is the plain sum.
    total = height.max() + np.log(relative.sum() * (u[1] - u[0]))
    kept = weights > 1e-12
    return LinearPosterior(
        float(total), np.exp(u[kept]), weights[kept] / weights[kept].sum(), means[kept], covariances[kept]
    )
