"""Does a network hold what it should have no use for? Linear probes of hidden states, against probes of shuffled labels.

A probe that finds a label (who asked, when, how often, what the outcome is called) better than probes of the same label shuffled
do has found a channel that should not be there. That none is found is no proof: a probe is linear, and labels are the ones
that somebody thought of.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
SHUFFLES, RIDGE = 40, 1e-2


@dataclass(frozen=True)
class Probe:
    """Area under the ROC curve on held-out states, and the central 95 % of it for shuffled labels."""

    label: str
    auc: float
    low: float
    high: float

    @property
    def found(self) -> bool:
        return self.auc > self.high


def area(score: Array, label: Array) -> float:
    """P(score of a positive > score of a negative), ties half."""
    _, which, counts = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[which]
    positives = int(label.sum())
    negatives = len(label) - positives
    if not positives or not negatives:
        return 0.5
    return float((ranks[label].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _fitted(hidden: Array, label: Array) -> Callable[[Array], Array]:
    center, deviation = hidden.mean(0), hidden.std(0) + 1e-9
    x = (hidden - center) / deviation
    y = label - label.mean()
    weights = np.linalg.solve(x.T @ x + RIDGE * len(x) * np.eye(x.shape[1]), x.T @ y)
    return lambda other: (other - center) / deviation @ weights


def probe(name: str, hidden: Array, label: Array, random: np.random.Generator) -> Probe:
    """One label [N] of hidden states [N, H]: the probe is fitted to half of them and judged on the other half."""
    order = random.permutation(len(hidden))
    fit, judge = order[: len(order) // 2], order[len(order) // 2 :]

    def auc(of: Array) -> float:
        return area(_fitted(hidden[fit], of[fit])(hidden[judge]), of[judge].astype(bool))

    shuffled = [auc(random.permutation(label)) for _ in range(SHUFFLES)]
    low, high = np.quantile(shuffled, (0.025, 0.975))
    return Probe(name, auc(label), float(low), float(high))
