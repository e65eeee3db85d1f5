"""The bytes of every hop: by the formula of plan.py, and counted from the tensors that real processes send."""

import datetime
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

from fathom.models.accounting import flops_per_token
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.transformer import Transformer
from fathom.parallel.pipeline import Pipeline
from fathom.parallel.plan import Plan, make_plan

MOST_RANKS = 8
"""More processes than this are not started: a table for them is computed."""
MOST_FLOPS = 1e12
"""Nor are processes for steps of more arithmetic: the bytes do not depend on who multiplies."""
TIMEOUT = datetime.timedelta(seconds=120)

Sent = dict[tuple[int, str], int]
"""Bytes by the stage that a hop leads into and by way."""
Arm = tuple[ModelConfig, Plan]


def formula(plan: Plan, tensor_bytes: int, num_micro_batches: int) -> Sent:
    """Bytes of a step; ``tensor_bytes`` is B T D times the size of a number."""
    return {
        (stage, way): plan.tensors(stage) * tensor_bytes * num_micro_batches
        for stage in range(1, plan.num_stages)
        for way in ("forward", "backward")
    }


def countable(config: ModelConfig, num_ranks: int, tokens: int) -> bool:
    """Whether processes are started for steps of ``tokens`` tokens."""
    flops = 3 * sum(flops_per_token(config, config.context).values()) * tokens
    return num_ranks <= MOST_RANKS and flops <= MOST_FLOPS


def count(arms: Mapping[str, Arm], num_micro_batches: int, micro_batch: int) -> dict[str, Sent]:
    """The same for each of ``arms``, counted: P gloo processes on this machine run one step of each in float32."""
    num_ranks = next(iter(arms.values()))[1].num_ranks
    with tempfile.TemporaryDirectory() as folder:
        arguments = (dict(arms), num_micro_batches, micro_batch, folder)
        start_processes(_rank, arguments, nprocs=num_ranks, start_method="forkserver")
        parts: list[dict[str, Sent]] = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(num_ranks)]
    return {name: {key: size for part in parts for key, size in part[name].items()} for name in arms}


def _rank(rank: int, arms: dict[str, Arm], num_micro_batches: int, micro_batch: int, folder: str) -> None:
    torch.set_num_threads(1)
    num_ranks = next(iter(arms.values()))[1].num_ranks
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=num_ranks, timeout=TIMEOUT
    )
    sent = {}
    for name, (config, plan) in arms.items():
        pipeline = Pipeline(
            Transformer(config, end_of_text=0), num_virtual=plan.num_stages // num_ranks,
            num_micro_batches=num_micro_batches, micro_batch=micro_batch, length=config.context, cache=plan.cache,
            firsts=plan.firsts,
        )  # fmt: skip
        tokens = torch.zeros(num_micro_batches * micro_batch, config.context, dtype=torch.int64)
        pipeline.step(tokens, tokens)
        sent[name] = dict(pipeline.traffic)
    torch.save(sent, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def table(
    config: ModelConfig, num_ranks: int, num_virtual: int, *, num_micro_batches: int, micro_batch: int, run: bool
) -> dict[str, Any]:
    """Naive against cached, hop by hop, and PreNorm beside them; float32. With ``run`` every number is counted, and checked.

    The bytes of a hop are those of one micro-batch, one way: the gradients that go back are as many.
    """
    plan = make_plan(config, num_ranks, num_virtual)
    tensor_bytes = 4 * micro_batch * config.context * config.dim
    prenorm = replace(config, residual=ResidualConfig(rule="prenorm"))
    arms: dict[str, Arm] = {
        "naive": (config, replace(plan, cache=False)),
        "cached": (config, plan),
        "prenorm": (prenorm, replace(plan, starts=())),
    }
    expected = {name: formula(arm, tensor_bytes, num_micro_batches) for name, (_, arm) in arms.items()}
    if run:
        counted = count(arms, num_micro_batches, micro_batch)
        assert counted == expected, f"counted {counted}, the formula says {expected}"
    hops = {
        name: [sent[stage, "forward"] // num_micro_batches for stage in range(1, plan.num_stages)]
        for name, sent in expected.items()
    }
    return {
        "ranks": num_ranks, "virtual": num_virtual, "stages": [list(plan.sites(s)) for s in range(plan.num_stages)],
        "counted": run, "micro_batches": num_micro_batches, "source_bytes": tensor_bytes,
        "hops": [
            {"into": stage + 1, "from_rank": stage % num_ranks, "to_rank": (stage + 1) % num_ranks}
            | {name: bytes_[stage] for name, bytes_ in hops.items()}
            for stage in range(plan.num_stages - 1)
        ],
        "step": {name: 2 * num_micro_batches * sum(bytes_) for name, bytes_ in hops.items()},
    }  # fmt: skip
