"""Block AttnRes: attention over the embedding, the finished blocks' sums and the running one (arXiv 2603.15031, Eq. 5-6).

The L sublayers are cut into N blocks of S. Inside a block outputs are added; across blocks they are attended over:

    b_0 = embedding        b_n = Σ_{j in block n} f_j(h_j)        b_n^i = the first i terms of it, the *partial* sum
    first read of block n:   h = attention over b_0 .. b_{n-1}
    read i+1 of block n:     h = attention over b_0 .. b_{n-1}, b_n^i
    output:                  h = attention over b_0 .. b_N, with a query of its own

The embedding is always a source of its own. S = 1 is Full AttnRes; N = 1 is the plain residual sum with the embedding kept apart.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fathom.depth_attention import EPS, depth_attention, depth_attention_weights
from fathom.errors import UserError
from fathom.stream import Norm, Stream
from fathom.two_phase import as_partial, inter_block, merge

Schedule = Literal["two_phase", "single_pass"]


def block_starts(num_sublayers: int, *, num_blocks: int | None = None, block_size: int | None = None) -> list[int]:
    """The first site of each block; give exactly one of the two keywords.

    The paper leaves L not divisible by N or S open. Here ``block_size`` S makes blocks of S and a shorter last one (as Kimi K3
    does), and ``num_blocks`` N makes exactly N blocks whose sizes differ by at most one, the longer ones first. S may be odd.
    """
    if (num_blocks is None) == (block_size is None):
        raise UserError("give exactly one of num_blocks (how many) and block_size (sublayers in each)")
    if block_size is not None:
        if not 1 <= block_size <= num_sublayers:
            raise UserError(f"block_size is {block_size}: it must be between 1 and the {num_sublayers} sublayers")
        return list(range(0, num_sublayers, block_size))
    assert num_blocks is not None
    if not 1 <= num_blocks <= num_sublayers:
        raise UserError(f"num_blocks is {num_blocks}: it must be between 1 and the {num_sublayers} sublayers")
    size, longer = divmod(num_sublayers, num_blocks)
    return [n * size + min(n, longer) for n in range(num_blocks)]


class BlockState(NamedTuple):
    bank: tuple[Tensor, ...]
    """b_0 .. b_{n-1}, each [..., D]."""
    partial: Tensor | None
    """b_n^i [..., D]; None at a block's start."""
    out: Tensor | None
    """Phase 1 of the current block [..., S, D]; None under the single-pass schedule."""
    lse: Tensor | None
    """Its log-denominators [..., S]."""


class BlockAttnRes(Stream):
    """Block Attention Residuals.

    Args:
        num_sublayers: L; a decoder layer is two sublayers.
        dim: width D.
        num_blocks, block_size: N or S (in sublayers), exactly one of them; see ``block_starts``. The paper's advice is N = 8.
        gain: whether the key norm has a learned weight (ones at first).
        eps: of the key norm.
        schedule: ``"two_phase"`` sweeps the bank once per block; ``"single_pass"`` is the equation read by read.

    Parameters: ``query`` [L+1, D], zeros at first, which makes the network PreNorm's equal (section 5);
    ``key_gain`` [L+1, D]. Row l belongs to site l; row 0 has one source and no effect.
    """

    def __init__(
        self,
        num_sublayers: int,
        dim: int,
        *,
        num_blocks: int | None = None,
        block_size: int | None = None,
        gain: bool = True,
        eps: float = EPS,
        schedule: Schedule = "two_phase",
    ) -> None:
        super().__init__(num_sublayers, dim)
        if schedule not in ("two_phase", "single_pass"):
            raise UserError(f"schedule is {schedule!r}: it must be 'two_phase' or 'single_pass'")
        self.starts = block_starts(num_sublayers, num_blocks=num_blocks, block_size=block_size)
        self.block_of_site = [n for n, (a, b) in enumerate(self._ranges()) for _ in range(a, b)]
        self.eps = eps
        self.schedule = schedule
        self.query = nn.Parameter(torch.zeros(num_sublayers + 1, dim))
        self.key_gain = nn.Parameter(torch.ones(num_sublayers + 1, dim)) if gain else None

    def _ranges(self) -> list[tuple[int, int]]:
        return list(zip(self.starts, [*self.starts[1:], self.num_sublayers], strict=True))

    def _gain(self, site: int) -> Tensor | None:
        return None if self.key_gain is None else self.key_gain[site]

    def _sources(self, state: BlockState) -> tuple[Tensor, ...]:
        return state.bank if state.partial is None else (*state.bank, state.partial)

    def start(self, embedding: Tensor) -> BlockState:
        return BlockState((embedding,), None, None, None)

    def read(self, state: BlockState, site: int, norm: Norm) -> tuple[Tensor, BlockState]:
        if self.schedule == "single_pass":
            mixed = depth_attention(self._sources(state), self.query[site], self._gain(site), eps=self.eps)
            return norm(mixed), state
        first, end = self._ranges()[self.block_of_site[site]]
        if site == first:
            gain = None if self.key_gain is None else self.key_gain[first:end]
            out, lse = inter_block(state.bank, self.query[first:end], gain, eps=self.eps)
            state = state._replace(out=out, lse=lse)
        assert state.out is not None and state.lse is not None
        mixed = state.out[..., site - first, :]
        if state.partial is not None:
            intra = as_partial(state.partial, self.query[site], self._gain(site), eps=self.eps)
            mixed = merge(mixed, state.lse[..., site - first], *intra)
        return norm(mixed), state

    def write(self, state: BlockState, site: int, output: Tensor) -> BlockState:
        total = output if state.partial is None else state.partial + output
        if site + 1 == self._ranges()[self.block_of_site[site]][1]:
            return BlockState((*state.bank, total), None, None, None)
        return state._replace(partial=total)

    def finish(self, state: BlockState, norm: Norm) -> Tensor:
        site = self.num_sublayers
        return norm(depth_attention(self._sources(state), self.query[site], self._gain(site), eps=self.eps))

    def running_sum(self, state: BlockState) -> Tensor:
        return self._sources(state)[-1]

    def source_names(self, site: int) -> list[str]:
        if site == self.num_sublayers:
            return ["embedding"] + [f"block {n + 1}" for n in range(len(self.starts))]
        block = self.block_of_site[site]
        names = ["embedding"] + [f"block {n + 1}" for n in range(block)]
        return names if site == self.starts[block] else [*names, "partial"]

    def weights(self, state: BlockState, site: int) -> Tensor:
        return depth_attention_weights(self._sources(state), self.query[site], self._gain(site), eps=self.eps)
