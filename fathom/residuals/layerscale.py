"""LayerScale (Touvron et al., CaiT, arXiv 2103.17239): a learned scale per channel on every output.

    h_l = h_{l-1} + λ_l ⊙ f_l(norm(h_{l-1}))

λ starts small: 0.1 up to 18 decoder layers, 1e-5 up to 24, 1e-6 beyond, the paper's choice by depth.
"""

import torch
from torch import Tensor, nn

from fathom.depth_attention import EPS
from fathom.residuals.rule import Rule
from fathom.stream import PreNorm, PreNormState


class LayerScale(Rule, PreNorm):
    """``init``: the first value of every scale; by depth if not given. Parameters: ``scale`` [L, D]."""

    scale: nn.Parameter

    def __init__(self, num_sublayers: int, dim: int, *, init: float | None = None, eps: float = EPS) -> None:
        super().__init__(num_sublayers, dim, eps=eps)
        by_depth = 0.1 if num_sublayers <= 36 else 1e-5 if num_sublayers <= 48 else 1e-6
        self.init = by_depth if init is None else init
        self.create()

    def initial(self, generator: torch.Generator) -> dict[str, Tensor | list[Tensor]]:
        return {"scale": torch.full((self.num_sublayers, self.dim), self.init)}

    def write(self, state: PreNormState, site: int, output: Tensor) -> PreNormState:
        return PreNormState(state.hidden + (self.scale[site] * output).to(output.dtype))

    def flops(self) -> float:
        return self.num_sublayers * self.dim
