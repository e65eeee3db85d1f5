"""From a theory's part of a document to a theory: priors, mean, noise, quantities, drift."""

from dataclasses import replace
from typing import Any

import numpy as np

from fathom.errors import UserError
from fathom.scientist import noise as noises
from fathom.scientist.checks import finite, keys, named, trees
from fathom.scientist.document import Issues
from fathom.scientist.expression import FUNCTIONS, Call, Name, Node, Number, affine, bits, calls, evaluate, names, parse
from fathom.scientist.noise import Noise
from fathom.scientist.priors import Prior
from fathom.scientist.reference import with_drift
from fathom.scientist.world import Design, Theory

Array = np.ndarray


def build_theory(
    given: dict[str, Any], designs: dict[str, Design], outcome: str, issues: Issues, path: tuple[str | int, ...]
) -> Theory | None:
    before = len(issues.found)
    for key in ("id", "params", "mean", "noise"):
        if key not in given:
            issues.add(path, f"a theory needs `{key}:`")
    if len(issues.found) > before:
        return None
    params: dict[str, Prior] = {}
    texts = given["params"] if isinstance(given["params"], dict) else {}
    if len(texts) > 12:
        issues.add((*path, "params"), "a theory may have 12 parameters")
    noise = None
    with issues.at(*path, "noise"):
        noise = _noise(str(given["noise"]), set(texts), designs)
    scale = noise.spread.id if noise is not None and isinstance(noise.spread, Name) else ""
    for key, text in texts.items():
        with issues.at(*path, "params", key):
            if key in designs or key == outcome:
                raise UserError(f"{key} is a design or the outcome already")
            params[named(key)] = prior_of(str(text), scale)
    mean: Node = Number(0.0)
    with issues.at(*path, "mean"):
        mean = parse(str(given["mean"]))
        _known(mean, set(texts) | set(designs), "a mean")
        _try(mean, params, designs)
    with issues.at(*path, "quantities"):
        quantities = trees(given.get("quantities") or {}, issues, (*path, "quantities"))
        for tree in quantities.values():
            _known(tree, set(texts) | set(designs), "a quantity", {"mean"})
    used = names(mean).union(*map(names, noise.args if noise else ()), *map(names, quantities.values()))
    for key in params.keys() - used if len(issues.found) == before else ():
        issues.add((*path, "params", key), f"{key} appears neither in the mean, the noise nor a quantity")
    length = bits(mean) + 8.0 * sum(len(prior.args) for prior in params.values())
    for argument in noise.args if noise else ():
        length += bits(argument)
    with issues.at(*path, "bits"):
        if given.get("bits", "auto") != "auto":
            length = finite(given["bits"], "bits")
    prior = 0.0
    with issues.at(*path, "prior"):
        if "prior" in given:
            prior = finite(given["prior"], "a prior", positive=True)
    role = given.get("role", "named") or "null"  # YAML reads a bare null as nothing
    if role not in ("named", "null"):
        issues.add((*path, "role"), "a role is named or null")
    if len(issues.found) > before or noise is None:
        return None
    theory = Theory(str(given["id"]), str(given.get("says", "")), params, mean, noise, quantities, length, prior, role)
    if "drift" in given and "beyond" in given:
        issues.add((*path, "beyond"), "give `drift` or `beyond`, not both")
    elif "drift" in given:
        with issues.at(*path, "drift"):
            return with_drift(theory, keys(given["drift"], "drift", issues, (*path, "drift")), designs)
    if "beyond" in given:
        with issues.at(*path, "beyond"):
            theory = _with_edge(theory, keys(given["beyond"], "beyond", issues, (*path, "beyond")), designs)
    choices = [prior.family == "choice" for prior in params.values()]
    if any(choices) and not all(choices):
        issues.add((*path, "params"), "choice(...) is for theories all of whose parameters are choices")
    return theory


def _with_edge(theory: Theory, beyond: dict[str, Any], designs: dict[str, Design]) -> Theory:
    budget = parse(str(beyond.get("budget", "")))
    if theory.noise.discrete:
        raise UserError("`beyond` is for real outcomes")
    for name in names(budget):
        if name not in designs or not designs[name].log:
            raise UserError(f"{name} in `beyond` is no design with log: true")
    _known(budget, set(designs), "`beyond`")
    if not names(budget):
        raise UserError("the `budget` of `beyond` is an expression of designs, such as 6*N*D")
    rate = finite(beyond["per_decade"], "per_decade", positive=True) if "per_decade" in beyond else None
    return replace(theory, edge=budget, edge_rate=rate, bits=theory.bits + bits(budget))


def _known(tree: Node, known: set[str], what: str, functions: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    for unknown in sorted(names(tree) - known):
        raise UserError(f"{unknown} in {what} is no parameter and no design")
    for unknown in sorted(calls(tree) - functions):
        raise UserError(f"{unknown}(...) is not a function of the language")


def _try(mean: Node, params: dict[str, Prior], designs: dict[str, Design]) -> None:
    """A text where a number is meant is found before any inference."""
    values: dict[str, Any] = {name: prior.draw(np.random.default_rng(0), 1)[0] for name, prior in params.items()}
    values |= {name: design.levels[0] if design.levels else design.low for name, design in designs.items()}
    if isinstance(evaluate(mean, dict.fromkeys(names(mean), 1.0) | values), str):
        raise UserError("a mean is a number, not a text")


def prior_of(text: str, scale: str) -> Prior:
    tree = parse(text)
    if not isinstance(tree, Call) or tree.keywords or tree.function in FUNCTIONS:
        raise UserError(f"{text!r} is not a prior such as normal(0, 1)")
    arguments, relative = list(tree.arguments), False
    if tree.function == "normal" and len(arguments) == 2 and scale and scale in names(arguments[1]):
        parts = affine(arguments[1], {scale})
        if parts is None or set(parts) != {scale}:
            raise UserError(f"a standard deviation relative to the noise is a number times {scale}")
        arguments[1], relative = parts[scale], True
    for argument in arguments:
        if names(argument):
            raise UserError(f"{sorted(names(argument))[0]} in a prior: its numbers must be numbers")
    return Prior(tree.function, tuple(float(evaluate(argument, {})) for argument in arguments), relative)


def _noise(text: str, params: set[str], designs: dict[str, Design]) -> Noise:
    tree = parse(text)
    if not isinstance(tree, Call) or tree.function not in noises.FAMILIES:
        raise UserError(f"{text!r} is not a noise; there are {', '.join(noises.FAMILIES)}")
    if len(tree.arguments) != noises.FAMILIES[tree.function] or tree.keywords:
        raise UserError(f"{tree.function} takes {noises.FAMILIES[tree.function]} arguments")
    for argument in tree.arguments:
        _known(argument, params | set(designs), "a noise")
    if tree.function == "student_t" and not (isinstance(tree.arguments[0], Number) and tree.arguments[0].value > 0):
        raise UserError("student_t's degrees of freedom are a positive number")
    return Noise(tree.function, tree.arguments)
