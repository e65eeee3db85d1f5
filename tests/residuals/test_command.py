"""`fathom residuals` and `fathom lab mixing`, as a user sees them."""

import json
from pathlib import Path
from typing import get_args

import pytest

from fathom.cli import main
from fathom.lab.sweeps import residual
from fathom.lab.table_5 import table_5
from fathom.models.config import SWITCHES, ModelConfig, ResidualConfig, Rule
from fathom.residuals.catalogue import CATALOGUE
from fathom.train.config import DataConfig, OptimConfig, RunConfig
from fathom.train.loop import train

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("runs")
    for rule in ("mhc", "value_residual"):
        residual = ResidualConfig(rule=rule)  # type: ignore[arg-type]
        config = RunConfig(
            model=ModelConfig(dim=16, num_layers=2, context=16, residual=residual), data=DataConfig(batch=1),
            optim=OptimConfig(warmup=1), steps=2, eval_sequences=1, device="cpu",
        )  # fmt: skip
        train(config, place / rule)
    return {rule: place / rule for rule in ("mhc", "value_residual")}


def test_the_catalogue_has_every_rule_in_the_order_of_the_config() -> None:
    assert tuple(CATALOGUE) == get_args(Rule)


def test_residuals_lists_every_rule_with_its_costs(capsys: Capture) -> None:
    assert main(["residuals", "--dim", "64", "--layers", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["rule"]: row for row in found["rules"]}
    assert rows.keys() == CATALOGUE.keys()
    for switch, meaning in found["switches"].items():
        values = switch.replace("=H", "=2").replace("=W", "=2").replace("=S", "=2")
        for rule in meaning.split(":")[0].split(", "):
            residual(f"{rule}:{values}")
    assert {setting for switch in found["switches"] for setting in [switch.split("=")[0]]} >= set(SWITCHES)
    assert rows["prenorm"]["added_bytes_per_token"] == 0 and rows["mhc"]["added_bytes_per_token"] == 3 * 128
    assert rows["rezero"]["parameters"] == 4 and rows["rezero"]["state_bytes_per_token"] == 128
    assert (
        rows["mhc"]["state_bytes_per_token"] == 4 * 128 and rows["value_residual"]["state_bytes_per_token"] == 2 * 128
    )
    assert rows["prenorm"]["flops_per_token"] == 0 < rows["rezero"]["flops_per_token"] == 4 * 64
    assert rows["mhar"]["mean_sources"] == 3 and rows["mhc"]["mean_sources"] is None


def test_residuals_lists_what_fits_a_width_and_says_what_does_not(capsys: Capture) -> None:
    assert main(["residuals", "--dim", "30", "--layers", "2", "--json"]) == 0
    refused = {row["rule"]: row["refused"] for row in json.loads(capsys.readouterr().out)["rules"] if "refused" in row}
    assert list(refused) == ["mhar"] and "heads is 4" in refused["mhar"]
    assert main(["residuals", "--dim", "0"]) == 2


def test_mixing_without_a_run_is_table_5(tmp_path: Path, capsys: Capture) -> None:
    assert main(["lab", "mixing", "--out", str(tmp_path / "figures")]) == 0
    text = capsys.readouterr().out
    assert all(row.method in text and row.weight in text for row in table_5())
    assert [file.name for file in (tmp_path / "figures").iterdir()] == ["figure-9.svg"]
    assert main(["lab", "mixing", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [row._asdict() for row in table_5()]


def test_mixing_of_runs(runs: dict[str, Path], tmp_path: Path, capsys: Capture) -> None:
    folders = [str(folder) for folder in runs.values()]
    assert main(["lab", "mixing", *folders, "--out", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    mhc, values = found[folders[0]], found[folders[1]]
    assert (mhc["rule"], values["rule"]) == ("mhc", "value_residual")
    assert [len(row) for row in mhc["matrix"]] == [5] * 5 and mhc["remainder"] < 1e-9
    assert values["matrix"] == [[1.0] * (row + 1) + [0.0] * (4 - row) for row in range(5)]
    assert values["semiseparable_rank"] == 1 and values["rank"] == 4
    assert {file.name for file in tmp_path.iterdir()} == {"mixing-mhc.svg", "mixing-value_residual.svg"}
    assert main(["lab", "mixing", folders[1]]) == 0
    assert "semiseparable rank 1 for a token" in capsys.readouterr().out


def test_mixing_of_what_is_no_run_is_refused(tmp_path: Path, capsys: Capture) -> None:
    assert main(["lab", "mixing", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err
