"""Hyper-Connections (Zhu et al., arXiv 2409.19606): n streams, read, mixed and written by learned weights.

    x = A_mᵀ H          H ← A_rᵀ H + B ⊗ f_l(norm(x))          H [n, D], A_m [n], A_r [n, n], B [n]
    A_m = a_m + s_α tanh(H̃ w_m)     A_r = a_r + s_α tanh(H̃ W_r)     B = b + s_β tanh(H̃ w_b)          H̃ = H / rms(H)

All streams start as the embedding and the output is their sum. At first a_m picks stream l mod n, a_r = 1, b = 1, and w = 0
with s = 0.01: all streams stay equal and the network is PreNorm, whatever n. ``dynamic=False`` keeps the constants only.
The norm on H has no learned gain here.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fathom.depth_attention import EPS, compute_dtype, full_precision
from fathom.errors import UserError
from fathom.residuals.rule import Rule, product, weigh
from fathom.stream import Norm

SCALE = 0.01


class StreamsState(NamedTuple):
    streams: Tensor
    """H [..., n, D]; between read and write, already mixed."""
    weights: Tensor | None
    """B [..., n], between read and write."""


class Streams(Rule):
    """n streams, read, mixed and written by ``maps``."""

    def __init__(self, num_sublayers: int, dim: int, *, num_streams: int = 4, eps: float = EPS) -> None:
        super().__init__(num_sublayers, dim, eps=eps)
        if num_streams < 1:
            raise UserError(f"num_streams is {num_streams}: it must be at least 1")
        self.num_streams = num_streams

    def maps(self, streams: Tensor, site: int) -> tuple[Tensor, Tensor, Tensor]:
        """Read [..., n], mix [..., n (new), n (old)] and write [..., n] weights."""
        raise NotImplementedError

    def start(self, embedding: Tensor) -> StreamsState:
        return StreamsState(embedding.unsqueeze(-2).expand(*embedding.shape[:-1], self.num_streams, self.dim), None)

    def read(self, state: StreamsState, site: int, norm: Norm) -> tuple[Tensor, StreamsState]:
        read, mix, write = (self.coefficient(weights) for weights in self.maps(state.streams, site))
        both = torch.cat((read.unsqueeze(-2), mix), dim=-2).to(compute_dtype(state.streams))
        with full_precision(both):
            mixed = (both @ state.streams.to(both.dtype)).to(state.streams.dtype)
        return norm(mixed[..., 0, :]), StreamsState(mixed[..., 1:, :], write)

    def write(self, state: StreamsState, site: int, output: Tensor) -> StreamsState:
        assert state.weights is not None
        return StreamsState(state.streams + weigh(state.weights, output.unsqueeze(-2)), None)

    def finish(self, state: StreamsState, norm: Norm) -> Tensor:
        return norm(state.streams.sum(-2))

    def running_sum(self, state: StreamsState) -> Tensor:
        return state.streams.sum(-2)

    def map_flops(self) -> float:
        """Operations of ``maps`` for one token."""
        raise NotImplementedError

    def flops(self) -> float:
        n = self.num_streams
        return self.num_sublayers * (self.map_flops() + self.dim * (2 * n * (n + 1) + 2 * n)) + n * self.dim


class HyperConnections(Streams):
    """Parameters of each sublayer: ``read_weight`` [n], ``mix`` [n, n], ``weight`` [n]; ``gate`` [D, n + 2], ``scale`` [2]."""

    read_weight: nn.Parameter
    mix: nn.Parameter
    weight: nn.Parameter
    gate: nn.Parameter
    scale: nn.Parameter

    def __init__(
        self, num_sublayers: int, dim: int, *, num_streams: int = 4, dynamic: bool = True, eps: float = EPS
    ) -> None:
        super().__init__(num_sublayers, dim, num_streams=num_streams, eps=eps)
        self.dynamic = dynamic
        self.create()

    def initial(self, generator: torch.Generator) -> dict[str, Tensor | list[Tensor]]:
        n, sites = self.num_streams, self.num_sublayers
        constants: dict[str, Tensor | list[Tensor]] = {
            "read_weight": torch.eye(n)[torch.arange(sites) % n],
            "mix": torch.eye(n).repeat(sites, 1, 1),
            "weight": torch.ones(sites, n),
        }
        if not self.dynamic:
            return constants
        return constants | {"gate": torch.zeros(sites, self.dim, n + 2), "scale": torch.full((sites, 2), SCALE)}

    def maps(self, streams: Tensor, site: int) -> tuple[Tensor, Tensor, Tensor]:
        read, mix, write = self.read_weight[site], self.mix[site], self.weight[site]
        if self.dynamic:
            scores = torch.tanh(product(self.normalised(streams), self.gate[site]))
            scale_alpha, scale_beta = self.scale[site]
            read = read + scale_alpha * scores[..., 0]
            write = write + scale_beta * scores[..., 1]
            mix = mix + scale_alpha * scores[..., 2:]
        return read, mix.mT, write

    def map_flops(self) -> float:
        n = self.num_streams
        return n * self.dim * (2 * (n + 2) + 4) if self.dynamic else 0
