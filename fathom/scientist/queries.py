"""The arithmetic of questions about a posterior: events, quantities and harm, over all theories.

A theory that does not say what a quantity is keeps its probability as *unsaid*: the answer is of the theories that say, and
its bounds allow the others any answer.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fathom.errors import UserError
from fathom.scientist import noise as noises
from fathom.scientist.answer import Abstain
from fathom.scientist.diagnostics import effective_size
from fathom.scientist.evaluation import Unsaid, degrees, quantities
from fathom.scientist.expression import Call, Node, Number, Text, is_event, parse
from fathom.scientist.fitting import MIN_ESS, Fit, seed
from fathom.scientist.posterior import Posterior
from fathom.scientist.predictive import quantiles
from fathom.scientist.world import World

Array = np.ndarray
Values = dict[str, Any]
MIN_PREMISE = 1e-4


@dataclass(frozen=True)
class Piece:
    """What one theory says of an expression: values and their weights [P]."""

    id: str
    p: float
    values: Array
    weights: Array

    @property
    def size(self) -> float:
        with np.errstate(divide="ignore"):
            return effective_size(np.log(self.weights)) if self.weights.any() else 0.0

    @property
    def says(self) -> float:
        """The probability of an event."""
        return min(float((self.weights * (self.values != 0)).sum()), 1.0)


def event(text: str) -> Node:
    tree = parse(text)
    if not is_event(tree):
        raise UserError(f"{text!r} is a number: an event is true or false, such as {text.strip() or 'x'} > 1")
    return tree


def pieces_of(posterior: Posterior, tree: Node) -> tuple[list[Piece], float]:
    """The theories that say what an expression is, and the probability of those that do not.

    Raises:
        Abstain: none says it.
        UserError: a name that the world does not know.
    """
    pieces, unsaid = [], 0.0
    for fit, p in zip(posterior.fits, posterior.probabilities, strict=True):
        try:
            value = fit.value(tree)
        except Unsaid:
            unsaid += float(p)
            continue
        pieces.append(Piece(fit.theory.id, float(p), np.where(np.isnan(value), np.inf, value), fit.draws[1]))
    if sum(piece.p for piece in pieces) <= 0:
        raise Abstain("no_adequate_theory", "no theory that has any probability says what this is")
    return pieces, unsaid


def pooled(pieces: list[Piece]) -> tuple[Array, Array]:
    """All theories' values and weights, as one weighted sample."""
    return np.concatenate([each.values for each in pieces]), np.concatenate([each.p * each.weights for each in pieces])


def probability(posterior: Posterior, tree: Node, premise: Node | None = None) -> Values:
    pieces, unsaid = pieces_of(posterior, tree)
    if premise is not None:
        pieces, unsaid = _given(posterior, pieces, unsaid, premise)
    low = sum(each.p * each.says for each in pieces)
    said = sum(each.p for each in pieces)
    variance = 0.0
    for each in pieces:
        # An event that all draws agree on may still fail in a tail that no draw reached; a constant cannot.
        if each.p > 0 and len(each.values) > 1 and each.size > 0:
            cautious = (each.says * each.size + 1) / (each.size + 2)
            variance += each.p**2 * cautious * (1 - cautious) / each.size
    p = min(low / said, 1.0)
    spread = math.sqrt(sum(each.p * (each.says - p) ** 2 for each in pieces) / said)
    return {
        "p": p, "mc_se": math.sqrt(variance) / said, "lower": low, "upper": min(low + unsaid, 1.0),
        "epistemic": {"by_theory": {each.id: {"p": each.p, "says": each.says} for each in pieces},
                      "between_theories": spread, "unsaid": unsaid},
    }  # fmt: skip


def _given(posterior: Posterior, pieces: list[Piece], unsaid: float, premise: Node) -> tuple[list[Piece], float]:
    """Pieces after a premise is taken as true: theories and draws reweighted by it."""
    held = {each.id: each for each in pieces_of(posterior, premise)[0]}
    if held.keys() != {each.id for each in pieces}:
        raise Abstain("no_adequate_theory", "some theories say only one of the event and the premise")
    total = sum(each.p * each.says for each in held.values())
    if total < MIN_PREMISE:
        raise Abstain("improbable_premise", f"the premise has probability {total:.2g}")
    after = []
    for each in pieces:
        condition = held[each.id]
        weights = each.weights * (condition.values != 0) / max(condition.says, 1e-300)
        after.append(replace(each, p=each.p * condition.says / total * (1 - unsaid), weights=weights))
        if after[-1].p > 1e-3 and after[-1].size < MIN_ESS and len(weights) > 1:
            raise Abstain("computational", f"the premise leaves {after[-1].size:.0f} effective draws of {each.id}")
    return after, unsaid


def interval(posterior: Posterior, tree: Node, level: float) -> Values:
    pieces, unsaid = pieces_of(posterior, tree)
    ends = [(1 - level) / 2, 0.5, (1 + level) / 2]
    values, weights = pooled(pieces)
    low, middle, high = quantiles(values, weights, ends)
    said = sum(each.p for each in pieces)
    size = said**2 / sum(each.p**2 / max(each.size, 1.0) for each in pieces)
    around = quantiles(values, weights, [max(0.5 - 0.5 / math.sqrt(size), 0), min(0.5 + 0.5 / math.sqrt(size), 1)])
    by_theory, spread = {}, 0.0
    for each in pieces:
        one = quantiles(each.values, each.weights, ends)
        by_theory[each.id] = {"p": each.p, "median": one[1], "lower": one[0], "upper": one[2]}
        spread += each.p / said * (one[1] - middle) ** 2
    return {
        "median": middle, "lower": low, "upper": high, "level": level, "mc_se": (around[1] - around[0]) / 2,
        "epistemic": {"by_theory": by_theory, "between_theories": math.sqrt(spread), "unsaid": unsaid},
    }  # fmt: skip


def harm(fit: Fit, index: int, tree: Node, design: Values) -> tuple[float, float]:
    """P(harm) of one more outcome at a design under one theory, and its standard error; 1 where the theory does not say."""
    world = fit.world
    params, weights = fit.draws
    _, means, scales = replace(fit, linear=None, make_draws=lambda: (params, weights)).components([design])
    outcome = noises.draw(fit.theory.noise, seed(world, index, 7), means[0], scales[0], degrees(fit.theory))
    try:
        value = fit.value(tree, {**design, world.outcome: outcome})
    except Unsaid:
        return 1.0, 0.0
    hit = (value != 0) | np.isnan(value)
    with np.errstate(divide="ignore"):
        size = effective_size(np.log(weights))
    p = float(np.clip((weights * hit).sum(), 0, 1))
    cautious = (p * size + 1) / (size + 2)
    return p, math.sqrt(cautious * (1 - cautious) / size)


def designs_in(tree: Node, world: World) -> list[Values]:
    """The designs, or parts of designs, that the calls of an expression name."""
    if not isinstance(tree, Call):
        return []
    found: list[Values] = []
    if tree.function == "mean" or tree.function in quantities(world):
        fixed = {name: each.value for name, each in tree.keywords if isinstance(each, Number | Text)}
        found.append({name: each for name, each in fixed.items() if name in world.designs})
    for each in (*tree.arguments, *(value for _, value in tree.keywords)):
        found += designs_in(each, world)
    return found
