"""The study's rules, stated before it runs: how a rate is chosen and carried, what is run in which order, what time is spent."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest

from fathom.errors import UserError
from fathom.lab.plan import training_flops
from fathom.train.embedded import embedded


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("study")


def test_the_best_rate_is_the_parabolas_lowest_point(study: ModuleType) -> None:
    rates = [1e-3, 2e-3, 4e-3, 8e-3]
    best = 3e-3
    losses = [(study.math.log(rate / best)) ** 2 + 3 for rate in rates]
    assert study.best_rate(rates, losses) == pytest.approx(best)
    assert study.best_rate(rates, [4, 3, 2, 1]) == 8e-3, "an end of the grid is taken as it is"
    assert study.best_rate(rates, [4, 3, 3.5, float("inf")]) < 4e-3


def test_the_carried_rate_is_a_held_power_of_compute(study: ModuleType) -> None:
    assert study.carried_rate(4e-3, 2e-3, (1, 16), 16) == pytest.approx(2e-3), "a quarter: through both"
    assert study.carried_rate(4e-3, 2e-3, (1, 16), 256) == pytest.approx(1e-3)
    assert study.carried_rate(2e-3, 4e-3, (1, 16), 256) == pytest.approx(8**0.5 * 1e-3), "never rising"
    assert study.carried_rate(4e-3, 4e-5, (1, 16), 16) == pytest.approx(4e-4 / 2**0.5), "never steeper than a quarter"


def test_the_sizes_span_sixteen_times_the_compute(study: ModuleType, tmp_path: Path) -> None:
    scale, data = study.SCALES["h100"], str(embedded(tmp_path))
    cost = [training_flops(study.run_config(scale, data, at, "prenorm", 1e-3, 0)) for at in range(4)]
    assert cost == sorted(cost) and cost[-1] / cost[0] >= 16


def test_a_stage_waits_for_the_rates_and_time_is_added_up(
    study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = tmp_path / "out", str(embedded(tmp_path))
    study.plan(out, data, "toy")
    assert "7,200 left" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds a study already"):
        study.plan(out, data, "toy")
    settings = study.settings_of(out)
    with pytest.raises(UserError, match="not a sweep"):
        study.stage_of(out, "sizes", settings)
    planned = study.stage_of(out, "rates", settings).runs
    assert len(planned) == settings["stages"]["rates"]["runs"] == 6 and {run.arm for run in planned} == {"prenorm"}
    for run in planned:  # as if they had ended, 8e-3 best of both sizes
        folder = out / "rates" / "runs" / run.name
        folder.mkdir(parents=True)
        loss = 4.0 if run.config.optim.lr == 8e-3 else 5.0
        (folder / "summary.json").write_text(json.dumps({"steps": run.config.steps, "val_loss": loss}))
        (folder / "config.json").write_text(json.dumps({"model": {"vocab_size": 512}}))
    sizes = study.stage_of(out, "sizes", settings).runs
    assert len(sizes) == settings["stages"]["sizes"]["runs"] == 9
    assert {run.config.optim.lr for run in sizes} == {8e-3} and {run.arm for run in sizes} == {
        "prenorm",
        "block",
        "full",
    }
    (out / "spent.jsonl").write_text('{"stage": "rates", "seconds": 7199.5}\n{"stage": "sizes", "seconds": 1}\n')
    assert study.run(out, 25, None) == 0, "no run begins once the budget is spent"
    assert "7,200 spent, -0 left" in capsys.readouterr().out
    assert not (out / "sizes" / "runs").exists()
