"""Figures of depth-mixing matrices: Figure 9 of arXiv 2603.15031, and the matrix of a trained run."""

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from torch import Tensor

from fathom.lab.figures import _STYLE, _axes
from fathom.lab.table_5 import figure_9_matrices
from fathom.residuals.mixing import semiseparable_rank

NOTATION = {
    "Residual": [["1"], ["1", "1"], ["1", "1", "1"], ["1", "1", "1", "1"]],
    "AttnRes Full": [[f"φ(w{row},k{column})" for column in range(row)] for row in range(1, 5)],
    "AttnRes Block": [
        ["φ(w1,k0)"],
        ["φ(w2,k0)", "φ(w2,k1)"],
        ["φ(w3,k0)", "φ(w3,k1+k2)", "φ(w3,k1+k2)"],
        ["φ(w4,k0)", "φ(w4,k1+k2)", "φ(w4,k1+k2)", "φ(w4,k3)"],
    ],
}
"""The entries that the paper prints, un-normalised; the colours are those of random parameters, normalised."""


def _draw(axes: Axes, matrix: Tensor, words: list[list[str]] | None, *, digits: bool) -> None:
    grid = np.ma.masked_where(np.triu(np.ones(matrix.shape), 1) > 0, matrix.numpy())
    largest = float(np.abs(grid).max()) or 1.0
    axes.grid(False)
    mesh = axes.pcolormesh(grid, cmap="RdBu_r", norm=TwoSlopeNorm(0, -largest, largest), edgecolors="#80808055", lw=0.4)
    axes.set_ylim(len(grid), 0)
    axes.set_aspect("equal")
    axes.tick_params(length=0)
    for row in range(len(grid)) if words or digits else ():
        for column in range(row + 1):
            value = float(matrix[row, column])
            ink = "white" if abs(value) > 0.6 * largest else "#1d1f21"
            text = words[row][column] if words else f"{value:.2f}"
            size = 5.5 if words and len(text) > 8 else 7
            drawn = axes.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=ink, fontsize=size)
            drawn.set_in_layout(False)  # it stays inside its cell, and asking every one makes the layout slow
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.colorbar(mesh, ax=axes, shrink=0.75, pad=0.02).outline.set_visible(False)


def figure_9() -> Figure:
    """The depth-mixing matrices of five rules at L = 4 (blocks of 2, 2 streams), rows reads 1 .. L, columns v_0 .. v_{L-1}."""
    matrices = figure_9_matrices()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8.8, 5.6), layout="constrained")
        for axes, (name, matrix) in zip(figure.subplots(2, 3).flat, matrices.items(), strict=False):
            _draw(axes, matrix, NOTATION.get(name), digits=name not in NOTATION)
            axes.set_title(f"{name}: semiseparable rank {semiseparable_rank(matrix)}", fontsize=9)
            axes.set_xticks([i + 0.5 for i in range(4)], [f"v{i}" for i in range(4)])
            axes.set_yticks([i + 0.5 for i in range(4)], [f"h{i + 1}" for i in range(4)])
        figure.axes[5].remove()
    return figure


def draw_matrix(axes: Axes, matrix: Tensor, title: str) -> None:
    """The mean depth-mixing matrix [L+1, L+1] of a run, the output's read last."""
    sites = len(matrix)
    axes.set_title(title)
    _draw(axes, matrix, None, digits=sites <= 9)
    shown = range(0, sites, -(-sites // 12))
    axes.set_xticks([i + 0.5 for i in shown], ["emb" if i == 0 else str(i) for i in shown])
    axes.set_yticks([i + 0.5 for i in shown], ["out" if i == sites - 1 else str(i + 1) for i in shown])
    axes.set_xlabel("source: embedding, then output 1 to L")
    axes.set_ylabel("read of sublayer")


def mixing_figure(matrix: Tensor, label: str) -> Figure:
    """One panel of ``draw_matrix``."""
    with _axes(f"Depth mixing: {label}", height=4.2) as (figure, axes):
        draw_matrix(axes, matrix, f"Depth mixing: {label}")
    return figure
