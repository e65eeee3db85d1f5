"""Highway networks (Srivastava et al., arXiv 1505.00387): a gate carries the old state or lets the output through.

    g = σ(W_l h_{l-1} + b_l)          h_l = (1 - g) ⊙ h_{l-1} + g ⊙ f_l(norm(h_{l-1}))

The published gate has one value per channel, from a D x D matrix; ``gate="scalar"`` has one per token, from a vector, which is
what the matrix view of arXiv 2603.15031 (section 6.1) assumes: then the weights of a read sum to one, a stick broken from the
latest output back. b = -2 as published (it carries at first); W = 0 here, where the original draws it at random.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from fathom.depth_attention import EPS
from fathom.residuals.rule import Rule, product
from fathom.stream import PreNorm, PreNormState

CARRY_BIAS = -2.0


class Highway(Rule, PreNorm):
    """Parameters: ``transform_gate`` [L, D, D] (or [L, D, 1]), ``bias`` [L, D] (or [L, 1])."""

    transform_gate: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self, num_sublayers: int, dim: int, *, gate: Literal["vector", "scalar"] = "vector", eps: float = EPS
    ) -> None:
        super().__init__(num_sublayers, dim, eps=eps)
        self.width = dim if gate == "vector" else 1
        self.create()

    def initial(self, generator: torch.Generator) -> dict[str, Tensor | list[Tensor]]:
        return {
            "transform_gate": torch.zeros(self.num_sublayers, self.dim, self.width),
            "bias": torch.full((self.num_sublayers, self.width), CARRY_BIAS),
        }

    def write(self, state: PreNormState, site: int, output: Tensor) -> PreNormState:
        gate = torch.sigmoid(product(state.hidden, self.transform_gate[site]) + self.bias[site])
        gate = self.coefficient(gate.to(output.dtype))
        return PreNormState(torch.lerp(state.hidden, output, gate))

    def flops(self) -> float:
        return self.num_sublayers * self.dim * (2 * self.width + 3)
