"""Delta Attention Residuals (Luo, Cai and Hu, arXiv 2605.18855): depth attention added to a residual stream that is kept.

    h_l = r_l + Σ_i α_i v_i          α = softmax_i(w_l · RMSNorm(v_i))          r_l = embedding + Σ_{i<l} v_i

v_0 is the embedding and v_i output i ("Delta"); with blocks, v_i is a block's sum and the running one ("Delta Block"). The output
is r_L, without a read. w = 0 at first: every read is r_l (1 + 1/N) for N sources, which the next norm makes PreNorm.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fathom.block import block_starts
from fathom.depth_attention import EPS, depth_attention_weights
from fathom.residuals.rule import Rule, weighted_sum
from fathom.stream import Norm


class DeltaState(NamedTuple):
    hidden: Tensor
    """r_l."""
    bank: tuple[Tensor, ...]
    partial: Tensor | None


class DeltaAttnRes(Rule):
    """Parameters: ``query`` [L, D], zeros at first; ``key_gain`` [L, D]."""

    query: nn.Parameter
    key_gain: nn.Parameter

    def __init__(
        self,
        num_sublayers: int,
        dim: int,
        *,
        num_blocks: int | None = None,
        block_size: int | None = None,
        gain: bool = True,
        eps: float = EPS,
    ) -> None:
        super().__init__(num_sublayers, dim, eps=eps)
        if num_blocks is None and block_size is None:
            block_size = 1
        self.starts = block_starts(num_sublayers, num_blocks=num_blocks, block_size=block_size)
        self.gain = gain
        self.create()

    def initial(self, generator: torch.Generator) -> dict[str, Tensor | list[Tensor]]:
        shape = (self.num_sublayers, self.dim)
        query: dict[str, Tensor | list[Tensor]] = {"query": torch.zeros(shape)}
        return query | ({"key_gain": torch.ones(shape)} if self.gain else {})

    def _sources(self, state: DeltaState) -> tuple[Tensor, ...]:
        return state.bank if state.partial is None else (*state.bank, state.partial)

    def start(self, embedding: Tensor) -> DeltaState:
        return DeltaState(embedding, (embedding,), None)

    def read(self, state: DeltaState, site: int, norm: Norm) -> tuple[Tensor, DeltaState]:
        weights = self.coefficient(self.weights(state, site))
        return norm(state.hidden + weighted_sum(weights, self._sources(state))), state

    def write(self, state: DeltaState, site: int, output: Tensor) -> DeltaState:
        total = output if state.partial is None else state.partial + output
        if site + 1 in self.starts or site + 1 == self.num_sublayers:
            return DeltaState(state.hidden + output, (*state.bank, total), None)
        return DeltaState(state.hidden + output, state.bank, total)

    def finish(self, state: DeltaState, norm: Norm) -> Tensor:
        return norm(state.hidden)

    def running_sum(self, state: DeltaState) -> Tensor:
        return state.hidden

    def source_names(self, site: int) -> list[str]:
        if site == self.num_sublayers:
            return []
        finished = sum(start < site for start in self.starts)
        inside = site > 0 and site not in self.starts
        return ["embedding"] + [f"source {n + 1}" for n in range(finished - inside)] + ["partial"] * inside

    def weights(self, state: DeltaState, site: int) -> Tensor:
        if site == self.num_sublayers:
            return super().weights(state, site)
        gain = self.key_gain[site] if self.gain else None
        return depth_attention_weights(self._sources(state), self.query[site], gain, eps=self.eps)

    def flops(self) -> float:
        return self.dim * sum(6 * len(self.source_names(site)) + 1 for site in range(self.num_sublayers))
