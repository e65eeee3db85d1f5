"""Small training runs on several processes, in float64: what the worlds train, and the functions that do."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo.backends.debugging import aot_eager

from fathom.models.config import ModelConfig, ResidualConfig
from fathom.parallel.config import ParallelConfig
from fathom.train import loop
from fathom.train.checkpoint import checkpoints
from fathom.train.config import DataConfig, OptimConfig, RunConfig

LAYOUTS = {
    2: {
        "pp2": ParallelConfig(pp=2),
        "pp2-v2-full": ParallelConfig(pp=2, virtual=2, recompute="full"),
        "tp2": ParallelConfig(tp=2),
    },
    4: {
        "pp2-v2-dp2": ParallelConfig(pp=2, virtual=2, dp=2),
        "pp4": ParallelConfig(pp=4, schedule="looped_bfs"),
        "dp4": ParallelConfig(dp=4),
        "tp2-dp2": ParallelConfig(tp=2, dp=2),
        "pp2-tp2": ParallelConfig(pp=2, virtual=2, tp=2),
        "dp4-selective": ParallelConfig(dp=4, recompute="selective"),
    },
}
"""By world size. Each trains from the start, and goes on from the middle of a run on other processes."""
ROUGH = {
    "pp2-bf16-compiled": {"precision": "bf16", "compile": "layers", "parallel": ParallelConfig(pp=2, virtual=2)},
    "dp2-bf16-compiled": {"precision": "bf16", "compile": "layers", "parallel": ParallelConfig(dp=2)},
    "tp2-bf16-compiled": {"precision": "bf16", "compile": "layers", "parallel": ParallelConfig(tp=2)},
}
"""What two processes train as well, in float32, for the steps of the warm-up."""
ORIGIN = "pp2-v2-dp2"
BEFORE = {
    "pp2-v2-dp2": "alone",
    "pp4": ORIGIN,
    "dp4": "alone",
    "tp2-dp2": ORIGIN,
    "pp2-tp2": "tp2-dp2",
    "dp4-selective": "pp2-tp2",
    "pp2": ORIGIN,
    "pp2-v2-full": "alone",
    "tp2": "alone",
}
"""Whose: ``alone`` is one process's."""
STEPS, MIDDLE = 6, 3


def config(corpus: Path, **parallel: Any) -> RunConfig:
    return RunConfig(
        model=ModelConfig(dim=16, num_layers=3, num_heads=2, context=16, residual=ResidualConfig(rule="block", block_size=4)),
        data=DataConfig(folder=str(corpus), batch=8, micro_batch=1),
        optim=OptimConfig(warmup=2),
        parallel=ParallelConfig(**parallel),
        steps=STEPS, device="cpu", eval_every=2, eval_sequences=11, checkpoint_every=MIDDLE,
    )  # fmt: skip


def cut_short(run: Path, copy: Path) -> Path:
    """A copy of a finished run as it was in the middle."""
    shutil.copytree(run, copy)
    shutil.rmtree(checkpoints(copy)[-1])
    (copy / "summary.json").unlink()
    return copy


def in_float64(train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return train()
    finally:
        torch.set_default_dtype(before)


def train_all(world: int, rank: int, folder: Path) -> dict[str, list[str]]:
    """On every rank of a world: train ``folder/<layout>``, and go on with ``folder/<layout>-from-<another>``.

    Returns, by run, the functions that its compiled graphs call; they are compiled by a backend that needs no compiler.
    """
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "localhost"}

    def once(work: Callable[[], Any]) -> None:
        if rank == 0:
            work()
        dist.barrier()

    for name, parallel in LAYOUTS[world].items():
        whole = replace(config(folder / "corpus"), parallel=parallel)
        in_float64(lambda whole=whole, name=name: loop.train(whole, folder / name))
        run = folder / f"{name}-from-{BEFORE[name]}"
        once(lambda name=name, run=run: cut_short(folder / BEFORE[name], run))
        in_float64(lambda run=run, parallel=parallel: loop.resume(run, parallel))
    called: dict[str, list[str]] = {}

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        called[name] += [node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"]
        return aot_eager(graph, inputs)

    torch.compile = partial(torch.compile, backend=backend)  # type: ignore[assignment]
    for name, changes in ROUGH.items() if world == 2 else ():
        called[name] = []
        torch.compiler.reset()
        short = replace(config(folder / "corpus"), steps=2, eval_sequences=2, **changes)
        loop.train(short, folder / name)
    return called
