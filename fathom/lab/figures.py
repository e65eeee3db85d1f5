"""Static figures of runs: losses, depth-attention maps, magnitudes by depth; drawn on axes, or each a figure of one panel.

A figure is 4.4 inches (317 points) wide with type of 9 to 10 points: legible on a phone at the phone's full width, and two
stand side by side on a desk. Colour tells the residual rule (Okabe and Ito's palette, distinct in the common deficiencies of
colour vision), the marker tells it again, and the dash pattern tells runs of one rule apart. Paper and ink follow the
reader's light or dark colour scheme.
"""

import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any, Literal, NamedTuple, get_args

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, ScalarFormatter

from fathom.lab.runs import Run
from fathom.models.config import Rule

COLOURS = {"prenorm": "#7a7a7a", "block": "#0072b2", "full": "#d55e00"}
MARKERS = {"prenorm": "o", "block": "s", "full": "^"}
# Four colours and seven markers: no two of the other rules share both.
for _rule, _colour, _marker in zip(
    (rule for rule in get_args(Rule) if rule not in MARKERS),
    cycle(("#00936b", "#c2609a", "#7b6fd0", "#a87000")),
    cycle("DvPX<>*"),
    strict=False,
):
    COLOURS[_rule], MARKERS[_rule] = _colour, _marker
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)))
POINTS = 300
INK = "#1d1f21"
SCHEMES = (
    "<style>svg { background: #ffffff; color: " + INK + " } "
    "@media (prefers-color-scheme: dark) { svg { background: #1d2125; color: #e8e8e4 } }</style>"
)
"""Paper and ink of an SVG document: the card's and the text's of the report's page."""

_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": "#7a7a7a",
    "axes.facecolor": "none",
    "axes.grid": True,
    "grid.color": "#808080",
    "grid.alpha": 0.22,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "svg.hashsalt": "fathom",
}


Quantity = Literal["output_magnitude", "gradient_magnitude"]


class Style(NamedTuple):
    """How one run is drawn in every figure."""

    color: str
    marker: str
    linestyle: Any


def styles(runs: list[Run]) -> dict[str, Style]:
    """The style of each run by its label."""
    dashes = {run.rule: cycle(DASHES) for run in runs}
    return {run.label: Style(COLOURS[run.rule], MARKERS[run.rule], next(dashes[run.rule])) for run in runs}


@contextmanager
def _axes(title: str, height: float = 3.2) -> Iterator[tuple[Figure, Axes]]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.4, height), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title)
        axes.set_axisbelow(True)
        yield figure, axes


def svg(figure: Figure) -> str:
    """The figure as an SVG document, light or dark as its reader is; the same figure gives the same text."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", dpi=200, metadata={"Date": None, "Creator": None})
    return buffer.getvalue().replace(INK, "currentColor").replace("<defs>", SCHEMES + "\n <defs>", 1)


def thin(x: Iterable[float], y: Iterable[float]) -> tuple[np.ndarray, np.ndarray]:
    """At most ``POINTS`` points: means over equal stretches of a longer curve."""
    xs, ys = np.fromiter(x, float), np.fromiter(y, float)
    if len(xs) <= POINTS:
        return xs, ys
    pieces = np.array_split(np.arange(len(xs)), POINTS)
    return np.array([xs[p].mean() for p in pieces]), np.array([ys[p].mean() for p in pieces])


def draw_losses(axes: Axes, runs: list[Run], against: Literal["steps", "seconds"], *, train: bool = True) -> None:
    """Training loss (thin, with ``train``) and validation loss (marked); what lies above the first validation is cut off."""
    look = styles(runs)
    for run in runs:
        style, seconds = look[run.label], run.seconds()

        def x(rows: list[dict[str, Any]], seconds: dict[int, float] = seconds) -> list[float]:
            return [row["step"] if against == "steps" else seconds[row["step"]] for row in rows]

        if train:
            axes.plot(*thin(x(run.train), (row["loss"] for row in run.train)), color=style.color, alpha=0.35, lw=0.9)
        axes.plot(
            x(run.val), [row["loss"] for row in run.val],
            color=style.color, linestyle=style.linestyle, marker=style.marker, markersize=4, lw=1.6, label=run.label,
        )  # fmt: skip
    validated = [[row["loss"] for row in run.val if row["step"]] for run in runs]
    if any(len(losses) > 1 for losses in validated):
        highest = max(losses[0] for losses in validated if losses)
        lowest = min(min(row["loss"] for row in [*(run.train if train else []), *run.val]) for run in runs if run.val)
        margin = 0.05 * (highest - lowest)
        if margin > 0:
            axes.set_ylim(lowest - margin, highest + margin)
    axes.set_xlabel("optimizer step" if against == "steps" else "seconds of training steps")
    axes.set_ylabel("nats per token")
    axes.legend()


def loss_figure(runs: list[Run], against: Literal["steps", "seconds"]) -> Figure:
    """One panel of ``draw_losses``."""
    with _axes(f"Loss against {against}") as (figure, axes):
        draw_losses(axes, runs, against)
    return figure


def draw_map(axes: Axes, depth: dict[str, Any], kind: Literal["attention", "mlp"], title: str) -> None:
    """Mean weights of the reads before one kind of sublayer, and of the output: sites down, sources across (Fig. 8).

    The colour scale is the same in every map: weights from 0 to 1 by their square root. A dot marks a block that was still
    being summed, empty places have no source.
    """
    last = depth["sites"][-1]
    rows = [site for site in depth["sites"] if site["name"].endswith(kind)] + [last]
    sources, num_sources = last["sources"], len(last["sources"])
    grid = np.full((len(rows), num_sources), np.nan)
    for row, site in zip(grid, rows, strict=True):
        row[: len(site["weights"])] = site["weights"]
    axes.set_title(title)
    axes.grid(False)
    axes.set_facecolor("#80808028")
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(grid), cmap="viridis", norm=PowerNorm(0.5, 0, 1),
        rasterized=grid.size > 2000,
    )  # fmt: skip
    partial = [(len(row["sources"]) - 0.5, y + 0.5) for y, row in enumerate(rows) if row["sources"][-1] == "partial"]
    if partial:
        axes.plot(*zip(*partial, strict=True), linestyle="none", marker=".", color="white", ms=6, mec="black", mew=0.5)
    axes.axhline(len(rows) - 1, color=INK, lw=1)
    axes.set_ylim(len(rows), 0)
    every = -(-len(rows) // 20)
    layers = range(0, len(rows) - 1, every)
    axes.set_yticks([y + 0.5 for y in [*layers, len(rows) - 1]], [*(str(y + 1) for y in layers), "output"])
    every = -(-num_sources // 12)
    shown = range(0, num_sources, every)
    axes.set_xticks([x + 0.5 for x in shown], ["emb" if x == 0 else str(x) for x in shown])
    axes.tick_params(length=0)
    numbered = sources[-1].split()[0] if num_sources > 1 else "source"
    axes.set_xlabel(f"source: embedding, then {numbered} 1 to {num_sources - 1}")
    axes.set_ylabel("decoder layer")
    figure = axes.get_figure(root=True)
    assert figure is not None
    bar = figure.colorbar(mesh, ax=axes, ticks=[0, 0.05, 0.2, 0.5, 1], shrink=0.9, aspect=26, pad=0.02)
    bar.ax.set_yticklabels(["0", ".05", ".2", ".5", "1"])
    bar.outline.set_visible(False)
    bar.set_label("mean weight")


def depth_map(depth: dict[str, Any], kind: Literal["attention", "mlp"], label: str) -> Figure:
    """One panel of ``draw_map``."""
    rows = sum(site["name"].endswith(kind) for site in depth["sites"]) + 1
    what = {"attention": "attention", "mlp": "MLP"}[kind]
    title = f"What {what} sublayers read: {label}"
    with _axes(title, height=min(6.5, 1.6 + 0.22 * rows)) as (figure, axes):
        draw_map(axes, depth, kind, title)
    return figure


def draw_magnitudes(axes: Axes, runs: list[Run], quantity: Quantity, look: dict[str, Style]) -> None:
    """One measured magnitude by decoder layer, for every run that has a depth.json; gradients on a logarithmic axis."""
    for run in runs:
        if run.depth is None:
            continue
        values = [layer[quantity] for layer in run.depth["layers"]]
        style = look[run.label]
        axes.plot(
            range(1, len(values) + 1), values,
            color=style.color, linestyle=style.linestyle, marker=style.marker, markersize=4, lw=1.4, label=run.label,
        )  # fmt: skip
    output = quantity == "output_magnitude"
    if output:
        axes.set_ylim(bottom=0)
    else:
        axes.set_yscale("log")
        if axes.get_ylim()[1] < 20 * axes.get_ylim()[0]:
            # Under a decade or so powers of ten alone would leave the axis without numbers.
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("RMS of the running sum" if output else "RMS of d loss / d MLP output")
    axes.legend()


def magnitude_figure(runs: list[Run], quantity: Quantity) -> Figure:
    """One panel of ``draw_magnitudes``."""
    title = "Output magnitude by depth" if quantity == "output_magnitude" else "Gradient magnitude by depth"
    with _axes(title) as (figure, axes):
        draw_magnitudes(axes, runs, quantity, styles(runs))
    return figure
