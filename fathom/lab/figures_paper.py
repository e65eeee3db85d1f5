"""The paper's figures drawn from one's own runs (arXiv 2603.15031): files figure-4, figure-5, figure-8 and mixing, SVG and PNG.

figure-4    loss against compute with fitted laws and their bands, of a sweep of several sizes
figure-5    (a) validation loss, (b) output magnitude and (c) gradient magnitude by decoder layer, in a row
figure-8    depth-attention weights before attention (left) and before MLPs (right), a row of panels for each run
mixing      depth-mixing matrices of trained runs, as Figure 9 shows them for four outputs
"""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from fathom.lab.figures import _STYLE, COLOURS, draw_losses, draw_magnitudes, draw_map, styles, svg
from fathom.lab.figures_mixing import draw_matrix
from fathom.lab.figures_sweep import draw_laws
from fathom.lab.report_sweep import Fit, fit, read_given
from fathom.lab.runs import Run, read_runs
from fathom.train.metrics import writing

ROWS = 4
"""Runs in one figure of maps or matrices, at most."""


def figure_5(runs: list[Run]) -> Figure:
    """Validation loss by step, and the magnitudes of the runs that were measured by depth."""
    measured = [run for run in runs if run.depth is not None]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(12.6 if measured else 4.4, 3.2), layout="constrained")
        axes = figure.subplots(1, 3 if measured else 1, squeeze=False)[0]
        look = styles(runs)
        draw_losses(axes[0], runs, "steps", train=False)
        axes[0].set_title("(a) Validation loss")
        for place, letter, quantity in ((1, "b", "output_magnitude"), (2, "c", "gradient_magnitude")):
            if measured:
                draw_magnitudes(axes[place], measured, quantity, look)  # type: ignore[arg-type]
                axes[place].set_title(f"({letter}) {quantity.replace('_', ' ').capitalize()}")
        for each in axes[1:]:
            if each.get_legend() is not None:
                each.get_legend().remove()
    return figure


def figure_8(runs: list[Run]) -> Figure:
    """Two panels a run: before attention, before MLPs; the output's read is the last row of each."""
    with matplotlib.rc_context(_STYLE):
        rows = max(len(run.depth["sites"]) for run in runs if run.depth is not None) // 2
        figure = Figure(figsize=(8.8, len(runs) * min(6.5, 1.6 + 0.22 * rows)), layout="constrained")
        grid = figure.subplots(len(runs), 2, squeeze=False)
        for line, run in zip(grid, runs, strict=True):
            assert run.depth is not None
            draw_map(line[0], run.depth, "attention", f"{run.label}, pre-attention")
            draw_map(line[1], run.depth, "mlp", f"{run.label}, pre-MLP")
    return figure


def mixing_figure(runs: list[Run]) -> Figure:
    """The mean mixing matrix of each run, from its reads.json."""
    import torch

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6 * len(runs), 4.2), layout="constrained")
        for axes, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
            assert run.reads is not None
            draw_matrix(axes, torch.tensor(run.reads["mixing"]["matrix"], dtype=torch.float64), run.label)
    return figure


def figure_4(law: Fit) -> Figure:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.4, 3.8), layout="constrained")
        axes = figure.add_subplot()
        draw_laws(axes, law.points, law.fitted, "PFLOP/s-days", law.bands)
        axes.set_title("Loss against compute")
    return figure


def write_figures(folders: list[Path], out: Path) -> list[Path]:
    """Draw what the runs and sweeps in ``folders`` have into folder ``out``; returns the files.

    Raises:
        UserError: as ``write_report``, or ``out`` cannot be written.
    """
    given = read_given(folders)
    runs = read_runs(given.runs)
    readers = [run for run in runs if run.depth is not None and run.depth["sites"]][:ROWS]
    mixed = [run for run in runs if run.reads is not None and run.rule in COLOURS][:ROWS]
    made = {"figure-5": figure_5(runs)}
    if readers:
        made["figure-8"] = figure_8(readers)
    if mixed:
        made["mixing"] = mixing_figure(mixed)
    law = fit(given.outcomes)
    if law is not None:
        made["figure-4"] = figure_4(law)
    files = []
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in sorted(made.items()):
            (out / f"{name}.svg").write_text(svg(figure), encoding="utf-8")
            figure.savefig(out / f"{name}.png", dpi=160, facecolor="white", metadata={"Software": None})
            files += [out / f"{name}.svg", out / f"{name}.png"]
    return files
