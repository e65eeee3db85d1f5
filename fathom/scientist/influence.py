"""What moved an answer: the posterior without each row in turn.

A linear theory is solved anew. Draws of any other are reweighted by 1 / p(row | parameters), and a Pareto k above 0.7 says
where that is not to be trusted (arXiv 1507.04544).
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from fathom.scientist.diagnostics import pareto_k
from fathom.scientist.fitting import Fit, fit
from fathom.scientist.posterior import Posterior, weigh
from fathom.scientist.sampler import LADDER

Array = np.ndarray
SOLVED_ANEW = 60
"""Rows up to which linear theories are solved anew; beyond, all are reweighted."""


def without(posterior: Posterior, row: int) -> tuple[Posterior, float]:
    """The posterior without a row, and the worst Pareto k of the reweighting (-inf if none was needed)."""
    world = posterior.world
    kept = np.delete(np.arange(len(world.y)), row)
    smaller = world.keeping(kept)
    fits, worst = [], -math.inf
    for index, each in enumerate(posterior.fits):
        exact = each.linear is not None and len(world.y) <= SOLVED_ANEW
        if exact or each.report.method in ("conjugate", "enumerated"):
            fits.append(fit(smaller, index, LADDER[0]))
            continue
        lighter, k = _reweighted(each, row)
        fits.append(lighter)
        if posterior.probabilities[index] > 1e-3:
            worst = max(worst, k)
    return Posterior(smaller, tuple(fits), weigh(fits), posterior.evals), worst


def _reweighted(each: Fit, row: int) -> tuple[Fit, float]:
    params, weights = each.draws
    log = -each.log_rows()[:, row]
    with np.errstate(divide="ignore"):
        after = np.log(weights) + np.where(np.isfinite(log), log, -np.inf)
    total = float(np.logaddexp.reduce(after))
    k = pareto_k(np.where(np.isfinite(log), log, log[np.isfinite(log)].min(initial=0.0)))
    return replace(
        each, log_evidence=each.log_evidence + total, linear=None, make_draws=lambda: (params, np.exp(after - total))
    ), k


def leave_one_out(posterior: Posterior, number: Callable[[Posterior], float], is_event: bool) -> dict[str, Any]:
    """How far each row moves ``number``, the largest first, and what happens to the theories."""
    before = number(posterior)
    rows: list[dict[str, Any]] = []
    for row, source in enumerate(posterior.world.sources):
        smaller, k = without(posterior, row)
        after = number(smaller)
        moved = _logit(after) - _logit(before) if is_event else after - before
        shift = 0.5 * float(np.abs(smaller.probabilities - posterior.probabilities).sum())
        rows.append({"row": row, "source": source, "without_it": after, "moved": moved, "theories_moved": shift,
                     "trusted": k <= 0.7})  # fmt: skip
    rows.sort(key=lambda each: -abs(each["moved"]) if math.isfinite(each["moved"]) else -math.inf)
    return {"value": before, "scale": "logit" if is_event else "value", "rows": rows}


def _logit(p: float) -> float:
    p = min(max(p, 1e-6), 1 - 1e-6)
    return math.log(p / (1 - p))
