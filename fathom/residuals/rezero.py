"""ReZero (Bachlechner et al., arXiv 2003.04887): a learned scalar on every output, zero at first.

    h_l = h_{l-1} + α_l f_l(norm(h_{l-1}))          α_l = 0 at initialisation

The network starts as the identity: the head reads the embedding. The original drops the norm inside f; here f keeps its
PreNorm, as in the table of related rules of arXiv 2603.15031 (Table 5).
"""

import torch
from torch import Tensor, nn

from fathom.depth_attention import EPS
from fathom.residuals.rule import Rule
from fathom.stream import PreNorm, PreNormState


class ReZero(Rule, PreNorm):
    """Parameters: ``alpha`` [L]."""

    alpha: nn.Parameter

    def __init__(self, num_sublayers: int, dim: int, *, eps: float = EPS) -> None:
        super().__init__(num_sublayers, dim, eps=eps)
        self.create()

    def initial(self, generator: torch.Generator) -> dict[str, Tensor | list[Tensor]]:
        return {"alpha": torch.zeros(self.num_sublayers)}

    def write(self, state: PreNormState, site: int, output: Tensor) -> PreNormState:
        return PreNormState(state.hidden + self.alpha[site] * output)

    def flops(self) -> float:
        return self.num_sublayers * self.dim
