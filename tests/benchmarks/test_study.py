"""The study's rules, stated before it runs: how a rate is chosen and carried, what is run in which order, what time is spent."""

import importlib
import json
import math
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from fathom.errors import UserError
from fathom.lab.plan import training_flops
from fathom.train.config import OptimConfig
from fathom.train.embedded import embedded


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("study")


@pytest.fixture
def stages(study: ModuleType) -> ModuleType:
    return importlib.import_module("study_stages")


def test_the_best_rate_is_the_parabolas_lowest_point(stages: ModuleType) -> None:
    rates = [1e-3, 2e-3, 4e-3, 8e-3]
    best = 3e-3
    losses = [(math.log(rate / best)) ** 2 + 3 for rate in rates]
    assert stages.best_rate(rates, losses) == pytest.approx(best)
    assert stages.best_rate(rates, [4, 3, 2, 1]) == 8e-3, "an end of the grid is taken as it is"
    assert stages.best_rate(rates, [4, 3, 3.5, float("inf")]) < 4e-3


def test_the_carried_factor_is_a_held_power_of_compute(stages: ModuleType) -> None:
    assert stages.carried_factor(1, 0.5, (1, 16), 16) == pytest.approx(0.5), "a quarter: through both"
    assert stages.carried_factor(1, 0.5, (1, 16), 256) == pytest.approx(0.25)
    assert stages.carried_factor(0.5, 1, (1, 16), 256) == pytest.approx(0.5**0.5), "never rising"
    assert stages.carried_factor(1, 0.01, (1, 16), 16) == pytest.approx(0.1 / 2**0.5), "never steeper than a quarter"


def test_candidates_are_every_combination_and_scale_together(stages: ModuleType) -> None:
    found = stages.candidates(stages.SCALES["h100"])
    assert len(found) == 18 + 12
    muon = found["muon-0.02-0.1-0.004"]
    assert (muon.optimizer, muon.muon_lr, muon.embedding_lr, muon.head_lr, muon.lr) == ("muon", 0.02, 0.1, 4e-3, 4e-3)
    half = stages.scaled(muon, 0.5)
    assert (half.muon_lr, half.embedding_lr, half.head_lr, half.lr) == (0.01, 0.05, 2e-3, 2e-3)
    assert half.depth_lr is None, "the queries' own rate is not tuned"
    beyond = stages.beyond(stages.SCALES["h100"], muon)
    assert len(beyond) == 17 and not beyond.keys() & found.keys() - {
        "muon-0.02-0.3-0.004",
        "muon-0.01-0.1-0.004",
        "muon-0.01-0.3-0.004",
    }
    assert (beyond["muon-0.005-0.3-0.064"].muon_lr, beyond["muon-0.005-0.3-0.064"].head_lr) == (0.005, 0.064)


def test_the_sizes_span_sixteen_times_the_compute(stages: ModuleType, tmp_path: Path) -> None:
    scale, data = stages.SCALES["h100"], str(embedded(tmp_path))
    cost = [training_flops(stages.run_config(scale, data, at, "prenorm", OptimConfig(), 0)) for at in range(4)]
    assert cost == sorted(cost) and cost[-1] / cost[0] >= 16


def test_a_stage_waits_for_the_rates_and_time_is_added_up(
    study: ModuleType, stages: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", str(embedded(tmp_path))
    study.plan(out, data, "toy")
    assert "7,200 left" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a study already"):
        study.plan(out, data, "toy")
    settings = study.settings_of(out)
    with pytest.raises(UserError, match="not a sweep"):
        study.stage_of(out, "sizes", settings)
    for stage, count, best in (("rates", 2, "adamw-0.008-0.1-0.004"), ("edges", 1, ""), ("factors", 2, "x0.5")):
        planned = study.stage_of(out, stage, settings).runs
        assert len(planned) == settings["stages"][stage]["runs"] == count and {run.arm for run in planned} == {
            "prenorm"
        }
        for run in planned:  # as if they had ended
            folder = out / stage / "runs" / run.name
            folder.mkdir(parents=True)
            loss = 4.0 if run.case == best else 5.0
            (folder / "summary.json").write_text(json.dumps({"steps": run.config.steps, "val_loss": loss}))
            (folder / "config.json").write_text(json.dumps({"model": {"vocab_size": 512}}))
    sizes = study.stage_of(out, "sizes", settings).runs
    assert len(sizes) == settings["stages"]["sizes"]["runs"] == 9
    assert {run.arm for run in sizes} == {"prenorm", "block", "full"}
    by_size = {run.case: run.config.optim for run in sizes}
    assert {optim.optimizer for optim in by_size.values()} == {"adamw"}
    rates = [by_size[f"s{size}"].lr for size in (1, 2, 3)]
    assert 8e-3 > rates[0] > rates[1] > rates[2], "half the rates at the second size: falling with compute"
    assert all(run.config.optim == by_size[run.case] for run in sizes), "all arms of a size share them"
    checks = study.stage_of(out, "checks", settings).runs
    assert len(checks) == settings["stages"]["checks"]["runs"] == 3
    assert {run.name: run.config.optim for run in checks} == {
        f"{case}-{arm}-seed0": by_size[case]
        for case, arm in (("s1", "full-plain"), ("s1", "full-input-query"), ("s3", "full-window8"))
    }
    plain = next(run.config.model.residual for run in checks if run.arm == "full-plain")
    assert plain.rule == "full" and plain.window == 2 * stages.SCALES["toy"].sizes[0][0], (
        "every output, by plain operations"
    )
    spent = (
        {"stage": "rates", "seconds": 7199.5, "machine": "one"},
        {"stage": "sizes", "seconds": 1, "machine": "one"},
    )
    (out / "spent.jsonl").write_text("".join(json.dumps(line) + "\n" for line in spent))
    assert study.run(out, 25, None) == 0, "no run begins once the budget is spent"
    assert "7,200 spent, -0 left" in capsys.readouterr().out
    assert not (out / "sizes" / "runs").exists()
    assert study.summarize(out)["rows"] == [], "a stage of which no run is done"
    ends = {"prenorm": 4.0, "block": 3.875, "full": 3.75, "full-window8": 3.5, "full-plain": 3.75}
    for stage, runs in (("sizes", sizes), ("checks", checks)):
        for run in runs:
            folder = out / stage / "runs" / run.name
            folder.mkdir(parents=True)
            if run.arm in ends:
                (folder / "summary.json").write_text(json.dumps({"steps": run.config.steps, "val_loss": ends[run.arm]}))
                (folder / "config.json").write_text(json.dumps({"model": {"vocab_size": 512}}))
                (folder / "data.json").write_text("{}")
                on_the_way = [
                    {"kind": "val", "step": step, "loss": 1 + step * ends[run.arm]}
                    for step in range(1, run.config.steps)
                ]
                steps = [
                    {"kind": "train", "step": step, "grad_norm": norm} for step, norm in ((1, 9.0), (2, 0.5), (3, 2.0))
                ]
                lines = [json.dumps({"tokens": 0, "step_seconds": 1, "tokens_per_second": 1, "loss": 1} | line) + "\n"
                         for line in (*on_the_way, *steps)]  # fmt: skip
                (folder / "metrics.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match="holds no study"):
        study.summarize(tmp_path / "nothing")
    summary = study.summarize(out)["rows"]
    during = {(row["case"], row["arm"]): row["median"] for row in summary if row["metric"] == "minus_prenorm_during"}
    assert during == {
        (f"s{size} at {share}", arm): step * (ends[arm] - ends["prenorm"])
        for size, every, steps in ((1, 1, 6), (2, 1, 8), (3, 2, 16)) for arm in ("block", "full")
        for share, step in (("1/4", 2 * every), ("1/2", 4 * every), ("3/4", 6 * every)) if step < steps
    }  # fmt: skip
    assert {row["median"] for row in summary if row["metric"] == "clipped"} == {0.5}, "of the steps after the first"
    early = {
        (row["case"], row["arm"]): row["median"] for row in summary if row["metric"] == "check_minus_prenorm_during"
    }
    assert early == {
        (f"{case} at {share}", arm): step * (ends[arm] - ends["prenorm"])
        for case, arm, steps in (("s1", "full-plain", (2, 4)), ("s3", "full-window8", (4, 8, 12)))
        for share, step in zip(("1/4", "1/2", "3/4"), steps, strict=False)
    }
    rows = [row for row in summary if row["metric"].startswith("check_") and "during" not in row["metric"]]
    assert {(row["metric"], row["case"], row["arm"]): row["median"] for row in rows} == {
        ("check_loss", "s1", "full-plain"): 3.75,
        ("check_loss", "s3", "full-window8"): 3.5,
        ("check_minus_prenorm", "s1", "full-plain"): -0.25,
        ("check_minus_prenorm", "s3", "full-window8"): -0.5,
        ("check_minus_full", "s1", "full-plain"): 0.0,
        ("check_minus_full", "s3", "full-window8"): -0.25,
    }


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["2026-11-22_study-first", "2026-11-22_study"])
def test_committed_numbers_follow_from_the_committed_runs(study: ModuleType, name: str, tmp_path: Path) -> None:
    committed = ROOT / "benchmarks/results" / name
    copy = shutil.copytree(committed, tmp_path / "study")
    (copy / "result.json").unlink()
    made, told = study.summarize(copy)["rows"], json.loads((committed / "result.json").read_text())["rows"]
    for ours, theirs in zip(made, told, strict=True):
        assert {k: v for k, v in ours.items() if isinstance(v, str)} == {
            k: v for k, v in theirs.items() if isinstance(v, str)
        }
        assert [ours[k] for k in ("median", "low", "high")] == pytest.approx(
            [theirs[k] for k in ("median", "low", "high")]
        )


def test_sentences_about_the_tuning_are_its_result(stages: ModuleType) -> None:
    results = ROOT / "benchmarks/results/2026-11-22_study"
    rows = json.loads((results / "result.json").read_text())["rows"]
    losses = {row["case"]: row["median"] for row in rows if row["metric"] == "tuning_loss"}
    best = min((case for case in losses if not case.startswith("x")), key=losses.__getitem__)
    assert best == "muon-0.01-0.3-0.016"
    factors = [0.5, 0.71, 1.0, 1.41]
    parabola = stages.best_rate(factors, [losses[f"x{factor:g}"] for factor in factors])
    text = " ".join((ROOT / "docs/study.md").read_text().split())
    first = [losses[case] for case in losses if case in stages.candidates(stages.SCALES["h100"])]
    at_edge = min(first)
    adamw = min(losses[case] for case in losses if case.startswith("adamw"))
    assert f"AdamW's best of twelve settings ends at {adamw:.3f}" in text
    assert f"best of eighteen at {at_edge:.3f}" in text and f"lies {losses[best]:.3f}" in text
    for case in ("muon-0.005-0.3-0.016", "muon-0.01-0.9-0.016", "muon-0.01-0.3-0.064"):
        assert f" {losses[case]:.3f}" in text, case
    assert f"end at {losses['x0.5']:.3f}, {losses['x0.71']:.3f}, {losses['x1']:.3f} and {losses['x1.41']:.3f}" in text
    assert f"parabola is {parabola:.2f}" in text
    cost = {case: loss - losses["x1"] for case, loss in losses.items() if case.startswith("x")}
    assert f"cost it at most {max(cost['x0.71'], cost['x1.41']):.3f} nats, half of them {cost['x0.5']:.3f}" in text


def test_sentences_about_the_gain_are_its_result() -> None:
    rows = json.loads((ROOT / "benchmarks/results/2026-11-22_study/result.json").read_text())["rows"]
    found = {(row["metric"], row["case"], row["arm"]): row for row in rows}
    text = " ".join((ROOT / "docs/study.md").read_text().split())

    def gap(metric: str, case: str, arm: str = "here") -> str:
        return f"{abs(found[metric, case, arm]['median']):.3f}"

    def interval(metric: str, case: str, arm: str = "here") -> tuple[str, str]:
        return tuple(sorted(f"{abs(found[metric, case, arm][end]):.3f}" for end in ("low", "high")))  # type: ignore[return-value]

    gains = {arm: sorted(gap("minus_prenorm", f"s{size}", arm) for size in (1, 2, 3, 4)) for arm in ("block", "full")}
    ends = f"Block AttnRes ends {gains['block'][0]} to {gains['block'][-1]} nats below PreNorm"
    assert f"{ends} and Full AttnRes {gains['full'][0]} to {gains['full'][-1]}" in text
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert ends.replace("AttnRes ends", "ends").replace("nats below", "nats per token below") in readme
    assert f"and Full {gains['full'][0]} to {gains['full'][-1]}, every 90 % interval" in readme
    assert all(found["minus_prenorm", f"s{size}", arm]["high"] < 0 for size in (1, 2, 3, 4) for arm in gains)
    for arm in gains:
        times = found["compute_multiplier", "L = A C^-a", arm]
        said = rf"×{times['median']:.2f} (compute )?for {arm.title()} \((90 % interval )?"
        assert re.search(rf"{said}{times['low']:.2f} to {times['high']:.2f}\)", text)
    late = {
        at: sorted(gap("minus_prenorm_during", f"s{size} at {at}", arm) for size in (2, 3, 4) for arm in gains)
        for at in ("1/2", "3/4")
    }
    half, later, end = *late.values(), sorted(each for arm in gains.values() for each in arm)
    assert text.count(f"{half[0]} to {half[-1]} nats half-way") == 2
    assert f"{later[0]} to {later[-1]} at three quarters and {end[0]} to {end[-1]} at the end" in text
    clipped = {
        case: found["clipped", *case] for metric, *case in found if metric == "clipped" for case in [tuple(case)]
    }
    assert all(row["high"] == 0 for (_, arm), row in clipped.items() if arm == "prenorm")
    of_arms = max(row["high"] for (_, arm), row in clipped.items() if arm in gains)
    assert f"at most {100 * of_arms:.1f} % of any run of Block or Full" in text
    often = {case: row["median"] for (case, arm), row in clipped.items() if arm == "here" and row["high"]}
    assert set(often) == {"full-input-query", "full-no-key-norm", "block-s4-no-key-norm"}
    assert (
        f"{100 * often['full-no-key-norm']:.0f} % and {100 * often['block-s4-no-key-norm']:.0f} % of the steps" in text
    )
    miss = found["largest_residual", "L = A C^-a", "prenorm"]["median"]
    assert f"misses PreNorm's by up to {miss:.3f} nats" in text
    window = gap("row_minus_prenorm_during", "full-window8 at 1/2"), gap("row_minus_prenorm", "full-window8")
    assert f"half-way it is {window[0]} nats below PreNorm, at the end {window[1]}" in text
    for case in ("s1", "s4"):
        assert found["minus_full", case, "block"]["low"] > 0
    assert (
        f"by {gap('minus_full', 's1', 'block')} nats at the first size and {gap('minus_full', 's4', 'block')} at the largest"
        in text
    )
    for metric, case, before in (
        ("row_minus_full", "full-no-key-norm", "worse, by {} nats ({} to {}) in Full"),
        ("row_minus_block", "block-s4-heads3", "worse than one, by {} nats ({} to {})"),
        ("row_minus_prenorm", "denseformer", "DenseFormer is {} nats below PreNorm ({} to {})"),
        ("row_minus_full", "full-window8", "{} nats below Full ({} to {})"),
    ):
        assert before.format(gap(metric, case), *interval(metric, case)) in text, case
    static, sigmoid = (found["row_minus_full", f"full-{case}", "here"] for case in ("static", "sigmoid"))
    assert (
        f"add {static['median']:.3f} to that, with an interval from {static['low']:.3f} to {static['high']:.3f}" in text
    )
    assert f"softmax ({sigmoid['median']:.3f}, {sigmoid['low']:.3f} to {sigmoid['high']:.3f})" in text
    best = min((row for row in rows if row["metric"] == "row_minus_prenorm"), key=lambda row: row["median"])
    assert best["case"] == "full-window8"
    spent = [
        json.loads(line) for line in (ROOT / "benchmarks/results/2026-11-22_study/spent.jsonl").read_text().splitlines()
    ]
    lost = sum(line["seconds"] for line in spent if "lost" in line)
    assert f"{sum(line['seconds'] for line in spent):,.0f} are spent, of which {lost:,.0f}" in text


def test_sentences_about_checks_and_shapes_are_their_result() -> None:
    rows = json.loads((ROOT / "benchmarks/results/2026-11-22_study/result.json").read_text())["rows"]
    found = {(row["metric"], row["case"], row["arm"]): row for row in rows}
    text = " ".join((ROOT / "docs/study.md").read_text().split())

    def values(metric: str, case: str, arm: str) -> list[float]:
        return [found[metric, case, arm][end] for end in ("median", "low", "high")]

    window = [values(f"check_minus_prenorm{at}", f"s3{share}", "full-window8")
              for at, share in (("_during", " at 1/4"), ("_during", " at 1/2"), ("_during", " at 3/4"), ("", ""))]  # fmt: skip
    assert (
        f"it is {-window[0][0]:.3f} nats below PreNorm after a quarter of the run, {-window[1][0]:.3f} half-way" in text
    )
    assert window[2][1] < 0 < window[2][2], "level at three quarters"
    end, low, high = window[3]
    assert f"{end:.3f} above it at the end ({-low:.3f} below to {high:.3f} above)" in text
    assert f"is {-window[0][0]:.3f} nats ahead of PreNorm early in training and {end:.3f} behind it at the end" in text
    above_full = "{:.3f} above Full ({:.3f} to {:.3f})".format(*values("check_minus_full", "s3", "full-window8"))
    assert above_full in text
    queries = values("check_minus_prenorm", "s1", "full-input-query")
    assert f"{-queries[0]:.3f} nats below PreNorm ({-queries[2]:.3f} to {-queries[1]:.3f})" in text
    above_full = "{:.3f} above Full ({:.3f} to {:.3f})".format(*values("check_minus_full", "s1", "full-input-query"))
    assert above_full in text
    plain = "ends {:.3f} nats from Full by kernels ({:.3f} to {:.3f})".format(
        *values("check_minus_full", "s1", "full-plain")
    )
    assert plain in text
    gains = sorted(-row["median"] for row in rows if row["metric"] == "shape_minus_prenorm")
    assert len(gains) == 9 and f"at all nine, by {gains[0]:.3f} to {gains[-1]:.3f} nats" in text
    losses = {arm: {row["case"]: row["median"] for row in rows if row["metric"] == "shape_loss" and row["arm"] == arm}
              for arm in ("prenorm", "block")}  # fmt: skip
    assert {min(of_arm, key=of_arm.__getitem__) for of_arm in losses.values()} == {"w24-h0.3"}
    deeper = {arm: of_arm["w16-h0.3"] - of_arm["w24-h0.3"] for arm, of_arm in losses.items()}
    assert f"costs PreNorm {deeper['prenorm']:.3f} nats and Block {deeper['block']:.3f}" in text
    seeds = found["val_loss", "s1", "prenorm"]
    assert f"nearly this shape lie {seeds['high'] - seeds['low']:.3f} apart" in text
    shapes = ROOT / "benchmarks/results/2026-11-22_study/shapes/runs"
    width = {case: json.loads((shapes / f"{case}-block-seed0/config.json").read_text())["model"]["head_dim"]
             for case in losses["block"]}  # fmt: skip
    for of_arm in losses.values():
        order = sorted(of_arm, key=of_arm.__getitem__)
        assert min(width[case] for case in order[:4]) == 56 and max(width[case] for case in order[4:]) == 42
    behind = min(sorted(of_arm.values())[4] - sorted(of_arm.values())[3] for of_arm in losses.values())
    assert f"have heads of 56 to {max(width.values())} channels; the five others, at least {behind:.2f} nats" in text
