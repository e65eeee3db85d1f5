"""KEEL (Chen and Wei, Post-LayerNorm Is Back, arXiv 2601.19895): post-norm with a strong carry and a norm inside.

    h_l = norm'_l(α h_{l-1} + f_l(norm_l(h_{l-1})))          α = L, the number of sublayers

norm_l is the sublayer's own PreNorm, norm'_l the rule's, with a learned gain. The strong carry keeps the gradient alive through
many norms. The equation is that of Table 5 of arXiv 2603.15031; α = L is the paper's setting, with L counted in sublayers here.
"""

import torch
from torch import Tensor, nn

from fathom.depth_attention import EPS
from fathom.residuals.rule import Rule
from fathom.stream import PreNorm, PreNormState


class Keel(Rule, PreNorm):
    """``alpha``: α, L if not given. Parameters: ``post_norm`` [L, D], the gains of norm'."""

    post_norm: nn.Parameter

    def __init__(self, num_sublayers: int, dim: int, *, alpha: float | None = None, eps: float = EPS) -> None:
        super().__init__(num_sublayers, dim, eps=eps)
        self.alpha = float(num_sublayers) if alpha is None else alpha
        self.create()

    def initial(self, generator: torch.Generator) -> dict[str, Tensor | list[Tensor]]:
        return {"post_norm": torch.ones(self.num_sublayers, self.dim)}

    def write(self, state: PreNormState, site: int, output: Tensor) -> PreNormState:
        return PreNormState(self.norm(self.alpha * state.hidden + output, self.post_norm[site]))

    def flops(self) -> float:
        return self.num_sublayers * 6 * self.dim
