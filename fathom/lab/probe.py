"""The reasoning probe: a small decoder learns a task of set difficulty, and is scored by the number of steps.

    probe.json         the config, and what it ran on
    probe.jsonl        loss and accuracy of training batches by step
    model.safetensors  the weights after the last step
    accuracy.json      the share of right test answers by number of steps; written last

Training draws new sequences forever, and the test draws others: nothing can be learned by heart. The loss is that of the answers
alone. Accuracies of one setting over several seeds come with their mean and interval (Student's t over seeds).
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from fathom.errors import UserError
from fathom.lab.intervals import LEVEL, paired
from fathom.lab.probe_tasks import Sample, TaskConfig
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.transformer import Transformer
from fathom.train.config import OptimConfig, from_dict, read_object, to_dict
from fathom.train.environment import environment, pick_device
from fathom.train.metrics import writing
from fathom.train.optimizers import lr_share, make_optimizers, set_lr

TEST_SEED = 2**40
"""Test sequences are drawn from here on, training sequences from the run's seed."""
LOG_EVERY = 50


@dataclass(frozen=True)
class ProbeConfig:
    """One network and the task that it learns."""

    task: TaskConfig = field(default_factory=TaskConfig)
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=6e-3))
    layers: int = 6
    """Decoder layers."""
    dim: int = 64
    """D, the width."""
    heads: int = 2
    """H, query heads."""
    batch: int = 64
    """Sequences of one optimizer step."""
    steps: int = 1000
    """Optimizer steps."""
    seed: int = 0
    """Of initialisation and data."""
    device: str = "auto"
    """cpu, cuda, or auto for the GPU where there is one."""

    def __post_init__(self) -> None:
        for name in ("batch", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.seed < TEST_SEED:
            raise UserError(f"seed is {self.seed}: it must be from 0 to 2^40, where the test's begin")

    @property
    def model(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=self.task.vocab_size, context=self.task.length, dim=self.dim, num_layers=self.layers,
            num_heads=self.heads, residual=self.residual,
        )  # fmt: skip


def _answers(model: Transformer, task: TaskConfig, sample: Sample) -> Tensor:
    """Logits [B, Q, answers] at the questions."""
    return model(sample.tokens)[:, -task.num_questions :, : task.num_answers]


def _moved(sample: Sample, device: torch.device) -> Sample:
    return Sample(*(value.to(device) for value in sample))


def _by_hops(right: Tensor, sample: Sample, hops: int) -> tuple[Tensor, Tensor]:
    """Right answers and questions of each difficulty."""
    counts = torch.stack([(sample.difficulty == k).sum() for k in range(1, hops + 1)])
    return torch.stack([right[sample.difficulty == k].sum() for k in range(1, hops + 1)]), counts


def steps_of(config: ProbeConfig, model: Transformer) -> Iterator[dict[str, Any]]:
    """Train ``model``; a line every ``LOG_EVERY`` steps with the loss and the accuracies since the last."""
    device = next(model.parameters()).device
    optimizers = make_optimizers(model, config.optim)
    generator = torch.Generator().manual_seed(config.seed)
    totals = torch.zeros(2, config.task.hops)
    for step in range(config.steps):
        sample = _moved(config.task.sample(config.batch, generator), device)
        logits = _answers(model, config.task, sample)
        loss = F.cross_entropy(logits.flatten(0, 1), sample.answers.flatten())
        if not torch.isfinite(loss):
            raise UserError(f"the loss is {loss.item()} at step {step + 1}: give a lower --optim.lr")
        loss.backward()
        if config.optim.clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        set_lr(optimizers, lr_share(config.optim, step, config.steps))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        totals += torch.stack(_by_hops(logits.argmax(-1) == sample.answers, sample, config.task.hops)).cpu()
        if (step + 1) % LOG_EVERY == 0 or step + 1 == config.steps:
            right, asked = totals
            yield {"step": step + 1, "loss": loss.item(), "accuracy": (right / asked.clamp(min=1)).tolist()}
            totals.zero_()


def train_probe(config: ProbeConfig, out: Path) -> list[float]:
    """Train the network of ``config`` into the new folder ``out``; returns its test accuracy by number of steps."""
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise UserError(f"{out} exists already; delete it or give another --out")
    device = pick_device(config.device)
    model = Transformer(config.model, seed=config.seed).to(device)
    begin = time.perf_counter()
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        about = {"config": to_dict(config), "env": environment(device)}
        (out / "probe.json").write_text(json.dumps(about, indent=1) + "\n")
        with (out / "probe.jsonl").open("w") as file:
            for row in steps_of(config, model):
                row["seconds"] = round(time.perf_counter() - begin, 2)
                file.write(json.dumps(row) + "\n")
                file.flush()
        save_file({name: p.detach().cpu() for name, p in model.named_parameters()}, out / "model.safetensors")
        found = accuracy(model, config.task)
        (out / "accuracy.json").write_text(json.dumps(found) + "\n")
    return found


@torch.no_grad()
def accuracy(model: Transformer, task: TaskConfig, *, sequences: int = 4096) -> list[float]:
    """The share of right answers by number of steps, from one, on test sequences."""
    if sequences < 1:
        raise UserError(f"sequences is {sequences}: it must be at least 1")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(TEST_SEED)
    totals = torch.zeros(2, task.hops)
    for first in range(0, sequences, 512):
        sample = _moved(task.sample(min(512, sequences - first), generator), device)
        right = _answers(model, task, sample).argmax(-1) == sample.answers
        totals += torch.stack(_by_hops(right, sample, task.hops)).cpu()
    return (totals[0] / totals[1].clamp(min=1)).tolist()


def load_probe(folder: Path, device: str = "auto") -> tuple[ProbeConfig, Transformer]:
    """The config and the trained network in ``folder``; ``UserError`` if it holds none."""
    for file in ("probe.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise UserError(f"{folder} is not a trained probe: it has no {file}")
    try:
        config = from_dict(ProbeConfig, read_object(folder / "probe.json").get("config"))
    except UserError as error:
        raise UserError(f"{folder / 'probe.json'}: {error}") from None
    model = Transformer(config.model)
    saved = load_file(folder / "model.safetensors")
    wanted = dict(model.named_parameters())
    if {name: value.shape for name, value in saved.items()} != {name: value.shape for name, value in wanted.items()}:
        raise UserError(f"{folder / 'model.safetensors'} holds another network than {folder / 'probe.json'} describes")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(saved[name])
    return config, model.to(pick_device(device))


@dataclass(frozen=True)
class Score:
    """The accuracies of one setting over its seeds; entry k of each list is for k + 1 steps."""

    config: ProbeConfig
    """With seed 0."""
    seeds: list[int]
    accuracies: list[list[float]]
    """Of each seed."""

    @property
    def mean(self) -> list[float]:
        return np.mean(self.accuracies, 0).tolist()

    def intervals(self, level: float = LEVEL) -> list[tuple[float, float] | None]:
        """Of the means, cut to 0 .. 1; None of a single seed."""
        found = [paired(list(column), level) for column in zip(*self.accuracies, strict=True)]
        return [
            None if each.low is None or each.high is None else (max(0.0, each.low), min(1.0, each.high)) for each in found
        ]  # fmt: skip


def score(folders: list[Path], *, sequences: int = 4096) -> list[Score]:
    """Test the probes in ``folders``; those that differ only by their seed are one ``Score``."""
    if not folders:
        raise UserError("no probe is given: name at least one folder of `fathom probe train`")
    found: dict[ProbeConfig, tuple[list[int], list[list[float]]]] = {}
    for folder in folders:
        config, model = load_probe(folder)
        seeds, accuracies = found.setdefault(replace(config, seed=0), ([], []))
        if config.seed in seeds:
            raise UserError(f"{folder} has the setting and the seed of another probe that is given")
        seeds.append(config.seed)
        accuracies.append(accuracy(model, config.task, sequences=sequences))
    return [Score(config, seeds, accuracies) for config, (seeds, accuracies) in found.items()]
