"""Paired differences and their intervals: Student's t, and a difference only where the interval says so."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fathom.errors import UserError

LEVEL = 0.90
Verdict = Literal["lower", "higher", "not told apart", "one seed"]


def check_level(level: float) -> None:
    if not 0 < level < 1:
        raise UserError(f"level is {level}: an interval's level must be between 0 and 1, such as 0.9")


def percent(level: float) -> str:
    """``90%``, and ``99.9%`` where rounding would claim more."""
    return f"{100 * level:.6g}%"


def central_probability(t: float, df: int) -> float:
    """P(|T| < t) of Student's t with ``df`` degrees of freedom, in closed form (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    theta = math.atan2(t, math.sqrt(df))
    odd = df % 2
    term, total = math.cos(theta) if odd else 1.0, 0.0
    for k in range((df - 1) // 2 if odd else df // 2):
        total += term
        term *= math.cos(theta) ** 2 * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total


def student_t(level: float, df: int) -> float:
    """The t with ``central_probability(t, df) == level``."""
    check_level(level)
    low, high = 0.0, 1.0
    while central_probability(high, df) < level:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if central_probability(middle, df) < level else (low, middle)
    return high


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences and its interval; no interval of a single pair."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def verdict(self) -> Verdict:
        """``lower`` or ``higher`` only where the whole interval lies on one side of zero."""
        if self.low is None or self.high is None:
            return "one seed"
        if self.high < 0:
            return "lower"
        return "higher" if self.low > 0 else "not told apart"


def paired(differences: list[float], level: float = LEVEL) -> Difference:
    """The mean of ``differences`` with its interval by Student's t, which takes them as independent and about normal."""
    check_level(level)
    n, mean = len(differences), float(np.mean(differences))
    if n < 2:
        return Difference(mean, None, None, n)
    half = student_t(level, n - 1) * float(np.std(differences, ddof=1)) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n)
