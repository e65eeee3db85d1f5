"""What the report's scripts draw, as one JSON value: curves, depth maps, mixing matrices, palettes.

charts     by key: x [{key, label, log}], y {label, log, ...}, series, bands (assets/report-charts.js says what each is)
readers    runs that attend over depth: columns, sites (weights of the mean token, their columns), sentences
mixing     runs whose mixing matrix was measured
viridis, diverging   the colours of maps, from the lowest value to the highest
"""

import json
from collections.abc import Iterable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_hex

from fathom.lab.figures import DASHES, Quantity, styles, thin
from fathom.lab.figures_sweep import look
from fathom.lab.runs import Run
from fathom.lab.scaling import Fitted, Points

MANY = 12
"""With more runs than this, curves are drawn from fewer points."""
_DASH: dict[Any, list[int]] = dict(zip(DASHES, ([], [7, 3], [2, 2], [9, 3, 2, 3]), strict=True))


def _rounded(values: Iterable[float], digits: int = 5) -> list[float]:
    return [float(f"{value:.{digits}g}") for value in values]


def _series(group: str, colour: str, x: dict[str, list[float]], y: Iterable[float], **how: Any) -> dict[str, Any]:
    drawn = {"told": True, "dash": [], "width": 2, "faint": False, "points": True, "line": True}
    return {"group": group, "colour": colour, "x": x, "y": _rounded(y), **drawn, **how}


def losses(runs: list[Run]) -> dict[str, Any]:
    """Training loss (thin) and validation loss of every run, against steps, tokens or seconds."""
    series = []
    for run in runs:
        style, seconds = styles(runs)[run.label], run.seconds()
        per_step = run.tokens / run.steps

        def x(steps: Iterable[float], seconds: dict[int, float] = seconds, per_step: float = per_step) -> Any:
            at = list(steps)
            spent = np.interp(at, list(seconds), list(seconds.values()))
            return {
                "steps": _rounded(at, 7), "tokens": _rounded((per_step * s for s in at), 7), "seconds": _rounded(spent)
            }  # fmt: skip

        steps, values = thin([row["step"] for row in run.train], [row["loss"] for row in run.train])
        if len(runs) > MANY:
            steps, values = steps[::4], values[::4]
        dash = _DASH[style.linestyle]
        series.append(
            _series(
                run.label, style.color, x(steps), values, width=1, faint=True, points=False, dash=dash, told=not run.val
            )
        )
        if run.val:
            at, loss = [row["step"] for row in run.val], [row["loss"] for row in run.val]
            series.append(_series(run.label, style.color, x(at), loss, dash=dash, points=len(at) <= 40))
    first = [row["loss"] for run in runs for row in run.val if row["step"]][:1]
    several = any(len([row for row in run.val if row["step"]]) > 1 for run in runs)
    top = max((next(r["loss"] for r in run.val if r["step"]) for run in runs if run.val), default=None)
    return {
        "x": [
            {"key": "steps", "label": "optimizer step", "log": False},
            {"key": "tokens", "label": "training tokens", "log": False},
            {"key": "seconds", "label": "seconds of training steps", "log": False},
        ],
        "y": {"label": "nats per token", "log": False, "choose": True, "top": top if first and several else None},
        "series": series,
    }  # fmt: skip


def magnitudes(runs: list[Run], quantity: Quantity) -> dict[str, Any]:
    """A magnitude by decoder layer of every run that was measured by depth."""
    series = []
    for run in runs:
        if run.depth is not None:
            style, values = styles(runs)[run.label], [layer[quantity] for layer in run.depth["layers"]]
            x = {"layer": [float(layer + 1) for layer in range(len(values))]}
            series.append(_series(run.label, style.color, x, values, dash=_DASH[style.linestyle]))
    output = quantity == "output_magnitude"
    positive = all(value > 0 for each in series for value in each["y"])
    return {
        "x": [{"key": "layer", "label": "decoder layer", "log": False}],
        "y": {
            "label": "RMS of the running sum" if output else "RMS of d loss / d MLP output",
            "log": not output and positive, "choose": positive, "zero": output,
        },
        "series": series,
    }  # fmt: skip


def laws(points: dict[str, Points], fitted: dict[str, Fitted], bands: dict[str, Any]) -> dict[str, Any]:
    """Measured losses, fitted laws, and the band of each law ({arm: (compute, low, high)})."""
    series, fills = [], []
    for arm, measured in points.items():
        colour, _ = look(arm, list(points))
        compute, low, high = bands[arm]
        x, law = {"compute": _rounded(compute)}, fitted[arm].law.loss(compute)
        for edge in (high, low):
            series.append(_series(arm, colour, x, edge, told=False, points=False, width=0))
        fills.append([len(series) - 2, len(series) - 1, f"{colour}2e"])
        series.append(_series(arm, colour, x, law, points=False))
        at = {"compute": _rounded(measured.compute)}
        series.append(_series(arm, colour, at, measured.losses, told=False, line=False))
    return {
        "x": [{"key": "compute", "label": "training compute, PFLOP/s-days", "log": True}],
        "y": {"label": "validation loss, nats per token", "log": False, "choose": True},
        "series": series,
        "bands": fills,
    }


def place(sites: list[list[str]]) -> tuple[list[str], list[list[int]]]:
    """The columns of a map, and each site's sources among them; a block still being summed stands where it will be."""
    columns = list(dict.fromkeys(name for site in sites for name in site if name != "partial"))
    places: list[list[int]] = []
    for site in sites:
        at: list[int] = []
        for name in site:
            at.append(at[-1] + 1 if name == "partial" else columns.index(name))
        places.append(at)
        columns += ["unfinished"] * (at[-1] + 1 - len(columns))
    return columns, places


def reader(run: Run) -> dict[str, Any]:
    """A run whose sites attend, for the map of what is read."""
    assert run.depth is not None
    sites = run.depth["sites"]
    columns, places = place([site["sources"] for site in sites])
    fits = run.reads is not None and run.reads["sources"] == [site["sources"] for site in sites]
    return {
        "label": run.label,
        "columns": columns,
        "sites": [
            {
                "name": site["name"], "columns": at, "weights": _rounded(site["weights"], 4),
                "effective": float(f"{site['effective_sources']:.4g}"),
                "partial": site["sources"][-1] == "partial",
            }
            for site, at in zip(sites, places, strict=True)
        ],
        "sentences": run.reads["sentences"] if run.reads is not None and fits else [],
    }  # fmt: skip


def mixings(runs: list[Run]) -> list[dict[str, Any]]:
    """Those of rules that mix first: PreNorm's is all ones."""
    ordered = sorted(runs, key=lambda run: run.rule == "prenorm")
    return [{"label": run.label, **run.reads["mixing"]} for run in ordered if run.reads is not None]


def _palette(name: str, size: int = 33) -> list[str]:
    return [to_hex(colour) for colour in matplotlib.colormaps[name](np.linspace(0, 1, size))]


def payload(charts: dict[str, Any], readers: list[Run], measured: list[Run]) -> str:
    """All of it as JSON that can stand in a <script>."""
    value = {
        "charts": charts, "readers": [reader(run) for run in readers], "mixing": mixings(measured),
        "viridis": _palette("viridis"), "diverging": _palette("RdBu_r"),
    }  # fmt: skip
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
