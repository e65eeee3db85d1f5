"""Mixture of experts without an auxiliary loss (arXiv 2412.19437, section 2.1; Kimi K3's variants: arXiv 2607.24653, 2.3).

    s = σ(W_r x)        the k experts of a token are those of largest s + b        p_i = scaling · s_i / Σ_chosen s
    y = Σ_chosen p_i E_i(x) + Σ_shared E_j(x)                                        E(x) = down(act(gate x) ⊙ up x)

b chooses and never weighs: after each step of training it moves against an expert's load, and no loss is bent. No token is
dropped: tokens are sorted by expert, and every expert takes what it gets. Latent MoE (Kimi K3) puts the routed experts between
two matrices: y = W↑ norm(Σ p_i E_i(W↓ x)) + Σ_shared E_j(x).
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from fathom.models.kimi_config import KimiConfig
from fathom.models.layers import Context, RMSNorm

SITU_GATE, SITU_UP = 4.0, 25.0
"""The bounds β of SiTU-GLU's two branches in Kimi K3."""


def swiglu(gate: Float[Tensor, "*batch F"], up: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
    return F.silu(gate) * up


def situ(gate: Float[Tensor, "*batch F"], up: Float[Tensor, "*batch F"]) -> Float[Tensor, "*batch F"]:
    """SiTU-GLU: SwiGLU whose branches level off at 4 and 25, so that no activation grows without bound."""
    return SITU_GATE * torch.tanh(gate / SITU_GATE) * torch.sigmoid(gate) * SITU_UP * torch.tanh(up / SITU_UP)


ACTIVATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"swiglu": swiglu, "situ": situ}


class MLP(nn.Module):
    """One gated MLP: the dense layers', and the shared experts side by side."""

    def __init__(self, dim: int, width: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_up = nn.Linear(dim, 2 * width, bias=False)
        self.down = nn.Linear(width, dim, bias=False)

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return self.down(self.activation(*self.gate_up(x).chunk(2, dim=-1)))


class Dense(nn.Module):
    """An MLP sublayer of a layer without experts."""

    def __init__(self, config: KimiConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config.dim, config.mlp_width, config.mlp_activation)

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        return self.mlp(x)


class Experts(nn.Module):
    """E experts, each an MLP, for tokens that are told which to take."""

    def __init__(self, num_experts: int, dim: int, width: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_up = nn.Parameter(torch.empty(num_experts, 2 * width, dim))
        self.down = nn.Parameter(torch.empty(num_experts, dim, width))

    def weights(self) -> tuple[Tensor, Tensor]:
        """``gate_up`` and ``down`` of the experts that rows are computed with here."""
        return self.gate_up, self.down

    def sorted(self, x: Float[Tensor, "R D"], counts: Int[Tensor, " E"]) -> Float[Tensor, "R D"]:
        """The experts on rows in the experts' order, ``counts`` rows each."""
        low = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        x, gate_up, down = x.to(low), *(weight.to(low) for weight in self.weights())
        # Its rows must be of a multiple of 16 bytes.
        if x.is_cuda and low == torch.bfloat16 and down.shape[1] % 8 == 0 and down.shape[2] % 8 == 0:
            return self.grouped(x, gate_up, down, counts)
        # Fake tensors (accounting.py) have shapes and no counts: even loads take as many bytes as any.
        even = [len(x) * (e + 1) // len(counts) - len(x) * e // len(counts) for e in range(len(counts))]
        pieces = x.split(even if is_fake(counts) else counts.tolist())
        # unbind, not an index each: the gradient of an index is as large as all experts.
        triples = zip(pieces, gate_up.unbind(), down.unbind(), strict=True)
        return torch.cat([F.linear(self.activation(*F.linear(p, g).chunk(2, dim=-1)), d) for p, g, d in triples])

    def grouped(self, x: Tensor, gate_up: Tensor, down: Tensor, counts: Tensor) -> Tensor:
        """``sorted`` by torch's grouped matrix product, which leaves the counts on the device."""
        ends = counts.cumsum(0, dtype=torch.int32)
        inner = self.activation(*F.grouped_mm(x, gate_up.mT, offs=ends).chunk(2, dim=-1))
        return F.grouped_mm(inner, down.mT, offs=ends)

    def forward(
        self, x: Float[Tensor, "R D"], chosen: Int[Tensor, "R k"], weights: Float[Tensor, "R k"]
    ) -> Float[Tensor, "R D"]:
        """The weighted sum of each row's chosen experts."""
        arrived, order = by_expert(x, chosen)
        return weighted(self.sorted(arrived, count(chosen, len(self.gate_up))), order, weights)


def by_expert(x: Float[Tensor, "R D"], chosen: Int[Tensor, "R k"]) -> tuple[Float[Tensor, "Rk D"], Int[Tensor, " Rk"]]:
    """A copy of each row for each expert that it chose, in the experts' order; and, for each, which choice it is.

    Both ways are permutations of rows, so that no gradient is summed by atomics: sums are over a token's own k choices.
    """
    order = chosen.flatten().argsort(stable=True)
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
    copies = x.repeat_interleave(chosen.shape[1], dim=0)
    return torch.empty_like(copies).index_copy(0, place, copies), order


def weighted(
    output: Float[Tensor, "Rk D"], order: Int[Tensor, " Rk"], weights: Float[Tensor, "R k"]
) -> Float[Tensor, "R D"]:
    """The weighted sum of each row's outputs, which come in the experts' order."""
    back = torch.empty_like(output).index_copy(0, order, output).unflatten(0, weights.shape)
    # CUDA's autocast sums in float32 and would hand the stream float32.
    return (back * weights.unsqueeze(-1).to(output.dtype)).sum(1).to(output.dtype)


def count(chosen: Int[Tensor, "R k"], num_experts: int) -> Int[Tensor, " E"]:
    """How many rows chose each expert."""
    ones = torch.ones_like(chosen.flatten())
    return torch.zeros(num_experts, dtype=ones.dtype, device=chosen.device).scatter_add(0, chosen.flatten(), ones)


class Router(nn.Module):
    """Which experts a token takes, and with what weights; keeps the balance of their loads."""

    load: Tensor
    proposed: Tensor

    def __init__(self, config: KimiConfig) -> None:
        super().__init__()
        self.active, self.scaling = config.active_experts, config.routed_scaling
        self.rule, self.rate = config.balance, config.balance_rate
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.dim))
        # A parameter so that checkpoints have it; balance moves it, and no gradient.
        self.bias = nn.Parameter(torch.zeros(config.num_experts), requires_grad=False)
        self.register_buffer("load", torch.zeros(config.num_experts), persistent=False)
        self.register_buffer("proposed", torch.zeros(config.num_experts), persistent=False)

    def forward(self, x: Float[Tensor, "R D"]) -> tuple[Int[Tensor, "R k"], Float[Tensor, "R k"]]:
        """Chosen experts and their weights, in float32 at least."""
        with torch.autocast(x.device.type, enabled=False):
            return self.choose(x)

    def choose(self, x: Float[Tensor, "R D"]) -> tuple[Int[Tensor, "R k"], Float[Tensor, "R k"]]:
        """``forward`` where nothing is cast."""
        wide = torch.promote_types(x.dtype, torch.float32)
        scores = torch.sigmoid(F.linear(x.to(wide), self.weight.to(wide)))
        biased = (scores + self.bias.to(wide)).detach()
        chosen = biased.topk(self.active, dim=-1).indices
        weights = scores.gather(1, chosen)
        weights = self.scaling * weights / (weights.sum(-1, keepdim=True) + 1e-20)
        if self.training and torch.is_grad_enabled():
            self._note(scores.detach(), biased, chosen)
        return chosen, weights

    @torch.no_grad()
    def _note(self, scores: Tensor, biased: Tensor, chosen: Tensor) -> None:
        self.load += count(chosen, len(self.bias))
        if self.rule == "quantile":
            # With b_j at minus this quantile, k of n tokens would have chosen expert j, had they the thresholds of now.
            threshold = biased.topk(self.active + 1, dim=-1).values[:, -1:]
            rank = max(1, round((1 - self.active / len(self.bias)) * len(scores)))
            self.proposed -= (scores - threshold).kthvalue(rank, dim=0).values * len(scores)

    @torch.no_grad()
    def balance(self, group: dist.ProcessGroup | None = None) -> Float[Tensor, " E"]:
        """Move the bias after a step; returns how many tokens each expert got since the last, over the ranks of ``group``."""
        if group is not None:
            dist.all_reduce(self.load, group=group)
            dist.all_reduce(self.proposed, group=group)
        load = self.load.clone()
        tokens = load.sum() / self.active
        if self.rule == "bias":
            self.bias.add_((load.mean() - load).sign(), alpha=self.rate)
        elif self.rule == "quantile":
            bias = self.proposed / tokens.clamp(min=1)
            self.bias.copy_(torch.where(tokens > 0, bias - bias.mean(), self.bias))
        self.load.zero_()
        self.proposed.zero_()
        return load


class MoE(nn.Module):
    """An MLP sublayer of experts."""

    def __init__(self, config: KimiConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.router = Router(config)
        width = config.latent_dim or config.dim
        self.experts = Experts(config.num_experts, width, config.expert_dim, config.mlp_activation)
        self.into: nn.Module = nn.Identity()
        self.back: nn.Module = nn.Identity()
        if config.latent_dim is not None:
            self.into = nn.Linear(config.dim, width, bias=False)
            self.back = nn.Sequential(RMSNorm(width, config.norm_eps), nn.Linear(width, config.dim, bias=False))
        shared = config.shared_experts * config.expert_dim
        self.shared = MLP(config.dim, shared, config.mlp_activation) if shared else None

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        rows = x.flatten(0, -2)
        chosen, weights = self.router(rows)
        output = self.back(self.experts(self.into(rows), chosen, weights)).view_as(x)
        return output if self.shared is None else output + self.shared(x)


def balance(model: nn.Module, group: dist.ProcessGroup | None = None) -> Float[Tensor, " M"] | None:
    """Even out the experts of every MoE layer after a step.

    Returns the largest load of each layer over its mean, 1 where all are equal; None for a model without experts.
    """
    loads = [module.balance(group) for module in model.modules() if isinstance(module, Router)]
    return torch.stack([load.max() / load.mean().clamp(min=1) for load in loads]) if loads else None
