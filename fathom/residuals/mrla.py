"""MRLA, multi-head recurrent layer attention (Fang et al., arXiv 2302.03985), as Table 5 of arXiv 2603.15031 has it.

    h_l = Σ_{i<l} a_{l,i} λ_i ⊙ v_i          a_{l,i} = σ(q_l * v_{l-1}) · σ(k_i * v_i) / d, for each head of d channels

v_0 is the embedding and v_i output i; * is a convolution over channels (its width grows with log D, as in the code), σ the
sigmoid. The original is for images: it pools each channel over space before the convolution, and its values pass a 3 x 3
convolution. Pooling over tokens would show a token its future, so queries and keys are of each token, and values have a scale per
channel, λ. Heads have 32 channels, or the next number that divides D.
Kernels are 0 at first, so every weight is 1/4 and the network is PreNorm.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fathom.depth_attention import EPS, compute_dtype, full_precision
from fathom.errors import UserError
from fathom.residuals.rule import Rule, weighted_sum
from fathom.stream import Norm

HEAD_DIM = 32


class MRLAState(NamedTuple):
    values: tuple[Tensor, ...]
    """λ_i ⊙ v_i, each [..., D]."""
    keys: tuple[Tensor, ...]
    """σ(k_i * v_i), each [..., heads, d]."""
    latest: Tensor
    """v_{l-1}, which asks."""


class MRLA(Rule):
    """``heads``: D / 32 if not given, or the next smaller divisor of D.

    Parameters: ``query_kernel`` and ``key_kernel`` [L+1, w], ``scale`` [L+1, D].
    """

    query_kernel: nn.Parameter
    key_kernel: nn.Parameter
    scale: nn.Parameter

    def __init__(self, num_sublayers: int, dim: int, *, heads: int | None = None, eps: float = EPS) -> None:
        super().__init__(num_sublayers, dim, eps=eps)
        most = max(1, dim // HEAD_DIM)
        self.heads = next(h for h in range(most, 0, -1) if dim % h == 0) if heads is None else heads
        if self.heads < 1 or dim % self.heads:
            raise UserError(f"heads is {self.heads}: it must divide the width, {dim}")
        half = int((math.log2(dim) + 1) / 2)
        self.kernel = half if half % 2 else half + 1
        self.create()

    def initial(self, generator: torch.Generator) -> dict[str, Tensor | list[Tensor]]:
        sites = self.num_sublayers + 1
        kernels: dict[str, Tensor | list[Tensor]] = {
            name: torch.zeros(sites, self.kernel) for name in ("query_kernel", "key_kernel")
        }
        return kernels | {"scale": torch.ones(sites, self.dim)}

    def _describe(self, source: Tensor, kernel: Tensor) -> Tensor:
        dtype = compute_dtype(source)
        flat = source.to(dtype).flatten(0, -2).unsqueeze(1)
        with full_precision(source):
            convolved = F.conv1d(flat, kernel.to(dtype).view(1, 1, -1), padding=self.kernel // 2)
        return torch.sigmoid(convolved).view(source.shape).unflatten(-1, (self.heads, -1))

    def _source(self, source: Tensor, index: int) -> tuple[Tensor, Tensor]:
        return (self.scale[index] * source).to(source.dtype), self._describe(source, self.key_kernel[index])

    def _mix(self, state: MRLAState, site: int) -> Tensor:
        query = self._describe(state.latest, self.query_kernel[site])
        weights = self.coefficient(torch.stack([(query * key).mean(-1) for key in state.keys]))
        heads = [value.unflatten(-1, (self.heads, -1)) for value in state.values]
        return weighted_sum(weights, heads).flatten(-2)

    def start(self, embedding: Tensor) -> MRLAState:
        value, key = self._source(embedding, 0)
        return MRLAState((value,), (key,), embedding)

    def read(self, state: MRLAState, site: int, norm: Norm) -> tuple[Tensor, MRLAState]:
        return norm(self._mix(state, site)), state

    def write(self, state: MRLAState, site: int, output: Tensor) -> MRLAState:
        value, key = self._source(output, len(state.values))
        return MRLAState((*state.values, value), (*state.keys, key), output)

    def finish(self, state: MRLAState, norm: Norm) -> Tensor:
        return norm(self._mix(state, self.num_sublayers))

    def running_sum(self, state: MRLAState) -> Tensor:
        return state.latest

    def flops(self) -> float:
        sites = self.num_sublayers + 1
        return self.dim * (4 * sites * self.kernel + 4 * sites * (sites + 1) / 2)
