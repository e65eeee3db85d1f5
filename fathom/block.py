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
from fathom.kernels import mix, read, score, score_bank, update_read
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


class Ahead(NamedTuple):
    """Of the reads after the current block's, the output's included: what is known before they happen."""

    queries: Tensor
    """Key gain folded in, [K, D]."""
    scores: tuple[tuple[Tensor, ...], ...]
    """Of each source of the bank, its scores for them, cut into those of each block, [S, ...] each: once for all, as the backward
    pass puts together again what was cut."""


class BlockState(NamedTuple):
    bank: tuple[Tensor, ...]
    """b_0 .. b_{n-1}, each [..., D]."""
    partial: Tensor | None
    """b_n^i [..., D], or b_n^{i-1} while an output is pending; None at a block's start."""
    pending: Tensor | None
    """The latest output, which the next read adds to the partial sum; None where it is added already."""
    out: tuple[Tensor, ...] = ()
    """Phase 1 of the current block: its reads still to come, each [..., D]; empty at a block's start."""
    lse: tuple[Tensor, ...] = ()
    """Their log-denominators, each [...]."""
    queries: tuple[Tensor, ...] = ()
    """Their queries, key gain folded in, each [D]."""
    scores: tuple[Tensor, ...] = ()
    """Of each source of the bank, its scores for all S reads of the block, [S, ...]."""
    ahead: Ahead | None = None
    """None, and the four before it empty, under the single-pass schedule."""


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

    def _end(self, site: int) -> int:
        """The first site after the block of ``site``."""
        following = self.block_of_site[site] + 1
        return self.starts[following] if following < len(self.starts) else self.num_sublayers

    def _num_reads(self, first: int, end: int) -> int:
        """Reads of phase 1 in the block of the sites from ``first`` to ``end``: with the last block's goes the output's.

        The output attends over the bank of the last block and that block's sum, just as a further read inside it would.
        """
        return end - max(first, 0) + (len(self.query) - self.num_sublayers if end == self.num_sublayers else 0)

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
        return self._begin((embedding,))

    def _begin(self, bank: tuple[Tensor, ...]) -> BlockState:
        """The state at a block's start, over sources that nothing is known of."""
        if self.schedule == "single_pass":
            return BlockState(bank, None, None)
        queries = fold_gain(self.query, self.key_gain)
        sources, scores = score_bank(bank, queries, eps=self.eps)
        ahead = Ahead(queries, tuple(self._cut(each, 0) for each in scores))
        return BlockState(tuple(sources), None, None, ahead=ahead)

    def _cut(self, scores: Tensor, block: int) -> tuple[Tensor, ...]:
        """Scores [K, ...] for the reads from ``block`` on, as ``Ahead`` has them."""
        return scores.split([self._num_reads(*block) for block in self._ranges()[block:]])

    def _phase_1(self, state: BlockState, num_reads: int, norm_weight: Tensor | None, norm_eps: float) -> BlockState:
        """The next ``num_reads`` reads over the bank, the first of them normalised if there is a ``norm_weight``."""
        assert state.ahead is not None

        queries, later = state.ahead.queries.split([num_reads, len(state.ahead.queries) - num_reads])
        scores = tuple(each[0] for each in state.ahead.scores)
        outs, lses, bank = mix(state.bank, scores, norm_weight=norm_weight, norm_eps=norm_eps)
        ahead = Ahead(later, tuple(each[1:] for each in state.ahead.scores))
        return BlockState(tuple(bank), None, None, tuple(outs), tuple(lses), queries.unbind(0), scores, ahead)

    @staticmethod
    def _after_read(state: BlockState, partial: Tensor | None) -> BlockState:
        return state._replace(
            partial=partial, pending=None, out=state.out[1:], lse=state.lse[1:], queries=state.queries[1:]
        )

    def read(self, state: BlockState, site: int, norm: Norm) -> tuple[Tensor, BlockState]:
        if self.schedule == "single_pass":
            return self._read_all(state, site, norm), state
        weight, norm_eps = norm_parts(norm)
        first = self.starts[self.block_of_site[site]]
        if site == first:
            state = self._phase_1(state, self._num_reads(first, self._end(site)), weight, norm_eps)
            total, x = None, state.out[0]
        else:
            total, x = self._update(state, weight, norm_eps)
        return x if weight is not None else norm(x), self._after_read(state, total)

    def _update(self, state: BlockState, norm_weight: Tensor | None, norm_eps: float) -> tuple[Tensor, Tensor]:
        """The partial sum with the latest output, and the next read of phase 1 merged with it."""
        assert state.pending is not None
        with self._keep(state):
            total, x = update_read(
                state.partial, state.pending, state.out[0], state.lse[0], state.queries[0], None, norm_weight,
                eps=self.eps, norm_eps=norm_eps,
            )  # fmt: skip
        return total, x

    def write(self, state: BlockState, site: int, output: Tensor) -> BlockState:
        state = state._replace(pending=output)
        last = site + 1 == self._end(site)
        if self.schedule == "single_pass":
            if last:
                return BlockState(self._sources(state), None, None)
            return state._replace(partial=self._total(state), pending=None)
        if not last or len(state.queries) == 1:  # the output's read merges with the last block's sum
            return state
        ahead = state.ahead
        assert ahead is not None
        if len(ahead.queries) == 0:  # a stage of a pipeline: later reads are the next one's
            return BlockState(self._sources(state), None, None, ahead=ahead)
        source, scores = score(state.partial, output, ahead.queries, eps=self.eps)
        cut = self._cut(scores, self.block_of_site[site] + 1)
        return BlockState((*state.bank, source), None, None, ahead=Ahead(ahead.queries, (*ahead.scores, cut)))

    def _keep(self, state: BlockState) -> AbstractContextManager[object]:
        """What autograd keeps of the next read of phase 1: itself, or with ``recompute`` how to compute it again."""
        # A single source is its own read, and kept anyway.
        if not self.recompute or not torch.is_grad_enabled() or len(state.bank) == 1:
            return nullcontext()
        at, size, index = state.out[0].data_ptr(), state.out[0].numel(), len(state.scores[0]) - len(state.out)
        sources = [source.detach() for source in state.bank]
        scores = [each[index : index + 1].detach() for each in state.scores]

        def pack(tensor: Tensor) -> Tensor | torch.Size:
            return tensor.shape if tensor.data_ptr() == at and tensor.numel() == size else tensor

        def unpack(kept: Tensor | torch.Size) -> Tensor:
            if isinstance(kept, Tensor):
                return kept
            return mix(sources, scores)[0][0].reshape(kept)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

    def _read_all(self, state: BlockState, site: int, norm: Norm) -> Tensor:
        weight, norm_eps = norm_parts(norm)
        sources, gain = self._sources(state), self._gain(site)
        x = read(sources, self.query[site], gain, eps=self.eps, norm_weight=weight, norm_eps=norm_eps)
        return x if weight is not None else norm(x)

    def finish(self, state: BlockState, norm: Norm) -> Tensor:
        if self.schedule == "single_pass":
            return self._read_all(state, self.num_sublayers, norm)
        weight, norm_eps = norm_parts(norm)
        _, x = self._update(state, weight, norm_eps)
        return x if weight is not None else norm(x)

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
