"""SiameseNorm (Li et al., arXiv 2602.08064): a post-norm and a pre-norm stream share every sublayer.

    u = norm'_l(h¹)          y = f_l(u + norm_l(h²))          h¹ ← u + y / sqrt(2 m)          h² ← h² + y

m counts decoder layers from 1; both streams start at the embedding, and the output is norm'(h¹) + norm(h²). Table 5 of arXiv
2603.15031 has it without the factor 1 / sqrt(2m), which the authors' code applies; their extra norm before each MLP is left out.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fathom.depth_attention import EPS
from fathom.residuals.rule import Rule
from fathom.stream import Norm


class SiameseState(NamedTuple):
    post: Tensor
    """h¹ before its norm; u between read and write."""
    pre: Tensor


class SiameseNorm(Rule):
    """Parameters: ``post_norm`` [L+1, D], the gains of norm'."""

    post_norm: nn.Parameter

    def __init__(self, num_sublayers: int, dim: int, *, eps: float = EPS) -> None:
        super().__init__(num_sublayers, dim, eps=eps)
        self.create()

    def initial(self, generator: torch.Generator) -> dict[str, Tensor | list[Tensor]]:
        return {"post_norm": torch.ones(self.num_sublayers + 1, self.dim)}

    def start(self, embedding: Tensor) -> SiameseState:
        return SiameseState(embedding, embedding)

    def read(self, state: SiameseState, site: int, norm: Norm) -> tuple[Tensor, SiameseState]:
        post = self.norm(state.post, self.post_norm[site])
        return post + norm(state.pre), SiameseState(post, state.pre)

    def write(self, state: SiameseState, site: int, output: Tensor) -> SiameseState:
        return SiameseState(state.post + output / math.sqrt(2 * (site // 2 + 1)), state.pre + output)

    def finish(self, state: SiameseState, norm: Norm) -> Tensor:
        return self.norm(state.post, self.post_norm[self.num_sublayers]) + norm(state.pre)

    def running_sum(self, state: SiameseState) -> Tensor:
        return state.pre

    def flops(self) -> float:
        return (self.num_sublayers + 1) * 7 * self.dim
