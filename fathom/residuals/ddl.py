"""Deep Delta Learning (Zhang et al., arXiv 2601.00417, Eq. 2.2 and 2.5): erase along a direction, then write there.

    x = Σ_j r_j X_j          X ← (I - β k kᵀ) X + β k vᵀ          X [D, n]: n hidden vectors X_j, all the embedding at first
    k = f_l(norm(x)) / |f_l(norm(x))|          β = 2 σ(w · norm(x) + b) in [0, 2]          v = 4 σ(x W) [n]

The sublayer's output is the direction, as in the authors' code; β = 1 at first, which replaces kᵀX by v; r = 1/n is learned.
w = 0 and W ~ N(0, 1 / 4D). The code's short convolution over tokens before each read is left out: it is no part of the depth
rule.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fathom.depth_attention import EPS, compute_dtype
from fathom.errors import UserError
from fathom.residuals.rule import Rule, product, weigh
from fathom.stream import Norm


class DDLState(NamedTuple):
    streams: Tensor
    """X [..., n, D]."""
    beta: Tensor | None
    """β [..., 1] and ``value`` v [..., n], between read and write."""
    value: Tensor | None


class DeepDelta(Rule):
    """Parameters: ``read_weight`` [L+1, n], ``beta_gate`` [L, D, 1], ``bias`` [L, 1], ``value_gate`` [L, D, n]."""

    read_weight: nn.Parameter
    beta_gate: nn.Parameter
    bias: nn.Parameter
    value_gate: nn.Parameter

    def __init__(self, num_sublayers: int, dim: int, *, num_streams: int = 4, eps: float = EPS) -> None:
        super().__init__(num_sublayers, dim, eps=eps)
        if num_streams < 1:
            raise UserError(f"num_streams is {num_streams}: it must be at least 1")
        self.num_streams = num_streams
        self.create()

    def initial(self, generator: torch.Generator) -> dict[str, Tensor | list[Tensor]]:
        n, sites = self.num_streams, self.num_sublayers
        return {
            "read_weight": torch.full((sites + 1, n), 1 / n),
            "beta_gate": torch.zeros(sites, self.dim, 1),
            "bias": torch.zeros(sites, 1),
            "value_gate": torch.randn(sites, self.dim, n, generator=generator) * 0.5 * self.dim**-0.5,
        }

    def _mean(self, streams: Tensor, site: int) -> Tensor:
        return weigh(self.read_weight[site], streams).sum(-2)

    def start(self, embedding: Tensor) -> DDLState:
        streams = embedding.unsqueeze(-2).expand(*embedding.shape[:-1], self.num_streams, self.dim)
        return DDLState(streams, None, None)

    def read(self, state: DDLState, site: int, norm: Norm) -> tuple[Tensor, DDLState]:
        hidden = self._mean(state.streams, site)
        x = norm(hidden)
        beta = self.coefficient(2 * torch.sigmoid(product(x, self.beta_gate[site]) + self.bias[site]))
        value = self.coefficient(4 * torch.sigmoid(product(hidden, self.value_gate[site])))
        return x, DDLState(state.streams, beta, value)

    def write(self, state: DDLState, site: int, output: Tensor) -> DDLState:
        assert state.beta is not None and state.value is not None
        exact = output.to(compute_dtype(output))
        direction = self.coefficient(F.normalize(exact, dim=-1, eps=self.eps))
        inverse = self.coefficient(1 / torch.linalg.vector_norm(exact, dim=-1, keepdim=True).clamp(min=self.eps))
        streams = state.streams.to(exact.dtype)
        held = (streams * direction.unsqueeze(-2)).sum(-1)
        erased = (state.beta * held).unsqueeze(-1) * direction.unsqueeze(-2)
        written = (state.beta * state.value * inverse).unsqueeze(-1) * exact.unsqueeze(-2)
        return DDLState((streams - erased + written).to(output.dtype), None, None)

    def finish(self, state: DDLState, norm: Norm) -> Tensor:
        return norm(self._mean(state.streams, self.num_sublayers))

    def running_sum(self, state: DDLState) -> Tensor:
        return state.streams.mean(-2)

    def flops(self) -> float:
        return self.num_sublayers * self.dim * (10 * self.num_streams + 5)
