"""DeepNorm (Wang et al., DeepNet, arXiv 2203.00555): post-norm with a weighted residual.

    h_l = norm(α h_{l-1} + f_l(h_{l-1}))          α = (2M)^(1/4) for a decoder of M layers (M = L / 2)

Nothing lies between the norm after one sublayer and the next sublayer, so each sublayer's own norm serves as the norm after
the one before it, and the final norm as the last: the network has PreNorm's parameters. The first norm acts on the embedding.
The paper also scales the value, output and MLP matrices by β = (8M)^(-1/4), which makes each output β² = 1 / (2 sqrt(L)) as
large. The decoder's initialisation has 1 / sqrt(L) already, so β is left out and the rule shares its twin's weights.
"""

from torch import Tensor

from fathom.depth_attention import EPS
from fathom.residuals.rule import Rule
from fathom.stream import Norm, PreNorm, PreNormState


class DeepNorm(Rule, PreNorm):
    """``alpha``: α, (2M)^(1/4) if not given. No parameters. Between read and write the state holds h, else the sum to norm."""

    def __init__(self, num_sublayers: int, dim: int, *, alpha: float | None = None, eps: float = EPS) -> None:
        super().__init__(num_sublayers, dim, eps=eps)
        self.alpha = num_sublayers**0.25 if alpha is None else alpha

    def read(self, state: PreNormState, site: int, norm: Norm) -> tuple[Tensor, PreNormState]:
        hidden = norm(state.hidden)
        return hidden, PreNormState(hidden)

    def write(self, state: PreNormState, site: int, output: Tensor) -> PreNormState:
        return PreNormState(self.alpha * state.hidden + output)

    def flops(self) -> float:
        return self.num_sublayers * self.dim
