"""Scaling laws: loss against compute, with and without an irreducible term, and what a rule is worth in compute.

    L(C) = E + A C^-α          E >= 0; E = 0 is the paper's form (arXiv 2603.15031, section 5)
    multiplier(C) = C' / C     where L_baseline(C') = L_arm(C): the baseline needs that much more compute for the arm's loss

Fits are least squares in nats. For a given α both other coefficients are linear, so only α is searched for, from 0.001 to 3.

Intervals come from refits to the fitted law plus drawn residuals (a parametric bootstrap): normal, scaled like the fit's own
residuals, with that scale drawn too, because a handful of sizes leave it uncertain. For a law that is linear in its
coefficients the intervals are Student's t exactly. Arms are drawn together, with the covariance of their residuals: twins
share data and shape, and so most of their scatter. Leave-one-out gives the range over fits that lack one size each.

A point is one size. Seeds of a size are averaged first, since they share that size's distance from the law.

A multiplier needs two laws that fall. Where a fit does not, there is none; a drawn or left-out fit that does not fall counts
against both ends of its interval, so that an interval from 0 to infinity says that nothing is known.
"""

import json
import math
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
from jaxtyping import Float

from fathom.errors import UserError
from fathom.lab.intervals import LEVEL, check_level
from fathom.lab.outcomes import arms, by_seed, cases, require_arm
from fathom.lab.plan import Outcome

Array = np.ndarray
Range = tuple[float, float]
PFLOPS_DAY = 1e15 * 86400
"""Floating-point operations of one PFLOP/s-day."""
_EXPONENTS = np.geomspace(1e-3, 3, 64)
MIN_DRAWS, MAX_DRAWS = 100, 100_000


@dataclass(frozen=True)
class Law:
    """``E + A C^-α`` for one or many fits: the fields are numbers, or arrays of one shape."""

    floor: Any
    """E, nats per token."""
    scale: Any
    """A, nats per token at one unit of compute."""
    exponent: Any
    """α."""

    @property
    def falls(self) -> Any:
        """Whether the loss falls with compute at all."""
        return np.asarray(self.scale) > 0

    @property
    def is_power_law(self) -> bool:
        """Of one fit: it falls, and by an exponent inside the range searched, not at its end."""
        return bool(self.falls) and _EXPONENTS[0] * 1.01 < self.exponent < _EXPONENTS[-1] / 1.01

    def loss(self, compute: Any) -> Any:
        return self.floor + self.scale * np.power(compute, -self.exponent)

    def compute(self, loss: Any) -> Any:
        """The compute that reaches ``loss``; infinite for a loss at or below the floor, NaN of a law that does not fall."""
        above = np.asarray(loss - self.floor, float)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            reached = np.power(self.scale / np.maximum(above, 1e-300), 1 / self.exponent)
        return np.where(self.falls, np.where(above > 0, reached, np.inf), np.nan)


def _solve(compute: Array, losses: Array, exponent: Array, irreducible: bool) -> tuple[Array, Array, Array]:
    """E, A and the squared error of the best law with each ``exponent`` [...] for ``losses`` [..., n]."""
    x = compute ** -exponent[..., None]
    scale, floor = (x * losses).sum(-1) / (x * x).sum(-1), np.zeros_like(exponent)
    if irreducible:
        dx, dy = x - x.mean(-1, keepdims=True), losses - losses.mean(-1, keepdims=True)
        slope = np.maximum((dx * dy).sum(-1) / (dx * dx).sum(-1), 0)
        free = losses.mean(-1) - slope * x.mean(-1)
        scale, floor = np.where(free > 0, slope, scale), np.maximum(free, 0)
    error = ((losses - floor[..., None] - scale[..., None] * x) ** 2).sum(-1)
    return floor, scale, error


def fit(compute: Float[Array, "*#draws n"], losses: Float[Array, "*draws n"], *, irreducible: bool) -> Law:
    """The least-squares law of each row of ``losses``, nats per token, against ``compute``, in any unit."""
    losses = np.asarray(losses, float)
    shape, rows = losses.shape[:-1], losses.reshape(-1, losses.shape[-1])
    logs = np.log(np.broadcast_to(compute, losses.shape)).reshape(rows.shape)
    middle = np.exp(logs.mean(-1))
    ratio = np.exp(logs - logs.mean(-1, keepdims=True))
    best = _solve(ratio, rows, _EXPONENTS[:, None], irreducible)[2].argmin(0)
    low = np.log(_EXPONENTS[np.maximum(best - 1, 0)])
    high = np.log(_EXPONENTS[np.minimum(best + 1, len(_EXPONENTS) - 1)])
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(30):
        left, right = high - golden * (high - low), low + golden * (high - low)
        errors = _solve(ratio, rows, np.exp(np.stack([left, right])), irreducible)[2]
        smaller = errors[0] < errors[1]
        low, high = np.where(smaller, low, left), np.where(smaller, right, high)
    exponent = np.exp((low + high) / 2)
    floor, scale, _ = _solve(ratio, rows, exponent, irreducible)
    return Law(*(value.reshape(shape)[()] for value in (floor, scale * middle**exponent, exponent)))


def multiplier(baseline: Law, arm: Law, budget: float) -> Any:
    """How many times ``budget`` the baseline needs for the arm's loss at ``budget``; NaN if either law does not fall."""
    return np.where(arm.falls, baseline.compute(arm.loss(budget)) / budget, np.nan)


@dataclass(frozen=True)
class Points:
    """One arm's losses by size; row i of every arm in a table is the same size."""

    compute: Float[Array, " n"]
    losses: Float[Array, " n"]


@dataclass(frozen=True)
class Estimate:
    """A number, its bootstrap interval and its leave-one-out range."""

    value: float
    interval: Range
    leave_one_out: Range

    @property
    def width(self) -> float:
        return self.interval[1] - self.interval[0]


@dataclass(frozen=True)
class Fitted:
    """One arm's law and what is not certain of it."""

    law: Law
    floor: Estimate
    scale: Estimate
    exponent: Estimate
    multiplier: Estimate | None
    """Against the baseline at the budget; None for the baseline itself, and where either of the two is no power law."""
    residuals: list[float]
    """Measured minus fitted loss of each size, nats per token."""


def _refits(
    table: dict[str, Points], *, irreducible: bool, draws: int, seed: int
) -> tuple[dict[str, Law], Array, dict[str, Law]]:
    """Every arm's law, the residuals [size, arm], and every arm's laws refitted to draws (see the top of this file)."""
    parameters = 3 if irreducible else 2
    n = len(next(iter(table.values())).losses)
    laws = {arm: fit(points.compute, points.losses, irreducible=irreducible) for arm, points in table.items()}
    expected = np.stack([laws[arm].loss(points.compute) for arm, points in table.items()], -1)
    residuals = np.stack([points.losses for points in table.values()], -1) - expected
    random = np.random.default_rng(seed)
    # Rows of normal @ residuals have the covariance of the arms' residuals, without a matrix root of it.
    noise = random.standard_normal((draws, n, n)) @ residuals
    noise /= np.sqrt(random.chisquare(n - parameters, size=(draws, 1, 1)))
    drawn = {
        arm: fit(points.compute, (expected + noise)[..., column], irreducible=irreducible)
        for column, (arm, points) in enumerate(table.items())
    }
    return laws, residuals, drawn


def bands(
    table: dict[str, Points],
    *,
    irreducible: bool,
    level: float = LEVEL,
    draws: int = 2000,
    seed: int = 0,
    places: int = 60,
) -> dict[str, tuple[Array, Array, Array]]:
    """Compute from the smallest size to the largest, and the interval of each arm's law there: (compute, low, high).

    The table must be one that ``fit_arms`` takes.
    """
    check_level(level)
    found = {}
    _, _, drawn = _refits(table, irreducible=irreducible, draws=draws, seed=seed)
    for arm, laws in drawn.items():
        compute = np.geomspace(table[arm].compute.min(), table[arm].compute.max(), places)
        losses = Law(*(np.asarray(value)[:, None] for value in (laws.floor, laws.scale, laws.exponent))).loss(compute)
        low, high = np.quantile(losses, ((1 - level) / 2, (1 + level) / 2), axis=0)
        found[arm] = (compute, low, high)
    return found


def fit_arms(
    table: dict[str, Points], *, baseline: str, budget: float, irreducible: bool, level: float = LEVEL,
    draws: int = 2000, seed: int = 0,
) -> dict[str, Fitted]:  # fmt: skip
    """Fit every arm of a table whose rows are the same sizes, and compare each with ``baseline`` at ``budget``.

    Raises:
        UserError: fewer sizes than a fit and its scatter need (3, or 4 with the irreducible term), or a wrong setting.
    """
    check_level(level)
    if not MIN_DRAWS <= draws <= MAX_DRAWS:
        raise UserError(
            f"draws is {draws}: an interval's ends need {MIN_DRAWS:,} at least, and memory bounds it at {MAX_DRAWS:,}"
        )
    if baseline not in table:
        raise UserError(f"there is no arm {baseline!r} to compare with; there are {', '.join(table)}")
    if not 0 < budget < math.inf:
        raise UserError(f"the budget is {budget}: it must be positive and finite")
    parameters = 3 if irreducible else 2
    n = len(table[baseline].losses)
    if n <= parameters:
        raise UserError(
            f"a law of {parameters} coefficients needs at least {parameters + 1} sizes to say how sure it is: there are {n}"
        )
    laws, residuals, drawn = _refits(table, irreducible=irreducible, draws=draws, seed=seed)
    kept = np.array([np.delete(np.arange(n), i) for i in range(n)])
    left_out = {
        arm: fit(points.compute[kept], points.losses[kept], irreducible=irreducible) for arm, points in table.items()
    }

    def estimate(value: Any, draws: Array, others: Array) -> Estimate:
        # Values of single draws: interpolating would give NaN beside an infinite multiplier.
        low = np.quantile(np.nan_to_num(draws, nan=0.0, posinf=np.inf), (1 - level) / 2, method="inverted_cdf")
        high = np.quantile(np.nan_to_num(draws, nan=np.inf, posinf=np.inf), (1 + level) / 2, method="inverted_cdf")
        least = np.nan_to_num(others, nan=0.0, posinf=np.inf).min()
        most = np.nan_to_num(others, nan=np.inf, posinf=np.inf).max()
        return Estimate(float(value), (float(low), float(high)), (float(least), float(most)))

    def coefficient(arm: str, name: str) -> Estimate:
        return estimate(*(getattr(which[arm], name) for which in (laws, drawn, left_out)))

    def against(arm: str) -> Estimate | None:
        if arm == baseline or not (laws[arm].is_power_law and laws[baseline].is_power_law):
            return None
        return estimate(*(multiplier(which[baseline], which[arm], budget) for which in (laws, drawn, left_out)))

    return {
        arm: Fitted(
            laws[arm], coefficient(arm, "floor"), coefficient(arm, "scale"), coefficient(arm, "exponent"),
            against(arm), residuals[:, column].tolist(),
        )
        for column, arm in enumerate(table)
    }  # fmt: skip


def paper() -> dict[str, Any]:
    """Table 2 of the paper with the compute of its Fig. 4, and the laws that it prints: see the file for sources."""
    return json.loads((files("fathom") / "assets/paper-table2.json").read_text())


def paper_points() -> dict[str, Points]:
    """The paper's arms as points; compute in PFLOP/s-days."""
    table = paper()
    compute = np.array([size["compute"] for size in table["sizes"]])
    return {arm: Points(compute, np.array(losses)) for arm, losses in table["losses"].items()}


def points_of(found: list[Outcome], baseline: str) -> dict[str, Points]:
    """The arms of a scaling sweep as points, baseline first; compute in PFLOP/s-days, each arm's own.

    A size counts where every arm has a run done, over the seeds that all of them have, so that rows stay twins.
    """
    require_arm(found, baseline)
    names = sorted(arms(found), key=lambda arm: arm != baseline)
    compute: dict[str, list[float]] = {arm: [] for arm in names}
    losses: dict[str, list[float]] = {arm: [] for arm in names}
    for case in cases(found):
        of = {arm: by_seed(found, case, arm) for arm in names}
        seeds = set.intersection(*(set(values) for values in of.values()))
        for arm in names if seeds else ():
            cost = next(end.flops for end in found if (end.planned.case, end.planned.arm) == (case, arm))
            compute[arm].append(cost / PFLOPS_DAY)
            losses[arm].append(float(np.mean([of[arm][seed] for seed in seeds])))
    return {arm: Points(np.array(compute[arm]), np.array(losses[arm])) for arm in names}
