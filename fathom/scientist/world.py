"""A world: designs, theories with priors, and evidence. Frozen: nothing here changes after it is read.

A theory says how the outcome's mean depends on a design, through parameters with priors, and how outcomes scatter about it.
Two theories always stand beside the named ones: one in which no design matters (``T_null``, unless a theory has
``role: null``) and a flexible one (``T_other``), a smooth curve along every numeric design with its own shape at every
level, whose evidence says whether the named theories miss something.

Free text (``world``, ``says``, ``notes``, ``source``) is carried along and never interpreted.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from fathom.errors import UserError
from fathom.scientist.document import canonical
from fathom.scientist.expression import Call, Name, Node, Text, affine, names
from fathom.scientist.noise import Noise
from fathom.scientist.priors import Prior

Array = np.ndarray


@dataclass(frozen=True)
class Design:
    """One thing that an experimenter sets: a number between bounds, or one of some levels."""

    name: str
    levels: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0
    log: bool = False
    unit: str = ""

    def value(self, given: Any) -> float | str:
        """``given`` as a value of this design.

        Raises:
            UserError: not a level, not a finite number, or not positive where a logarithm is taken.
        """
        if self.levels:
            if given not in self.levels:
                raise UserError(f"{self.name} is one of {', '.join(self.levels)}: {given!r} is not")
            return str(given)
        try:
            number = float(given)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(given, bool) or not math.isfinite(number):
            raise UserError(f"{self.name} is a number: {' '.join(repr(given).split())[:60]} is not")
        if self.log and number <= 0:
            raise UserError(f"{self.name} must be positive: {number:g} is not")
        return number

    def position(self, value: Any) -> Array:
        """Where a number stands along this design: decades if ``log``, else fractions of its range."""
        if self.log:
            return np.log10(np.asarray(value, float))
        return (np.asarray(value, float) - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Theory:
    id: str
    says: str
    params: dict[str, Prior]
    mean: Node
    noise: Noise
    quantities: dict[str, Node]
    bits: float
    prior: float
    """Weight before the evidence, normalised over the world's theories."""
    role: str = "named"
    """named, null or other."""
    drifts: bool = False
    """Whether a discrepancy grows outside the data."""
    sizes: tuple[tuple[float, float], ...] = ()
    """Of a flexible theory: equally probable factors of the prior deviations of what bends it and of what sets levels apart."""
    edge: Node | None = None
    """A budget beyond whose measured values this theory's predictions may stray (extrapolation.py)."""
    edge_rate: float | None = None
    """How far, per root decade; learned from its own past if not given."""

    @property
    def linear(self) -> bool:
        """Whether the mean is affine in parameters with normal priors: then everything is exact, given the noise scale."""
        return self.coefficients is not None

    @cached_property
    def coefficients(self) -> dict[str, Node] | None:
        scale = self.scale
        if self.noise.family != "normal" or isinstance(self.noise.spread, Call | Text):
            return None
        if isinstance(self.noise.spread, Name) and scale is None:
            return None
        inner = set(self.params) - {scale}
        if any(self.params[name].family != "normal" for name in inner) or scale in names(self.mean):
            return None
        return affine(self.mean, inner)

    @property
    def scale(self) -> str | None:
        """The parameter that is the noise scale, if one is."""
        spread = self.noise.spread
        return spread.id if isinstance(spread, Name) and spread.id in self.params else None


@dataclass(frozen=True)
class Claim:
    """Somebody said that a quantity has a value: true within an error, or else said regardless of the truth."""

    who: str
    about: Node
    value: float
    within: float
    otherwise: Prior
    reliability: tuple[float, float]


@dataclass(frozen=True)
class World:
    document: dict[str, Any]
    hash: str
    outcome: str
    designs: dict[str, Design]
    theories: tuple[Theory, ...]
    quantities: dict[str, Node]
    data: dict[str, Array]
    """Of measured and reported rows: the value of each design."""
    y: Array
    extra: Array
    """Standard deviation that a reporter adds, 0 for measured rows."""
    sources: tuple[str, ...]
    claims: tuple[Claim, ...]

    @property
    def snapshot(self) -> bytes:
        return canonical(self.document)

    def keeping(self, rows: Array) -> "World":
        """This world with some of its rows."""
        return replace(
            self, data={name: each[rows] for name, each in self.data.items()}, y=self.y[rows], extra=self.extra[rows],
            sources=tuple(self.sources[i] for i in rows),
        )  # fmt: skip

    def design(self, given: dict[str, Any]) -> dict[str, float | str]:
        """A full design from what a caller gives.

        Raises:
            UserError: a design is unknown, missing or has a wrong value.
        """
        for name in given:
            if name not in self.designs:
                raise UserError(f"{name} is not a design of this world; there are {', '.join(self.designs)}")
        if missing := [name for name in self.designs if name not in given]:
            raise UserError(f"the design lacks {' and '.join(missing)}")
        return {name: design.value(given[name]) for name, design in self.designs.items()}

    def outside(self, design: dict[str, Any]) -> float:
        """How far a design, or a part of one, lies outside the data: decades of a logarithmic design, of
        another the span of the data; inf at a level never seen, 0 if nothing was."""
        far = 0.0
        for name in design if len(self.y) else ():
            kind, seen = self.designs[name], self.data[name]
            if kind.levels:
                far = far if design[name] in seen else math.inf
            else:
                at, seen = float(kind.position(design[name])), kind.position(seen)
                span = 1.0 if kind.log else float(np.ptp(seen)) or 1.0
                far = max(far, (seen.min() - at) / span, (at - seen.max()) / span)
        return far
