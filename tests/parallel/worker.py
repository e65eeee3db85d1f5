"""One rank of the gloo tests: runs every case of its world, one after the other in one process group, and saves what it saw."""

import datetime
import os
import runpy
import sys
import traceback
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from fathom.parallel.checkpoint import load, save
from fathom.parallel.pipeline import Pipeline
from fathom.parallel.shard import shard
from tests.parallel.cases import CASES, LAYOUTS, LENGTH, MICRO_BATCH, MICRO_BATCHES, Case, batch, network
from tests.parallel.runs import train_all


def watch_memory(pipeline: Pipeline) -> tuple[dict[int, dict[int, set[int]]], list[int]]:
    """Where in memory the rank has had each source, by micro-batch and number; and the most bytes the cache has held."""
    places: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    most = [0]
    for stage in pipeline.stages:
        read = stage.stream.read

        def watched(state, site, norm, read=read):  # type: ignore[no-untyped-def]
            again = torch._C._current_graph_task_id() != -1  # in a backward pass, of another micro-batch
            for n, source in enumerate(() if again else getattr(state, "bank", ())):
                places[pipeline.cache.micro_batch][n].add(source.data_ptr())
            most[0] = max(most[0], pipeline.cache.nbytes())
            return read(state, site, norm)

        stage.stream.read = watched  # type: ignore[method-assign]
    return places, most


def gradient(parameter: Tensor) -> Tensor | None:
    whole = parameter.grad
    return whole.full_tensor() if isinstance(whole, DTensor) else None if whole is None else whole.clone()


def local_numbers(parts: Sequence[nn.Module]) -> int:
    """How many numbers of parameters lie on this rank."""
    parameters = [parameter for part in parts for parameter in part.parameters()]
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)


@cache
def mesh(dp: int, pp: int) -> DeviceMesh:
    return init_device_mesh("cpu", (dp, pp), mesh_dim_names=("dp", "pp"))


def pipeline_of(case: Case) -> tuple[Pipeline, Tensor, Tensor]:
    """This rank's pipeline and its part of the batch."""
    axes = mesh(case.dp, case.pp)
    tokens, targets = (part.chunk(case.dp)[axes.get_local_rank("dp")] for part in batch(case))
    pipeline = Pipeline(
        network(case), num_virtual=case.virtual, num_micro_batches=MICRO_BATCHES // case.dp, micro_batch=MICRO_BATCH,
        length=LENGTH, cache=case.cache, recompute=case.recompute, schedule=case.schedule, firsts=case.firsts,
        group=axes.get_group("pp"), dp=axes["dp"] if case.dp > 1 else None,
    )  # fmt: skip
    return pipeline, tokens, targets


def run_fsdp(case: Case) -> dict[str, Any]:
    """Without a pipeline: the whole network, sharded over all ranks."""
    rank, model, steps = dist.get_rank(), network(case), []
    shard(model, mesh(case.world, 1)["dp"])
    tokens, targets = (part.chunk(case.world)[rank] for part in batch(case))
    for _ in range(2):
        loss = model.loss(tokens, targets)
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        steps.append((total / case.world, {(0, key): gradient(p) for key, p in model.named_parameters()}))
        model.zero_grad()
    return {"steps": steps, "local": local_numbers([model])}


def order_of(pipeline: Pipeline) -> list[tuple[int, bool, int]]:
    """What the schedule makes this rank run, as passes of simulate.py; none where torch keeps no list of them."""
    actions = getattr(pipeline.schedule, "pipeline_order", {}).get(pipeline.rank, [])
    return [(a.stage_index, a.computation_type.name == "FORWARD", a.microbatch_index) for a in actions if a is not None]


def run(case: Case) -> dict[str, Any]:
    pipeline, tokens, targets = pipeline_of(case)
    places, most = watch_memory(pipeline)
    steps, copies = [], 1
    for _ in range(2):
        places.clear()
        loss = pipeline.step(tokens, targets)
        gradients = {
            (stage.index, key): gradient(parameter)
            for stage in pipeline.stages
            for key, parameter in stage.named_parameters()
        }
        copies = max([copies, *(len(where) for by in places.values() for where in by.values())])
        for stage in pipeline.stages:
            stage.zero_grad()
        steps.append((loss, gradients))
    return {
        "steps": steps,
        "local": local_numbers(pipeline.stages),
        "traffic": dict(pipeline.traffic),
        "copies": copies,
        "most": most[0],
        "left": pipeline.cache.nbytes(),
        "order": order_of(pipeline),
    }


def moments(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def reshard(world: int, folder: Path) -> dict[str, Tensor]:
    """Train two steps and save, on 4 ranks; go on for a step from that checkpoint under every layout of this world."""
    losses = {}
    for name, case in LAYOUTS.items():
        if case.world != world:
            continue
        pipeline, tokens, targets = pipeline_of(case)
        optimizer = moments(nn.ModuleList(pipeline.stages))
        if name == "p4":
            for _ in range(2):
                pipeline.step(tokens, targets)
                optimizer.step()
                optimizer.zero_grad()
            save(folder / "step", pipeline.stages, [optimizer])
        else:
            load(folder / "step", pipeline.stages, [optimizer])
            save(folder / f"again-{name}", pipeline.stages, [optimizer])
            losses[name] = pipeline.step(tokens, targets)
    return losses


def benchmark(out: Path) -> None:
    """As `torchrun` starts benchmarks/pipeline.py, at a tiny size."""
    script = Path(__file__).parents[2] / "benchmarks" / "pipeline.py"
    sys.argv = [str(script), "--device", "cpu", "--tiny", "--micro-batches", "4", "--rounds", "2", "--out", str(out)]
    runpy.run_path(str(script), run_name="__main__")


def main(world: int, rank: int, folder: Path) -> None:
    """``folder`` is shared by the worlds: rank k of a world leaves what it saw in WORLD-k.pt, or why it failed in WORLD-k.log."""
    with (folder / f"{world}-{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/{world}.store", world_size=world, rank=rank,
            timeout=datetime.timedelta(seconds=60),
        )  # fmt: skip
        seen: dict[str, Any] = {
            name: (run_fsdp if case.pp == 1 else run)(case) for name, case in CASES.items() if case.world == world
        }
        seen["reshard"] = reshard(world, folder)
        seen["compiled graphs"] = train_all(world, rank, folder)
        if world == 2:
            benchmark(folder / "benchmark")
        torch.save(seen, folder / f"{world}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # at once, so that the others are not waited for
