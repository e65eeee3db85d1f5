"""What the tests of the report share: three real runs of six steps, measured, and a sweep made of them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fathom.lab.dynamics import write_depth
from fathom.lab.plan import Planned, make_sweep
from fathom.lab.report_measure import write_reads
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.train.config import DataConfig, RunConfig, load_config
from fathom.train.embedded import embedded
from fathom.train.loop import train


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs prenorm, block and full, trained for six steps and measured."""
    root = tmp_path_factory.mktemp("runs")
    data = DataConfig(folder=str(embedded(root / "cache")), batch=2)
    for residual in (
        ResidualConfig(rule="prenorm"), ResidualConfig(rule="block", block_size=2), ResidualConfig(rule="full"),
    ):  # fmt: skip
        model = ModelConfig(context=32, dim=8, num_layers=3, num_heads=1, residual=residual)
        config = RunConfig(model=model, data=data, steps=6, eval_every=2, eval_sequences=4, device="cpu")
        train(config, root / residual.rule)
        write_depth(root / residual.rule, sequences=2, device="cpu")
        write_reads(root / residual.rule, sentences=2, device="cpu")
    return root


@pytest.fixture(scope="session")
def sweep(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sizes, three arms, one seed: the runs of ``made`` under planned names, with losses on a law each."""
    folder = tmp_path_factory.mktemp("sweep") / "sizes"
    runs = []
    for steps in (6, 24, 96):
        for arm in ("prenorm", "block", "full"):
            config = replace(load_config(made / arm / "config.json"), steps=steps)
            runs.append(Planned(f"s{steps}-{arm}-seed0", f"s{steps}", arm, 0, config))
    plan = make_sweep(folder, "paper-scaling", runs, threads=1)
    for planned, flops in zip(plan.runs, plan.flops, strict=True):
        run = plan.run_folder(planned)
        run.parent.mkdir(exist_ok=True)
        shutil.copytree(made / planned.arm, run)
        values = json.loads((run / "config.json").read_text()) | {"steps": planned.config.steps}
        (run / "config.json").write_text(json.dumps(values))
        worth = {"prenorm": 1.0, "block": 1.25, "full": 1.5}[planned.arm]
        summary = {"steps": planned.config.steps, "val_loss": 4 * (worth * flops / 1e9) ** -0.05}
        (run / "summary.json").write_text(json.dumps(summary))
    return folder
