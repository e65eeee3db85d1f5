"""LAuReL (Menghani et al., arXiv 2411.07501, RW + LR): weights on output and residual, and a low-rank map beside the identity.

    h_l = α_l f_l(norm(h_{l-1})) + β_l (h_{l-1} + h_{l-1} A_l B_l)          A [D, r], B [r, D]

α = β = 1 and B = 0 at first, which is PreNorm; A has orthonormal columns. The paper bounds α and β by some normalisation that it
leaves open; here they are free.
"""

import torch
from torch import Tensor, nn

from fathom.depth_attention import EPS
from fathom.errors import UserError
from fathom.residuals.rule import Rule, product
from fathom.stream import PreNorm, PreNormState


class LAuReL(Rule, PreNorm):
    """``rank``: r, at most 32 if not given. Parameters: ``weight`` [L, 2], ``down_map`` [L, D, r], ``up_map`` [L, r, D]."""

    weight: nn.Parameter
    down_map: nn.Parameter
    up_map: nn.Parameter

    def __init__(self, num_sublayers: int, dim: int, *, rank: int | None = None, eps: float = EPS) -> None:
        super().__init__(num_sublayers, dim, eps=eps)
        self.rank = min(32, dim) if rank is None else rank
        if not 1 <= self.rank <= dim:
            raise UserError(f"rank is {rank}: it must be between 1 and the width, {dim}")
        self.create()

    def initial(self, generator: torch.Generator) -> dict[str, Tensor | list[Tensor]]:
        columns = torch.eye(self.rank).repeat(-(-self.dim // self.rank), 1)[: self.dim]
        columns = columns / columns.square().sum(0).sqrt()
        return {
            "weight": torch.ones(self.num_sublayers, 2),
            "down_map": columns.repeat(self.num_sublayers, 1, 1),
            "up_map": torch.zeros(self.num_sublayers, self.rank, self.dim),
        }

    def write(self, state: PreNormState, site: int, output: Tensor) -> PreNormState:
        alpha, beta = self.weight[site]
        low_rank = product(product(state.hidden, self.down_map[site]), self.up_map[site]).to(output.dtype)
        return PreNormState(alpha * output + beta * (state.hidden + low_rank))

    def flops(self) -> float:
        return self.num_sublayers * self.dim * (4 * self.rank + 3)
