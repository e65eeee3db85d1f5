"""One of four processes: experts over a mesh axis of two ranks beside a data axis, and over all four."""

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fathom.errors import UserError
from fathom.models.config import ResidualConfig
from fathom.models.kimi_linear import build
from fathom.models.moe import Router, balance
from fathom.models.sizes import micro
from fathom.parallel.experts import ShardedExperts, average_gradients, shard_experts


def network(num_experts: int = 8) -> torch.nn.Module:
    config = replace(
        micro(), vocab_size=50, context=8, dim=16, num_layers=2, head_dim=8, mlp_dim=16, num_experts=num_experts, expert_dim=8,
        head_std=1.0, residual=ResidualConfig(rule="block", num_blocks=2),
    )  # fmt: skip
    return build(config).double()


def batch() -> torch.Tensor:
    return torch.randint(50, (8, 9), generator=torch.Generator().manual_seed(7))


def step(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return loss.detach()


def run(rank: int, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "experts"))
    line = init_device_mesh("cpu", (4,), mesh_dim_names=("experts",))
    found = {}
    for name, mesh, data in (("2", grid["experts"], grid["data"]), ("4", line, None)):
        model = network()
        shard_experts(model, mesh)
        loss = step(model, batch()[2 * rank : 2 * rank + 2])
        average_gradients(model, mesh, data)
        dist.all_reduce(loss)
        gradients = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
        for key, module in model.named_modules():  # the experts of all ranks, in their order
            if isinstance(module, ShardedExperts):
                for part, parameter in module.local.named_parameters():
                    whole = [torch.empty_like(parameter.grad) for _ in range(mesh.size())]
                    dist.all_gather(whole, parameter.grad, group=mesh.get_group())
                    gradients[f"{key}.{part}"] = torch.cat(whole)
                    del gradients[f"{key}.local.{part}"]
        load = balance(model, dist.group.WORLD)
        bias = {key: module.bias for key, module in model.named_modules() if isinstance(module, Router)}
        found[name] = {"loss": loss / 4, "gradients": gradients, "load": load, "bias": bias}
    try:
        shard_experts(network(6), line)
    except UserError as error:
        found["refused"] = str(error)
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()
