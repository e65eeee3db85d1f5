"""The report of real small runs: its numbers are the runs', it is one valid offline file, and it compares only what compares."""

import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from fathom.errors import UserError
from fathom.lab import figures
from fathom.lab.compare import baseline, difference, flags, headline
from fathom.lab.report import write_report
from fathom.lab.runs import Run, read_runs
from fathom.train.config import to_dict

VOID = {"meta", "img", "br", "link", "input", "hr"}


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """The same runs, to be spoilt."""
    return shutil.copytree(made, tmp_path / "runs")


def folders(root: Path) -> list[Path]:
    return [root / rule for rule in ("prenorm", "block", "full")]


class Page(HTMLParser):
    """Elements and tables of a page; fails where tags do not nest or an attribute stands twice."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, dict[str, list[str]]] = {}
        """caption -> first cell -> the other cells"""
        self.words: list[str] = []
        self.feed(self.text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.row: list[str] = []
        if tag in ("th", "td", "caption"):
            self.cell = ""

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)
        self.cell = getattr(self, "cell", "") + data

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if tag == "caption":
            self.table = self.tables.setdefault(self.cell, {})
        if tag in ("th", "td"):
            self.row.append(self.cell)
        if tag == "tr":
            self.table[self.row[0]] = self.row[1:]

    def find(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


COMPARISON = "Losses in nats per token; below zero is better than PreNorm"


def test_the_comparison_is_the_runs_own_numbers(made: Path, tmp_path: Path) -> None:
    table = Page(write_report(folders(made), tmp_path / "new" / "report.html")).tables[COMPARISON]
    columns = dict(zip(table["run"], range(99), strict=False))
    summaries = {rule: json.loads((made / rule / "summary.json").read_text()) for rule in ("prenorm", "block", "full")}
    for rule, summary in summaries.items():
        cells = table[rule]
        assert cells[columns["validation loss"]] == f"{summary['val_loss']:.4f}"
        assert cells[columns["parameters"]] == f"{summary['parameters']:,}"
        assert cells[columns["tokens"]] == f"{summary['tokens']:,}" == "384"
        assert cells[columns["tokens/s"]] == f"{summary['tokens_per_second']:,.0f}"
        rows = [json.loads(line) for line in (made / rule / "metrics.jsonl").read_text().splitlines()]
        seconds = np.median([row["step_seconds"] for row in rows if row["kind"] == "train"])
        assert cells[columns["median step, ms"]] == f"{1e3 * seconds:,.1f}"
        if rule == "prenorm":
            assert cells[columns["to PreNorm"]] == "baseline"
        else:
            gap = summary["val_loss"] - summaries["prenorm"]["val_loss"]
            assert cells[columns["to PreNorm"]] == f"{gap:+.4f}".replace("-", "−")


def test_the_tables_behind_the_figures_are_the_recorded_numbers(made: Path, tmp_path: Path) -> None:
    tables = Page(write_report(folders(made), tmp_path / "report.html")).tables
    runs = read_runs(folders(made))
    losses = tables["Validation loss, nats per token"]
    assert losses["step"] == ["prenorm", "block", "full"]
    for row, step in enumerate((2, 4, 6)):
        assert losses[str(step)] == [f"{run.val[row]['loss']:.4f}" for run in runs]
    block = runs[1].depth
    assert block is not None
    weights = tables[f"block: mean weights by source, over {block['tokens']} tokens"]
    assert weights["site"][2:] == ["embedding", "block 1", "block 2", "block 3"]
    output = block["sites"][-1]
    assert weights["output"] == [f"{output['effective_sources']:.2f}", f"{output['entropy_nats']:.3f}"] + [
        f"{weight:.3f}" for weight in output["weights"]
    ]
    assert weights["layer 1 mlp"][4:] == ["", ""], "a source that does not exist yet has no weight"
    assert tables["Gradient magnitude"]["3"][1] == f"{block['layers'][2]['gradient_magnitude']:#.4g}"
    assert tables["Settings that differ"].keys() == {"name", "model.residual.rule", "model.residual.block_size"}
    env = json.loads((made / "block" / "env.json").read_text())
    facts = tables["Facts shared by all runs"]
    assert facts["machine"] == [env["machine"]] and facts["torch"] == [env["torch"]] and facts["seed"] == ["0"]
    assert facts["command"] == [" ".join(env["command"])] and facts["commit"][0].startswith(env["git_commit"] or "–")


def scripts(page: Page) -> list[str]:
    return re.findall(r"<script[^>]*>(.*?)</script>", page.text, re.DOTALL)


def test_the_page_is_one_valid_offline_file(made: Path, tmp_path: Path) -> None:
    out = write_report(folders(made), tmp_path / "report.html")
    page = Page(out)
    assert page.text.startswith('<!doctype html>\n<html lang="en">')
    markup = re.sub(r"<script.*?</script>", "", page.text, flags=re.DOTALL)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", markup)
    assert not page.find("link") and not any("src" in attributes for _, attributes in page.elements)
    (policy,) = (meta["content"] or "" for meta in page.find("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none';") and "http" not in policy
    assert len(page.find("figure")) == len(page.find("figcaption")) == 3
    for figure in page.find("figure"):
        named = {figure["aria-labelledby"], figure["aria-describedby"]}
        assert named <= {attributes.get("id") for _, attributes in page.elements}
    boxes = [attributes for attributes in page.find("div") if "scroll" in (attributes.get("class") or "")]
    assert boxes and all(box["tabindex"] == "0" and box["aria-label"] for box in boxes)
    assert "prefers-color-scheme: dark" in page.text and "width=device-width" in page.text
    again = write_report(folders(made), tmp_path / "again.html")
    assert again.read_bytes() == out.read_bytes()


def test_what_the_scripts_draw_is_the_recorded_numbers(made: Path, tmp_path: Path) -> None:
    page = Page(write_report(folders(made), tmp_path / "report.html"))
    data = json.loads(scripts(page)[0])
    runs = read_runs(folders(made))
    assert set(data["charts"]) == {
        attributes["data-chart"] for attributes in page.find("div") if "data-chart" in attributes
    }
    told = [series for series in data["charts"]["loss"]["series"] if series["told"]]
    for series, run in zip(told, runs, strict=True):
        assert (
            series["group"] == run.label
            and series["x"]["steps"] == [2, 4, 6]
            and series["x"]["tokens"] == [128, 256, 384]
        )
        assert series["y"] == pytest.approx([row["loss"] for row in run.val], rel=1e-4)
        assert series["x"]["seconds"] == pytest.approx([run.seconds()[step] for step in (2, 4, 6)], rel=1e-4)
    assert [reader["label"] for reader in data["readers"]] == ["block", "full"]
    block = data["readers"][0]
    assert block["columns"] == ["embedding", "block 1", "block 2", "block 3"]
    for drawn, site in zip(block["sites"], (runs[1].depth or {})["sites"], strict=True):
        assert drawn["weights"] == pytest.approx(site["weights"], abs=1e-4)
        assert drawn["columns"] == list(range(len(site["sources"]))) and drawn["partial"] == (
            "partial" in site["sources"]
        )
    assert [mixing["label"] for mixing in data["mixing"]] == ["block", "full", "prenorm"]
    assert np.array(data["mixing"][2]["matrix"]) == pytest.approx(np.tri(7)), (
        "PreNorm adds every output with weight one"
    )


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda run: (run / "data.json").write_text('{"corpus_hash": "0123456789abcdef"}'), "different data"),
        (lambda run: (run / "tokenizer.json").write_text("{}"), "different tokenizers"),
    ],
)
def test_runs_of_other_text_are_flagged_and_not_subtracted(
    root: Path, tmp_path: Path, spoil: Callable[[Path], object], said: str
) -> None:
    assert said not in write_report(folders(root), tmp_path / "report.html").read_text()
    spoil(root / "block")
    page = Page(write_report(folders(root), tmp_path / "report.html"))
    assert said in "".join(page.words) and "none of them is called the best" in "".join(page.words)
    assert page.tables[COMPARISON]["block"][1] == "–"
    assert re.fullmatch(r"[+−]\d\.\d{4}", page.tables[COMPARISON]["full"][1])


def test_unequal_runs_are_flagged_and_not_subtracted(made: Path) -> None:
    prenorm, block, full = read_runs(folders(made))
    assert difference(block, [prenorm, block]) == block.val[-1]["loss"] - prenorm.val[-1]["loss"]
    shorter = replace(block, train=block.train[:4], val=block.val[:2])
    assert difference(shorter, [prenorm, shorter]) is None
    notes = " ".join(flags([prenorm, shorter]))
    assert "different numbers of tokens" in notes and "block is at step 4 of the 6" in notes
    assert "of step 6, not of 4" in notes
    stale = replace(block, val=block.val[:2])
    assert stale.val_loss is None and difference(stale, [prenorm, stale]) is None
    other = replace(full, env={**full.env, "machine": "abacus"}, config=replace(full.config, eval_sequences=8))
    notes = " ".join(flags([prenorm, other]))
    assert difference(other, [prenorm, other]) is None
    assert "different machines" in notes
    assert "different numbers of validation sequences" in notes and "4: prenorm; 8: full" in notes
    assert "seed 0" in flags([prenorm, block])[-1] and len(flags([prenorm, block])) == 1


def test_the_baseline_is_prenorm_of_the_same_seed(made: Path) -> None:
    def seeded(run: Run, seed: int, loss: float) -> Run:
        val = [*run.val[:-1], {**run.val[-1], "loss": loss}]
        return replace(run, label=f"{run.rule}-{seed}", val=val, config=replace(run.config, seed=seed))

    prenorm, block, _ = read_runs(folders(made))
    runs = [seeded(prenorm, 0, 4.0), seeded(prenorm, 1, 4.5), seeded(block, 1, 3.75), seeded(block, 2, 3.5)]
    assert baseline(runs[2], runs) is runs[1] and difference(runs[2], runs) == -0.75
    assert baseline(runs[3], runs) is runs[0] and difference(runs[3], runs) == -0.5
    assert difference(runs[0], runs) is None
    assert headline(runs) == (
        "block-2 has the lowest validation loss, 3.5000 nats per token after 384 tokens, 0.5000 below prenorm-0; "
        "one seed says nothing of how much of that is luck."
    )
    # Pairs of seeds 1 and 2, -0.75 and -0.25: t of one degree of freedom is 6.314, half the range of both 0.25.
    pairs = [*runs, seeded(prenorm, 2, 3.75)]
    assert headline(pairs).endswith(
        "Over 2 seeds its rule is 0.5000 below PreNorm, 90% interval of the difference -2.0784 to +1.0784, which holds zero."
    )
    apart = [*pairs[:2], seeded(block, 0, 3.0), seeded(block, 1, 3.5), seeded(block, 5, 9.0)]
    assert headline(apart).endswith("90% interval of the difference -1.0000 to -1.0000.")
    assert headline(runs[:2]) == "prenorm-0 has the lowest validation loss, 4.0000 nats per token after 384 tokens."
    assert headline(runs[2:3]) == "block-1 has a validation loss of 3.7500 nats per token after 384 tokens."


def test_a_run_of_which_some_lines_were_kept_has_its_steps_and_times(made: Path) -> None:
    run = read_runs(folders(made))[0]
    thin = replace(run, train=run.train[::2])  # without the last step's
    assert (thin.steps, thin.tokens, thin.val_loss) == (run.steps, run.tokens, run.val_loss)
    kept = [row["step_seconds"] for row in thin.train]
    assert thin.seconds() == pytest.approx({0: 0, 1: kept[0], 3: kept[0] + 2 * kept[1], 5: kept[0] + 2 * sum(kept[1:])})


def test_a_run_without_measurements_or_validation_is_still_reported(root: Path, tmp_path: Path) -> None:
    for file in ("depth.json", "reads.json"):
        (root / "block" / file).unlink()
    metrics = (root / "block" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (root / "block" / "metrics.jsonl").write_text("".join(line for line in metrics if '"train"' in line))
    page = Page(write_report([root / "block"], tmp_path / "report.html"))
    assert len(page.find("figure")) == 1
    assert page.tables[COMPARISON]["block"][:2] == ["–", "–"]
    assert "Not measured by depth (no depth.json): block." in "".join(page.words)


def test_names_are_escaped_and_told_apart(root: Path, tmp_path: Path) -> None:
    strange = root / 'a<b> & "c"'
    shutil.copytree(root / "block", strange)
    shutil.copytree(root / "block", root / "deeper" / "block")
    page = Page(write_report([strange, root / "block", root / "deeper" / "block"], tmp_path / "report.html"))
    assert list(page.tables[COMPARISON])[1:] == ['a<b> & "c"', "block (1)", "block (2)"]
    assert not page.find("b")
    assert "<b>" not in scripts(page)[0]


def test_what_is_not_a_run_is_one_line(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run is given"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(UserError, match=r"nothing is not a run folder: it has no config\.json"):
        write_report([tmp_path / "nothing"], tmp_path / "report.html")
    with pytest.raises(UserError, match="cannot be written"):
        write_report([root / "block"], tmp_path)
    shutil.copy(root / "full" / "depth.json", root / "block")
    with pytest.raises(UserError, match="not a measurement of this block run"):
        write_report([root / "block"], tmp_path / "report.html")
    (root / "block" / "depth.json").write_text("{")
    with pytest.raises(UserError, match=r"depth\.json is not valid JSON"):
        write_report([root / "block"], tmp_path / "report.html")
    (root / "full" / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no training step"):
        write_report([root / "full"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_maps_show_the_weights_on_one_scale_and_nothing_else(made: Path, kind: str) -> None:
    _, block, full = read_runs(folders(made))
    for run in (block, full):
        assert run.depth is not None
        axes = figures.depth_map(run.depth, kind, run.label).axes[0]  # type: ignore[arg-type]
        mesh = axes.collections[0]
        assert (mesh.norm.vmin, mesh.norm.vmax) == (0, 1)
        sites = [site for site in run.depth["sites"] if site["name"].endswith(kind)] + run.depth["sites"][-1:]
        shown = mesh.get_array().reshape(4, len(sites[-1]["sources"]))
        for row, site in zip(shown, sites, strict=True):
            assert row.compressed().tolist() == site["weights"] == row[: len(site["weights"])].tolist()
        assert axes.yaxis_inverted() and axes.get_yticklabels()[-1].get_text() == "output"
    # Blocks of one decoder layer: every MLP, and no attention, sees a block that is still being summed.
    dots = [line for line in figures.depth_map(block.depth or {}, kind, "").axes[0].lines if line.get_marker() == "."]  # type: ignore[arg-type]
    assert [len(line.get_xdata()) for line in dots] == ([3] if kind == "mlp" else [])


def test_curves_are_the_metrics_and_colour_tells_the_rule(made: Path) -> None:
    runs = read_runs([*folders(made), made / "block"])
    axes = figures.loss_figure(runs, "seconds").axes[0]
    validation = [line for line in axes.lines if not line.get_label().startswith("_")]
    for run, line in zip(runs, validation, strict=True):
        spent = np.cumsum([row["step_seconds"] for row in run.train])
        assert line.get_xdata() == pytest.approx(spent[[1, 3, 5]])
        assert list(line.get_ydata()) == [row["loss"] for row in run.val]
        assert line.get_color() == figures.COLOURS[run.rule]
    first, second = (line for run, line in zip(runs, validation, strict=True) if run.rule == "block")
    assert first.get_linestyle() != second.get_linestyle()
    gradient = figures.magnitude_figure(runs, "gradient_magnitude").axes[0]
    assert gradient.get_yscale() == "log" and len(gradient.lines) == 4
    assert (runs[0].depth or {})["layers"][2]["gradient_magnitude"] == gradient.lines[0].get_ydata()[2]


def contrast(one: str, other: str) -> float:
    """Of two colours #rrggbb, as WCAG 2 defines it: 1 to 21."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_figures_follow_the_readers_colour_scheme(made: Path) -> None:
    runs = read_runs(folders(made))
    drawn = [figures.loss_figure(runs, "steps"), figures.depth_map(runs[1].depth or {}, "mlp", "block")]
    for text in map(figures.svg, drawn):
        schemes = re.findall(r"background: (#\w{6}); color: (#\w{6})", text)
        assert len(schemes) == 2 and text.count("@media (prefers-color-scheme: dark)") == 1
        for paper, ink in schemes:
            assert contrast(paper, ink) > 7
            assert all(contrast(paper, colour) >= 3 for colour in figures.COLOURS.values())
        words = [element for element in ET.fromstring(text).iter() if element.get("id", "").startswith("text_")]
        assert len(words) > 10 and all("fill: currentColor" in ET.tostring(word, "unicode") for word in words)
        assert figures.INK not in text.replace(figures.SCHEMES, "") and 'style="fill: #ffffff"' not in text


def test_drawing_changes_no_global_settings(made: Path) -> None:
    with matplotlib.rc_context({"font.size": 33, "axes.grid": False}):
        before = dict(matplotlib.rcParams)
        figures.svg(figures.loss_figure(read_runs(folders(made)), "steps"))
        assert dict(matplotlib.rcParams) == before


def test_long_curves_are_thinned_to_means() -> None:
    x, y = figures.thin(range(100_000), (step % 2 for step in range(100_000)))
    assert len(x) == len(y) == figures.POINTS
    assert y == pytest.approx(0.5, abs=0.01) and np.all(np.diff(x) > 0)
    assert figures.thin([1, 2], [3, 4])[1].tolist() == [3, 4]


def test_configs_in_a_report_are_whole(made: Path, tmp_path: Path) -> None:
    """Every setting of a single run is on its page."""
    page = Page(write_report([made / "block"], tmp_path / "report.html"))
    config = to_dict(read_runs([made / "block"])[0].config)
    assert page.tables["Settings"]["optim.lr"] == [str(config["optim"]["lr"])]
    assert len(page.tables["Settings"]) == 1 + sum(
        len(value) + len(value.get("residual", {"": 0})) - 1 if isinstance(value, dict) else 1
        for value in config.values()
    )
