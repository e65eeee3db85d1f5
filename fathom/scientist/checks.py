"""What every part of a world file is checked for: known keys, finite numbers, free names, expressions that parse."""

import math
from typing import Any

from fathom.errors import UserError
from fathom.scientist.document import Issues
from fathom.scientist.expression import FUNCTIONS, Name, Node, parse

KEYS = {
    "": {"world", "outcome", "designs", "quantities", "theories", "evidence", "prior_of_other", "notes", "version"},
    "outcome": {"name", "center", "spread", "noise", "unit"},
    "design": {"levels", "low", "high", "log", "unit"},
    "theory": {"id", "says", "params", "mean", "noise", "quantities", "bits", "prior", "role", "drift", "beyond"},
    "data": {"kind", "source", "file", "rows", "data", "sha256", "read_from", "noise"},
    "claim": {"kind", "who", "about", "value", "within", "otherwise", "reliability", "source"},
    "drift": {"along", "per_decade"},
    "beyond": {"budget", "per_decade"},
}


def keys(value: Any, kind: str, issues: Issues, path: tuple[str | int, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        issues.add(path, f"a {kind or 'world'} is given as names with values")
        return {}
    for key in value.keys() - KEYS[kind]:
        issues.add((*path, key), f"{key} is not known here; there are {', '.join(sorted(KEYS[kind]))}")
    return value


def finite(value: Any, what: str, *, positive: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{what} is a number: {value!r} is not")
    if positive and value <= 0:
        raise UserError(f"{what} must be positive: {value!r} is not")
    return float(value)


def named(name: Any) -> str:
    tree = parse(name)
    if not isinstance(tree, Name) or name in FUNCTIONS or name == "mean":
        raise UserError(f"{name!r} is not a free name")
    return str(name)


def trees(given: Any, issues: Issues, path: tuple[str | int, ...]) -> dict[str, Node]:
    result: dict[str, Node] = {}
    for key, text in given.items() if isinstance(given, dict) else ():
        with issues.at(*path, key):
            result[named(key)] = parse(str(text))
    return result
