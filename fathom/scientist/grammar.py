"""Theories from a grammar: a law along one design, what each level changes, what other designs add, noise and drift.

    theory  =  law  level*  design*  noise  drift
    law     =  constant | power | power with curvature | power that breaks in the middle
    level   =  no effect | an offset | an offset and a slope of its own        (of each level but the first)
    design  =  no effect | a slope                                              (of each further numeric design)
    noise   =  normal | student_t(4)                                            drift  =  none | along the law

The prior of a theory halves with each bit: two for a parameter (what its values cost, the evidence says). Up to 500 theories
are written out, all of them; above, a sampler trained by trajectory balance finds those that the evidence favours
(gflownet.py), and those it finds are written out.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fathom.errors import UserError
from fathom.scientist.build import build
from fathom.scientist.build_theory import build_theory
from fathom.scientist.document import Issues
from fathom.scientist.fitting import fit
from fathom.scientist.sampler import LADDER
from fathom.scientist.world import World

Document = dict[str, Any]
Choice = tuple[int, ...]
MOST, BITS = 500, 2
"""Theories that are enumerated, and the bits of a parameter; drift has its own (reference.py)."""
_KEYS = {"law", "levels", "noises", "drift"}


@dataclass(frozen=True)
class Option:
    """One way to fill a place of the grammar."""

    label: str
    params: dict[str, str]
    terms: tuple[str, ...]
    noise: str = ""
    drift: bool = False


@dataclass(frozen=True)
class Grammar:
    """The places of the grammar for one world's document, each with its options."""

    document: Document
    slots: tuple[tuple[Option, ...], ...]

    @property
    def count(self) -> int:
        return math.prod(map(len, self.slots))

    def choices(self) -> Iterator[Choice]:
        return itertools.product(*(range(len(slot)) for slot in self.slots))

    def theory(self, choice: Choice) -> Document:
        """The part of a world file that says theory ``choice``."""
        picked = [slot[index] for slot, index in zip(self.slots, choice, strict=True)]
        params = {name: prior for option in picked for name, prior in option.params.items()}
        made: Document = {
            "id": "-".join(option.label for option in picked if option.label), "params": params,
            "mean": " + ".join(term for option in picked for term in option.terms),
            "noise": next(option.noise for option in picked if option.noise), "bits": BITS * len(params),
        }  # fmt: skip
        if not any(choice):
            made["role"] = "null"
        if any(option.drift for option in picked):
            made["drift"] = {"along": self.document["grammar"]["law"], "per_decade": self.document["grammar"]["drift"]}
        return made

    def world(self, choices: list[Choice]) -> Document:
        """The world file with these theories in place of the grammar."""
        rest = {key: value for key, value in self.document.items() if key not in ("grammar", "theories")}
        return rest | {"theories": [self.theory(choice) for choice in choices]}


def grammar(document: Document) -> Grammar:
    """The grammar of a world file that has `grammar:` in place of `theories:`.

    Its keys: `law`, a design with log: true; `levels`, a design whose first level is the baseline; `noises`, of normal and
    student_t; `drift`, per decade. All but `law` may be left out.

    Raises:
        UserError: something is missing or wrong.
    """
    given, designs, outcome = document.get("grammar"), document.get("designs"), document.get("outcome")
    if not isinstance(given, dict) or not isinstance(designs, dict) or not isinstance(outcome, dict):
        raise UserError("a world that grows has `grammar:`, `designs:` and `outcome:`")
    if unknown := sorted(given.keys() - _KEYS):
        raise UserError(f"{unknown[0]} is not known in `grammar:`; there are {', '.join(sorted(_KEYS))}")
    if {"center", "spread", "noise"} - outcome.keys():
        raise UserError("the outcome of a grammar needs center, spread and noise")
    law = given.get("law")
    if law not in designs or designs[law].get("log") is not True:
        raise UserError("`law` of the grammar is a design with log: true")
    spread, noise = float(outcome["spread"]), float(outcome["noise"])
    low, high = math.log(designs[law]["low"]), math.log(designs[law]["high"])
    x = f"(log({law})/{(high - low) / 2:.6g} - {(high + low) / (high - low):.6g})"  # -1 to 1 over the design
    level = f"normal({float(outcome['center']):g}, {spread:g})"
    slope, bend = f"normal(0, {spread / 2:g})", f"normal(0, {spread / 8:g})"
    power = {"a": level, "b": slope}
    slots: list[tuple[Option, ...]] = [(
        Option("constant", {"a": level}, ("a",)), Option("power", power, ("a", f"b*{x}")),
        Option("curve", power | {"c": bend}, ("a", f"b*{x}", f"c*{x}**2")),
        Option("break", power | {"c": bend}, ("a", f"b*{x}", f"c*max({x}, 0)")),
    )]  # fmt: skip
    small = f"normal(0, {max(10 * noise, spread / 20):g})"
    groups = given.get("levels")
    if groups is not None:
        if groups not in designs or "levels" not in designs[groups]:
            raise UserError("`levels` of the grammar is a design with levels")
        for number, name in enumerate(designs[groups]["levels"][1:], 1):
            at = f"is({groups}, '{name}')"
            offset = {f"o{number}": small}
            slots.append((
                Option("", {}, ()), Option(f"{name}+", offset, (f"o{number}*{at}",)),
                Option(f"{name}++", offset | {f"t{number}": small}, (f"o{number}*{at}", f"t{number}*{at}*{x}")),
            ))  # fmt: skip
    for name, design in designs.items():
        if name not in (law, groups) and "levels" not in design:
            inner = f"log({name})" if design.get("log") else name
            ends = [math.log(design[k]) if design.get("log") else float(design[k]) for k in ("low", "high")]
            place = f"({inner}/{(ends[1] - ends[0]) / 2:.6g} - {(ends[1] + ends[0]) / (ends[1] - ends[0]):.6g})"
            slots.append((Option("", {}, ()), Option(name, {f"g_{name}": small}, (f"g_{name}*{place}",))))
    scale = {"s": f"root_inverse_gamma(1, {noise**2:g})"}
    noises = given.get("noises", ["normal"])
    known = {"normal": Option("", scale, (), "normal(s)"), "student_t": Option("tails", scale, (), "student_t(4, s)")}
    if not isinstance(noises, list) or not noises or set(noises) - known.keys() or len(set(noises)) < len(noises):
        raise UserError("`noises` of the grammar are normal, student_t or both")
    slots.append(tuple(known[name] for name in noises))
    if "drift" in given:
        slots.append((Option("", {}, ()), Option("drift", {}, (), drift=True)))
    return Grammar(document, tuple(slots))


def weigher(given: Grammar) -> Callable[[Choice], float]:
    """The log of prior times evidence of any theory of the grammar, up to a constant, each computed once.

    Drift and tails together, and more than twelve parameters, are no theories that can be fitted: their weight is 0.
    """
    base = _built(given.world([tuple(0 for _ in given.slots)]))
    found: dict[Choice, float] = {}

    def weight(choice: Choice) -> float:
        if choice not in found:
            theory = given.theory(choice)
            if ("drift" in theory and "student_t" in theory["noise"]) or len(theory["params"]) > 12:
                found[choice] = -math.inf
            else:
                issues = Issues("grammar", {})
                made = build_theory(theory, base.designs, base.outcome, issues, ())
                issues.check()
                assert made is not None
                evidence = fit(replace(base, theories=(made,)), 0, LADDER[0]).log_evidence
                found[choice] = evidence - made.bits * math.log(2)
        return found[choice]

    return weight


def _built(document: Document) -> World:
    issues = Issues("grammar", {})
    world = build(document, issues)
    issues.check()
    assert world is not None
    return world
