"""Block AttnRes with one kernel a sublayer: a block's last output waits for the next block's first read.

That read's kernel ends the block, scores it for all later reads, and makes the reads of the next block over the finished ones,
the first of them normalised. So a decode step has as many launches as ``FusedPreNorm``'s. Full AttnRes is blocks of one sublayer.
"""

from torch import Tensor

from fathom.block import Ahead, BlockAttnRes, BlockState
from fathom.depth_attention import fold_gain
from fathom.full import FullAttnRes
from fathom.kernels import turn


class FusedBlocks(BlockAttnRes):
    """``BlockAttnRes`` under the two-phase schedule, or ``FullAttnRes``, for inference; shares its parameters."""

    def __init__(self, stream: BlockAttnRes | FullAttnRes) -> None:
        super().__init__(stream.num_sublayers, stream.dim, block_size=1, gain=False, eps=stream.eps)
        if isinstance(stream, BlockAttnRes):
            self.starts, self.block_of_site = stream.starts, stream.block_of_site
        self.query, self.key_gain = stream.query, stream.key_gain
        self.names = [stream.source_names(site) for site in range(stream.num_sublayers + 1)]

    def start(self, embedding: Tensor) -> BlockState:
        return BlockState((), None, embedding, ahead=Ahead(fold_gain(self.query, self.key_gain), ()))

    def write(self, state: BlockState, site: int, output: Tensor) -> BlockState:
        return state._replace(pending=output)

    def _phase_1(self, state: BlockState, num_reads: int, norm_weight: Tensor | None, norm_eps: float) -> BlockState:
        ahead, output = state.ahead, state.pending
        assert ahead is not None and output is not None
        # Not cut: there is no backward pass to put them together again.
        scores = [each for (each,) in ahead.scores]
        source, own, outs, lses = turn(
            state.partial, output, state.bank, scores, ahead.queries, num_reads, eps=self.eps, norm_weight=norm_weight,
            norm_eps=norm_eps,
        )  # fmt: skip
        later = Ahead(ahead.queries[num_reads:], tuple((each[num_reads:],) for each in (*scores, own)))
        queries = ahead.queries[:num_reads].unbind(0)
        return BlockState((*state.bank, source), None, None, tuple(outs), tuple(lses), queries, ahead=later)

    def source_names(self, site: int) -> list[str]:
        return self.names[site]
