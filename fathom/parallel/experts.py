"""Experts over the ranks of a mesh axis: each rank keeps E/P experts of every layer, and tokens travel to them and back.

    rows, sorted by expert  --all-to-all-->  rows of this rank's experts  --experts-->  outputs  --all-to-all-->  rows' outputs

Each rank has sequences of its own. No token is dropped, and how many go where is exchanged first. Applied to a model from
outside: the router does not know of it, and a checkpoint has the experts of all ranks under their own names, because the
parameters are DTensors on the axis. The axis is a part of the data-parallel ranks; over the rest of those FSDP2 shards each
rank's experts (shard.py), along a dim that is not the experts'.
"""

from typing import cast

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from fathom.errors import UserError
from fathom.models.moe import Experts, MoE, Router, by_expert, count, weighted


class _Exchange(torch.autograd.Function):
    """Rows to other ranks: the first ``sent[0]`` to rank 0, and so on; the gradient goes the way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.sent, ctx.received, ctx.group = sent, received, group
        out = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[no-untyped-def]
        return _Exchange.apply(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


class _Mean(torch.autograd.Function):
    """The identity; backward divides the gradient by ``ranks``."""

    @staticmethod
    def forward(ctx, x: Tensor, ranks: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.ranks = ranks
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return gradient / ctx.ranks, None


class ShardedExperts(Experts):
    """This rank's part of ``experts``, called as they are, with the rank's own rows.

    Its gradients are of the mean of the axis's losses: they have every rank's tokens in them, and are divided by the ranks.
    """

    def __init__(self, experts: Experts, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.activation = experts.activation
        self.mesh, self.ranks = mesh, mesh.size()
        self.num_experts = len(experts.gate_up)
        if self.num_experts % self.ranks:
            raise UserError(f"model.num_experts is {self.num_experts}: {self.ranks} ranks must divide it")
        rank, size = mesh.get_local_rank(), self.num_experts // self.ranks

        def part(whole: nn.Parameter) -> nn.Parameter:
            mine = whole.detach()[rank * size : (rank + 1) * size].to(mesh.device_type, copy=True)
            return nn.Parameter(DTensor.from_local(mine, mesh, [Shard(0)], run_check=False))

        self.gate_up, self.down = part(experts.gate_up), part(experts.down)

    def weights(self) -> tuple[Tensor, Tensor]:
        # Gathered by FSDP2 they are DTensors on the axis still.
        gate_up, down = (_Mean.apply(cast(DTensor, p).to_local(), self.ranks) for p in (self.gate_up, self.down))
        return gate_up, down

    def forward(
        self, x: Float[Tensor, "R D"], chosen: Int[Tensor, "R k"], weights: Float[Tensor, "R k"]
    ) -> Float[Tensor, "R D"]:
        rows, order = by_expert(x, chosen)
        outgoing = count(chosen, self.num_experts)
        incoming, group = torch.empty_like(outgoing), self.mesh.get_group()
        dist.all_to_all_single(incoming, outgoing, group=group)
        per_rank = incoming.view(self.ranks, -1)  # from each rank, to each of my experts
        sent, received = outgoing.view(self.ranks, -1).sum(1).tolist(), per_rank.sum(1).tolist()
        arrived = _Exchange.apply(rows, sent, received, group)
        # They come rank by rank, and the experts want them expert by expert.
        mine = torch.arange(per_rank.shape[1], device=x.device).repeat(self.ranks)
        sorting = mine.repeat_interleave(incoming, output_size=sum(received)).argsort(stable=True)
        output = self.sorted(arrived[sorting], per_rank.sum(0))
        back = torch.empty_like(output).index_copy(0, sorting, output)
        returned = _Exchange.apply(back, received, sent, group)
        return weighted(returned, order, weights)


def shard_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the experts of every MoE layer of ``model``, the same on every rank, over the one-dimensional ``mesh``, in place.

    Raises:
        UserError: experts that the ranks do not divide.
    """
    for module in model.modules():
        if isinstance(module, MoE):
            module.experts = ShardedExperts(module.experts, mesh)


def biases(model: nn.Module) -> set[nn.Parameter]:
    """The routers' biases: whole on every rank, and moved by all ranks alike (``moe.balance``), never by a gradient."""
    return {module.bias for module in model.modules() if isinstance(module, Router)}
