"""LR-AttnRes (arXiv 2607.09694): Attention Residuals with keys and queries of r dimensions.

    s_i = w_l · k_i / sqrt(r)          h_l = Σ_i softmax_i(s_i) v_i          w_l [r], zero at first
    projected: k_i = RMSNorm(v_i) P_i, P_i [D, r]          sliced: k_i = RMSNorm(the last r channels of v_i)

With blocks, a source is the *mean* of its outputs, as in the authors' default, so that zero queries are PreNorm only where each
source is one output (the default here: no blocks). Their projected key may also come from a wider output matrix of the sublayer;
here it is the variant that projects the value. P ~ N(0, 1/D). RMSNorm of the slice is our reading.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from fathom.depth_attention import EPS
from fathom.errors import UserError
from fathom.residuals.ablations import DepthState, SwitchedAttnRes
from fathom.residuals.rule import product


class LRAttnRes(SwitchedAttnRes):
    """``key_dim``: r, at most 64 if not given. Parameters: ``query`` [L+1, r]; projected: ``key_map`` [sources, D, r]."""

    key_map: nn.Parameter

    def __init__(
        self,
        num_sublayers: int,
        dim: int,
        *,
        keys: Literal["projected", "sliced"] = "projected",
        key_dim: int | None = None,
        num_blocks: int | None = None,
        block_size: int | None = None,
        eps: float = EPS,
    ) -> None:
        self.key_dim = min(64, dim) if key_dim is None else key_dim
        self.keys = keys
        if not 1 <= self.key_dim <= dim:
            raise UserError(f"key_dim is {key_dim}: it must be between 1 and the width, {dim}")
        super().__init__(num_sublayers, dim, num_blocks=num_blocks, block_size=block_size, gain=False, eps=eps)

    def initial(self, generator: torch.Generator) -> dict[str, Tensor | list[Tensor]]:
        query: dict[str, Tensor | list[Tensor]] = {"query": torch.zeros(self.num_sublayers + 1, self.key_dim)}
        if self.keys == "sliced":
            return query
        shape = (len(self.starts) + 1, self.dim, self.key_dim)
        return query | {"key_map": torch.randn(shape, generator=generator) * self.dim**-0.5}

    def _sources(self, state: DepthState, site: int) -> list[Tensor]:
        embedding, *sums = super()._sources(state, site)
        ends = (*self.starts[1:], self.num_sublayers)
        counts = [min(end, site) - start for start, end in zip(self.starts, ends, strict=True) if start < site]
        return [embedding, *(total / count for total, count in zip(sums, counts, strict=True))]

    def _key(self, source: Tensor, index: int) -> Tensor:
        # A sum and its mean have the same key: the norm undoes the count.
        if self.keys == "sliced":
            return self.normalised(source[..., -self.key_dim :])
        return product(self.normalised(source), self.key_map[index])

    def start(self, embedding: Tensor) -> DepthState:
        return super().start(embedding)._replace(keys=(self._key(embedding, 0),))

    def write(self, state: DepthState, site: int, output: Tensor) -> DepthState:
        after = super().write(state, site, output)
        if after.partial is not None:
            return after
        return after._replace(keys=(*state.keys, self._key(after.bank[-1], len(state.bank))))

    def scores(self, sources: list[Tensor], state: DepthState, site: int) -> Tensor:
        keys = [*state.keys] if state.partial is None else [*state.keys, self._key(state.partial, len(state.bank))]
        return torch.stack([(key * self.query[site]).sum(-1, keepdim=True) for key in keys]) * self.key_dim**-0.5

    def flops(self) -> float:
        names = [self._names(site) for site in range(self.num_sublayers + 1)]
        keys = len(names[-1]) + sum(site[-1] == "partial" for site in names)
        projected = 2 * self.dim * self.key_dim if self.keys == "projected" else 0
        return sum(map(len, names)) * (2 * self.dim + 2 * self.key_dim) + keys * (projected + 3 * self.dim)
