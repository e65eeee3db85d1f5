"""The map of Fig. 7 (arXiv 2603.15031): loss over depth, width and heads at equal compute, and how sure its minimum is."""

import re
import statistics
from dataclasses import dataclass

from fathom.errors import UserError
from fathom.lab.intervals import LEVEL, paired
from fathom.lab.outcomes import arms, by_seed, cases
from fathom.lab.plan import Outcome

NAME = re.compile(r"w([\d.]+)-h([\d.]+)")


@dataclass(frozen=True)
class Map:
    """One arm's losses: rows are heads over layers, columns width over layers; None where no run is done."""

    arm: str
    columns: list[float]
    rows: list[float]
    losses: list[list[float | None]]
    best: str
    """The case of the lowest mean loss."""
    rivals: list[str]
    """Cases that are not told apart from the best over paired seeds; every one of them where there is one seed."""
    num_seeds: int


def maps(found: list[Outcome], level: float = LEVEL) -> list[Map]:
    """A map for each arm of a depth-width sweep; ``UserError`` if it is another sweep, or an arm has no run done."""
    places: dict[str, tuple[float, float]] = {}
    for case in cases(found):
        match = NAME.fullmatch(case)
        if match is None:
            raise UserError(f"case {case} is no shape: give the folder of a depth-width sweep")
        places[case] = (float(match[1]), float(match[2]))
    columns, rows = (sorted({place[axis] for place in places.values()}) for axis in (0, 1))
    made = []
    for arm in arms(found):
        losses = {case: by_seed(found, case, arm) for case in places}
        done = {case: statistics.mean(seeds.values()) for case, seeds in losses.items() if seeds}
        if not done:
            raise UserError(f"no run of arm {arm} is done")
        best = min(done, key=lambda case: done[case])
        rivals = []
        for case in done:
            pairs = [losses[case][seed] - losses[best][seed] for seed in losses[case] if seed in losses[best]]
            if case != best and (not pairs or paired(pairs, level).verdict != "higher"):
                rivals.append(case)
        mean_at = {places[case]: mean for case, mean in done.items()}
        grid = [[mean_at.get((column, row)) for column in columns] for row in rows]
        made.append(Map(arm, columns, rows, grid, best, rivals, max(len(seeds) for seeds in losses.values())))
    return made


def sentence(found: Map) -> str:
    """What may be said of the map's minimum."""
    others = f"{len(found.rivals)} of the {sum(v is not None for row in found.losses for v in row) - 1} other shapes"
    if found.num_seeds < 2:
        return f"{found.arm}: lowest at {found.best}, of one seed: no shape is told apart from it."
    return f"{found.arm}: lowest at {found.best}; {others} are not told apart from it over {found.num_seeds} seeds."
