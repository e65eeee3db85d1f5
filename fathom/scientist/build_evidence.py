"""From the evidence of a document to rows and claims, every value checked against the designs."""

from typing import Any

import numpy as np

from fathom.errors import UserError
from fathom.scientist.build_theory import prior_of
from fathom.scientist.checks import finite, keys
from fathom.scientist.document import Issues
from fathom.scientist.expression import calls, names, parse
from fathom.scientist.world import Claim, Design

Array = np.ndarray


def build_evidence(
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
                claims.append(_claim(keys(item, "claim", issues, path), quantities))
            continue
        keys(item, "data", issues, path)
        with issues.at(*path):
            added = finite(item.get("noise", 0), "noise") if kind == "reported" else 0.0
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
                result = finite(row[outcome], f"row {number + 1}: {outcome}")
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
    otherwise = prior_of(str(item["otherwise"]), "")
    if otherwise.support != "real":
        raise UserError("`otherwise` is normal(...) or student_t(...): what is said regardless of the truth")
    reliability = item["reliability"]
    if not isinstance(reliability, list) or len(reliability) != 2:
        raise UserError("`reliability` is [a, b] of a beta distribution")
    first, second = (finite(each, "reliability", positive=True) for each in reliability)
    return Claim(
        str(item["who"]), about, finite(item["value"], "value"), finite(item["within"], "within", positive=True),
        otherwise, (first, second),
    )  # fmt: skip
