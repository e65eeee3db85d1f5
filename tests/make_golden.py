"""Writes golden/losses-30.json: the losses of 30 training steps of every rule, in float64 on a CPU.

    python tests/make_golden.py

Model, optimizer groups, schedule and data order are the real ones. Bits differ between CPUs; float64 keeps that difference
far below any change of the mathematics.
"""

import json
import tempfile
from contextlib import closing
from pathlib import Path

import torch

from fathom.models.config import ModelConfig, ResidualConfig
from fathom.train.config import DataConfig, OptimConfig, RunConfig
from fathom.train.loop import Trainer

CASES = {
    "prenorm": ResidualConfig(rule="prenorm"),
    "full two_phase": ResidualConfig(rule="full"),
    "full single_pass": ResidualConfig(rule="full", schedule="single_pass"),
    "block two_phase": ResidualConfig(rule="block", num_blocks=3),
    "block single_pass": ResidualConfig(rule="block", num_blocks=3, schedule="single_pass"),
}


def losses() -> dict[str, list[float]]:
    """The loss of each of 30 steps, nats per token, by case."""
    found = {}
    for case, residual in CASES.items():
        config = RunConfig(
            model=ModelConfig(dim=16, num_layers=4, context=32, residual=residual),
            data=DataConfig(batch=4, micro_batch=2),
            optim=OptimConfig(lr=1e-2, warmup=5),
            steps=30,
            device="cpu",
            eval_sequences=1,
        )
        with tempfile.TemporaryDirectory() as folder, closing(Trainer(config, Path(folder) / "run")) as trainer:
            trainer.model.double()
            found[case] = [trainer.step().loss.item() for _ in range(30)]
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    golden = Path(__file__).parent / "golden" / "losses-30.json"
    golden.parent.mkdir(exist_ok=True)
    golden.write_text(json.dumps(losses(), indent=1) + "\n")
