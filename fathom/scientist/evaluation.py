"""What one theory says for given parameters: means, densities of rows, quantities, and the probability of claims."""

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fathom.errors import UserError
from fathom.scientist import noise as noises
from fathom.scientist.expression import FUNCTIONS, Call, Name, Node, Number, evaluate
from fathom.scientist.world import Claim, Theory, World

Array = np.ndarray
Values = dict[str, Any]
CHUNK = 2_000_000
"""Densities computed at once."""


class Unsaid(Exception):
    """A theory does not say what a quantity is."""


def quantities(world: World) -> set[str]:
    """What questions may ask about, ``mean`` apart."""
    return {name for theory in world.theories for name in theory.quantities} | set(world.quantities)


def degrees(theory: Theory) -> float:
    """Degrees of freedom of a student_t noise, 0 of any other."""
    first = theory.noise.args[0] if theory.noise.family == "student_t" else None
    return first.value if isinstance(first, Number) else 0.0


def columns(world: World, designs: list[Values]) -> dict[str, Array]:
    return {
        name: np.array([design[name] for design in designs], dtype=object if kind.levels else float)
        for name, kind in world.designs.items()
    }


def spread(theory: Theory, environment: Values) -> Array:
    spread = theory.noise.spread
    return np.asarray(1.0 if spread is None else evaluate(spread, environment), float)


def features_of(theory: Theory, columns: dict[str, Array], rows: int) -> tuple[Array, Array]:
    """Offset [n] and features [n, p] of a linear theory."""
    parts = theory.coefficients
    assert parts is not None
    inner = [name for name in theory.params if name != theory.scale]
    offset = np.broadcast_to(np.asarray(evaluate(parts.get("", Number(0.0)), columns), float), (rows,))
    features = np.zeros((rows, len(inner)))
    for index, name in enumerate(inner):
        if name in parts:
            features[:, index] = evaluate(parts[name], columns)
    return offset, features


def log_rows(world: World, theory: Theory, params: dict[str, Array]) -> Array:
    """Log density of every row [P, n] for parameters [P]."""
    environment: Values = {name: each[None, :] for name, each in world.data.items()}
    environment |= {name: each[:, None] for name, each in params.items()}
    count = len(next(iter(params.values()))) if params else 1
    mean = np.asarray(evaluate(theory.mean, environment), float)
    scale = spread(theory, environment)
    if not theory.noise.discrete and world.extra.any():
        scale = np.sqrt(scale**2 + world.extra**2)
    rows = noises.log_density(theory.noise, world.y[None, :], mean, scale, degrees(theory))
    return np.broadcast_to(rows, (count, len(world.y)))


def value(world: World, theory: Theory, tree: Node, params: dict[str, Array], design: Values) -> Array:
    """An expression over quantities and ``mean(design=..)`` for parameters [P]; see ``Fit.value``."""

    def called(call: Call, values: Mapping[str, Any]) -> Any:
        given = {name: evaluate(each, values, called) for name, each in call.keywords}
        if call.arguments:
            raise UserError(f"{call.function}(...) takes designs by name, as in {call.function}({_example(world)})")
        if call.function == "mean":
            at = world.design({**{k: v for k, v in values.items() if k in world.designs}, **given})
            return evaluate(theory.mean, {**params, **at})
        quantity = theory.quantities.get(call.function)
        shared = world.quantities.get(call.function)
        if quantity is None and shared is None:
            known = quantities(world)
            if call.function in known:
                raise Unsaid(call.function)
            raise UserError(
                f"{call.function} is not a quantity of this world; there are {', '.join(sorted(known | {'mean'}))}"
            )
        at = {name: world.designs[name].value(each) for name, each in given.items() if name in world.designs}
        for name in given.keys() - world.designs.keys():
            raise UserError(f"{name} is not a design of this world")
        own = quantity if quantity is not None else shared
        assert own is not None
        try:
            return evaluate(own, {**params, **values, **at}, called)
        except UserError as error:
            raise UserError(f"{call.function}: {error}") from None

    with np.errstate(all="ignore"):
        found = evaluate(_resolved(tree, set(design)), design, called)
    if isinstance(found, str):
        raise UserError(f"{found!r} is a text: a quantity is a number")
    return np.asarray(found, float)


def _resolved(tree: Node, designs: set[str]) -> Node:
    """A tree with every bare name of a quantity made a call."""
    match tree:
        case Name(name) if name not in designs and name not in FUNCTIONS:
            return Call(name, ())
        case Call(function, arguments, keywords):
            return Call(
                function, tuple(_resolved(each, designs) for each in arguments),
                tuple((name, _resolved(each, designs)) for name, each in keywords),
            )  # fmt: skip
    return tree


def _example(world: World) -> str:
    return ", ".join(f"{k}='{d.levels[0]}'" if d.levels else f"{k}={d.low:g}" for k, d in world.designs.items())


_RELIABILITY = (np.arange(64) + 0.5) / 64


def log_claims(world: World, theory: Theory, params: dict[str, Array], count: int) -> Array:
    """Log probability [P] of what was said: true within its error with an unknown reliability, which a speaker keeps."""
    total = np.zeros(count)
    for who, claims in itertools.groupby(
        sorted(world.claims, key=lambda claim: claim.who), key=lambda claim: claim.who
    ):
        said = list(claims)
        del who
        a, b = said[0].reliability
        prior = (a - 1) * np.log(_RELIABILITY) + (b - 1) * np.log1p(-_RELIABILITY)
        inner = prior - np.logaddexp.reduce(prior)
        inner = np.broadcast_to(inner, (count, 64))
        for claim in said:
            inner = inner + _claim(world, theory, claim, params, count)
        total = total + np.logaddexp.reduce(inner, axis=1)
    return total


def _claim(world: World, theory: Theory, claim: Claim, params: dict[str, Array], count: int) -> Array:
    regardless = float(claim.otherwise.log_density(np.array(claim.value)))
    try:
        truth = np.broadcast_to(value(world, theory, claim.about, params, {}), (count,))
    except Unsaid:
        return np.full((count, 64), regardless)
    honest = -0.5 * ((claim.value - truth) / claim.within) ** 2 - math.log(claim.within) - 0.5 * math.log(2 * math.pi)
    honest = np.where(np.isfinite(honest), honest, -np.inf)
    return np.logaddexp(np.log(_RELIABILITY) + honest[:, None], np.log1p(-_RELIABILITY) + regardless)


def log_likelihood(world: World, theory: Theory, params: dict[str, Array], count: int) -> Array:
    """Log likelihood [P] of all rows, in pieces that fit in memory."""
    step = max(CHUNK // max(len(world.y), 1), 1)
    pieces = []
    for start in range(0, count, step):
        part = {name: each[start : start + step] for name, each in params.items()}
        pieces.append(log_rows(world, theory, part)[: count - start].sum(1))
    return np.concatenate(pieces)
