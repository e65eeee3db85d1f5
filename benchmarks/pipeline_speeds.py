"""Speeds of two devices for the simulator: of a stage of PreNorm, of a read, of copies and of the link between the two."""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fathom.models.accounting import source_counts
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.transformer import Transformer
from fathom.parallel.plan import make_plan, site_costs
from fathom.parallel.simulate import Speeds
from fathom.parallel.stages import Stage
from fathom.residuals import make_stream
from fathom.train.config import RunConfig
from fathom.train.environment import environment


def build(weights: Transformer, model: ModelConfig) -> Transformer:
    """``weights`` with the residual rule of ``model``: a copy, for to draw a billion random numbers takes far longer."""
    whole = copy.deepcopy(weights)
    whole.config, whole.stream = model, make_stream(model.residual, model.num_sublayers, model.dim)
    return whole


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()


def seconds(part: Callable[[], Any], device: torch.device) -> float:
    """Until all ranks have done ``part``."""
    synchronize(device)
    begin = time.perf_counter()
    part()
    synchronize(device)
    return time.perf_counter() - begin


def repeat(part: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        part()


IN_A_ROW = 4
"""Passes of a stage that are timed together."""


def link(device: torch.device, number: int) -> tuple[float, float]:
    """Bytes per second from the first rank to the second, and seconds of a hop of next to nothing."""
    times = {}
    for size in (1, 2**26 if device.type == "cuda" else 2**20):
        block = torch.zeros(size, dtype=torch.uint8, device=device)
        send = partial(dist.send, block, 1) if number == 0 else partial(dist.recv, block, 0)
        send()
        times[size] = min(seconds(partial(repeat, send, 20), device) / 20 for _ in range(3))
    small, large = times.values()
    size = max(times)
    return size / large, small


def stage_speeds(weights: Transformer, config: RunConfig, device: torch.device) -> tuple[float, float, float, float]:
    """FLOP/s of a stage of PreNorm forward and backward, and what a read of AttnRes costs for a source, in seconds.

    The stage is the one in the middle, whose bank is the mean one: what a read costs whatever its sources is spread over them.
    """
    found: list[tuple[float, float]] = []
    model, middle = config.model, 4
    for arm in (replace(model, residual=ResidualConfig(rule="prenorm")), model):
        plan = make_plan(model, 2, 4)
        plan = plan if arm is model else replace(plan, starts=())
        stage = Stage(build(weights, arm), replace(plan, cache=False), middle).to(device)
        if config.compile == "layers":
            for sublayer in stage.sublayers.values():
                sublayer.compile()
        shape = (config.data.micro_batch or 1, model.context, model.dim)
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        count = replace(plan, cache=False).tensors(middle)
        received = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(count)]
        tokens = torch.zeros(shape[:2], dtype=torch.int64, device=device)
        best = [float("inf")] * 2
        for _ in range(4):
            # Several in a row, so that neither the first launches nor the barrier at the end are what is timed.
            outputs: list[list[Tensor]] = []

            def forward(stage=stage, received=received, tokens=tokens, outputs=outputs) -> None:  # type: ignore[no-untyped-def]
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    outputs.append(list(stage(*received, tokens=tokens)))

            def backward(outputs=outputs) -> None:  # type: ignore[no-untyped-def]
                made = outputs.pop()
                torch.autograd.backward(made, [torch.ones_like(output) for output in made])

            parts: tuple[Callable[[], Any], ...] = (forward, backward)
            best = [
                min(before, seconds(partial(repeat, part, IN_A_ROW), device) / IN_A_ROW)
                for before, part in zip(best, parts, strict=True)
            ]
        found.append((best[0], best[1]))
    sites = make_plan(model, 2, 4).sites(middle)
    prenorm = site_costs(replace(model, residual=ResidualConfig(rule="prenorm")))
    flops = shape[0] * model.context * sum(prenorm[site] for site in sites)
    sources = sum(source_counts(model)[site] for site in sites)
    (f, b), (block_f, block_b) = found
    return flops / f, 2 * flops / b, max(block_f - f, 0.0) / sources, max(block_b - b, 0.0) / sources


def speeds(weights: Transformer, config: RunConfig, device: torch.device, number: int) -> Speeds:
    forward, backward, read_forward, read_backward = stage_speeds(weights, config, device)
    bandwidth, latency = link(device, number)
    number_bytes = 2 if config.precision == "bf16" else 4
    size = (config.data.micro_batch or 1) * config.model.context * config.model.dim * number_bytes
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copies = partial(repeat, partial(target.copy_, source), 20)
    memory = 2 * size / (min(seconds(copies, device) for _ in range(5)) / 20)
    return Speeds(
        forward_flops=forward, backward_flops=backward, memory=memory, read_forward=read_forward * memory / size,
        read_backward=read_backward * memory / size, link=bandwidth, network=bandwidth, latency=latency,
        number_bytes=number_bytes, source=f"{environment(device)['machine']}, measured by benchmarks/pipeline.py",
    )  # fmt: skip
