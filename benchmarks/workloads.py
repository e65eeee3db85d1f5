"""The workloads of the residual-path benchmark: sublayers that every arm shares, and the one loop that runs them.

*stack*: sublayers that only scale their input, by a fixed factor per channel, so that nearly all time is the residual path.
(A factor per channel, because after a common one all sources would be parallel, and a wrong mix would look right.)
*model*: causal attention with heads 128 wide, and SwiGLU; no rotary positions, no embedding, no head.

Weights, inputs and the gradient at the output are bf16 and the same for all arms. The depth queries are random (std 0.02),
not zero, so that a read's weights are not uniform; key gains and norm weights are one.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fathom.models.layers import RMSNorm
from fathom.stream import Stream

EPS = 1e-6
QUERY_STD = 0.02


@dataclass(frozen=True)
class Case:
    """One workload at one shape: ``num_sublayers`` sublayers of width ``dim`` in blocks of ``block_size``."""

    name: str
    kind: Literal["stack", "model"]
    dim: int
    mlp_width: int
    num_sublayers: int = 32
    block_size: int = 8
    batch: int = 2
    length: int = 8192
    head_width: int = 128

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def description(self) -> str:
        return (
            f"D {self.dim}, {self.num_sublayers} sublayers, S {self.block_size}, "
            f"{self.batch} x {self.length} = {self.tokens} tokens, bf16"
        )

    def tiny(self) -> "Case":
        """The same case at a size that a CPU runs in moments; its last block is a short one."""
        return replace(
            self, name=f"{self.name}-tiny", dim=64, mlp_width=176, num_sublayers=10, block_size=4, length=24, head_width=32
        )  # fmt: skip


CASES = {
    case.name: case
    for case in (
        Case("stack-d2048", "stack", 2048, 5632),
        Case("model-d2048", "model", 2048, 5632),
        Case("model-d4096", "model", 4096, 11264),
        Case("model-d1024", "model", 1024, 2816),
        # The shape of Kimi Linear 48B: 27 decoder layers, S = 6.
        Case("model-d2304", "model", 2304, 6336, num_sublayers=54, block_size=6),
    )
}


class Scale(nn.Module):
    """``factor ⊙ x``, with a fixed factor per channel."""

    factor: Tensor

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.norm = RMSNorm(case.dim, EPS)
        self.register_buffer("factor", torch.ones(case.dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Attention(nn.Module):
    """Causal multi-head attention."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.head_width = case.head_width
        self.norm = RMSNorm(case.dim, EPS)
        self.qkv = nn.Linear(case.dim, 3 * case.dim, bias=False)
        self.out = nn.Linear(case.dim, case.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, -1, self.head_width)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) ⊙ up(x))``."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.norm = RMSNorm(case.dim, EPS)
        self.gate_up = nn.Linear(case.dim, 2 * case.mlp_width, bias=False)
        self.down = nn.Linear(case.mlp_width, case.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Network(nn.Module):
    """The sublayers of a case and the norm of its output; the residual rule comes from outside."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        kinds: list[Callable[[Case], nn.Module]] = [Scale, Scale] if case.kind == "stack" else [Attention, SwiGLU]
        self.sublayers = nn.ModuleList(kinds[site % 2](case) for site in range(case.num_sublayers))
        self.final_norm = RMSNorm(case.dim, EPS)


@dataclass(frozen=True)
class Workload:
    """What all arms of a case share."""

    case: Case
    network: Network
    embedding: Tensor
    """[batch, length, D], requires grad."""
    gradient: Tensor
    """The gradient of the loss at the normalised output: the loss is their dot product."""
    queries: Tensor
    """[L + 1, D]; row l is of site l, the last of the output. Each arm makes its own parameters from it."""
    gains: Tensor

    def clear(self) -> None:
        """Drop the gradients that an arm left."""
        for tensor in (self.embedding, *self.network.parameters()):
            tensor.grad = None


def make_workload(case: Case, device: torch.device) -> Workload:
    """The case's tensors on ``device``, from one seed."""
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            network = Network(case)
            embedding = torch.empty(case.batch, case.length, case.dim).normal_(generator=generator)
            gradient = torch.empty_like(embedding).normal_(generator=generator)
            queries = torch.empty(case.num_sublayers + 1, case.dim).normal_(std=QUERY_STD, generator=generator)
        finally:
            torch.set_default_dtype(default)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            kind = name.split(".")[-2]
            if kind in ("out", "down"):
                weight.normal_(std=(weight.shape[1] * case.num_sublayers) ** -0.5, generator=generator)
            elif kind in ("qkv", "gate_up"):
                weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
        for buffer in network.buffers():
            buffer.normal_(generator=generator)
    return Workload(case, network, embedding.requires_grad_(), gradient, queries, torch.ones_like(queries))


def _run(stream: Stream, network: Network, state: Any, first: int, end: int) -> Any:
    for site in range(first, end):
        sublayer = network.sublayers[site]
        x, state = stream.read(state, site, cast(RMSNorm, sublayer.norm))
        state = stream.write(state, site, sublayer(x))
    return state


def forward(stream: Stream, network: Network, embedding: Tensor, checkpoint_every: int | None = None) -> Tensor:
    """The normalised output [..., D]; with ``checkpoint_every`` sublayers recomputed in the backward pass, together."""
    num_sublayers = len(network.sublayers)
    state = stream.start(embedding)
    if checkpoint_every is None:
        state = _run(stream, network, state, 0, num_sublayers)
    else:
        for first in range(0, num_sublayers, checkpoint_every):
            end = min(first + checkpoint_every, num_sublayers)
            state = checkpoint(
                _run, stream, network, state, first, end, use_reentrant=False, preserve_rng_state=False
            )  # fmt: skip
    return stream.finish(state, network.final_norm)
