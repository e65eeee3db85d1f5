"""Block AttnRes: attention over the embedding, the finished blocks' sums and the running one (arXiv 2603.15031, Eq. 5-6).

The L sublayers are cut into N blocks of S. Inside a block outputs are added; across blocks they are attended over:

    b_0 = embedding        b_n = Σ_{j in block n} f_j(h_j)        b_n^i = the first i terms of it, the *partial* sum
    first read of block n:   h = attention over b_0 .. b_{n-1}
    read i+1 of block n:     h = attention over b_0 .. b_{n-1}, b_n^i
    output:                  h = attention over b_0 .. b_N, with a query of its own

The embedding is always a source of its own. S = 1 is Full AttnRes; N = 1 is the plain residual sum with the embedding kept apart.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fathom.depth_attention import EPS, depth_attention_weights, fold_gain
from fathom.errors import UserError
from fathom.kernels import inter_block, read, update_read
from fathom.stream import Norm, Stream, norm_parts

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
    """b_n^i [..., D], or b_n^{i-1} while an output is pending; None at a block's start."""
    pending: Tensor | None
    """The latest output, which the next read adds to the partial sum; None where it is added already."""
    out: tuple[Tensor, ...]
    """Phase 1 of the current block: its S reads, each [..., D]; empty at a block's start and under the single-pass schedule."""
    lse: tuple[Tensor, ...]
    """Their log-denominators, each [...]."""
    queries: tuple[Tensor, ...]
    """Their queries, key gain folded in, each [D]."""


class BlockAttnRes(Stream):
    """Block Attention Residuals.

    Args:
        num_sublayers: L; a decoder layer is two sublayers.
        dim: width D.
        num_blocks, block_size: N or S (in sublayers), exactly one of them; see ``block_starts``. The paper's advice is N = 8.
        gain: whether the key norm has a learned weight (ones at first).
        eps: of the key norm.
        schedule: ``"two_phase"`` sweeps the bank once per block; ``"single_pass"`` is the equation read by read.
        recompute: compute phase 1 again in the backward pass instead of keeping it, read by read: what is kept for a sublayer is
            then the partial sum, as much as PreNorm keeps. Under ``"two_phase"`` only.

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
        recompute: bool = False,
    ) -> None:
        super().__init__(num_sublayers, dim)
        if schedule not in ("two_phase", "single_pass"):
            raise UserError(f"schedule is {schedule!r}: it must be 'two_phase' or 'single_pass'")
        self.starts = block_starts(num_sublayers, num_blocks=num_blocks, block_size=block_size)
        self.block_of_site = [n for n, (a, b) in enumerate(self._ranges()) for _ in range(a, b)]
        self.eps = eps
        self.schedule = schedule
        self.recompute = recompute
        self.query = nn.Parameter(torch.zeros(num_sublayers + 1, dim))
        self.key_gain = nn.Parameter(torch.ones(num_sublayers + 1, dim)) if gain else None

    def _ranges(self) -> list[tuple[int, int]]:
        return list(zip(self.starts, [*self.starts[1:], self.num_sublayers], strict=True))

    def _gain(self, site: int) -> Tensor | None:
        return None if self.key_gain is None else self.key_gain[site]

    def _sources(self, state: BlockState) -> tuple[Tensor, ...]:
        total = self._total(state)
        return state.bank if total is None else (*state.bank, total)

    @staticmethod
    def _total(state: BlockState) -> Tensor | None:
        if state.partial is None or state.pending is None:
            return state.partial if state.pending is None else state.pending
        return state.partial + state.pending

    def start(self, embedding: Tensor) -> BlockState:
        return BlockState((embedding,), None, None, (), (), ())

    def read(self, state: BlockState, site: int, norm: Norm) -> tuple[Tensor, BlockState]:
        if self.schedule == "single_pass":
            return self._read_all(state, site, norm), state
        first, end = self._ranges()[self.block_of_site[site]]
        weight, norm_eps = norm_parts(norm)
        if site == first:
            # Sliced once a block: the gradient of every slice of a parameter is as large as the parameter.
            queries = fold_gain(self.query[first:end], None if self.key_gain is None else self.key_gain[first:end])
            outs, lses = inter_block(state.bank, queries, eps=self.eps, norm_weight=weight, norm_eps=norm_eps)
            state = state._replace(out=tuple(outs[1:]), lse=tuple(lses[1:]), queries=queries.unbind(0)[1:])
            return outs[0] if weight is not None else norm(outs[0]), state
        assert state.pending is not None
        out, lse, query = state.out[0], state.lse[0], state.queries[0]
        with self._keep(out, state.bank, query):
            total, x = update_read(
                state.partial, state.pending, out, lse, query, None, weight, eps=self.eps, norm_eps=norm_eps
            )
        state = BlockState(state.bank, total, None, state.out[1:], state.lse[1:], state.queries[1:])
        return x if weight is not None else norm(x), state

    def write(self, state: BlockState, site: int, output: Tensor) -> BlockState:
        state = state._replace(pending=output)
        last = site + 1 == self._ranges()[self.block_of_site[site]][1]
        if last:
            return BlockState(self._sources(state), None, None, (), (), ())
        if self.schedule == "single_pass":
            return state._replace(partial=self._total(state), pending=None)
        return state

    def _keep(self, out: Tensor, bank: tuple[Tensor, ...], query: Tensor) -> AbstractContextManager[object]:
        """What autograd keeps of ``out``, a read of phase 1: itself, or with ``recompute`` how to compute it again."""
        if not self.recompute or not torch.is_grad_enabled():
            return nullcontext()
        at, size, query = out.data_ptr(), out.numel(), query.detach()
        sources = [source.detach() for source in bank]

        def pack(tensor: Tensor) -> Tensor | torch.Size:
            return tensor.shape if tensor.data_ptr() == at and tensor.numel() == size else tensor

        def unpack(kept: Tensor | torch.Size) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            return inter_block(sources, query[None], eps=self.eps)[0][0].reshape(kept)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _read_all(self, state: BlockState, site: int, norm: Norm) -> Tensor:
        weight, norm_eps = norm_parts(norm)
        sources, gain = self._sources(state), self._gain(site)
        x = read(sources, self.query[site], gain, eps=self.eps, norm_weight=weight, norm_eps=norm_eps)
        return x if weight is not None else norm(x)

    def finish(self, state: BlockState, norm: Norm) -> Tensor:
        return self._read_all(state, self.num_sublayers, norm)

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
