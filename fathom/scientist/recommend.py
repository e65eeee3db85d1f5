"""Which experiment next: the caller's candidates ranked by expected information per cost, alone or as a batch."""

from dataclasses import dataclass
from typing import Any

from fathom.errors import UserError
from fathom.scientist.experiments import Bounds, Imagined, gains, question
from fathom.scientist.posterior import Posterior

Values = dict[str, Any]
WORTH, WIDE = 0.01, 48
"""The share of what is not known that an experiment must be expected to tell to be worth running, and how many of the best
single experiments a batch is chosen from."""


@dataclass(frozen=True)
class Experiment:
    """Runs that are made together: their designs, and what they cost together."""

    designs: tuple[Values, ...]
    cost: float


def experiments(rows: list[tuple[Values, float, Any]]) -> list[Experiment]:
    """Experiments from rows of design, cost and the label of the experiment; None makes a row one of its own."""
    grouped: dict[Any, list[tuple[Values, float]]] = {}
    for index, (design, cost, label) in enumerate(rows):
        grouped.setdefault((index,) if label is None else label, []).append((design, cost))
    made = [Experiment(tuple(d for d, _ in group), sum(c for _, c in group)) for group in grouped.values()]
    if any(len(each.designs) > 32 for each in made):
        raise UserError("an experiment may have 32 runs")
    return made


def rank(posterior: Posterior, candidates: list[Experiment], about: str, batch: int) -> Values:
    """Every candidate by information per cost, and the batch that greedy choice makes of them.

    A candidate of one run has its information by quadrature; one of several lies between a lower and an upper bound.
    """
    single = all(len(each.designs) == 1 for each in candidates)
    found: list[Bounds]
    imagined, places = None, {}
    if not single or batch > 1:
        designs = [design for each in candidates for design in each.designs]
        distinct = list({str(sorted(each.items())): each for each in designs}.values())
        places = {str(sorted(each.items())): index for index, each in enumerate(distinct)}
        asked = question(posterior, about)
        imagined = Imagined(posterior, asked, distinct)

    def indices(experiment: Experiment) -> list[int]:
        return [places[str(sorted(design.items()))] for design in experiment.designs]

    if single:
        remaining, nats = gains(posterior, [each.designs[0] for each in candidates], about)
        found = [Bounds(each, each, 0.0) for each in nats]
    else:
        assert imagined is not None
        remaining = imagined.asked.remaining
        found = [imagined.bounds(indices(each)) for each in candidates]
    order = sorted(range(len(candidates)), key=lambda i: (-found[i].middle / candidates[i].cost, i))
    ranked = [_row(posterior, candidates[i], found[i], remaining) for i in order]
    # Where every experiment is worth the same or nothing, their order means nothing.
    told_apart = len(order) < 2 or (
        found[order[0]].lower / candidates[order[0]].cost > found[order[1]].upper / candidates[order[1]].cost
    )
    result = {"remaining_nats": remaining, "ranked": ranked, "told_apart": told_apart, "advice": _advice(ranked)}
    if batch > 1:
        assert imagined is not None
        result["batch"] = _greedy(imagined, candidates, order[:WIDE], indices, batch)
    return result


def _row(posterior: Posterior, experiment: Experiment, bounds: Bounds, remaining: float | None) -> Values:
    share = None if remaining is None else bounds.middle / remaining if remaining > 0 else 0.0
    highest = None if remaining is None else (bounds.upper + 2 * bounds.error) / remaining if remaining > 0 else 0.0
    return _named(experiment) | {
        "cost": experiment.cost, "nats": bounds.middle, "lower": bounds.lower,
        "upper": bounds.upper, "mc_se": bounds.error, "share": share, "nats_per_cost": bounds.middle / experiment.cost,
        "worth_running": highest is None or highest >= WORTH,
        "outside_the_data": max(posterior.world.outside(design) for design in experiment.designs),
    }  # fmt: skip


def _named(experiment: Experiment) -> Values:
    one = len(experiment.designs) == 1
    return {"design": experiment.designs[0]} if one else {"designs": list(experiment.designs)}


def _advice(ranked: list[Values]) -> str:
    return "run the first" if any(row["worth_running"] for row in ranked) else "not worth running"


def _greedy(
    imagined: Imagined, candidates: list[Experiment], order: list[int], indices: Any, batch: int
) -> list[Values]:
    """One experiment after another, each the one that adds most per cost to those before it; the same one may be repeated."""
    chosen: list[int] = []
    runs: list[int] = []
    before, steps = 0.0, []
    for _ in range(batch):
        tried = {i: imagined.bounds(runs + indices(candidates[i])) for i in order}
        best = max(order, key=lambda i: (tried[i].middle - before) / candidates[i].cost)
        runs, before = runs + indices(candidates[best]), tried[best].middle
        chosen.append(best)
        steps.append(_named(candidates[best]) | {
            "cost": sum(candidates[i].cost for i in chosen), "nats": before, "lower": tried[best].lower,
            "upper": tried[best].upper, "mc_se": tried[best].error,
        })  # fmt: skip
    return steps
