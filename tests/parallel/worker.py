"""One rank of the gloo tests: runs every case of its world, one after the other in one process group, and saves what it saw."""

import datetime
import os
import runpy
import sys
import traceback
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from fathom.models.transformer import Transformer
from fathom.parallel.checkpoint import load, save
from fathom.parallel.footprint import _Alive
from fathom.parallel.pipeline import Pipeline, next_token_loss
from fathom.parallel.plan import whole
from fathom.parallel.shard import shard
from fathom.parallel.stages import Stage
from fathom.parallel.tensor import SplitLinear, own_tokens, split_sublayers, sum_gradients
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


def gradient(parameter: Tensor, owner: nn.Module, case: Case) -> Tensor | None:
    """The whole gradient, put together from the ranks' parts."""
    found = parameter.grad
    if found is None:
        return None
    found = found.full_tensor() if isinstance(found, DTensor) else found.clone()
    if not isinstance(owner, SplitLinear):
        return found
    pieces = owner.pieces(found)
    everyone: list[list[tuple[torch.Size, Tensor]]] = [[] for _ in range(case.tp)]
    dist.all_gather_object(everyone, pieces.parts, group=axes_of(case).get_group("tp"))
    all_of_it = found.new_full(pieces.size(), torch.nan)
    for (row, column), piece in (part for parts in everyone for part in parts):
        all_of_it[row : row + piece.shape[0], column : column + piece.shape[1]] = piece
    return all_of_it


def gradients(parts: Mapping[int, nn.Module], case: Case) -> dict[tuple[int, str], Tensor | None]:
    """By stage and name, after what ranks of ``tp`` have found alike is added up."""
    if case.tp > 1:
        sum_gradients(list(parts.values()), axes_of(case)["tp"])
    return {
        (index, name): gradient(parameter, part.get_submodule(name.rpartition(".")[0]), case)
        for index, part in parts.items()
        for name, parameter in part.named_parameters()
    }


def local_numbers(parts: Sequence[nn.Module]) -> int:
    """How many numbers of parameters lie on this rank."""
    parameters = [parameter for part in parts for parameter in part.parameters()]
    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)


@cache
def mesh(dp: int, pp: int, tp: int) -> DeviceMesh:
    return init_device_mesh("cpu", (dp, pp, tp), mesh_dim_names=("dp", "pp", "tp"))


def axes_of(case: Case) -> DeviceMesh:
    return mesh(case.dp, case.pp, case.tp)


def part_of(case: Case) -> tuple[Transformer, Tensor, Tensor]:
    """The network as this rank has it, split over ``tp``, and its part of the batch."""
    axes, model = axes_of(case), network(case)
    if case.tp > 1:
        split_sublayers(model, axes["tp"])
    tokens, targets = (part.chunk(case.dp)[axes.get_local_rank("dp")] for part in batch(case))
    return model, tokens, targets


def pipeline_of(case: Case) -> tuple[Pipeline, Tensor, Tensor]:
    """This rank's pipeline and its part of the batch."""
    axes = axes_of(case)
    model, tokens, targets = part_of(case)
    pipeline = Pipeline(
        model, num_virtual=case.virtual, num_micro_batches=MICRO_BATCHES // case.dp, micro_batch=MICRO_BATCH,
        length=LENGTH, cache=case.cache, recompute=case.recompute, schedule=case.schedule, firsts=case.firsts,
        group=axes.get_group("pp"), dp=axes["dp"] if case.dp > 1 else None, tp=axes["tp"] if case.tp > 1 else None,
    )  # fmt: skip
    return pipeline, tokens, targets


def whole_of(case: Case) -> tuple[nn.Module, Tensor, Tensor]:
    """Without a pipeline: all sublayers, split over ``tp`` and sharded over ``dp``."""
    model, tokens, targets = part_of(case)
    network: Any = model
    if case.recompute != "none":
        network = Stage(model, whole(case.config()), 0, recompute=case.recompute)
    if case.dp > 1:
        shard(network, axes_of(case)["dp"])
    return network, tokens, targets


def whole_loss(case: Case, network: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """This rank's share of it."""
    if case.tp > 1:
        targets = own_tokens(targets, axes_of(case)["tp"])
    return next_token_loss(network(tokens=tokens), targets) / case.tp


class Collectives(TorchDispatchMode):
    """Counts what DTensor's collectives gather and scatter, in bytes of the whole tensors, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[int]] = defaultdict(list)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.name().partition("::")[2]
        if function.namespace == "_c10d_functional" and not name.startswith(("wait", "_")):
            self.seen[name].append(max(args[0].nbytes, result.nbytes))
        return result


def kept(network: nn.Module, tokens: Tensor) -> int:
    """Bytes that a forward pass leaves for the backward pass, beside the logits."""
    with _Alive([*network.parameters(), *network.buffers()]) as alive:
        logits = network(tokens=tokens)
        return alive.bytes - logits.nbytes


def run_whole(case: Case) -> dict[str, Any]:
    network, tokens, targets = whole_of(case)
    steps, left = [], kept(network, tokens) if case.dp == 1 else 0
    for _ in range(2):
        with Collectives() as collectives:
            loss = whole_loss(case, network, tokens, targets)
            loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        steps.append((total / case.dp, gradients({0: network}, case)))
        network.zero_grad()
    return {"steps": steps, "local": local_numbers([network]), "collectives": dict(collectives.seen), "kept": left}


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
        found = gradients({stage.index: stage for stage in pipeline.stages}, case)
        copies = max([copies, *(len(where) for by in places.values() for where in by.values())])
        for stage in pipeline.stages:
            stage.zero_grad()
        steps.append((loss, found))
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
        if case.pp == 1:
            network, tokens, targets = whole_of(case)
            parts: list[Any] = [network]
        else:
            pipeline, tokens, targets = pipeline_of(case)
            parts = pipeline.stages
        optimizer = moments(nn.ModuleList(parts))
        if name == "p4":
            for _ in range(2):
                pipeline.step(tokens, targets)
                optimizer.step()
                optimizer.zero_grad()
            save(folder / "step", parts, [optimizer])
            continue
        load(folder / "step", parts, [optimizer])
        save(folder / f"again-{name}", parts, [optimizer])
        if case.pp == 1:
            losses[name] = whole_loss(case, network, tokens, targets).detach() / case.dp
            dist.all_reduce(losses[name])
        else:
            losses[name] = pipeline.step(tokens, targets)
    return losses


def benchmark(out: Path) -> None:
    """As `torchrun` starts benchmarks/pipeline.py, at a tiny size."""
    script = Path(__file__).parents[2] / "benchmarks" / "pipeline.py"
    sys.argv = [str(script), "--device", "cpu", "--tiny", "--micro-batches", "4", "--rounds", "2", "--out", str(out)]
    sys.path.insert(0, str(script.parent))  # as for any script that is started by its path
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
            name: (run_whole if case.pp == 1 else run)(case) for name, case in CASES.items() if case.world == world
        }
        seen["reshard"] = reshard(world, folder)
        seen["compiled calls"] = train_all(world, rank, folder)
        if world == 2:
            benchmark(folder / "benchmark")
        torch.save(seen, folder / f"{world}-{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # at once, so that the others are not waited for
