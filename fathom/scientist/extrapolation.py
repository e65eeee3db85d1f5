"""How far a law may stray beyond its rows: a bias that grows with the root of the distance, its size learned from the past.

    y = law(design) + b sqrt(x) + noise,   b ~ N(0, rate^2),   x = decades to the nearest row where the budget is beyond all rows

A law that fits everywhere inside is still over-confident outside. Its own past tells by how much: at some origins it is fitted
to the smaller budgets and asked for the larger ones that are known, and how probable those were under a rate is its
likelihood. Outcomes near each other share their bias, so they count as the fewer that they are worth; origins overlap, so
each counts half.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from fathom.scientist import noise as noises
from fathom.scientist.evaluation import columns, degrees
from fathom.scientist.expression import Node, evaluate, names
from fathom.scientist.world import World

if TYPE_CHECKING:
    from fathom.scientist.fitting import Fit

Array = np.ndarray
ORIGINS = (0.4, 0.55, 0.7)
"""Shares of the distinct budgets that are fitted."""
OVERLAP, MIN_ROWS, REACH = 0.5, 8, 0.25
"""The weight of an origin, the least rows it fits, and the decades over which a bias is shared."""
TYPICAL, FACTOR, RATES, DRAWS = 0.015, 1.0, 41, 100
"""Before its own past is seen, a rate is lognormal about 0.015 of the logarithm of the loss per root decade, with a factor of e
either way: set by rehearsals inside the fitted rows of public sets (benchmarks/scientist_extrapolation.py --rehearse), never
by held-out ones. A world of other outcomes gives `per_decade`."""


@dataclass(frozen=True)
class Edge:
    """What a theory says beyond its rows."""

    world: World
    budget: Node
    rate: float | None
    """Of the bias per root decade; learned from the past if None."""
    refit: "Callable[[World], Fit]"
    """The same theory after fewer rows."""

    def _budgets(self, table: dict[str, Array], count: int) -> Array:
        return np.broadcast_to(np.log10(np.asarray(evaluate(self.budget, table), float)), (count,))

    def _places(self, table: dict[str, Array]) -> Array:
        """Decades along every design of the budget [m, k]."""
        return np.stack([np.log10(np.asarray(table[name], float)) for name in sorted(names(self.budget))], 1)

    @cached_property
    def _seen(self) -> Array:
        return self._budgets(self.world.data, len(self.world.y))

    def distance(self, designs: list[dict[str, Any]]) -> Array:
        """x of each design [m]: 0 within the rows' budgets."""
        table = columns(self.world, designs)
        if not len(self._seen):
            return np.zeros(len(designs))
        at = self._budgets(table, len(designs))
        outside = (at > self._seen.max() + 1e-9) | (at < self._seen.min() - 1e-9)
        return np.where(outside, _decades(self._places(table), self._places(self.world.data)).min(1), 0.0)

    @cached_property
    def rates(self) -> tuple[Array, Array]:
        """Rates [K] and their probabilities after the past [K]."""
        if self.rate is not None:
            return np.array([self.rate]), np.ones(1)
        z = np.linspace(-2.5, 2.5, RATES)
        rates = TYPICAL * np.exp(FACTOR * z)
        log = -0.5 * z**2
        for origin in ORIGINS:
            log = log + OVERLAP * self._past(origin, rates)
        weights = np.exp(log - log.max())
        return rates, weights / weights.sum()

    def _past(self, origin: float, rates: Array) -> Array:
        """Log probability of the budgets after an origin under each rate [K]; 0 where there are too few rows to say."""
        budgets = np.unique(np.round(self._seen, 6))
        edge = budgets[max(math.ceil(origin * len(budgets)) - 1, 0)]
        before, after = (np.flatnonzero(side) for side in (self._seen <= edge + 1e-6, self._seen > edge + 1e-6))
        if len(before) < MIN_ROWS or len(after) < 2:
            return np.zeros(len(rates))
        fitted = self.refit(self.world.keeping(before))
        weights, means, scales = fitted.components(
            [{name: each[i] for name, each in self.world.data.items()} for i in after], DRAWS
        )
        places = self._places(self.world.data)
        root = np.sqrt(_decades(places[after], places[before]).min(1))
        shared = np.exp(-_decades(places[after], places[after]) / REACH)
        worth = float((1 / shared.sum(1)).sum()) / len(after)
        z, share = np.polynomial.hermite_e.hermegauss(9)
        share = share / share.sum()
        noise, nu = fitted.theory.noise, degrees(fitted.theory)
        y = self.world.y[after, None, None]
        scales = np.sqrt(scales**2 + self.world.extra[after, None] ** 2)[:, :, None]
        found = []
        for rate in rates:
            centers = means[:, :, None] + rate * root[:, None, None] * z
            density = np.exp(noises.log_density(noise, y, centers, scales, nu)) @ share @ weights
            found.append(worth * np.log(np.maximum(density, 1e-300)).sum())
        return np.array(found)

    def biases(self, count: int) -> Array:
        """``count`` equally likely values of b, in no order: stratified, so that few have the right spread."""
        rates, weights = self.rates
        random = np.random.default_rng(0)
        chosen = np.repeat(rates, np.diff(np.round(np.cumsum([0.0, *weights]) * count).astype(int)))
        normal = NormalDist().inv_cdf
        points = np.array([normal((i + 0.5) / count) for i in range(count)])
        return random.permutation(chosen) * random.permutation(points)


def _decades(first: Array, second: Array) -> Array:
    """Distances [m, n] between places [m, k] and [n, k]."""
    return np.sqrt(((first[:, None] - second[None]) ** 2).sum(-1))
