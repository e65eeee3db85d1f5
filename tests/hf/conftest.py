"""What the tests of fathom/hf/ share. They are skipped where Transformers is not installed, and only there."""

import importlib.util
from pathlib import Path

import pytest

from fathom.models.config import ModelConfig, ResidualConfig
from fathom.train.config import DataConfig, OptimConfig, RunConfig
from fathom.train.loop import train

collect_ignore_glob = [] if importlib.util.find_spec("transformers") else ["test_*.py"]


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a short run of Block AttnRes, whose queries have moved from zero."""
    folder = tmp_path_factory.mktemp("hf") / "run"
    model = ModelConfig(
        dim=16, num_layers=3, num_heads=4, num_kv_heads=2, context=48, residual=ResidualConfig(num_blocks=2)
    )
    train(
        RunConfig(
            model=model, data=DataConfig(batch=2), optim=OptimConfig(warmup=1, depth_lr=0.1), steps=5, eval_sequences=1,
            device="cpu",
        ),
        folder,
    )  # fmt: skip
    return folder
