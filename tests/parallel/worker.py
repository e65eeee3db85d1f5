"""One rank of the gloo tests: runs every case of its world size and saves what it saw.

python worker.py WORLD RANK FOLDER
"""

import datetime
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.transformer import Transformer
from fathom.parallel.checkpoint import load, save
from fathom.parallel.pipeline import Pipeline
from fathom.parallel.shard import shard

MICRO_BATCHES, MICRO_BATCH, LENGTH = 4, 2, 5


@dataclass(frozen=True)
class Case:
    """A network, and how it is cut."""

    world: int
    virtual: int
    residual: ResidualConfig
    num_layers: int
    firsts: tuple[int, ...] | None = None
    cache: bool = True
    schedule: str = "1f1b"
    document_mask: bool = False
    dp: int = 1
    """Pipelines side by side; with as many as ranks there is no pipeline, only FSDP2."""

    @property
    def pp(self) -> int:
        return self.world // self.dp

    def config(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=17, context=LENGTH, dim=8, num_layers=self.num_layers, num_heads=2, head_std=1.0,
            document_mask=self.document_mask, residual=self.residual,
        )  # fmt: skip


def _block(size: int, **options: object) -> ResidualConfig:
    return ResidualConfig(rule="block", block_size=size, **options)  # type: ignore[arg-type]


STRADDLING = {2: (0, 5), 4: (0, 1, 5, 6)}
"""Uneven cuts inside blocks of 4; the block of sites 0-3 goes on over two hops where there are four stages."""

CASES = {
    f"{world}-{name}": case
    for world in (2, 4)
    for name, case in {
        "aligned-v1": Case(world, 1, _block(2), world),
        "straddling-v1": Case(world, 1, _block(4), 5, STRADDLING[world]),
        **{
            f"{name}-v{virtual}-{'cached' if cache else 'naive'}": Case(world, virtual, residual, layers, cache=cache)
            for virtual in (2, 3)
            for cache in (True, False)
            for name, residual, layers in (
                ("aligned", _block(2), world * virtual),
                ("straddling", _block(5), world * virtual + 1),
            )
        },
        "several-a-stage": Case(world, 2, _block(1), 2 * world + 1),
        "one-block": Case(world, 2, ResidualConfig(rule="block", num_blocks=1), 2 * world),
        "full": Case(world, 2, ResidualConfig(rule="full"), 2 * world),
        "prenorm": Case(world, 2, ResidualConfig(rule="prenorm"), 2 * world),
        "single-pass": Case(world, 2, _block(5, schedule="single_pass"), 2 * world + 1),
        "recompute": Case(world, 2, _block(5, recompute=True), 2 * world + 1),
        "no-gain": Case(world, 2, _block(5, gain=False), 2 * world + 1),
        "documents": Case(world, 2, _block(5), 2 * world + 1, document_mask=True),
        "gpipe": Case(world, 1, _block(3), 2 * world, schedule="gpipe"),
        "looped-bfs": Case(world, 2, _block(3), 2 * world, schedule="looped_bfs"),
    }.items()
} | {
    "2-fsdp": Case(2, 1, _block(5), 5, dp=2),
    "4-fsdp-prenorm": Case(4, 1, ResidualConfig(rule="prenorm"), 3, dp=4),
    "4-fsdp-v1": Case(4, 1, _block(4), 5, (0, 5), dp=2),
    "4-fsdp-v2": Case(4, 2, _block(5), 5, dp=2),
    "4-fsdp-v2-naive": Case(4, 2, _block(5), 5, dp=2, cache=False),
}  # fmt: skip


def network(case: Case) -> Transformer:
    """The network of ``case`` in float64, every depth query and gain away from its initial value."""
    model = Transformer(case.config(), seed=1, end_of_text=0).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.stream.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def batch(case: Case) -> tuple[Tensor, Tensor]:
    shape = (MICRO_BATCHES * MICRO_BATCH, LENGTH + 1)
    tokens = torch.randint(17, shape, generator=torch.Generator().manual_seed(3))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def watch_memory(pipeline: Pipeline) -> tuple[dict[int, dict[int, set[int]]], list[int]]:
    """Where in memory the rank has had each source, by micro-batch and number; and the most bytes the cache has held."""
    places: dict[int, dict[int, set[int]]] = defaultdict(lambda: defaultdict(set))
    most = [0]
    for stage in pipeline.stages:
        read = stage.stream.read
        first = pipeline.plan.firsts[stage.index]

        def watched(state, site, norm, read=read, first=first):  # type: ignore[no-untyped-def]
            for n, source in enumerate(getattr(state, "bank", ())):
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


def run_fsdp(case: Case, folder: Path, name: str) -> None:
    """Without a pipeline: the whole network, sharded over all ranks."""
    rank, model, steps = dist.get_rank(), network(case), []
    shard(model, init_device_mesh("cpu", (case.world,)))
    tokens, targets = (part.chunk(case.world)[rank] for part in batch(case))
    for _ in range(2):
        loss = model.loss(tokens, targets)
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        steps.append((total / case.world, {(0, key): gradient(p) for key, p in model.named_parameters()}))
        model.zero_grad()
    torch.save({"steps": steps, "local": local_numbers([model])}, folder / f"{name}.{rank}.pt")


def run(case: Case, folder: Path, name: str) -> None:
    model = network(case)
    mesh = init_device_mesh("cpu", (case.dp, case.pp), mesh_dim_names=("dp", "pp"))
    tokens, targets = (part.chunk(case.dp)[mesh.get_local_rank("dp")] for part in batch(case))
    pipeline = Pipeline(
        model, num_virtual=case.virtual, num_micro_batches=MICRO_BATCHES // case.dp, micro_batch=MICRO_BATCH, length=LENGTH,
        cache=case.cache, schedule=case.schedule, firsts=case.firsts, group=mesh.get_group("pp"),
        dp=mesh["dp"] if case.dp > 1 else None,
    )  # fmt: skip
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
    torch.save(
        {
            "steps": steps,
            "local": local_numbers(pipeline.stages),
            "traffic": dict(pipeline.traffic),
            "copies": copies,
            "most": most[0],
            "left": pipeline.cache.nbytes(),
        },
        folder / f"{name}.{dist.get_rank()}.pt",
    )


LAYOUTS = {"p4": Case(4, 1, _block(5), 5), "p2-dp2": Case(4, 2, _block(5), 5, dp=2), "p2": Case(2, 2, _block(5), 5)}
"""Cuts of one network, under which a checkpoint is saved (the first) and loaded (all)."""


def moments(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def reshard(folder: Path, saved: Path) -> None:
    """Train two steps and save, on 4 ranks; go on for a step from the checkpoint under every layout of this world."""
    world, rank = dist.get_world_size(), dist.get_rank()
    for name, case in LAYOUTS.items():
        if case.world != world:
            continue
        mesh = init_device_mesh("cpu", (case.dp, case.pp), mesh_dim_names=("dp", "pp"))
        pipeline = Pipeline(
            network(case), num_virtual=case.virtual, num_micro_batches=MICRO_BATCHES // case.dp, micro_batch=MICRO_BATCH,
            length=LENGTH, group=mesh.get_group("pp"), dp=mesh["dp"] if case.dp > 1 else None,
        )  # fmt: skip
        tokens, targets = (part.chunk(case.dp)[mesh.get_local_rank("dp")] for part in batch(case))
        optimizer = moments(nn.ModuleList(pipeline.stages))
        if name == "p4":
            for _ in range(2):
                pipeline.step(tokens, targets)
                optimizer.step()
                optimizer.zero_grad()
            save(saved, pipeline.stages, [optimizer])
        else:
            load(saved, pipeline.stages, [optimizer])
            save(folder / f"again-{name}", pipeline.stages, [optimizer])
            losses = pipeline.step(tokens, targets)
            torch.save(losses, folder / f"{name}.{rank}.pt")


def main(world: int, rank: int, folder: Path, saved: Path | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", world_size=world, rank=rank,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    if saved is not None:
        reshard(folder, saved)
    for name, case in CASES.items():
        if saved is None and case.world == world:
            (run_fsdp if case.pp == 1 else run)(case, folder, name)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    world, rank, folder, *saved = sys.argv[1:]
    main(int(world), int(rank), Path(folder), Path(saved[0]) if saved else None)
