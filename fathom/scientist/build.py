"""From a document to a world: every check, each with the line it is about, and the theories that always stand beside."""

from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from fathom.errors import UserError
from fathom.scientist.build_evidence import build_evidence
from fathom.scientist.build_theory import build_theory
from fathom.scientist.checks import finite, keys, named, trees
from fathom.scientist.document import Issues, digest, read_document
from fathom.scientist.expression import calls, names
from fathom.scientist.reference import null_theory, other_theory
from fathom.scientist.world import Design, Theory, World

Array = np.ndarray


def ready_made() -> dict[str, Path]:
    """The worlds inside the package, by name."""
    folder = Path(str(files("fathom") / "scientist" / "worlds"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(name: str | Path) -> Path:
    """A world file, a snapshot or the name of a ready-made world, as a path.

    Raises:
        UserError: there is none.
    """
    path = Path(name)
    if path.is_file():
        return path
    if str(name) in ready_made():
        return ready_made()[str(name)]
    raise UserError(f"{name} is no world file; ready-made worlds are {', '.join(ready_made())}")


def read(path: str | Path) -> World:
    """Read, check and freeze a world.

    Raises:
        UserError: the first thing that is wrong, with its line.
    """
    document, issues = read_document(find(path))
    world = build(document, issues)
    issues.check()
    assert world is not None
    return world


def lint(path: str | Path) -> list[str]:
    """Everything that is wrong with a world file, each as ``file:line: what``.

    Raises:
        UserError: there is no such file.
    """
    file = find(path)
    try:
        document, issues = read_document(file)
    except UserError as error:
        return [str(error)]
    build(document, issues)
    return issues.messages()


def build(document: dict[str, Any], issues: Issues) -> World | None:
    """A world from a document; None, and issues, if something is wrong."""
    top = keys(document, "", issues, ())
    for key in ("world", "outcome", "designs", "theories"):
        if key not in top:
            issues.add((), f"`{key}:` is missing")
    outcome = keys(top.get("outcome", {}), "outcome", issues, ("outcome",))
    name = outcome.get("name", "outcome")
    with issues.at("outcome"):
        named(name)
        for key in ("center", "spread", "noise"):
            if key in outcome:
                finite(outcome[key], f"the outcome's {key}", positive=key != "center")
    designs: dict[str, Design] = {}
    for key, given in (top.get("designs") or {}).items() if isinstance(top.get("designs"), dict) else ():
        with issues.at("designs", key):
            designs[key] = _design(named(key), keys(given, "design", issues, ("designs", key)))
    if not isinstance(top.get("theories", []), list):
        issues.add(("theories",), "`theories:` is a list")
        return None
    if not isinstance(top.get("designs"), dict):
        issues.add(("designs",), "`designs:` gives each design's levels, or its low and high")
    shared = trees(top.get("quantities") or {}, issues, ("quantities",))
    theories: list[Theory] = []
    for index, given in enumerate(top.get("theories") or []):
        path = ("theories", index)
        if (theory := build_theory(keys(given, "theory", issues, path), designs, name, issues, path)) is not None:
            theories.append(theory)
    _distinct([theory.id for theory in theories], issues)
    wanted = set().union(*(theory.quantities for theory in theories), shared)
    for index, theory in enumerate(theories):
        if missing := sorted(wanted - set(theory.quantities) - set(shared)):
            issues.add(("theories", index), f"theory {theory.id} does not say what {missing[0]} is under it")
    for quantity, tree in shared.items():
        for unknown in calls(tree) - {"mean"} | names(tree) - set(designs):
            issues.add(
                ("quantities", quantity), f"{unknown} is not known here: a quantity of all theories uses mean(...)"
            )
    columns, y, extra, sources, claims = build_evidence(top.get("evidence") or [], designs, name, wanted, issues)
    real = not any(theory.noise.discrete for theory in theories)
    if any(theory.noise.discrete == real for theory in theories):
        issues.add(("theories",), "theories of one world share one kind of outcome: real numbers, or counts")
    if real and not {"center", "spread", "noise"} <= outcome.keys():
        issues.add(("outcome",), "the outcome needs center, spread and noise: typical sizes, known before the evidence")
    if not real and any(value < 0 or value != int(value) for value in y):
        issues.add(("evidence",), f"{name} is a count: whole numbers from 0")
    weight = top.get("prior_of_other", 0.05)
    with issues.at("prior_of_other"):
        if not 0 < finite(weight, "prior_of_other") < 1:
            raise UserError("prior_of_other lies between 0 and 1, both excluded: other theories always exist")
    if not top.get("theories"):
        issues.add(("theories",), "a world has at least one theory")
    if issues.found:
        return None
    family = theories[0].noise
    if not any(theory.role == "null" for theory in theories):
        theories.append(null_theory(outcome, family))
    weights = _weights(theories, [item for item in top["theories"] if isinstance(item, dict)], issues)
    if issues.found:
        return None
    whole = [
        replace(theory, prior=(1 - weight) * each / sum(weights))
        for theory, each in zip(theories, weights, strict=True)
    ]
    whole.append(replace(other_theory(designs, outcome, family), prior=float(weight)))
    frozen = {"version": 1, **document}
    return World(
        frozen, digest(frozen), name, designs, tuple(whole), shared, columns, y, extra, tuple(sources), tuple(claims)
    )


def _weights(theories: list[Theory], given: list[dict[str, Any]], issues: Issues) -> list[float]:
    """Each theory's weight before the evidence: as given, or 2^-bits where bits are given, or equal.

    A generated null theory weighs as much as the named ones do on average, or by its bits.
    """
    for key in ("prior", "bits"):
        number = sum(key in item for item in given)
        if 0 < number < len(given):
            issues.add(("theories",), f"give every theory `{key}`, or none")
        elif number:
            if key == "prior":
                weights = [theory.prior for theory in theories if theory.prior > 0]
                return weights + [sum(weights) / len(weights)] * (len(theories) - len(weights))
            least = min(theory.bits for theory in theories)
            return [2.0 ** (least - theory.bits) for theory in theories]
    return [1.0] * len(theories)


def _distinct(ids: list[str], issues: Issues) -> None:
    for index, each in enumerate(ids):
        if each in ids[:index] or each in ("T_null", "T_other"):
            issues.add(("theories", index), f"the name {each} is taken")


def _design(name: str, given: dict[str, Any]) -> Design:
    if "levels" in given:
        levels = given["levels"]
        if not isinstance(levels, list) or len(levels) < 1 or not all(isinstance(level, str) for level in levels):
            raise UserError(f"the levels of {name} are a list of texts")
        if len(set(levels)) != len(levels) or len(levels) > 50:
            raise UserError(f"the levels of {name} must differ, 50 at most")
        return Design(name, levels=tuple(levels), unit=str(given.get("unit", "")))
    low, high = (finite(given.get(key), f"{name}'s {key}") for key in ("low", "high"))
    log = given.get("log", False)
    if low >= high or (log and low <= 0) or not isinstance(log, bool):
        raise UserError(f"{name} needs low below high, and both positive where log is true")
    return Design(name, low=low, high=high, log=log, unit=str(given.get("unit", "")))
