"""From a document to a world: every check, each with the line it is about, and the theories that always stand beside."""

import math
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from fathom.errors import UserError
from fathom.scientist import noise as noises
from fathom.scientist.document import Issues, digest, read_document
from fathom.scientist.expression import FUNCTIONS, Call, Name, Node, Number, affine, bits, calls, evaluate, names, parse
from fathom.scientist.noise import Noise
from fathom.scientist.priors import Prior
from fathom.scientist.reference import null_theory, other_theory, with_drift
from fathom.scientist.world import Claim, Design, Theory, World

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


_KEYS = {
    "": {"world", "outcome", "designs", "quantities", "theories", "evidence", "prior_of_other", "notes", "version"},
    "outcome": {"name", "center", "spread", "noise", "unit"},
    "design": {"levels", "low", "high", "log", "unit"},
    "theory": {"id", "says", "params", "mean", "noise", "quantities", "bits", "prior", "role", "drift"},
    "data": {"kind", "source", "file", "rows", "data", "sha256", "read_from", "noise"},
    "claim": {"kind", "who", "about", "value", "within", "otherwise", "reliability", "source"},
    "drift": {"along", "per_decade"},
}


def _keys(value: Any, kind: str, issues: Issues, path: tuple[str | int, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        issues.add(path, f"a {kind or 'world'} is given as names with values")
        return {}
    for key in value.keys() - _KEYS[kind]:
        issues.add((*path, key), f"{key} is not known here; there are {', '.join(sorted(_KEYS[kind]))}")
    return value


def _finite(value: Any, what: str, *, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{what} is a number: {value!r} is not")
    if positive and value <= 0:
        raise UserError(f"{what} must be positive: {value!r} is not")
    return float(value)


def build(document: dict[str, Any], issues: Issues) -> World | None:
    """A world from a document; None, and issues, if something is wrong."""
    top = _keys(document, "", issues, ())
    for key in ("world", "outcome", "designs", "theories"):
        if key not in top:
            issues.add((), f"`{key}:` is missing")
    outcome = _keys(top.get("outcome", {}), "outcome", issues, ("outcome",))
    name = outcome.get("name", "outcome")
    with issues.at("outcome"):
        _named(name)
        for key in ("center", "spread", "noise"):
            if key in outcome:
                _finite(outcome[key], f"the outcome's {key}", positive=key != "center")
    designs: dict[str, Design] = {}
    for key, given in (top.get("designs") or {}).items() if isinstance(top.get("designs"), dict) else ():
        with issues.at("designs", key):
            designs[key] = _design(_named(key), _keys(given, "design", issues, ("designs", key)))
    if not isinstance(top.get("theories", []), list):
        issues.add(("theories",), "`theories:` is a list")
        return None
    if not isinstance(top.get("designs"), dict):
        issues.add(("designs",), "`designs:` gives each design's levels, or its low and high")
    shared = _trees(top.get("quantities") or {}, issues, ("quantities",))
    theories: list[Theory] = []
    for index, given in enumerate(top.get("theories") or []):
        path = ("theories", index)
        if (theory := _theory(_keys(given, "theory", issues, path), designs, name, issues, path)) is not None:
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
    columns, y, extra, sources, claims = _evidence(top.get("evidence") or [], designs, name, wanted, issues)
    real = not any(theory.noise.discrete for theory in theories)
    if any(theory.noise.discrete == real for theory in theories):
        issues.add(("theories",), "theories of one world share one kind of outcome: real numbers, or counts")
    if real and not {"center", "spread", "noise"} <= outcome.keys():
        issues.add(("outcome",), "the outcome needs center, spread and noise: typical sizes, known before the evidence")
    if not real and any(value < 0 or value != int(value) for value in y):
        issues.add(("evidence",), f"{name} is a count: whole numbers from 0")
    weight = top.get("prior_of_other", 0.05)
    with issues.at("prior_of_other"):
        if not 0 < _finite(weight, "prior_of_other") < 1:
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


def _named(name: Any) -> str:
    tree = parse(name)
    if not isinstance(tree, Name) or name in FUNCTIONS or name == "mean":
        raise UserError(f"{name!r} is not a free name")
    return str(name)


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
    low, high = (_finite(given.get(key), f"{name}'s {key}") for key in ("low", "high"))
    log = given.get("log", False)
    if low >= high or (log and low <= 0) or not isinstance(log, bool):
        raise UserError(f"{name} needs low below high, and both positive where log is true")
    return Design(name, low=low, high=high, log=log, unit=str(given.get("unit", "")))


def _trees(given: Any, issues: Issues, path: tuple[str | int, ...]) -> dict[str, Node]:
    result: dict[str, Node] = {}
    for key, text in given.items() if isinstance(given, dict) else ():
        with issues.at(*path, key):
            result[_named(key)] = parse(str(text))
    return result


def _theory(
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
            params[_named(key)] = _prior(str(text), scale)
    mean: Node = Number(0.0)
    with issues.at(*path, "mean"):
        mean = parse(str(given["mean"]))
        _known(mean, set(texts) | set(designs), "a mean")
        _try(mean, params, designs)
    with issues.at(*path, "quantities"):
        quantities = _trees(given.get("quantities") or {}, issues, (*path, "quantities"))
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
            length = _finite(given["bits"], "bits")
    prior = 0.0
    with issues.at(*path, "prior"):
        if "prior" in given:
            prior = _finite(given["prior"], "a prior", positive=True)
    role = given.get("role", "named") or "null"  # YAML reads a bare null as nothing
    if role not in ("named", "null"):
        issues.add((*path, "role"), "a role is named or null")
    if len(issues.found) > before or noise is None:
        return None
    theory = Theory(str(given["id"]), str(given.get("says", "")), params, mean, noise, quantities, length, prior, role)
    if "drift" in given:
        with issues.at(*path, "drift"):
            return with_drift(theory, _keys(given["drift"], "drift", issues, (*path, "drift")), designs)
    finite = [prior.family == "choice" for prior in params.values()]
    if any(finite) and not all(finite):
        issues.add((*path, "params"), "choice(...) is for theories all of whose parameters are choices")
    return theory


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


def _prior(text: str, scale: str) -> Prior:
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


def _evidence(
    given: Any, designs: dict[str, Design], outcome: str, quantities: set[str], issues: Issues
) -> tuple[dict[str, Array], Array, Array, list[str], list[Claim]]:
    columns: dict[str, list[Any]] = {name: [] for name in designs}
    y: list[float] = []
    extra: list[float] = []
    sources: list[str] = []
    claims: list[Claim] = []
    for index, item in enumerate(given if isinstance(given, list) else []):
        path = ("evidence", index)
        kind = item.get("kind") if isinstance(item, dict) else None
        if kind not in ("measured", "reported", "claimed"):
            issues.add((*path, "kind"), "evidence is measured, reported or claimed")
            continue
        if kind == "claimed":
            with issues.at(*path):
                claims.append(_claim(_keys(item, "claim", issues, path), quantities))
            continue
        _keys(item, "data", issues, path)
        with issues.at(*path):
            added = _finite(item.get("noise", 0), "noise") if kind == "reported" else 0.0
            if (added <= 0) == (kind == "reported") or (kind == "measured" and "noise" in item):
                raise UserError(
                    "reported evidence has `noise`: the standard deviation that reporting adds; measured has none"
                )
            if not isinstance(item.get("data", []), list):
                raise UserError("`data` is a list of rows")
        for number, row in enumerate(item.get("data") or []):
            with issues.at(*path, "data", number):
                if not isinstance(row, dict) or set(row) - {"source"} != {*designs, outcome}:
                    raise UserError(f"row {number + 1} must give {', '.join([*designs, outcome])}, and may give source")
                values = {name: design.value(row[name]) for name, design in designs.items()}
                for name, design in designs.items():
                    if not design.levels and not design.low <= float(values[name]) <= design.high:
                        raise UserError(
                            f"row {number + 1}: {name} {values[name]:g} is outside {design.low:g} to {design.high:g}"
                        )
                result = _finite(row[outcome], f"row {number + 1}: {outcome}")
                for name in designs:
                    columns[name].append(values[name])
                y.append(result)
                extra.append(added)
                source = row.get("source", item.get("source", item.get("read_from", f"evidence {index + 1}")))
                sources.append(f"{source}, row {number + 1}")
    if len(y) > 10_000:
        issues.add(("evidence",), "a world may have 10,000 rows")
    arrays = {
        name: np.array(columns[name], dtype=object if design.levels else float) for name, design in designs.items()
    }
    return arrays, np.array(y, float), np.array(extra, float), sources, claims


def _claim(item: dict[str, Any], quantities: set[str]) -> Claim:
    if missing := {"who", "about", "value", "within", "otherwise", "reliability"} - item.keys():
        raise UserError(f"a claim needs {', '.join(sorted(missing))}")
    about = parse(str(item["about"]))
    for unknown in sorted((names(about) | calls(about)) - quantities - {"mean"}):
        raise UserError(f"{unknown} is not a quantity of this world")
    otherwise = _prior(str(item["otherwise"]), "")
    if otherwise.support != "real":
        raise UserError("`otherwise` is normal(...) or student_t(...): what is said regardless of the truth")
    reliability = item["reliability"]
    if not isinstance(reliability, list) or len(reliability) != 2:
        raise UserError("`reliability` is [a, b] of a beta distribution")
    first, second = (_finite(each, "reliability", positive=True) for each in reliability)
    return Claim(
        str(item["who"]), about, _finite(item["value"], "value"), _finite(item["within"], "within", positive=True),
        otherwise, (first, second),
    )  # fmt: skip
