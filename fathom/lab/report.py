"""The report: runs compared in one HTML file that opens offline, without scripts, on a phone or a desk, by day or night.

``write_report`` reads run folders and nothing else, so the same folders give the same bytes.
"""

import base64
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from matplotlib.figure import Figure

from fathom.errors import UserError
from fathom.lab import figures
from fathom.lab.compare import difference, flags, headline
from fathom.lab.runs import Run, read_runs
from fathom.train.config import to_dict
from fathom.train.dynamics import DEFINITIONS

NONE = "–"
TABLE_ROWS = 40


def write_report(runs: list[Path], out: Path) -> Path:
    """Compare ``runs`` in the HTML file ``out`` (folders are made as needed, a file is replaced) and return ``out``.

    Raises:
        UserError: no run, a folder that is not a run, a damaged file in one, or ``out`` cannot be written.
    """
    page = render(read_runs(runs))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(page, encoding="utf-8")
    except OSError as error:
        raise UserError(f"report {out} cannot be written: {error.strerror}") from None
    return out


class Html(str):
    """Text that is HTML already."""


def _cell(value: Any) -> str:
    return value if isinstance(value, Html) else escape(str(value))


def _table(head: list[Any], rows: list[list[Any]], caption: str, *, words: bool = False, shown: bool = False) -> str:
    """A table whose first column heads its rows, in a box that scrolls by itself and takes the keyboard's focus."""
    top = "".join(f'<th scope="col">{_cell(value)}</th>' for value in head)
    body = "\n".join(
        f'<tr><th scope="row">{_cell(first)}</th>' + "".join(f"<td>{_cell(value)}</td>" for value in rest) + "</tr>"
        for first, *rest in rows
    )
    kind, of = "scroll open" if shown else "scroll", "words" if words else "numbers"
    return (
        f'<div class="{kind}" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f'<table class="{of}"><caption>{escape(caption)}</caption>\n'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _figure(figure: Figure, alt: str, caption: str, data: str) -> str:
    picture = base64.b64encode(figures.svg(figure).encode()).decode()
    width, height = (round(100 * inches) for inches in figure.get_size_inches())
    return (
        f'<figure><div class="plot"><img src="data:image/svg+xml;base64,{picture}" width="{width}" height="{height}" '
        f'alt="{escape(alt)}"></div>\n<figcaption>{escape(caption)}</figcaption>\n'
        f"<details><summary>The numbers</summary>\n{data}</details></figure>"
    )


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def _cards(*parts: str) -> str:
    return '<div class="cards">\n' + "\n".join(parts) + "\n</div>"


def _number(value: float | None, form: str = ".4f") -> str:
    """With a true minus sign, or a dash for None."""
    return NONE if value is None else format(value, form).replace("-", "−")


def _comparison(runs: list[Run]) -> str:
    rows = []
    for run in runs:
        swatch = f'<span class="swatch" style="background:{figures.COLOURS[run.rule]}"></span>'
        rows.append([
            Html(swatch + escape(run.label)), _number(run.val_loss),
            "baseline" if run.rule == "prenorm" else _number(difference(run, runs), "+.4f"),
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
    return _table(head, rows, "Losses in nats per token; below zero is better than PreNorm", shown=True)


def _losses(runs: list[Run]) -> str:
    steps = sorted({row["step"] for run in runs for row in run.val})
    steps = steps[:: max(1, -(-len(steps) // TABLE_ROWS))]
    losses = {run.label: {row["step"]: row["loss"] for row in run.val} for run in runs}
    seconds = {run.label: run.seconds() for run in runs}
    by_step = [[f"{step:,}", *(_number(losses[run.label].get(step)) for run in runs)] for step in steps]
    by_time = [
        [
            f"{step:,}",
            *(_number(seconds[run.label].get(step) if step in losses[run.label] else None, ",.1f") for run in runs),
        ]
        for step in steps
    ]
    names = [run.label for run in runs]
    fall = "; ".join(
        f"{run.label} from {run.val[0]['loss']:.2f} to {run.val[-1]['loss']:.2f} in {seconds[run.label][run.steps]:,.0f} seconds"
        for run in runs
        if run.val
    )
    cut = "What lies above the first validation is cut off; long training curves are drawn as means over stretches."
    return _cards(
        _figure(
            figures.loss_figure(runs, "steps"), f"Line chart of losses by optimizer step. Validation loss: {fall}.",
            f"Marked: validation loss. Thin: training loss of each step's batch. {cut}",
            _table(["step", *names], by_step, "Validation loss, nats per token"),
        ),
        _figure(
            figures.loss_figure(runs, "seconds"), f"Line chart of losses by training time. Validation loss: {fall}.",
            "The same losses against the time spent in training steps, without validation and checkpoints.",
            _table(["step", *names], by_time, "Seconds of training when each validation was done"),
        ),
    )  # fmt: skip


def _maps(run: Run) -> str:
    assert run.depth is not None
    cards = []
    kinds: tuple[tuple[Literal["attention", "mlp"], str], ...] = (("attention", "attention"), ("mlp", "MLP"))
    for kind, what in kinds:
        sites = [site for site in run.depth["sites"] if site["name"].endswith(kind)] + run.depth["sites"][-1:]
        sources = run.depth["sites"][-1]["sources"]
        rows = [
            [site["name"], f"{site['effective_sources']:.2f}", f"{site['entropy_nats']:.3f}"]
            + [f"{weight:.3f}" for weight in site["weights"]] + [""] * (len(sources) - len(site["weights"]))
            for site in sites
        ]  # fmt: skip
        named = max(zip(sites[-1]["weights"], sources, strict=True))
        widest = max(sites, key=lambda site: site["effective_sources"])
        cards.append(
            _figure(
                figures.depth_map(run.depth, kind, run.label),
                f"Heat map of the mean depth-attention weights before each {what} sublayer of {run.label}, and of the output. "
                f"The output reads most from the {named[1]}, {named[0]:.2f}; {widest['name']} reads most widely, "
                f"{widest['effective_sources']:.1f} effective sources.",
                f"{run.label}: the share of each source in what the {what} sublayer of each decoder layer reads, mean over "
                f"{run.depth['tokens']:,} tokens. A row adds up to one; grey is no source yet"
                + ("; a dot marks the running sum of an unfinished block." if run.rule == "block" else "."),
                _table(
                    ["site", "effective sources", "entropy, nats", *sources],
                    rows,
                    f"{run.label}: mean weights by source",
                ),
            )
        )
    return _cards(*cards)


def _magnitudes(runs: list[Run]) -> str:
    cards = []
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
        cards.append(
            _figure(
                figures.magnitude_figure(runs, quantity),
                f"Line chart of the {title.lower()} by decoder layer: {ends}.",
                f"{title}: {DEFINITIONS[quantity]}.",
                _table(["decoder layer", *names], rows, title),
            )
        )
    return _cards(*cards)


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
            _table(["name", *(run.label for run in runs)], apart, f"{what} that differ", words=True, shown=True)
        )
    if alike:
        title = f"{what} shared by all runs" if len(runs) > 1 else what
        table = _table(["name", "value"], alike, title, words=True)
        parts.append(f"<details{' open' if shown else ''}><summary>{escape(title)}</summary>\n{table}</details>")
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


def render(runs: list[Run]) -> str:
    """The page as one HTML document."""
    notes = "\n".join(f'<p class="note">{escape(note)}</p>' for note in flags(runs))
    measured = [run for run in runs if run.depth is not None]
    readers = [run for run in measured if run.depth is not None and run.depth["sites"]]
    sections = [_section("Comparison", _comparison(runs)), _section("Loss", _losses(runs))]
    if readers:
        text = "Every sublayer of an AttnRes network chooses, token by token, how much of each earlier source it reads."
        sections.append(_section("What each layer reads", f"<p>{text}</p>", *map(_maps, readers)))
    if measured:
        sections.append(_section("Magnitudes by depth", _magnitudes(runs)))
    missing = [run.label for run in runs if run.depth is None]
    if missing:
        text = f"Not measured by depth (no depth.json): {', '.join(missing)}."
        sections.append(f'<p class="quiet">{escape(text)}</p>')
    settings = [_flatten(to_dict(run.config)) for run in runs]
    sections.append(_section("Settings", *_by_run(settings, runs, "Settings", shown=False)))
    origins = [_origin(run) for run in runs]
    sections.append(_section("Where the numbers come from", *_by_run(origins, runs, "Facts", shown=True)))
    style = resources.files("fathom").joinpath("assets/report.css").read_text()
    body = "\n".join(sections)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Fathom: {escape(", ".join(run.label for run in runs))}</title>
<style>
{style}</style>
</head>
<body>
<main>
<header>
<h1>Fathom report</h1>
<p class="lead">{escape(headline(runs))}</p>
{notes}
</header>
{body}
<footer><p>Written by Fathom from the run folders alone; every number is in their metrics.jsonl and depth.json.</p></footer>
</main>
</body>
</html>
"""
