"""Loading a run folder or a checkpoint, and naming what is wrong with it."""

import shutil
from pathlib import Path

import pytest
import torch

import fathom
from fathom.errors import UserError
from fathom.inference.engine import Engine
from fathom.inference.load import load_run
from fathom.models.config import ModelConfig
from fathom.models.transformer import Transformer
from fathom.train import checkpoint
from fathom.train.config import RunConfig, save_config

TOKENIZER = Path(fathom.__path__[0]) / "assets" / "sotu-tokenizer.json"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 1 and 2, of different weights."""
    config = RunConfig(model=ModelConfig(context=8, dim=16, num_layers=1, head_std=1.0))
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(config, folder / "config.json")
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    for step in (1, 2):
        model = Transformer(config.model, seed=step)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        checkpoint.save(folder, checkpoint.Progress(step, step, end_of_text=0), model, [optimizer], keep=2)
    return folder


def test_load_run(run: Path) -> None:
    cpu = torch.device("cpu")
    config = RunConfig(model=ModelConfig(context=8, dim=16, num_layers=1, head_std=1.0))
    for step, seed in ((None, 2), (1, 1)):
        model, tokenizer = load_run(run, cpu, step=step)
        torch.testing.assert_close(model.head.weight, Transformer(config.model, seed=seed).head.weight, rtol=0, atol=0)
        assert model.end_of_text == 0 and tokenizer.get_vocab_size() == 1024


def test_load_run_names_what_is_wrong(run: Path, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="not a run folder"):
        load_run(tmp_path, cpu)
    with pytest.raises(UserError, match="no checkpoint of step 7; it has 1, 2"):
        load_run(run, cpu, step=7)
    weights = run / "checkpoints" / "step-000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match="damaged"):
        load_run(run, cpu)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_run(run, cpu)


def test_load_run_with_another_tokenizer(run: Path) -> None:
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"vocab_size": 1024', '"vocab_size": 1000'))
    with pytest.raises(UserError, match="belongs to another run"):
        load_run(run, torch.device("cpu"))


def test_load_a_checkpoint(run: Path) -> None:
    cpu, config = torch.device("cpu"), ModelConfig(context=8, dim=16, num_layers=1, head_std=1.0)
    model, _ = load_run(run / "checkpoints" / "step-000001", cpu)
    torch.testing.assert_close(model.head.weight, Transformer(config, seed=1).head.weight, rtol=0, atol=0)
    with pytest.raises(UserError, match="is a checkpoint already"):
        load_run(run / "checkpoints" / "step-000001", cpu, step=2)


def test_load_run_with_a_tokenizer_of_another_end(run: Path) -> None:
    model = Transformer(ModelConfig(context=8, dim=16, num_layers=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    checkpoint.save(run, checkpoint.Progress(3, 3, end_of_text=7), model, [optimizer], keep=2)
    with pytest.raises(UserError, match="ends documents with token 0, the model with 7: it belongs to another run"):
        load_run(run, torch.device("cpu"))


def test_engine_of_a_run(run: Path) -> None:
    engine = Engine.load(run, step=1, slots=2)
    assert engine.tokenizer is not None and engine.cache.keys.shape[1] == 2
    assert engine.prefill([[1, 2], [3]]).shape == (2, 1024)
