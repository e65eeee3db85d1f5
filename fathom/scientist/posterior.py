"""What the evidence says of all theories together, each tried harder until its numbers pass the gates.

A sampled theory must pass three gates (fitting.py) or is tried harder; one that fails them all is marked, and questions that
lean on it are not answered.
"""

import math
from dataclasses import dataclass

import numpy as np

from fathom.errors import UserError
from fathom.scientist.fitting import Fit, fit
from fathom.scientist.sampler import LADDER
from fathom.scientist.world import World

Array = np.ndarray
MATTERS = 1e-3
"""The posterior probability from which a theory must pass the gates."""


@dataclass(frozen=True)
class Budget:
    """What one posterior may cost, in evaluations of a theory's likelihood: counted, so that no answer depends on the clock."""

    evals: int = 4_000_000


@dataclass(frozen=True)
class Posterior:
    """All theories of a world after its evidence."""

    world: World
    fits: tuple[Fit, ...]
    probabilities: Array
    evals: int

    @property
    def untrusted(self) -> list[str]:
        """Theories that matter and whose numbers did not pass the gates."""
        return [
            each.theory.id for each, p in zip(self.fits, self.probabilities, strict=True)
            if p > MATTERS and not each.report.trusted
        ]  # fmt: skip

    @property
    def log_evidence(self) -> float:
        """Of the whole world."""
        priors = np.log([each.theory.prior for each in self.fits])
        return float(np.logaddexp.reduce(priors + [each.log_evidence for each in self.fits]))


def weigh(fits: list[Fit]) -> Array:
    """Posterior probabilities of theories.

    Raises:
        UserError: no theory gives the evidence any probability.
    """
    heights = np.log([each.theory.prior for each in fits]) + np.array([each.log_evidence for each in fits])
    if not np.isfinite(heights.max()):
        raise UserError(
            "no theory gives this evidence any probability: look for a wrong value or a bound that excludes it"
        )
    weights = np.exp(heights - heights.max())
    return weights / weights.sum()


def infer(world: World, budget: Budget | None = None) -> Posterior:
    """The posterior of a world, escalating where a gate is not passed and the budget allows."""
    budget = budget or Budget()
    fits = [fit(world, index, LADDER[0]) for index in range(len(world.theories))]
    spent = sum(each.report.evals for each in fits)
    for effort in LADDER[1:]:
        probabilities = weigh(fits)
        # An evidence that is not trusted may be far off, so a margin of e^10 decides what could matter.
        weak = [
            i for i, each in enumerate(fits) if not each.report.trusted and probabilities[i] > MATTERS * math.exp(-10)
        ]
        for index in weak:
            expected = 2 * (effort.draws * 3 + effort.particles * effort.moves * 30)
            if spent + expected <= budget.evals:
                fits[index] = fit(world, index, effort)
                spent += fits[index].report.evals
    return Posterior(world, tuple(fits), weigh(fits), spent)
