"""A run killed on a GPU and resumed has the bits of an unbroken one, with ``deterministic=True``.

Each part runs in a process of its own, as after a real kill; other tests keep their algorithms.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fathom.models.config import ModelConfig, ResidualConfig
from fathom.train.checkpoint import checkpoints, read_progress
from fathom.train.config import DataConfig, OptimConfig, RunConfig, save_config
from tests.train.conftest import files, numbers, write_corpus

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = "cuda"
STEPS, SAVE_EVERY, KILLED_AFTER = 12, 4, 7

PART = """
import os, signal, sys
from pathlib import Path
from fathom.train.config import load_config
from fathom.train.loop import Trainer, resume, train

what, config, run, last = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
step = Trainer.step

def step_and_die(self):
    result = step(self)
    if self.progress.step == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return result

Trainer.step = step_and_die
resume(run) if what == "resume" else train(load_config(config), run)
"""


def part(what: str, config: Path, run: Path, *, killed_after: int = 0) -> int:
    """Train or resume in another process, which kills itself after an optimizer step; its exit code."""
    arguments = [sys.executable, "-c", PART, what, str(config), str(run), str(killed_after)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


@pytest.mark.parametrize("rule", ["prenorm", "block"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_killed_on_a_gpu_has_the_bits_of_an_unbroken_one(rule: str, optimizer: str, tmp_path: Path) -> None:
    residual = ResidualConfig(rule=rule, num_blocks=4 if rule == "block" else None)  # type: ignore[arg-type]
    config = RunConfig(
        model=ModelConfig(dim=128, num_layers=4, num_heads=2, context=256, residual=residual),
        data=DataConfig(folder=str(write_corpus(tmp_path / "corpus", 0)), batch=8, micro_batch=4),
        optim=OptimConfig(optimizer=optimizer, warmup=2),  # type: ignore[arg-type]
        steps=STEPS, eval_every=SAVE_EVERY, eval_sequences=2, checkpoint_every=SAVE_EVERY, log_every=5,
        device=DEVICE, precision="bf16", deterministic=True,
    )  # fmt: skip
    save_config(config, tmp_path / "config.json")
    whole, again, run = (tmp_path / name for name in ("whole", "again", "run"))
    for unbroken in (whole, again):  # or else a resume could differ by luck alone, and be the same by luck
        assert part("train", tmp_path / "config.json", unbroken) == 0
    assert part("train", tmp_path / "config.json", run, killed_after=KILLED_AFTER) == -signal.SIGKILL
    assert read_progress(checkpoints(run)[-1]).step == SAVE_EVERY
    assert part("resume", tmp_path / "config.json", run) == 0
    assert read_progress(checkpoints(whole)[-1]).step == STEPS
    for other in (again, run):
        assert files(checkpoints(other)[-1]) == files(checkpoints(whole)[-1])
        assert numbers(other) == numbers(whole)
