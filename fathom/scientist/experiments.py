"""What experiments are expected to tell about a question: which theory holds, the parameters, an event, or a quantity.

One run with one outcome: quadrature (information.py), exact but for the draws. Several outcomes at once (a pair of runs, a
batch): nested Monte Carlo, bounded from both sides. With G the answers to the question, g the true one, θ its parameters and
L contrasting draws of each answer,

    I(G; y) = E log p(y | g) - E log p(y),    p(y) = sum_g P(g) p(y | g)

a mean over draws that leave θ out is too low in expectation by Jensen's inequality, one that counts θ among them too high
(Foster et al., arXiv 1911.00294, appendix; Rainforth et al., arXiv 1709.06181), so that

    lower = E log p_without(y | g) - E log p_with(y),    upper = E log p_with(y | g) - E log p_without(y).
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fathom.scientist import noise as noises
from fathom.scientist.answer import Abstain
from fathom.scientist.evaluation import Unsaid, degrees
from fathom.scientist.expression import Node, is_event, parse
from fathom.scientist.fitting import Fit, few, seed
from fathom.scientist.gaussian import resample
from fathom.scientist.information import Group, entropy, gain, gain_about_parameters
from fathom.scientist.posterior import Posterior
from fathom.scientist.predictive import quantiles

Array = np.ndarray
Values = dict[str, Any]
BINS, DRAWS, PARAMETER_DRAWS = 10, 256, 512
OUTER, CONTRASTS = 1000, 256
"""Outcomes that are imagined, and draws of each answer that they are contrasted with."""


@dataclass(frozen=True)
class Question:
    """A question as groups of draws: each draw's theory, its place there, its answer and its probability, all [A]."""

    fits: list[Fit]
    theory: Array
    draw: Array
    answer: Array
    p: Array
    parameters: bool = False
    """Whether it is about the parameters themselves; ``answer`` is then the theory."""

    @property
    def sizes(self) -> Array:
        """Probability of each answer [G]."""
        return np.bincount(self.answer, self.p)

    @property
    def remaining(self) -> float | None:
        """Entropy of the answers in nats; of continuous parameters none is defined."""
        return None if self.parameters else entropy(self.sizes)


def question(posterior: Posterior, about: str) -> Question:
    """``about``: theories, parameters, an event, or a quantity (in which tenth of its posterior it lies).

    Raises:
        Abstain: no theory says what the quantity is.
    """
    tree: Node | None = None if about in ("theories", "parameters") else parse(about)
    fits, theory, draw, values, p = [], [], [], [], []
    for fit, probability in zip(posterior.fits, posterior.probabilities, strict=True):
        if probability < 1e-6:
            continue
        lighter = few(fit, DRAWS)
        count = len(lighter.draws[1])
        try:
            value = lighter.value(tree) if tree is not None else np.zeros(count)
        except Unsaid:
            continue
        fits.append(lighter)
        theory.append(np.full(count, len(fits) - 1))
        draw.append(np.arange(count))
        values.append(value)
        p.append(np.full(count, probability / count))
    if not fits:
        raise Abstain("no_adequate_theory", "no theory that has any probability says what this is")
    shares, all_values, of = np.concatenate(p), np.concatenate(values), np.concatenate(theory)
    shares = shares / shares.sum()
    if tree is None:
        answer = of
    elif is_event(tree):
        answer = (all_values != 0).astype(int)
    else:
        edges = np.unique(quantiles(all_values, shares, [k / BINS for k in range(1, BINS)]))
        answer = np.searchsorted(edges, all_values)
    answer = np.unique(answer, return_inverse=True)[1]
    return Question(fits, of, np.concatenate(draw), answer, shares, about == "parameters")


def gains(posterior: Posterior, designs: list[Values], about: str) -> tuple[float | None, list[float]]:
    """What is not known about a question, and what one outcome at each design is expected to tell of it, in nats."""
    if about == "theories":
        return entropy(posterior.probabilities), _about_theories(posterior, designs)
    if about == "parameters":
        return None, _about_parameters(posterior, designs)
    asked = question(posterior, about)
    if len({(fit.theory.noise.family, degrees(fit.theory)) for fit in asked.fits}) > 1:
        imagined = Imagined(posterior, asked, designs)  # a group of the quadrature has one kind of noise
        return asked.remaining, [imagined.bounds([i]).middle for i in range(len(designs))]
    parts = [fit.components(designs) for fit in asked.fits]
    means, scales = (np.concatenate([part[k] for part in parts], 1) for k in (1, 2))
    kinds = [asked.answer == kind for kind in range(len(asked.sizes))]
    theory = asked.fits[0].theory
    return asked.remaining, [
        gain([Group(float(size), asked.p[inside] / size, means[i, inside], scales[i, inside], theory.noise, degrees(theory))
              for size, inside in zip(asked.sizes, kinds, strict=True)])
        for i in range(len(designs))
    ]  # fmt: skip


def _about_theories(posterior: Posterior, designs: list[Values]) -> list[float]:
    mixtures = [fit.components(designs, 24 if fit.linear is not None else 200) for fit in posterior.fits]
    result = []
    for i in range(len(designs)):
        groups = [
            Group(float(p), weights, means[i], scales[i], fit.theory.noise, degrees(fit.theory))
            for fit, p, (weights, means, scales) in zip(posterior.fits, posterior.probabilities, mixtures, strict=True)
        ]
        result.append(gain([group for group in groups if group.p > 1e-6]))
    return result


def _about_parameters(posterior: Posterior, designs: list[Values]) -> list[float]:
    """Each theory's own parameters, averaged over theories; exact where a theory is linear."""
    total = np.zeros(len(designs))
    for fit, p in zip(posterior.fits, posterior.probabilities, strict=True):
        if p < 1e-6:
            continue
        noise = fit.theory.noise
        exact = fit.linear is not None
        lighter = fit if exact else few(fit, PARAMETER_DRAWS)
        weights, means, scales = lighter.components(designs)
        for i in range(len(designs)):
            group = Group(1.0, weights, means[i], scales[i], noise, degrees(fit.theory))
            inner = fit.linear.scales if fit.linear is not None else None
            total[i] += p * gain_about_parameters(group, inner)
    return total.tolist()


@dataclass(frozen=True)
class Bounds:
    """Expected information of an experiment with several outcomes, in nats; ``error`` is the standard error of both ends."""

    lower: float
    upper: float
    error: float

    @property
    def middle(self) -> float:
        return (self.lower + self.upper) / 2


class Imagined:
    """Outcomes drawn once for a question, so that every experiment is judged by the same ones.

    Args:
        designs: All designs that experiments may hold; experiments name them by index.
    """

    def __init__(self, posterior: Posterior, asked: Question, designs: list[Values]) -> None:
        self.asked, self.designs, self.world = asked, designs, posterior.world
        random = seed(posterior.world, 11, len(designs))
        parts = [fit.components(designs) for fit in asked.fits]
        self.means, self.scales = (np.concatenate([part[k] for part in parts], 1) for k in (1, 2))
        self.truth = resample(asked.p, OUTER, random)
        random.shuffle(self.truth)
        kinds = [np.flatnonzero(asked.answer == kind) for kind in range(len(asked.sizes))]
        self.contrasts = [random.permutation(inside[resample(asked.p[inside], CONTRASTS, random)]) for inside in kinds]
        self.random = int(random.integers(2**62))

    def _outcomes(self, design: int, slot: int) -> Array:
        """One outcome of each imagined truth [OUTER]; the ``slot``-th outcome of any experiment has the same luck."""
        y = np.zeros(OUTER)
        for index, fit in enumerate(self.asked.fits):
            random = np.random.default_rng([self.random, slot])
            of = self.asked.theory[self.truth] == index
            means, scales = self.means[design, self.truth], self.scales[design, self.truth]
            y[of] = noises.draw(fit.theory.noise, random, means, scales, degrees(fit.theory))[of]
        return y

    def _heights(self, experiment: list[int], atoms: Array) -> Array:
        """Log density of each imagined outcome under atoms [L], or under each outcome's own [OUTER, 1]."""
        total = np.zeros((OUTER, atoms.shape[-1]))
        theory = self.asked.theory[atoms]
        alike = len({(fit.theory.noise.family, degrees(fit.theory)) for fit in self.asked.fits}) == 1
        for slot, design in enumerate(experiment):
            y = self._outcomes(design, slot)[:, None]
            means, scales = self.means[design, atoms], self.scales[design, atoms]
            for index, fit in enumerate(self.asked.fits[:1] if alike else self.asked.fits):
                of = True if alike else theory == index
                heights = noises.log_density(fit.theory.noise, y, means, scales, degrees(fit.theory))
                total += np.where(of, heights, 0.0)
        return total

    def bounds(self, experiment: list[int]) -> Bounds:
        """Of an experiment whose outcomes are at the designs with these indices, repeats allowed."""
        asked = self.asked
        own = self._heights(experiment, self.truth[:, None])[:, 0]
        sizes = np.log(asked.sizes)
        mine = asked.answer[self.truth]
        without, with_truth = [], []
        for kind, atoms in enumerate(self.contrasts):
            heights = self._heights(experiment, atoms)
            without.append(np.logaddexp.reduce(heights, 1) - math.log(CONTRASTS))
            first = np.where(mine == kind, own, heights[:, 0])
            rest = np.logaddexp.reduce(heights[:, 1:], 1)
            with_truth.append(np.logaddexp(first, rest) - math.log(CONTRASTS))
        low, high = np.stack(without, 1), np.stack(with_truth, 1)
        rows = np.arange(OUTER)
        if asked.parameters:
            lower, upper = own - high[rows, mine], own - low[rows, mine]
        else:
            lower = low[rows, mine] - np.logaddexp.reduce(high + sizes, 1)
            upper = high[rows, mine] - np.logaddexp.reduce(low + sizes, 1)
        error = max(float(each.std(ddof=1)) for each in (lower, upper)) / math.sqrt(OUTER)
        return Bounds(max(float(lower.mean()), 0.0), max(float(upper.mean()), 0.0), error)
