"""Reads over sources of which nothing is known yet, by their queries: the kernels of scores.py, mixes.py and mix_gradients.py
in one op.

It saves the sources, and per token their reciprocal norms, their scores, and of each read what it divides by; the backward pass
writes a source's gradient from the reads, then adds that from its scores in place.
"""

import torch
from torch import Tensor

from fathom.kernels.mix_gradients import mixed_backward
from fathom.kernels.mixes import mixed
from fathom.kernels.operators import operator
from fathom.kernels.scores import gradients_of, scores_of
from fathom.kernels.tiles import present, statistic

Tensors = list[Tensor]


@operator("inter_block")
def inter_block(
    sources: list[Tensor], queries: Tensor, eps: float, scale: float, normalize_values: bool
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor], list[Tensor]]:
    """S reads of N sources [..., D] by folded queries [S, D].

    Returns the S reads [..., D] and their lse [S, ...], then what no gradient flows through: of each read the largest score and
    the sum that it divides by [S, ..., 2], of each source the scores [S, ...] and the reciprocal norms [...].
    """
    _, scores, rstds = scores_of(sources, queries, eps, scale)
    return *mixed(sources, scores, rstds if normalize_values else None), scores, rstds


@torch.library.register_fake(inter_block)
def _(sources, queries, eps, scale, normalize_values):
    first, num_reads, batch = sources[0], len(queries), sources[0].shape[:-1]
    return (
        [first.new_empty(first.shape) for _ in range(num_reads)],
        statistic(first, num_reads, *batch),
        statistic(first, num_reads, *batch, 2),
        [statistic(first, num_reads, *batch) for _ in sources],
        [statistic(first, *batch) for _ in sources],
    )


@operator("inter_block_backward")
def inter_block_backward(
    sources: list[Tensor], queries: Tensor, softmax: Tensor, scores: list[Tensor], rstds: list[Tensor], douts: list[Tensor],
    dlse: Tensor, scale: float, normalize_values: bool,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Gradients of the sources [..., D] and of the folded queries [S, D]."""
    dsources, dscores, drstds = mixed_backward(
        sources, scores, rstds if normalize_values else None, softmax, douts, dlse, None
    )
    dqueries = gradients_of(sources, queries, scores, rstds, dscores, drstds, dsources, dsources, scale)
    return dsources, dqueries


@torch.library.register_fake(inter_block_backward)
def _(sources, queries, softmax, scores, rstds, douts, dlse, scale, normalize_values):
    return [source.new_empty(source.shape) for source in sources], softmax.new_empty(queries.shape)


def _setup(ctx, inputs, output):
    sources, queries, _, ctx.scale, ctx.normalize_values = inputs
    _, _, softmax, scores, rstds = output
    ctx.count = len(sources)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(queries, softmax, *sources, *scores, *rstds)


def _gradients(ctx, douts, dlse, *_):
    queries, softmax, *rest = ctx.saved_tensors
    n = ctx.count
    sources, scores, rstds = rest[:n], rest[n : 2 * n], rest[2 * n :]
    dsources, dqueries = inter_block_backward(
        sources, queries, softmax, scores, rstds, present(douts, sources[0]), *present([dlse], scores[0]), ctx.scale,
        ctx.normalize_values,
    )  # fmt: skip
    return dsources, dqueries.to(queries.dtype), None, None, None


torch.library.register_autograd(inter_block, _gradients, setup_context=_setup)
