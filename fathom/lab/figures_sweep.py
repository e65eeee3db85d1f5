"""Figures of sweeps: laws and their residuals, differences with intervals, depth-width maps; style as in figures.py."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from fathom.lab.ablations import Row
from fathom.lab.depth_width import Map
from fathom.lab.figures import COLOURS, MARKERS, _axes
from fathom.lab.intervals import percent
from fathom.lab.scaling import Fitted, Points

OTHER_COLOURS = tuple(dict.fromkeys(COLOURS.values()))[3:]
OTHER_MARKERS = ("D", "v", "P", "X", "<", ">")


def look(arm: str, arms: list[str]) -> tuple[str, str]:
    """Colour and marker of an arm: a rule's own where it has one, else by its place among the others."""
    others = [other for other in arms if other not in COLOURS]
    if arm in COLOURS:
        return COLOURS[arm], MARKERS[arm]
    place = others.index(arm)
    return OTHER_COLOURS[place % len(OTHER_COLOURS)], OTHER_MARKERS[place % len(OTHER_MARKERS)]


def _compute_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FormatStrFormatter("%.3g"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_laws(
    axes: Axes, points: dict[str, Points], fitted: dict[str, Fitted], unit: str, bands: dict[str, Any] | None = None
) -> None:
    """Measured losses, the fitted laws and, if given, their bands ({arm: (compute, low, high)}); compute on a log axis."""
    for arm, measured in points.items():
        colour, marker = look(arm, list(points))
        line = np.geomspace(measured.compute.min(), measured.compute.max(), 100)
        if bands is not None:
            axes.fill_between(*bands[arm], color=colour, alpha=0.15, lw=0)
        axes.plot(measured.compute, measured.losses, marker, color=colour, markersize=4)
        axes.plot(line, fitted[arm].law.loss(line), color=colour, lw=1.3, label=arm)
    _compute_axis(axes)
    axes.set_xlabel(f"training compute, {unit}")
    axes.set_ylabel("validation loss, nats per token")
    axes.legend()


def law_figure(points: dict[str, Points], fitted: dict[str, Fitted], unit: str) -> Figure:
    """One panel of ``draw_laws``, without bands."""
    with _axes("Loss against compute") as (figure, axes):
        draw_laws(axes, points, fitted, unit)
    return figure


def residual_figure(points: dict[str, Points], fitted: dict[str, Fitted], unit: str) -> Figure:
    """Measured minus fitted loss: a shape in it that arms share is the law's fault, not noise."""
    with _axes("Residuals of the laws") as (figure, axes):
        axes.axhline(0, color="#7a7a7a", lw=0.8)
        for arm, measured in points.items():
            colour, marker = look(arm, list(points))
            values = 1e3 * np.array(fitted[arm].residuals)
            axes.plot(measured.compute, values, color=colour, marker=marker, markersize=4, lw=1, label=arm)
        _compute_axis(axes)
        axes.set_xlabel(f"training compute, {unit}")
        axes.set_ylabel("residual, thousandths of a nat")
        axes.legend()
    return figure


def difference_figure(rows: list[Row], baseline: str, level: float) -> Figure:
    """Each arm's mean paired difference with its interval; hollow where the interval holds zero or there is none."""
    shown = [row for row in rows if row.difference is not None]
    many = len({row.case for row in rows}) > 1
    with _axes(f"Loss minus {baseline}'s", height=1.1 + 0.26 * len(shown)) as (figure, axes):
        axes.axvline(0, color="#7a7a7a", lw=0.8)
        names = list(dict.fromkeys(row.arm for row in rows))
        for y, row in enumerate(shown):
            difference = row.difference
            assert difference is not None
            colour, marker = look(row.arm, names)
            told = difference.verdict in ("lower", "higher")
            if difference.low is not None and difference.high is not None:
                axes.plot([difference.low, difference.high], [y, y], color=colour, lw=1.6)
            axes.plot(difference.mean, y, marker, color=colour, markersize=5, fillstyle="full" if told else "none")
        axes.set_yticks(range(len(shown)), [f"{row.case} {row.arm}" if many else row.arm for row in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.set_xlabel(f"nats per token, with {percent(level)} intervals")
    return figure


def heat_map(found: Map, low: float, high: float) -> Figure:
    """One arm's losses over shapes, on the colours of ``low`` .. ``high``; the lowest is framed, its rivals dotted."""
    grid = np.array([[np.nan if value is None else value for value in row] for row in found.losses])
    with _axes(f"Loss by shape: {found.arm}", height=3.4) as (figure, axes):
        axes.grid(False)
        mesh = axes.pcolormesh(np.ma.masked_invalid(grid), cmap="viridis_r", vmin=low, vmax=high)
        for y, row in enumerate(found.rows):
            for x, column in enumerate(found.columns):
                if np.isnan(grid[y, x]):
                    continue
                case = f"w{column:.3g}-h{row:.3g}"
                dark = grid[y, x] > (low + high) / 2
                text = f"{grid[y, x]:.3f}" + ("·" if case in found.rivals else "")
                weight = "bold" if case == found.best else "normal"
                ink = "white" if dark else "black"
                axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8, color=ink, weight=weight)
                if case == found.best:
                    axes.plot([x, x + 1, x + 1, x, x], [y, y, y + 1, y + 1, y], color="#d55e00", lw=2, clip_on=False)
        axes.set_xticks(np.arange(len(found.columns)) + 0.5, [f"{column:.3g}" for column in found.columns])
        axes.set_yticks(np.arange(len(found.rows)) + 0.5, [f"{row:.3g}" for row in found.rows])
        axes.tick_params(length=0)
        axes.set_xlabel("width / decoder layers")
        axes.set_ylabel("heads / decoder layers")
        bar = figure.colorbar(mesh, ax=axes, shrink=0.9, aspect=26, pad=0.02)
        bar.outline.set_visible(False)
        bar.set_label("nats per token")
    return figure
