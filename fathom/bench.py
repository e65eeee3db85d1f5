"""The cost of a residual rule: the training step of every rule on one decoder, timed in turns, against PreNorm.

The arms share one config but for the rule. They take turns in one process (A B C D, A B C D, ...), so that whatever
drifts, a clock or a neighbour, drifts for all. Nothing is timed before a gate has passed: with all depth queries at
zero every arm must have the loss and the gradients of PreNorm.
"""

import datetime
import shlex
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from fathom.errors import UserError
from fathom.kernels import backend_for
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.transformer import Transformer
from fathom.train.config import OptimConfig
from fathom.train.environment import environment, pick_device
from fathom.train.optimizers import make_optimizers

GATE_TOLERANCE = 1e-9
"""Largest relative difference that the gate lets pass: above float64 rounding through hundreds of sublayers, far below
any wrong term."""
KERNEL_TOLERANCE = 1e-3
"""The same for float32."""


@dataclass(frozen=True)
class BenchOptions:
    """What is timed."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The decoder; its residual rule is replaced by each arm's."""
    batch: int = 8
    """Sequences of one step, each model.context long."""
    rounds: int = 10
    """Turns that every arm takes; at least 5."""
    steps: int = 1
    """Training steps of one turn; more of them on a GPU, where one is short."""
    device: str = "auto"
    """cpu, cuda, or auto for the GPU where there is one."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: autocast, as in training."""

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("rounds", 5), ("steps", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {least}")


def arms(config: ModelConfig) -> dict[str, ModelConfig]:
    """The configs that are compared, PreNorm first; block sizes, gain and epsilon are those of ``config``."""
    given = config.residual
    full = ResidualConfig(rule="full", gain=given.gain, eps=given.eps)
    block = replace(full, rule="block", num_blocks=given.num_blocks, block_size=given.block_size)
    rules: dict[str, ResidualConfig] = {
        "prenorm": ResidualConfig(rule="prenorm"),
        "block": block,
        "block-single-pass": replace(block, schedule="single_pass"),
        "full": full,
    }
    return {name: replace(config, residual=rule) for name, rule in rules.items()}


def gate(config: ModelConfig, device: torch.device) -> float:
    """The largest relative difference of loss and gradients to PreNorm's at zero queries.

    In float64, with the norms' epsilon at 0 and a head that is not zero: there the identity is exact (section 5), and
    the loss depends on every sublayer. Where kernels are what is timed, they pass too, in float32. Raises ``UserError`` if
    the difference is more than rounding.
    """
    worst = _difference(config, device, torch.float64, GATE_TOLERANCE)
    if backend_for(device) == "triton":
        _difference(config, device, torch.float32, KERNEL_TOLERANCE)
    return worst


def _difference(config: ModelConfig, device: torch.device, dtype: torch.dtype, tolerance: float) -> float:
    exact = replace(config, norm_eps=0.0, head_std=1.0, residual=replace(config.residual, eps=0.0))
    tokens = torch.randint(config.vocab_size, (1, min(config.context, 32) + 1), generator=_generator()).to(device)
    values: dict[str, list[torch.Tensor]] = {}
    for name, arm in arms(exact).items():
        model = Transformer(arm, end_of_text=0).to(device, dtype)
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        shared = [p.grad for key, p in model.named_parameters() if not key.startswith("stream.")]
        values[name] = [loss.detach(), *(gradient for gradient in shared if gradient is not None)]
    worst = 0.0
    for name, arm_values in values.items():
        for value, reference in zip(arm_values, values["prenorm"], strict=True):
            difference = float((value - reference).norm() / reference.norm().clamp(min=1e-30))
            # Not <=, so that a NaN fails.
            if not difference < tolerance:
                raise UserError(
                    f"{name} differs from prenorm by {difference:.1e} at zero queries: it is wrong, and was not timed"
                )
            worst = max(worst, difference)
    return worst


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _training_step(config: ModelConfig, options: BenchOptions, device: torch.device) -> Callable[[], None]:
    model = Transformer(config, end_of_text=0).to(device)
    optim = OptimConfig()
    optimizers = make_optimizers(model, optim)
    tokens = torch.randint(config.vocab_size, (options.batch, config.context + 1), generator=_generator()).to(device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            loss = model.loss(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def bench(options: BenchOptions) -> dict[str, Any]:
    """Time ``options`` and return the result in the schema of ``benchmarks/results/*/result.json``.

    A row's ``median`` is over the rounds, ``low`` and ``high`` are the fastest and the slowest of them (ms a step),
    ``n`` is their number, and ``over_prenorm`` the median over rounds of the ratio to PreNorm's time in the same round.
    Raises ``UserError`` if the gate fails.
    """
    device = pick_device(options.device)
    difference = gate(options.model, device)
    configs = arms(options.model)
    steps = {name: _training_step(config, options, device) for name, config in configs.items()}

    def turn(step: Callable[[], None]) -> float:
        _synchronize(device)
        begin = time.perf_counter()
        for _ in range(options.steps):
            step()
        _synchronize(device)
        return (time.perf_counter() - begin) * 1000 / options.steps

    for step in steps.values():
        turn(step)
        turn(step)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(turn(step))

    model = options.model
    case = f"step-d{model.dim}-l{model.num_layers}-{options.batch}x{model.context}-{options.precision}"
    rows = [
        {
            "case": case,
            "arm": name,
            "metric": "step_ms",
            "unit": "ms",
            "median": statistics.median(values),
            "low": min(values),
            "high": max(values),
            "n": options.rounds,
            "over_prenorm": statistics.median(a / b for a, b in zip(values, times["prenorm"], strict=True)),
        }
        for name, values in times.items()
    ]
    versions = environment(device)
    return {
        "name": "bench",
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(versions.pop("command")),
        "machine": versions.pop("machine"),
        "versions": versions,
        "gate": {"tolerance": GATE_TOLERANCE, "difference": difference},
        "rows": rows,
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
