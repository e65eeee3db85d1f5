"""DenseFormer (Pagliardini et al., arXiv 2402.02622): after every decoder layer, a weighted mean over depth.

    X_0 = Y_0 = embedding          X_i = layer_i(Y_{i-1})          Y_i = Σ_{j<=i} α_{i,j} X_j

The weights are learned scalars, the same for all tokens, and not normalised. α_{i,i} = 1 and all others 0 at first, which is
PreNorm. X_j is a whole hidden state (a layer with its residual), not an output: that is the published form (dilation 1, period
1); Table 5 of arXiv 2603.15031 writes it over outputs, of which it is a reparametrisation.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fathom.depth_attention import EPS
from fathom.residuals.rule import Rule, weighted_sum
from fathom.stream import Norm


class DenseState(NamedTuple):
    layers: tuple[Tensor, ...]
    """X_0 .. X_i, each [..., D]."""
    hidden: Tensor


class DenseFormer(Rule):
    """Parameters: ``mix``, for each of the M = L/2 decoder layers i its i + 1 weights, M (M + 3) / 2 in all."""

    mix: nn.Parameter

    def __init__(self, num_sublayers: int, dim: int, *, eps: float = EPS) -> None:
        super().__init__(num_sublayers, dim, eps=eps)
        self.rows = [i + 1 for i in range(1, num_sublayers // 2 + 1)]
        self.create()

    def initial(self, generator: torch.Generator) -> dict[str, Tensor | list[Tensor]]:
        return {"mix": torch.cat([torch.zeros(0), *(torch.eye(size)[-1] for size in self.rows)])}

    def start(self, embedding: Tensor) -> DenseState:
        return DenseState((embedding,), embedding)

    def read(self, state: DenseState, site: int, norm: Norm) -> tuple[Tensor, DenseState]:
        return norm(state.hidden), state

    def write(self, state: DenseState, site: int, output: Tensor) -> DenseState:
        hidden = state.hidden + output
        if site % 2 == 0:
            return DenseState(state.layers, hidden)
        layers = (*state.layers, hidden)
        return DenseState(layers, weighted_sum(self.mix.split(self.rows)[site // 2], layers))

    def finish(self, state: DenseState, norm: Norm) -> Tensor:
        return norm(state.hidden)

    def running_sum(self, state: DenseState) -> Tensor:
        return state.hidden

    def flops(self) -> float:
        return 2 * self.dim * sum(self.rows)
