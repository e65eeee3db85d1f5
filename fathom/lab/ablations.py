"""The ablation table: every arm against a baseline, pair by pair of the same case and seed, with intervals.

A difference is called one only where its interval does not hold zero. Runs that diverged or are not done are in no mean.
"""

import statistics
from dataclasses import dataclass

from fathom.lab.intervals import LEVEL, Difference, paired, percent
from fathom.lab.outcomes import arms, by_seed, cases, require_arm
from fathom.lab.plan import Outcome


@dataclass(frozen=True)
class Row:
    """One arm in one case; losses in nats per token."""

    case: str
    arm: str
    losses: dict[int, float]
    """By seed."""
    difference: Difference | None
    """To the baseline, over the seeds that both have; None for the baseline itself, and without such a seed."""

    @property
    def mean(self) -> float | None:
        return statistics.mean(self.losses.values()) if self.losses else None


def table(found: list[Outcome], *, baseline: str = "prenorm", level: float = LEVEL) -> list[Row]:
    """Every case's arms, the baseline first; ``UserError`` if there is no such arm."""
    require_arm(found, baseline)
    rows = []
    for case in cases(found):
        base = by_seed(found, case, baseline)
        there = [end for end in found if end.planned.case == case]
        for arm in sorted(arms(there), key=lambda arm: arm != baseline):
            losses = by_seed(found, case, arm)
            pairs = [losses[seed] - base[seed] for seed in losses if seed in base]
            difference = paired(pairs, level) if pairs and arm != baseline else None
            rows.append(Row(case, arm, losses, difference))
    return rows


def luck(rows: list[Row], level: float = LEVEL) -> str:
    """How many of the table's differences chance alone would let stand out."""
    pairs = [row.difference.n for row in rows if row.difference is not None]
    count = sum(n > 1 for n in pairs)
    if not pairs:
        return "No arm has a finished run of the baseline's case and seed: there is nothing to compare."
    if not count:
        return "One seed gives no interval: nothing here is told apart from luck."
    return (
        f"{count} interval{'s' if count > 1 else ''} at {percent(level)}: "
        f"about {count * (1 - level):.1f} would miss zero by luck alone."
    )
