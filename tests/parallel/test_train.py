"""`fathom train` on several processes: the numbers of one process, whatever the layout and whatever it began with."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fathom.errors import UserError
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.parallel.config import ParallelConfig
from fathom.train import loop
from fathom.train.checkpoint import checkpoints, newest
from fathom.train.config import OptimConfig
from fathom.train.loop import Trainer
from tests.parallel.conftest import Ranks
from tests.parallel.runs import BEFORE, MIDDLE, ORIGIN, ROUGH, STEPS, config, cut_short, in_float64

pytestmark = pytest.mark.dist
RUNS = [*BEFORE, *(f"{name}-from-{other}" for name, other in BEFORE.items())]


def numbers(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensors(run: Path) -> dict[str, Tensor]:
    """Everything in the newest checkpoint, loaded in this process."""
    trainers = []

    def load() -> dict[str, Any]:
        trainers.append(Trainer(config(run.parent / "corpus"), run, resume=True))
        return {}

    in_float64(load)
    trainer = trainers[0]
    trainer.close()
    state = {p: s for optimizer in trainer.optimizers for p, s in optimizer.state.items()}
    return {
        f"{name} {key}": value
        for name, p in trainer.model.named_parameters()
        for key, value in {"value": p.detach(), **state[p]}.items()
    }


@pytest.mark.parametrize("name", RUNS)
def test_equals_one_process(name: str, folder: Path, world2: Ranks) -> None:
    expected, found = numbers(folder / "alone"), numbers(folder / name)
    assert [(row["kind"], row["step"]) for row in found] == [(row["kind"], row["step"]) for row in expected]
    for row, other in zip(found, expected, strict=True):
        for key in {"loss", "grad_norm", "lr", "tokens"} & other.keys():
            assert row[key] == pytest.approx(other[key], rel=1e-9), f"{key} of step {row['step']}"
    mine = tensors(folder / name)
    for key, value in tensors(folder / "alone").items():
        torch.testing.assert_close(mine[key], value, rtol=1e-6, atol=1e-9, msg=key)
    assert [path.name for path in checkpoints(folder / name)] == [f"step-{step:06d}" for step in (MIDDLE, STEPS)]
    summaries = [json.loads((folder / run / "summary.json").read_text()) for run in (name, "alone")]
    assert summaries[0]["parameters"] == summaries[1]["parameters"]


@pytest.mark.parametrize("name", ROUGH)
def test_bf16_and_compiled_sublayers(name: str, folder: Path, world2: Ranks) -> None:
    last = len(world2) - 1
    for rank, seen in enumerate(world2):
        called = seen["compiled calls"][name]
        assert {"scaled_dot_product_attention", "silu"} <= {*called}
        # The loss as well, where there is one: a pipeline's is on its last rank.
        assert ("cross_entropy" in called) == (rank == last or not name.startswith("pp"))
    found, expected = ([row for row in numbers(folder / run) if row["kind"] == "train"] for run in (name, "alone"))
    assert len(found) == 2
    for row, other in zip(found, expected, strict=False):
        assert row["loss"] == pytest.approx(other["loss"], rel=2e-3), f"loss of step {row['step']}"


def test_one_process_goes_on_with_what_several_saved(folder: Path, world4: Ranks, tmp_path: Path) -> None:
    run = cut_short(folder / ORIGIN, tmp_path / "run")
    shutil.copytree(folder / "corpus", tmp_path / "corpus")
    in_float64(lambda: loop.resume(run, ParallelConfig()))
    for row, other in zip(numbers(run), numbers(folder / "alone"), strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-9)


def test_one_process_recomputes(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recompute = replace(config(folder / "corpus"), parallel=ParallelConfig(recompute="full"))
    in_float64(lambda: loop.train(recompute, run))
    again = cut_short(run, tmp_path / "again")
    in_float64(lambda: loop.resume(again))
    for found in (run, again):
        for row, other in zip(numbers(found), numbers(folder / "alone"), strict=True):
            assert row["loss"] == pytest.approx(other["loss"], rel=1e-9)
        assert [path.name for path in checkpoints(found)] == [f"step-{step:06d}" for step in (MIDDLE, STEPS)]


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(
    damage: str, folder: Path, world4: Ranks, tmp_path: Path
) -> None:
    run = shutil.copytree(folder / ORIGIN, tmp_path / "run")
    good, last = checkpoints(run)
    file = last / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    match damage:
        case "flipped":
            file.write_bytes(content)
        case "truncated":
            file.write_bytes(file.read_bytes()[:-7])
        case "missing":
            file.unlink()
    with pytest.raises(
        UserError, match=f"{file} is .*; use another checkpoint: {good} is whole, .* delete {last.name}$"
    ):
        newest(run)


def test_torchrun_as_a_user_starts_it(folder: Path, world4: Ranks, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fathom.cli", "train", "quick",
        "--parallel.pp", "2", "--parallel.virtual", "2", "--steps", "2", "--model.dim", "8", "--model.num-layers", "3",
        "--model.context", "16", "--data.folder", str(folder / "corpus"), "--data.batch", "4", "--eval-sequences", "3",
        "--device", "cpu", "--out", str(run),
    ]  # fmt: skip
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("block: validation loss") and done.stdout.count("\n") == 2
    split = [line for line in done.stderr.splitlines() if line[:1].isdigit()]
    assert [line.split()[:2] for line in split] == [["0", "0"], ["1", "1"], ["2", "0"], ["3", "1"]]
    assert [row["step"] for row in numbers(run) if row["kind"] == "train"] == [1, 2]


def test_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.num_heads is 2: parallel\.tp, 3, must divide it"):
        config(corpus, tp=3)
    with pytest.raises(UserError, match=r"parallel\.tp is 2: .* not with residual\.rule delta$"):
        replace(config(corpus, tp=2), model=ModelConfig(residual=ResidualConfig(rule="delta")))
    with pytest.raises(UserError, match=r"parallel\.tp is 2: .* not with residual\.activation$"):
        replace(config(corpus, tp=2), model=ModelConfig(residual=ResidualConfig(rule="block", activation="sigmoid")))
    with pytest.raises(UserError, match=r"parallel\.tp is 2: muon orthogonalises whole matrices"):
        replace(config(corpus, tp=2), optim=OptimConfig(optimizer="muon"))
    with pytest.raises(UserError, match="schedule zbv cannot be cached: it puts off"):
        config(corpus, pp=2, schedule="zbv")
    with pytest.raises(UserError, match=r"virtual is 2, but parallel\.pp is 1"):
        config(corpus, virtual=2)
    with pytest.raises(UserError, match=r"data\.batch is 8: parallel.dp, 3, must divide it"):
        config(corpus, dp=3)
    with pytest.raises(UserError, match="2 micro-batches a step are too few for 1F1B on 4 ranks"):
        config(corpus, pp=4, dp=4)
    with pytest.raises(
        UserError, match=r"needs 4 processes, but 1 process was started: use `torchrun --nproc-per-node 4"
    ):
        Trainer(config(corpus, pp=2, dp=2), tmp_path / "run")
