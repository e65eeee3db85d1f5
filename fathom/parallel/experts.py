"""Experts over the ranks of a mesh axis: each rank keeps E/P experts of every layer, and tokens travel to them and back.

    rows, sorted by expert  --all-to-all-->  rows of this rank's experts  --experts-->  outputs  --all-to-all-->  rows' outputs

Everything else of the network is whole on every rank, each of which has sequences of its own. No token is dropped, and how many
go where is exchanged first. Applied to a model from outside; the router does not know of it.
"""

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from fathom.errors import UserError
from fathom.models.moe import Experts, MoE, by_expert, count, weighted


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


class ShardedExperts(nn.Module):
    """This rank's part of ``experts``, called as they are, with the rank's own rows."""

    def __init__(self, experts: Experts, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group, self.ranks = group, dist.get_world_size(group)
        self.num_experts = len(experts.gate_up)
        if self.num_experts % self.ranks:
            raise UserError(f"model.num_experts is {self.num_experts}: {self.ranks} ranks must divide it")
        size = self.num_experts // self.ranks
        mine = slice(dist.get_rank(group) * size, (dist.get_rank(group) + 1) * size)
        experts.gate_up = nn.Parameter(experts.gate_up.detach()[mine].clone())
        experts.down = nn.Parameter(experts.down.detach()[mine].clone())
        self.local = experts

    def forward(
        self, x: Float[Tensor, "R D"], chosen: Int[Tensor, "R k"], weights: Float[Tensor, "R k"]
    ) -> Float[Tensor, "R D"]:
        rows, order = by_expert(x, chosen)
        outgoing = count(chosen, self.num_experts)
        incoming = torch.empty_like(outgoing)
        dist.all_to_all_single(incoming, outgoing, group=self.group)
        per_rank = incoming.view(self.ranks, -1)  # from each rank, to each of my experts
        sent, received = outgoing.view(self.ranks, -1).sum(1).tolist(), per_rank.sum(1).tolist()
        arrived = _Exchange.apply(rows, sent, received, self.group)
        # They come rank by rank, and the experts want them expert by expert.
        mine = torch.arange(per_rank.shape[1], device=x.device).repeat(self.ranks)
        sorting = mine.repeat_interleave(incoming).argsort(stable=True)
        output = self.local.sorted(arrived[sorting], per_rank.sum(0))
        back = torch.empty_like(output).index_copy(0, sorting, output)
        returned = _Exchange.apply(back, received, sent, self.group)
        return weighted(returned, order, weights)


def shard_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the experts of every MoE layer of ``model``, the same on every rank, over the one-dimensional ``mesh``, in place.

    Raises:
        UserError: experts that the ranks do not divide.
    """
    for module in model.modules():
        if isinstance(module, MoE):
            module.experts = ShardedExperts(module.experts, mesh.get_group())  # type: ignore[assignment]


def average_gradients(model: nn.Module, mesh: DeviceMesh, data: DeviceMesh | None = None) -> None:
    """Make gradients of every rank's mean loss those of the mean over all ranks: of ``mesh``, and of a ``data`` axis beside it.

    An expert has got the gradients of all tokens of its mesh axis already; only the replicas of the data axis have others.
    """
    ranks = mesh.size() * (1 if data is None else data.size())
    local = {id(p) for module in model.modules() if isinstance(module, ShardedExperts) for p in module.parameters()}
    for parameter in model.parameters():
        if parameter.grad is None:
            continue
        if id(parameter) not in local:
            dist.all_reduce(parameter.grad, group=mesh.get_group())
        if data is not None:
            dist.all_reduce(parameter.grad, group=data.get_group())
        parameter.grad /= ranks
