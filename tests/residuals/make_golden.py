"""Writes tests/golden/zoo-<case>.json: the losses of 60 training steps of every rule and switch, in float64 on a CPU.

    python -m tests.residuals.make_golden [CASE ...]

As tests/make_golden.py does: the real trainer, groups, schedule and data order, and a decoder of six sublayers.
"""

import json
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import torch

from fathom.models.config import ModelConfig
from fathom.train.config import DataConfig, OptimConfig, RunConfig
from fathom.train.loop import Trainer
from tests.residuals.zoo import CASES, config

STEPS = 60
GOLDEN = Path(__file__).parents[1] / "golden"


def path(case: str) -> Path:
    return GOLDEN / f"zoo-{case.replace(',', '').replace(' ', '-')}.json"


def losses(case: str) -> list[float]:
    """The loss of each step, nats per token."""
    run = RunConfig(
        model=ModelConfig(dim=16, num_layers=3, context=32, residual=config(case)),
        data=DataConfig(batch=2),
        optim=OptimConfig(lr=1e-2, warmup=5),
        steps=STEPS,
        device="cpu",
        eval_sequences=1,
    )
    with tempfile.TemporaryDirectory() as folder, closing(Trainer(run, Path(folder) / "run")) as trainer:
        trainer.model.double()
        return [trainer.step().loss.item() for _ in range(STEPS)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or CASES:
        path(name).write_text(json.dumps(losses(name)) + "\n")
