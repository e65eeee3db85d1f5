"""MUDDFormer (Xiao et al., arXiv 2502.12170): dynamic dense connections, a set each for query, key, value and residual.

    X_0 = embedding          X_i = layer_i(Q_{i-1}, K_{i-1}, V_{i-1}, R_{i-1})
    Q_i = Σ_{j<=i} A^Q_{i,j} X_j, and K, V, R likewise          A_i = GELU(rms(X_i) W_1) W_2 + a_i, per token

A layer's attention takes Q, K and V for its three projections and R as its residual. For each of the C = 4 ways, a_{i,i} = 1 and
all else 0 at first, W_1 ~ N(0, 1/D) and W_2 = 0: PreNorm. W_1 is D x C(i+1), W_2 C(i+1) x C(i+1); the last layer has one way, the
residual. Q, K and V pass the sublayer's one norm, where the published model has three; its wider deep MLPs are left out.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fathom.depth_attention import EPS
from fathom.models.layers import AttentionInput
from fathom.residuals.rule import Rule, product, weighted_sum
from fathom.stream import Norm


class MUDDState(NamedTuple):
    layers: tuple[Tensor, ...]
    """X_0 .. X_i, each [..., D]."""
    hidden: Tensor
    """R, and what the layer's sublayers have added to it."""
    attention: tuple[Tensor, Tensor, Tensor] | None
    """Q, K and V of the coming attention; None where they are R."""


class MUDDFormer(Rule):
    """Parameters, for each decoder layer: ``hidden_gate`` W_1, ``weight_gate`` W_2, ``constant`` [C, i + 1]."""

    hidden_gate: nn.ParameterList
    weight_gate: nn.ParameterList
    constant: nn.ParameterList

    def __init__(self, num_sublayers: int, dim: int, *, eps: float = EPS) -> None:
        super().__init__(num_sublayers, dim, eps=eps)
        layers = num_sublayers // 2
        self.shapes = [(4 if layer < layers else 1, layer + 1) for layer in range(1, layers + 1)]
        self.create()

    def initial(self, generator: torch.Generator) -> dict[str, Tensor | list[Tensor]]:
        widths = [ways * sources for ways, sources in self.shapes]
        return {
            "hidden_gate": [torch.randn(self.dim, w, generator=generator) * self.dim**-0.5 for w in widths],
            "weight_gate": [torch.zeros(w, w) for w in widths],
            "constant": [torch.eye(sources)[-1].repeat(ways, 1) for ways, sources in self.shapes],
        }

    def start(self, embedding: Tensor) -> MUDDState:
        return MUDDState((embedding,), embedding, None)

    def read(self, state: MUDDState, site: int, norm: Norm) -> tuple[Tensor | AttentionInput, MUDDState]:  # type: ignore[override]
        if state.attention is None:
            return norm(state.hidden), state
        query, key, value = state.attention
        return AttentionInput(norm(query), norm(key), norm(value)), state._replace(attention=None)

    def write(self, state: MUDDState, site: int, output: Tensor) -> MUDDState:
        hidden = state.hidden + output
        if site % 2 == 0:
            return state._replace(hidden=hidden)
        layer, layers = site // 2, (*state.layers, hidden)
        scores = product(F.gelu(product(self.normalised(hidden), self.hidden_gate[layer])), self.weight_gate[layer])
        weights = self.coefficient(scores.unflatten(-1, self.shapes[layer]) + self.constant[layer])
        ways = [weighted_sum(way.movedim(-1, 0), layers) for way in weights.unbind(-2)]
        return MUDDState(layers, ways[-1], (ways[0], ways[1], ways[2]) if len(ways) == 4 else None)

    def finish(self, state: MUDDState, norm: Norm) -> Tensor:
        return norm(state.hidden)

    def running_sum(self, state: MUDDState) -> Tensor:
        return state.hidden

    def flops(self) -> float:
        return sum(2 * w * (self.dim + w) + 2 * w * self.dim + 4 * self.dim for w in (c * n for c, n in self.shapes))
