"""Full AttnRes: every sublayer attends over the embedding and every earlier output (arXiv 2603.15031, section 3.1).

    v_0 = embedding,  v_i = f_i(h_i)          h_l = Σ_{i<l} α_{i→l} v_i          α by depth_attention.py, query w_l

Read the literal way, sublayer l sweeps l sources: O(L²) sweeps. In chunks of S reads (the two-phase schedule) the sources
older than the chunk are swept once for its S queries, and each read adds the chunk's own outputs: about L·(L/2S + S/2),
least at S ≈ √L. A chunk is only a schedule; it changes no result.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fathom.depth_attention import EPS, depth_attention_weights
from fathom.errors import UserError
from fathom.kernels import backend_for, inter_block, read
from fathom.stream import Norm, Stream, norm_parts
from fathom.two_phase import merge


def default_chunk(num_sublayers: int) -> int:
    """Reads per two-phase chunk: about √L."""
    return max(1, round(math.sqrt(num_sublayers)))


class FullState(NamedTuple):
    sources: tuple[Tensor, ...]
    """The embedding and every output so far, each [..., D]."""
    out: tuple[Tensor, ...]
    """Phase 1 of the current chunk: its S reads, each [..., D]; empty where each read sweeps all sources."""
    lse: tuple[Tensor, ...]
    """Their log-denominators, each [...]."""


class FullAttnRes(Stream):
    """Full Attention Residuals.

    Args:
        num_sublayers: L; a decoder layer is two sublayers.
        dim: width D.
        gain: whether the key norm has a learned weight (ones at first). The weight can be absorbed by the query,
            so it changes how the model trains and not what it can express.
        eps: of the key norm.
        chunk: reads per two-phase chunk, None for about √L, 1 for the literal single pass.

    Parameters: ``query`` [L+1, D], zeros at first, which makes every read an equal-weight mean and the network
    PreNorm's equal (section 5); ``key_gain`` [L+1, D]. Row l belongs to site l; row 0 has one source and no effect.
    """

    def __init__(
        self, num_sublayers: int, dim: int, *, gain: bool = True, eps: float = EPS, chunk: int | None = None
    ) -> None:
        super().__init__(num_sublayers, dim)
        if chunk is not None and not 1 <= chunk <= num_sublayers:
            raise UserError(f"chunk is {chunk}: it must be between 1 and num_sublayers, {num_sublayers}")
        self.eps = eps
        self.chunk = chunk or default_chunk(num_sublayers)
        self.query = nn.Parameter(torch.zeros(num_sublayers + 1, dim))
        self.key_gain = nn.Parameter(torch.ones(num_sublayers + 1, dim)) if gain else None

    def _gain(self, site: int) -> Tensor | None:
        return None if self.key_gain is None else self.key_gain[site]

    def start(self, embedding: Tensor) -> FullState:
        return FullState((embedding,), (), ())

    def read(self, state: FullState, site: int, norm: Norm) -> tuple[Tensor, FullState]:
        if self.chunk == 1 or backend_for(state.sources[0].device, state.sources[0].dtype) == "triton":
            return self._read_all(state, site, norm), state
        first = site - site % self.chunk
        if site == first:
            sites = slice(first, min(first + self.chunk, self.num_sublayers))
            gain = None if self.key_gain is None else self.key_gain[sites]
            out, lse = inter_block(state.sources, self.query[sites], gain, eps=self.eps)
            state = FullState(state.sources, tuple(out), tuple(lse))
        mixed = state.out[site - first]
        if site > first:
            recent = state.sources[first + 1 :]
            gain = None if self.key_gain is None else self.key_gain[site : site + 1]
            out, lse = inter_block(recent, self.query[site : site + 1], gain, eps=self.eps)
            mixed = merge(mixed, state.lse[site - first], out[0], lse[0])
        return norm(mixed), state

    def write(self, state: FullState, site: int, output: Tensor) -> FullState:
        return state._replace(sources=(*state.sources, output))

    def _read_all(self, state: FullState, site: int, norm: Norm) -> Tensor:
        weight, norm_eps = norm_parts(norm)
        gain = self._gain(site)
        x = read(state.sources, self.query[site], gain, eps=self.eps, norm_weight=weight, norm_eps=norm_eps)
        return x if weight is not None else norm(x)

    def finish(self, state: FullState, norm: Norm) -> Tensor:
        return self._read_all(state, self.num_sublayers, norm)

    def running_sum(self, state: FullState) -> Tensor:
        return state.sources[-1]

    def source_names(self, site: int) -> list[str]:
        return ["embedding"] + [f"output {i}" for i in range(1, site + 1)]

    def weights(self, state: FullState, site: int) -> Tensor:
        return depth_attention_weights(state.sources, self.query[site], self._gain(site), eps=self.eps)
