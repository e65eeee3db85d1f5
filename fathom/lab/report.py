"""The report: runs and sweeps compared in one HTML file that opens offline, on a phone or a desk, by day or night.

``write_report`` reads run folders and nothing else, so the same folders give the same bytes. Page, style and scripts are in
assets/report*; report_data.py has what the scripts draw, and every number drawn stands in a table of the page too.
"""

from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from fathom.errors import UserError
from fathom.lab import figures, report_data, report_sweep
from fathom.lab.compare import difference, flags, headline
from fathom.lab.report_html import NONE, Html, cards, chart, details, number, section, table
from fathom.lab.runs import Run, read_runs
from fathom.train.config import to_dict
from fathom.train.dynamics import DEFINITIONS

TABLE_ROWS = 40
MAPS = 8
"""Runs whose mean weights are given in tables."""


def write_report(runs: list[Path], out: Path) -> Path:
    """Compare ``runs`` (run folders and sweeps) in the HTML file ``out``, made or replaced with its folders; return ``out``.

    Raises:
        UserError: no run, a folder that is neither, a damaged file in one, or ``out`` cannot be written.
    """
    given = report_sweep.read_given(runs)
    page = render(read_runs(given.runs), *report_sweep.sections(given.outcomes)[:2])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"report {out} cannot be written: {error.strerror}") from None
    return out


def _comparison(runs: list[Run]) -> str:
    rows = []
    for run in runs:
        swatch = f'<span class="swatch" style="background:{figures.COLOURS[run.rule]}"></span>'
        rows.append([
            Html(swatch + escape(run.label)), number(run.val_loss),
            "baseline" if run.rule == "prenorm" else number(difference(run, runs), "+.4f"),
            f"{1e3 * run.step_seconds:,.1f}", f"{run.tokens_per_second:,.0f}", run.rule, f"{run.num_parameters:,}",
            f"{run.tokens:,}", run.config.seed,
        ])  # fmt: skip
    head = [
        "run",
        "validation loss",
        "to PreNorm",
        "median step, ms",
        "tokens/s",
        "rule",
        "parameters",
        "tokens",
        "seed",
    ]
    return table(head, rows, "Losses in nats per token; below zero is better than PreNorm", shown=True)


def _losses(runs: list[Run]) -> str:
    steps = sorted({row["step"] for run in runs for row in run.val})
    steps = steps[:: max(1, -(-len(steps) // TABLE_ROWS))]
    losses = {run.label: {row["step"]: row["loss"] for row in run.val} for run in runs}
    seconds = {run.label: run.seconds() for run in runs}
    by_step = [[f"{step:,}", *(number(losses[run.label].get(step)) for run in runs)] for step in steps]
    by_time = [
        [
            f"{step:,}",
            *(number(seconds[run.label].get(step) if step in losses[run.label] else None, ",.1f") for run in runs),
        ]
        for step in steps
    ]
    names = [run.label for run in runs]
    fall = "; ".join(
        f"{run.label} from {run.val[0]['loss']:.2f} to {run.val[-1]['loss']:.2f} in {seconds[run.label][run.steps]:,.0f} seconds"
        for run in runs
        if run.val
    )
    # Two tables, so that a phone can show one of them.
    return cards(
        chart(
            "loss", "Training and validation loss", f"Line chart of losses. Validation loss: {fall}.",
            "Strong: validation loss. Faint: training loss of each step's batch, of long runs as means over stretches. What lies "
            "above the first validation is cut off. Drag to enlarge a part, double-click to see all; seconds are of training "
            "steps alone.",
            table(["step", *names], by_step, "Validation loss, nats per token")
            + table(["step", *names], by_time, "Seconds of training when each validation was done"),
        )
    )  # fmt: skip


def _mean_weights(run: Run) -> str:
    assert run.depth is not None
    columns, places = report_data.place([site["sources"] for site in run.depth["sites"]])
    rows = []
    for site, at in zip(run.depth["sites"], places, strict=True):
        cells = [""] * len(columns)
        for column, weight in zip(at, site["weights"], strict=True):
            cells[column] = f"{weight:.3f}"
        rows.append([site["name"], f"{site['effective_sources']:.2f}", f"{site['entropy_nats']:.3f}", *cells])
    head = ["site", "effective sources", "entropy, nats", *columns]
    caption = f"{run.label}: mean weights by source, over {run.depth['tokens']:,} tokens"
    return details(f"The numbers of {run.label}", table(head, rows, caption))


def _reads(readers: list[Run]) -> str:
    text = (
        "Every sublayer of an AttnRes network chooses, token by token, how much of each earlier source it reads. Choose a token "
        "of a validation sentence to see what it reads, and a row of the map for one site."
    )
    panel = '<div id="reads" class="open panels"></div>'
    return section(
        "What each layer reads", f"<p>{text}</p>", panel, *map(_mean_weights, readers[:MAPS])
    )  # fmt: skip


def _mixing() -> str:
    text = (
        "Any residual rule as one matrix over depth (section 6 of the paper): row by row, how much of the embedding and of each "
        "sublayer's output is in what a site reads. PreNorm's is all ones."
    )
    return section("Depth mixing", f"<p>{text}</p>", '<div id="mixing" class="open panels"></div>')


def _magnitudes(runs: list[Run]) -> str:
    made = []
    for quantity in ("output_magnitude", "gradient_magnitude"):
        columns = [[layer[quantity] for layer in run.depth["layers"]] for run in runs if run.depth is not None]
        names = [run.label for run in runs if run.depth is not None]
        rows = [
            [str(layer + 1), *(f"{column[layer]:#.4g}" if layer < len(column) else NONE for column in columns)]
            for layer in range(max(map(len, columns)))
        ]
        ends = "; ".join(
            f"{name} from {column[0]:.3g} in the first layer to {column[-1]:.3g} in the last"
            for name, column in zip(names, columns, strict=True)
        )
        title = quantity.replace("_", " ").capitalize()
        made.append(
            chart(
                quantity.replace("_", "-"), f"{title} by depth", f"Line chart of the {title.lower()} by decoder layer: {ends}.",
                f"{title}: {DEFINITIONS[quantity]}.".replace("``", ""), table(["decoder layer", *names], rows, title),
            )
        )  # fmt: skip
    return cards(*made)


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _by_run(values: list[dict[str, Any]], runs: list[Run], what: str, *, shown: bool) -> list[str]:
    """A table of the keys whose values differ between runs, and one of those that they share, open if ``shown``."""
    keys = list(dict.fromkeys(key for flat in values for key in flat))
    column = {key: [NONE if flat.get(key) is None else flat[key] for flat in values] for key in keys}
    apart = [[key, *column[key]] for key in keys if any(value != column[key][0] for value in column[key])]
    alike = [[key, column[key][0]] for key in keys if all(value == column[key][0] for value in column[key])]
    parts = []
    if apart:
        parts.append(
            table(["name", *(run.label for run in runs)], apart, f"{what} that differ", words=True, shown=True)
        )
    if alike:
        title = f"{what} shared by all runs" if len(runs) > 1 else what
        parts.append(details(title, table(["name", "value"], alike, title, words=True), opened=shown))
    return parts


def _origin(run: Run) -> dict[str, Any]:
    env = dict(run.env)
    commit, changed = env.pop("git_commit", None), env.pop("git_changed", None)
    command = env.pop("command", None)
    return {
        "command": " ".join(map(str, command)) if isinstance(command, list) else command,
        "commit": f"{commit}{' with uncommitted changes' if changed else ''}" if commit else None,
        "seed": run.config.seed,
        "corpus hash": run.data.get("corpus_hash"),
        "tokenizer sha256": run.tokenizer,
        **env,
    }


def _asset(name: str) -> str:
    return resources.files("fathom").joinpath(f"assets/{name}").read_text(encoding="utf-8")


def render(runs: list[Run], sweep_sections: list[str], sweep_charts: dict[str, Any]) -> str:
    """The page as one HTML document."""
    measured = [run for run in runs if run.depth is not None]
    readers = [run for run in measured if run.depth is not None and run.depth["sites"]]
    mixed = [run for run in runs if run.reads is not None]
    charts: dict[str, Any] = {"loss": report_data.losses(runs), **sweep_charts}
    sections = [section("Comparison", _comparison(runs)), *sweep_sections, section("Loss", _losses(runs))]
    if readers:
        sections.append(_reads(readers))
    if measured:
        charts["output-magnitude"] = report_data.magnitudes(measured, "output_magnitude")
        charts["gradient-magnitude"] = report_data.magnitudes(measured, "gradient_magnitude")
        sections.append(section("Magnitudes by depth", _magnitudes(measured)))
    if mixed:
        sections.append(_mixing())
    missing = [run.label for run in runs if run.depth is None]
    if missing:
        text = f"Not measured by depth (no depth.json): {', '.join(missing)}."
        sections.append(f'<p class="quiet">{escape(text)}</p>')
    settings = [_flatten(to_dict(run.config)) for run in runs]
    sections.append(section("Settings", *_by_run(settings, runs, "Settings", shown=False)))
    origins = [_origin(run) for run in runs]
    sections.append(section("Where the numbers come from", *_by_run(origins, runs, "Facts", shown=True)))
    return Template(_asset("report.html")).substitute(
        title=escape(", ".join(run.label for run in runs[:4]) + (" ..." if len(runs) > 4 else "")),
        headline=escape(headline(runs)),
        notes="\n".join(f'<p class="note">{escape(note)}</p>' for note in flags(runs)),
        body="\n".join(sections),
        style=_asset("uplot.min.css") + "\n" + _asset("report.css"),
        script="\n".join(map(_asset, ("uplot.min.js", "report-charts.js", "report-maps.js"))),
        data=report_data.payload(charts, readers, mixed),
    )
