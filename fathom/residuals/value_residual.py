"""Value residual, ResFormer (Zhou et al., arXiv 2410.17897): every attention mixes the first layer's values into its own.

    V'_m = λ_{m,1} V_1 + λ_{m,2} V_m          for decoder layers m > 1; the hidden stream is PreNorm's

Both weights are learned and 1/2 at first (the paper's learnable ResFormer). λ = (0, 1) is PreNorm. V_1 is what the first
attention hands over beside its output (``AttentionOutput``) and travels in the state.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fathom.depth_attention import EPS
from fathom.errors import UserError
from fathom.models.layers import AttentionInput, AttentionOutput
from fathom.residuals.rule import Rule
from fathom.stream import Norm


class ValueState(NamedTuple):
    hidden: Tensor
    values: Tensor | None
    """V_1 [B, kv heads, T, W]; None before the first attention."""


class ValueResidual(Rule):
    """Parameters: ``value_mix`` [L/2 - 1, 2], λ of the decoder layers after the first."""

    value_mix: nn.Parameter

    def __init__(self, num_sublayers: int, dim: int, *, eps: float = EPS) -> None:
        super().__init__(num_sublayers, dim, eps=eps)
        if num_sublayers % 2:
            raise UserError(
                f"num_sublayers is {num_sublayers}: value residual needs pairs of attention and MLP, an even number"
            )
        self.create()

    def initial(self, generator: torch.Generator) -> dict[str, Tensor | list[Tensor]]:
        return {"value_mix": torch.full((max(0, self.num_sublayers // 2 - 1), 2), 0.5)}

    def start(self, embedding: Tensor) -> ValueState:
        return ValueState(embedding, None)

    # The contract's sublayer input and output, widened as AttentionInput and AttentionOutput say.
    def read(self, state: ValueState, site: int, norm: Norm) -> tuple[Tensor | AttentionInput, ValueState]:  # type: ignore[override]
        x = norm(state.hidden)
        if site % 2:
            return x, state
        if site == 0:
            return AttentionInput(x, x, x, hand_over=True), state
        return AttentionInput(x, x, x, first=state.values, mix=self.value_mix[site // 2 - 1]), state

    def write(self, state: ValueState, site: int, output: Tensor | AttentionOutput) -> ValueState:
        if isinstance(output, AttentionOutput):
            return ValueState(state.hidden + output.hidden, output.values)
        return ValueState(state.hidden + output, state.values)

    def finish(self, state: ValueState, norm: Norm) -> Tensor:
        return norm(state.hidden)

    def running_sum(self, state: ValueState) -> Tensor:
        return state.hidden

    def flops(self) -> float:
        # The values of grouped-query attention are narrower; this counts as many heads as queries.
        return 3 * self.dim * max(0, self.num_sublayers // 2 - 1)
