"""One of four processes that train a Kimi Linear in every layout of ``LAYOUTS``, and what one process is compared with."""

import os
import sys
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from fathom.models.config import ResidualConfig
from fathom.models.kimi_config import KimiConfig
from fathom.models.kimi_linear import build
from fathom.models.moe import Router
from fathom.models.transformer import Transformer
from fathom.parallel.config import ParallelConfig
from fathom.parallel.ranks import Ranks
from fathom.parallel.stages import Stage
from fathom.train import loop
from fathom.train.config import DataConfig, OptimConfig, RunConfig
from fathom.train.muon import StackedMuon
from fathom.train.network import Network, make_network

LAYOUTS = {
    "dp4": ParallelConfig(dp=4),
    "dp4-ep2": ParallelConfig(dp=4, ep=2),
    "dp4-ep4-full": ParallelConfig(dp=4, ep=4, recompute="full"),
    "pp4": ParallelConfig(pp=4),
    "pp2-v2-dp2-ep2": ParallelConfig(pp=2, virtual=2, dp=2, ep=2),
}
TRAINED = ("dp4-ep2", "pp2-v2-dp2-ep2")
"""What is trained from its config too, with a checkpoint in the middle."""
STEPS = 4


def config(corpus: Path | None = None, **changes: Any) -> RunConfig:
    """KDA, MLA, a dense MLP and latent experts, under blocks that straddle stages."""
    model = KimiConfig(
        vocab_size=50, context=8, dim=16, num_layers=3, num_heads=2, head_dim=8, mlp_dim=24, mla_every=3, kv_rank=6,
        shared_key_dim=4, num_experts=8, active_experts=2, expert_dim=8, latent_dim=12, balance_rate=1e-2, head_std=1.0,
        document_mask=True, residual=ResidualConfig(rule="block", block_size=4),
    )  # fmt: skip
    return replace(
        RunConfig(
            model=model, data=DataConfig(folder=str(corpus), batch=8, micro_batch=1), optim=OptimConfig(warmup=2), steps=STEPS,
            device="cpu", eval_every=2, eval_sequences=11, checkpoint_every=2,
        ),
        **changes,
    )  # fmt: skip


def network() -> Transformer:
    """In float64, depth queries and routers' biases away from zero."""
    model = build(config().model, seed=1, end_of_text=0).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("stream.") or name.endswith("router.bias"):
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(50, (8, 9), generator=torch.Generator().manual_seed(7))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def step(net: Network) -> dict[str, Any]:
    """A forward and a backward pass over the batch, the norm of all gradients, and the experts evened out."""
    tokens, targets = batch()
    pieces = net.pieces(0)
    loss = net.total([net.backward(tokens[[*piece]], targets[[*piece]], 1 / len(pieces)) for piece in pieces])
    gradients = {}
    for part in net.parts:
        for name, parameter in part.named_parameters():
            if parameter.grad is not None:
                grad = parameter.grad.full_tensor() if isinstance(parameter.grad, DTensor) else parameter.grad
                if name.startswith("stream."):
                    first = part.rows().start if isinstance(part, Stage) else 0
                    gradients |= {f"{name}.{first + n}": row.clone() for n, row in enumerate(grad)}
                else:
                    gradients[name] = grad.clone()
    norm, load = net.clip(), net.balance()
    assert load is not None
    routers = [
        (name, module) for part in net.parts for name, module in part.named_modules() if isinstance(module, Router)
    ]
    held_out = net.loss(tokens[:5], targets[:5])
    return {"loss": loss, "gradients": gradients, "norm": norm, "load": load.mean(), "held out": held_out,
            "experts": sum(_local(p).numel() for name, p in net.named_parameters() if ".experts." in name),
            "biases": {name: module.bias.detach() for name, module in routers}}  # fmt: skip


def muon_errors() -> dict[str, float]:
    """How far Muon's steps on parameters that lie on all ranks are from its steps on whole ones, by how they lie."""
    mesh, errors = init_device_mesh("cpu", (2, 2)), {}
    generator = torch.Generator().manual_seed(4)
    for name, shape, rows, placements in (
        ("experts", (6, 4, 8), None, (Replicate(), Shard(0))),
        ("experts twice", (6, 4, 8), None, (Shard(1), Shard(0))),
        ("heads", (12, 8), 4, (Replicate(), Shard(0))),
    ):
        whole = torch.nn.Parameter(torch.randn(shape, generator=generator))
        cut = torch.nn.Parameter(distribute_tensor(whole.detach(), mesh, placements))
        whole.grad = torch.randn(shape, generator=generator)
        cut.grad = distribute_tensor(whole.grad, mesh, placements)
        before = whole.detach().clone()
        for parameter in (whole, cut):
            StackedMuon([{"params": [parameter], "rows": rows}], lr=0.1, weight_decay=0.1).step()
        errors[name] = float((cut.detach().full_tensor() - whole.detach()).norm() / (whole.detach() - before).norm())
    return errors


def main(rank: int, folder: Path) -> None:
    with (folder / f"{rank}.log").open("w") as log:
        os.dup2(log.fileno(), 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "4", "MASTER_ADDR": "localhost"}
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message=".*flattened")
    torch.set_default_dtype(torch.float64)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", world_size=4, rank=rank)
        found: dict[str, Any] = {}
        for name, parallel in LAYOUTS.items():
            with Ranks(parallel, torch.device("cpu")) as ranks:
                found[name] = step(make_network(network(), config(parallel=parallel), ranks))
        for name in TRAINED:
            loop.train(config(folder / "corpus", parallel=LAYOUTS[name]), folder / name)
        found["muon"] = muon_errors()
        torch.save(found, folder / f"{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
