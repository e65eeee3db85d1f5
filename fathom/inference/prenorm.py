"""PreNorm with one kernel a sublayer: the output waits for the next read, which adds it and normalises.

The same sums in the same order as ``fathom.stream.PreNorm``; served beside AttnRes, whose read is fused the same way.
"""

from typing import NamedTuple

from torch import Tensor

from fathom.kernels import update_read
from fathom.stream import Norm, PreNorm, norm_parts


class PendingState(NamedTuple):
    hidden: Tensor
    pending: Tensor | None
    """The latest output, which the next read adds to ``hidden``."""


class FusedPreNorm(PreNorm):
    """``PreNorm`` for inference."""

    def start(self, embedding: Tensor) -> PendingState:  # type: ignore[override]
        return PendingState(embedding, None)

    def read(self, state: PendingState, site: int, norm: Norm) -> tuple[Tensor, PendingState]:  # type: ignore[override]
        weight, eps = norm_parts(norm)
        if state.pending is None or weight is None:
            hidden = self.running_sum(state)
            return norm(hidden), PendingState(hidden, None)
        hidden, x = update_read(state.hidden, state.pending, None, None, None, None, weight, norm_eps=eps)
        return x, PendingState(hidden, None)

    def write(self, state: PendingState, site: int, output: Tensor) -> PendingState:  # type: ignore[override]
        return state._replace(pending=output)

    def finish(self, state: PendingState, norm: Norm) -> Tensor:  # type: ignore[override]
        return self.read(state, self.num_sublayers, norm)[0]

    def running_sum(self, state: PendingState) -> Tensor:  # type: ignore[override]
        return state.hidden if state.pending is None else state.hidden + state.pending
