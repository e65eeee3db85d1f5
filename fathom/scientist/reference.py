"""The theories that always stand beside the named ones, and drift: written in the expression language like any other.

T_null     one mean for all designs
T_other    level + slope + smooth bumps along every numeric design, each with its own deviations at every level, of unknown size
drift      a Brownian path along a logarithmic design, κ per root decade: how far a law may stray where nothing was seen
"""

import math
from dataclasses import replace
from typing import Any

from fathom.errors import UserError
from fathom.scientist.expression import Call, Name, bits, parse
from fathom.scientist.noise import Noise
from fathom.scientist.priors import Prior
from fathom.scientist.world import Design, Theory

WIGGLE, LEVEL = "v", "d"
"""What the names of parameters begin with that bend a curve, and that set levels apart."""
BUMPS, BUMPS_OF_COUNTS, KNOTS, MAX_TERMS, GENERATED_NODES = 6, 3, 12, 120, 50_000


def _built(
    id: str, says: str, role: str, mean: str, params: dict[str, Prior], family: Noise, noise_scale: float
) -> Theory:
    noise = family
    if family.family == "poisson":
        mean = f"exp({mean})"
    elif family.discrete:
        mean = f"logistic({mean})"
    else:
        noise = Noise("normal", (parse("s"),))
        params = params | {"s": Prior("halfnormal", (noise_scale,))}
    tree = parse(mean, max_nodes=GENERATED_NODES)
    length = bits(tree) + 8.0 * sum(len(prior.args) for prior in params.values())
    return Theory(id, says, params, tree, noise, {}, length, 0.0, role)


def _sizes(outcome: dict[str, Any], family: Noise) -> tuple[float, float, float]:
    """Centre, spread and noise of the outcome; for counts, of its logit or logarithm."""
    if family.discrete:
        return 0.0, 2.0, 1.0
    return float(outcome["center"]), float(outcome["spread"]), float(outcome["noise"])


def null_theory(outcome: dict[str, Any], family: Noise) -> Theory:
    center, spread, noise = _sizes(outcome, family)
    return _built("T_null", "No design matters.", "null", "m", {"m": Prior("normal", (center, spread))}, family, noise)


def other_theory(designs: dict[str, Design], outcome: dict[str, Any], family: Noise) -> Theory:
    center, spread, noise = _sizes(outcome, family)
    params = {"m": Prior("normal", (center, spread))}
    terms = ["m"]

    def add(feature: str, size: float, letter: str = WIGGLE) -> None:
        if len(params) > MAX_TERMS:  # a world of many levels keeps its first deviations
            return
        name = f"{letter}{len(params)}"
        params[name] = Prior("normal", (0.0, size))
        terms.append(f"{name}*{feature}")

    bumps = BUMPS_OF_COUNTS if family.discrete else BUMPS
    slopes: list[str] = []
    shapes: list[str] = []
    for name, design in designs.items():
        if design.levels:
            continue
        inner, low, high = (
            (f"log({name})", math.log(design.low), math.log(design.high))
            if design.log
            else (name, design.low, design.high)
        )
        position = f"(({inner}-({low!r}))/({high - low!r}))"
        slopes.append(f"({position}-0.5)")
        width = 1 / (bumps - 1)
        shapes += [f"exp(0-(({position}-{k * width!r})/{width!r})**2/2)" for k in range(bumps)]
    for slope in slopes:
        add(slope, spread, "w")
    for shape in shapes:
        add(shape, spread)
    for name, design in designs.items():
        for level in design.levels if len(design.levels) > 1 else ():
            at = f"is({name},'{level}')"
            add(at, spread / 2, LEVEL)
            for shape in slopes + shapes if not family.discrete else slopes[:1]:
                add(f"{at}*{shape}", spread / 4, LEVEL)
    made = _built("T_other", "Something else: any smooth dependence.", "other", "+".join(terms), params, family, noise)
    return made if family.discrete else replace(made, sizes=sizes(spread, noise))


def sizes(spread: float, noise: float) -> tuple[tuple[float, float], ...]:
    """Factors of the prior deviations of wiggles and of levels, equally probable: from the outcome's down to a few noises."""
    least = min(4 * noise / spread, 1.0)
    middle = math.sqrt(least)
    return ((1.0, 1.0),) if least == 1 else ((1.0, 1.0), (middle, middle), (least, least), (least, middle))


def with_drift(theory: Theory, drift: dict[str, Any], designs: dict[str, Design]) -> Theory:
    """``theory`` plus a Brownian path along a design, started at its low end.

    Raises:
        UserError: not a logarithmic design, not a positive rate, or a theory whose mean is not affine in normal parameters.
    """
    along = drift.get("along")
    design = designs.get(along) if isinstance(along, str) else None
    if design is None or not design.log:
        raise UserError("drift goes `along` a numeric design with log: true")
    rate = drift.get("per_decade")
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 < rate < math.inf:
        raise UserError("drift needs `per_decade`: the standard deviation that one decade adds")
    if not theory.linear:
        raise UserError(
            "drift is for theories whose mean is affine in parameters with normal priors, with normal(s) noise"
        )
    low, high = math.log10(design.low), math.log10(design.high)
    width = (high - low) / KNOTS
    params = dict(theory.params)
    mean = theory.mean
    for knot in range(KNOTS):
        name = f"drift{knot}"
        params[name] = Prior("normal", (0.0, rate * math.sqrt(width)))
        step = parse(f"min(max((log10({along})-({low + knot * width!r}))/{width!r},0),1)")
        mean = Call("+", (mean, Call("*", (Name(name), step))))
    return replace(theory, params=params, mean=mean, drifts=True, bits=theory.bits + 16)
