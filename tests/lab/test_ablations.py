"""Ablation tables and shape maps: paired by seed, marked runs left out, and no difference where an interval holds zero."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from fathom.errors import UserError
from fathom.lab.ablations import luck, table
from fathom.lab.depth_width import maps, sentence
from fathom.lab.figures import svg
from fathom.lab.figures_sweep import difference_figure, heat_map, law_figure, residual_figure
from fathom.lab.intervals import central_probability, paired, student_t
from fathom.lab.outcomes import left_out, read_outcomes
from fathom.lab.plan import Outcome, Planned, make_sweep, outcome, training_flops
from fathom.lab.scaling import fit_arms, paper_points
from fathom.lab.sweeps import residual
from fathom.models.config import ModelConfig
from fathom.train.config import RunConfig, save_config


def end(case: str, arm: str, seed: int, loss: float | None) -> Outcome:
    planned = Planned(f"{case}-{arm}-seed{seed}", case, arm, seed, RunConfig())
    return Outcome(planned, 1.0, "diverged" if loss is None else "done", 5, loss, "" if loss else "it blew up")


@pytest.mark.parametrize(("df", "t"), [(1, 6.314), (2, 2.920), (3, 2.353), (4, 2.132), (9, 1.833), (30, 1.697)])
def test_students_t_is_the_published_table(df: int, t: float) -> None:
    assert student_t(0.9, df) == pytest.approx(t, abs=5e-4)
    assert central_probability(student_t(0.73, df), df) == pytest.approx(0.73)


def test_a_paired_interval_by_hand() -> None:
    found = paired([-0.03, -0.01, -0.02])
    half = 2.920 * 0.01 / math.sqrt(3)
    assert (found.mean, found.n, found.verdict) == (pytest.approx(-0.02), 3, "lower")
    assert (found.low, found.high) == (pytest.approx(-0.02 - half, abs=1e-5), pytest.approx(-0.02 + half, abs=1e-5))
    assert paired([-0.03, 0.01, -0.02]).verdict == "not told apart"
    assert paired([0.03, 0.01, 0.02]).verdict == "higher"
    assert paired([-0.5]).verdict == "one seed" and paired([-0.5]).low is None


def test_differences_are_paired_by_seed_and_a_diverged_run_is_in_no_mean() -> None:
    # Seeds differ by far more than arms do: only pairing can tell the arms apart.
    found = [end("base", "prenorm", seed, 3 + seed) for seed in range(4)]
    found += [end("base", "block", seed, 3 + seed - 0.1 - 0.001 * seed) for seed in (0, 1, 2)]
    found += [end("base", "block", 3, None), end("base", "full", 0, 2.9)]
    prenorm, block, full = table(found)
    assert prenorm.mean == 4.5 and prenorm.difference is None
    assert set(block.losses) == {0, 1, 2} and block.mean == pytest.approx(3.899)
    assert block.difference is not None and block.difference.verdict == "lower"
    assert block.difference.mean == pytest.approx(-0.101) and block.difference.n == 3
    assert full.difference is not None and full.difference.verdict == "one seed"
    assert left_out(found) == ["base-block-seed3 diverged: it blew up"]
    assert "1 interval at 90%" in luck([prenorm, block, full])
    with pytest.raises(UserError, match="no arm 'mhc'"):
        table(found, baseline="mhc")


def test_cases_are_not_mixed() -> None:
    found = [
        end("a", "prenorm", 0, 3.0),
        end("a", "block", 0, 2.0),
        end("b", "block", 0, 9.0),
        end("b", "prenorm", 1, 1.0),
    ]
    rows = table(found)
    assert [(row.case, row.arm) for row in rows] == [("a", "prenorm"), ("a", "block"), ("b", "prenorm"), ("b", "block")]
    assert rows[1].difference is not None and rows[1].difference.mean == -1.0
    assert rows[3].difference is None  # no seed in common


def run_folder(
    path: Path, *, rule: str = "block", seed: int = 0, loss: float = 3.0, tokens: str = "t", dim: int = 8
) -> Path:
    """A run folder with what the tables read of one."""
    path.mkdir(parents=True)
    model = ModelConfig(dim=dim, num_layers=1, num_heads=1, residual=residual(rule))
    save_config(RunConfig(model=model, steps=4, seed=seed), path / "config.json")
    (path / "data.json").write_text(json.dumps({"tokens_hash": tokens}))
    (path / "summary.json").write_text(json.dumps({"steps": 4, "val_loss": loss}))
    return path


def test_plain_run_folders_compare_too(tmp_path: Path) -> None:
    folders = [
        run_folder(tmp_path / f"{rule.replace(':', '-')}-{seed}", rule=rule, seed=seed, loss=3 - 0.1 * (rule != "prenorm"))
        for seed in (0, 1) for rule in ("prenorm", "block", "block:block_size=2")
    ]  # fmt: skip
    rows = table(read_outcomes(folders))
    assert [row.arm for row in rows] == ["prenorm", "block", "block-block_size2"]
    assert rows[1].difference is not None and rows[1].difference.mean == pytest.approx(-0.1)


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    one, other = run_folder(tmp_path / "one"), run_folder(tmp_path / "other", rule="prenorm", tokens="other text")
    with pytest.raises(UserError, match="differ in data"):
        read_outcomes([one, other])
    with pytest.raises(UserError, match="given twice"):
        read_outcomes([one, one])
    with pytest.raises(UserError, match="neither a sweep nor a run"):
        read_outcomes([tmp_path])
    with pytest.raises(UserError, match="no run is given"):
        read_outcomes([])
    base = RunConfig(model=ModelConfig(dim=8, num_layers=1, num_heads=1))
    for name, steps in (("first", 4), ("second", 5)):
        make_sweep(tmp_path / name, "seeds", [Planned("x", "base", name, 0, replace(base, steps=steps))], threads=1)
    with pytest.raises(UserError, match="both of case base"):
        read_outcomes([tmp_path / "first", tmp_path / "second"])


def test_a_run_no_better_than_guessing_counts_as_diverged(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", loss=math.log(1024) + 0.01)
    config = RunConfig(model=ModelConfig(dim=8, num_layers=1, num_heads=1), steps=4)
    planned = Planned("run", "base", "block", 0, config)
    assert outcome(run, planned, training_flops(config)).state == "diverged"
    (run / "summary.json").write_text(json.dumps({"steps": 4, "val_loss": 6.9}))
    assert outcome(run, planned, 1.0).state == "done"


def grid(losses: dict[tuple[float, float], list[float]], arm: str = "prenorm") -> list[Outcome]:
    return [
        end(f"w{column}-h{row}", arm, seed, loss)
        for (column, row), seeds in losses.items() for seed, loss in enumerate(seeds)
    ]  # fmt: skip


def test_the_map_has_its_axes_and_says_how_sure_its_minimum_is() -> None:
    losses = {
        (15, 0.3): [2.0, 2.1, 2.2],
        (15, 0.7): [1.9, 2.0, 2.1],
        (45, 0.3): [1.5, 1.6, 1.7],
        (45, 0.7): [1.52, 1.58, 1.71],
    }
    (found,) = maps(grid(losses))
    assert (found.columns, found.rows) == ([15, 45], [0.3, 0.7])
    assert found.losses == [
        [pytest.approx(2.1), pytest.approx(1.6)],
        [pytest.approx(2.0), pytest.approx(1.60333, abs=1e-4)],
    ]
    assert found.best == "w45-h0.3" and found.rivals == ["w45-h0.7"]
    assert "1 of the 3 other shapes are not told apart" in sentence(found)
    (alone,) = maps(grid({place: seeds[:1] for place, seeds in losses.items()}))
    assert len(alone.rivals) == 3 and "no shape is told apart" in sentence(alone)
    with pytest.raises(UserError, match="depth-width"):
        maps([end("base", "prenorm", 0, 1.0)])


def test_figures_draw_what_they_are_given() -> None:
    fitted = fit_arms(paper_points(), baseline="prenorm", budget=5.6, irreducible=False, draws=100)
    lines = residual_figure(paper_points(), fitted, "x").axes[0].get_lines()
    drawn = {str(line.get_label()): list(line.get_ydata()) for line in lines}
    assert drawn["block"] == pytest.approx([1e3 * value for value in fitted["block"].residuals])
    assert svg(law_figure(paper_points(), fitted, "x")).count("<path") > 8
    rows = table(
        [end("base", arm, seed, 3 - 0.1 * (arm != "prenorm")) for arm in ("prenorm", "block") for seed in (0, 1)]
    )
    assert svg(difference_figure(rows, "prenorm", 0.9))
    (found,) = maps(grid({(15, 0.3): [2.0], (45, 0.3): [1.5]}))
    texts = [text.get_text() for text in heat_map(found, 1.5, 2.0).axes[0].texts]
    assert texts == ["2.000·", "1.500"]
