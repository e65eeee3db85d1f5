"""Dynamics as they are recorded: not a bit of training changes, the numbers are the definitions', summaries tell growth."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fathom.errors import UserError
from fathom.lab.dynamics import growth, records, sinks
from fathom.lab.pruning import pruning
from fathom.lab.sweeps import residual
from fathom.models.config import ModelConfig
from fathom.models.transformer import Transformer
from fathom.train import checkpoint
from fathom.train.config import DataConfig, OptimConfig, RunConfig, to_dict
from fathom.train.dynamics import DEFINITIONS, Recorder, measure_depth
from fathom.train.embedded import embedded
from fathom.train.loop import Diverged, StepResult, Trainer, resume, train

# Output magnitudes by decoder layer as read off Fig. 5b of arXiv 2603.15031, baseline and Block.
PAPER_BASELINE = [
     0.04, 0.06, 0.10, 0.14, 0.20, 0.59, 0.63, 0.68, 0.71, 0.76, 0.81, 0.89, 0.98, 1.07,
     1.23, 1.43, 1.66, 1.91, 2.29, 2.60, 3.12, 3.51, 5.56, 6.20, 7.10, 10.47, 12.15,
]  # fmt: skip
PAPER_BLOCK = [
     0.07, 0.34, 0.75, 0.35, 0.67, 1.89, 0.38, 0.69, 1.30, 0.30, 0.66, 1.48, 0.21, 0.42,
     0.71, 0.28, 0.59, 1.48, 0.46, 0.75, 1.41, 0.66, 1.23, 1.50, 0.64, 1.16, 1.91,
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded(tmp_path_factory.mktemp("cache"))


def small(data: Path, rule: str, **run: Any) -> RunConfig:
    model = ModelConfig(context=32, dim=16, num_layers=2, residual=residual(rule))
    settings: dict[str, Any] = {"steps": 12, "eval_every": 5, "eval_sequences": 3, "checkpoint_every": 4, **run}
    return RunConfig(
        model=model,
        data=DataConfig(folder=str(data), batch=2),
        optim=OptimConfig(lr=1e-2, warmup=2),
        device="cpu",
        **settings,
    )


def rows(run: Path, *, dynamics: bool) -> list[dict[str, Any]]:
    clock = ("step_seconds", "tokens_per_second", "mfu", "seconds")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if dynamics or line["kind"] != "dynamics"]
    return [{key: value for key, value in line.items() if key not in clock} for line in kept]


def tensors(run: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(checkpoint.checkpoints(run)[-1].glob("*.safetensors"))]


@pytest.mark.parametrize("rule", ["prenorm", "block", "full"])
def test_recording_changes_no_bit_of_training(data: Path, tmp_path: Path, rule: str) -> None:
    train(small(data, rule), tmp_path / "without")
    train(small(data, rule, dynamics_every=3), tmp_path / "with")
    assert rows(tmp_path / "with", dynamics=False) == rows(tmp_path / "without", dynamics=False)
    assert tensors(tmp_path / "with") == tensors(tmp_path / "without")
    seen = [line for line in rows(tmp_path / "with", dynamics=True) if line["kind"] == "dynamics"]
    assert [line["step"] for line in seen] == [3, 6, 9, 12]
    about = json.loads((tmp_path / "with/dynamics.json").read_text())
    assert about["definitions"] == DEFINITIONS and set(seen[0]["layers"][0]) <= DEFINITIONS.keys()
    assert not (tmp_path / "without/dynamics.json").exists()


@pytest.mark.slow
def test_recording_changes_no_bit_of_a_compiled_run(data: Path, tmp_path: Path) -> None:
    """The probe has another shape than the batch: were the model compiled for both, it might train on with other kernels."""
    processes = []
    for name, every in (("without", 0), ("with", 2)):
        config = small(data, "block", steps=5, compile="layers", dynamics_every=every)
        # A process of its own, since the types that tests check at run time cannot be compiled.
        code = (
            "import json, sys; from pathlib import Path; from fathom.train.config import RunConfig, from_dict; "
            "from fathom.train.loop import train; train(from_dict(RunConfig, json.loads(sys.argv[1])), Path(sys.argv[2]))"
        )
        command = [sys.executable, "-c", code, json.dumps(to_dict(config)), str(tmp_path / name)]
        processes.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}))
    assert [process.wait(300) for process in processes] == [0, 0]
    assert rows(tmp_path / "with", dynamics=False) == rows(tmp_path / "without", dynamics=False)
    assert tensors(tmp_path / "with") == tensors(tmp_path / "without")
    assert [row["step"] for row in rows(tmp_path / "with", dynamics=True) if row["kind"] == "dynamics"] == [2, 4]


def test_a_record_is_of_the_model_after_the_step(data: Path, tmp_path: Path) -> None:
    train(small(data, "block", dynamics_every=12), tmp_path / "run")
    (seen,) = [line for line in rows(tmp_path / "run", dynamics=True) if line["kind"] == "dynamics"]
    trainer = Trainer(small(data, "block"), tmp_path / "copy")
    checkpoint.load_model(checkpoint.checkpoints(tmp_path / "run")[-1], trainer.model)
    tokens, targets = trainer.validation[0]
    depth = measure_depth(trainer.model, [(tokens[:1], targets[:1])])
    trainer.close()
    for layer, expected in zip(seen["layers"], depth["layers"], strict=True):
        assert {key: layer[key] for key in expected} == expected
    for site, expected in zip(seen["sites"], depth["sites"], strict=True):
        assert site["weights"] == [round(weight, 6) for weight in expected["weights"]]
        assert site["entropy_nats"] == expected["entropy_nats"]


def test_update_to_weight_is_the_move_of_a_layers_matrices() -> None:
    model = Transformer(
        ModelConfig(vocab_size=17, context=8, dim=8, num_layers=2, num_heads=1, residual=residual("prenorm"))
    )
    tokens = torch.arange(8).unsqueeze(0)
    recorder = Recorder(model, tokens, tokens, every=1)
    recorder.before_step()
    with torch.no_grad():
        for parameter in model.sublayers[2].parameters():
            parameter.mul_(1.25)
        for parameter in model.sublayers[3].parameters():
            parameter.mul_(1.25)
        model.sublayers[0].norm.weight.mul_(9)  # type: ignore[operator, union-attr]
    layers = recorder.after_step()["layers"]
    assert layers[0]["update_to_weight"] == 0
    assert layers[1]["update_to_weight"] == pytest.approx(0.25, rel=1e-5)


def test_a_resumed_run_has_the_same_records(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(data, "block", dynamics_every=3)
    train(config, tmp_path / "straight")
    real = Trainer.step

    def step(self: Trainer) -> StepResult:
        if self.progress.step == 7:  # after the record of step 6, before the checkpoint of step 8
            raise KeyboardInterrupt
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "stopped")
    resume(tmp_path / "stopped")
    assert rows(tmp_path / "stopped", dynamics=True) == rows(tmp_path / "straight", dynamics=True)


def test_a_magnitude_that_is_not_finite_stops_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer.step

    def step(self: Trainer) -> StepResult:
        result = real(self)
        with torch.no_grad():
            next(self.model.sublayers[0].parameters()).fill_(math.inf)
        return result

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(Diverged, match="dynamics of step 1 "):
        train(small(data, "prenorm", dynamics_every=1), tmp_path / "run")


def test_summaries_follow_from_the_records(data: Path, tmp_path: Path) -> None:
    train(small(data, "full", dynamics_every=6), tmp_path / "run")
    seen, cost = records(tmp_path / "run")
    lines = [line for line in rows(tmp_path / "run", dynamics=True) if line["kind"] == "dynamics"]
    assert [each.step for each in seen] == [6, 12] and cost > 0
    last, sites = lines[-1], [site for site in lines[-1]["sites"] if len(site["weights"]) > 1]
    assert seen[-1].largest_output == max(layer["output_magnitude"] for layer in last["layers"])
    assert seen[-1].embedding == pytest.approx(sum(site["weights"][0] for site in sites) / len(sites))
    assert seen[-1].last == pytest.approx(sum(site["weights"][-1] for site in sites) / len(sites))
    assert 0 < (seen[-1].effective_share or 0) <= 1
    train(small(data, "prenorm", dynamics_every=6), tmp_path / "prenorm")
    (*_, plain), _ = records(tmp_path / "prenorm")
    assert plain.embedding is None and plain.sinks is None
    train(small(data, "prenorm"), tmp_path / "none")
    with pytest.raises(UserError, match="no record of dynamics"):
        records(tmp_path / "none")


def test_growth_tells_the_papers_baseline_from_its_block() -> None:
    assert growth(PAPER_BASELINE) > 1.5 and growth(PAPER_BLOCK) < 0.45
    assert growth([2.0] * 24) == 0 and growth([3.0]) == 0
    assert growth([float(layer) for layer in range(1, 25)]) == pytest.approx(1)
    # A sum of independent outputs of one size is what "growing" begins with.
    assert 0.5 <= growth([math.sqrt(layer) for layer in range(1, 25)]) < 0.55


def test_sinks_are_read_often_when_they_are_not_new() -> None:
    uniform = [[1 / count] * count for count in range(1, 9)]
    assert sinks(uniform) == {}
    heavy = [[0.5 if source == 2 else 0.5 / (count - 1) for source in range(count)] for count in range(4, 9)]
    assert list(sinks(heavy)) == [2]
    local = [[0.1 / (count - 1)] * (count - 1) + [0.9] for count in range(2, 9)]
    assert sinks(local) == {}  # the newest source is locality, not a sink


@pytest.mark.parametrize("rule", ["prenorm", "block", "full"])
def test_pruning_is_the_loss_without_the_layer(rule: str) -> None:
    config = ModelConfig(
        vocab_size=17, context=8, dim=8, num_layers=3, num_heads=1, head_std=1.0, residual=residual(rule)
    )
    model = Transformer(config, seed=1)
    with torch.no_grad():
        model.sublayers[4].out.weight.zero_()  # type: ignore[operator, union-attr]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(17, (3, 9), generator=generator)
    batches = [(tokens[:2, :-1], tokens[:2, 1:]), (tokens[2:, :-1], tokens[2:, 1:])]
    found = pruning(model, batches)
    assert found["loss"] == pytest.approx(model.loss(tokens[:, :-1], tokens[:, 1:]).item(), rel=1e-6)
    assert found["sublayers"]["layer 3 attention"] == pytest.approx(0, abs=1e-7)
    assert all(not sublayer._forward_hooks for sublayer in model.sublayers)

    before = model.loss(tokens[:, :-1], tokens[:, 1:]).item()
    with torch.no_grad():
        model.sublayers[2].out.weight.zero_()  # type: ignore[operator, union-attr]
        model.sublayers[3].down.weight.zero_()  # type: ignore[operator, union-attr]
    assert found["layers"][1] == pytest.approx(model.loss(tokens[:, :-1], tokens[:, 1:]).item() - before, abs=1e-6)
    assert abs(found["layers"][1]) > 1e-4
