"""A block's end and the reads of the next, for a few tokens without gradients, as in a decode step: all in one launch.

    v = b + f          s_k = (q_k · v) r          h_k = Σ_n p_kn v_n, v included, for the next block's S reads k < S

With thousands of tokens a program goes through many rows, so that the memory is always at work. With a few of them what counts
is how long one takes: here each read of each token has a program of its own, and its rows are all on the way at once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.kernels.tiles import (
    accumulator,
    few_warps,
    four_sums,
    is_aligned,
    on_their_device,
    padded,
    pick,
    pointers,
    power_of_two,
    row_pointers,
    rsqrt,
    size_of,
    statistic,
    strides_of,
    sums_together,
)

ELEMENTS = 16384
"""Most elements of earlier sources that one program loads at a time."""


@triton.jit(do_not_specialize=["num_sources"])
def _turn(
    partial, output, sources, strides, known, queries, norm_weight, total, scores, outs, lse, num_sources, num_tokens, dim, eps,
    norm_eps, PARTIAL: tl.constexpr, N: tl.constexpr, AT_ONCE: tl.constexpr, S: tl.constexpr, NORM: tl.constexpr,
    BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, BYTES: tl.constexpr, ACC_BYTES: tl.constexpr,
    TOGETHER: tl.constexpr,
):  # fmt: skip
    """Read ``program_id(1)`` of token ``program_id(0)``: the score of the source that ends, and the read if it is one of S."""
    element: tl.constexpr = output.dtype.element_ty
    t, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    n, d = tl.arange(0, AT_ONCE), tl.arange(0, BLOCK_D)
    inside = d < dim
    v = tl.load(output + t * dim + d, inside, other=0).to(ACC)
    if PARTIAL:
        v = (v + tl.load(partial + t * dim + d, inside, other=0).to(ACC)).to(element).to(ACC)
    q = tl.load(queries + k * dim + d, inside, other=0).to(ACC)
    if NORM:
        w = tl.load(norm_weight + d, inside, other=0).to(ACC)
    h, top, mass = tl.zeros([BLOCK_D], ACC), tl.full([], float("-inf"), ACC), tl.full([], 0, ACC)
    if k < S:  # the earlier sources first: their rows come while those above are waited for
        for start in range(0, num_sources, AT_ONCE):
            live = start + n < num_sources
            source = row_pointers(sources, strides, start + n, t, N, element, BYTES, ALIGNED)[:, None]
            rows = tl.load(source + d[None, :], live[:, None] & inside[None, :], other=0).to(ACC)
            at = row_pointers(known, strides, start + n, 0, N, ACC, ACC_BYTES, False) + k * num_tokens + t
            each = tl.load(at, live, other=float("-inf"))
            higher = tl.maximum(top, tl.max(each, 0))
            p, shrink = tl.exp(each - higher), tl.exp(top - higher)
            h = h * shrink + tl.sum(p[:, None] * rows, 0)
            mass = mass * shrink + tl.sum(p, 0)
            top = higher
    if TOGETHER:
        square, dot, other, cross = four_sums(v * v, v * q, h * h, h * v, 0)
    else:
        square, dot = tl.sum(v * v, 0), tl.sum(v * q, 0)
    r = rsqrt(square / dim + eps)
    score = dot * r
    tl.store(scores + k * num_tokens + t, score)
    if PARTIAL:
        tl.store(total + t * dim + d, v.to(element), inside & (k == 0))
    if k < S:
        higher = tl.maximum(top, score)
        p, shrink = tl.exp(score - higher), tl.exp(top - higher)
        mass = mass * shrink + p
        h = (h * shrink + v * p) / mass
        tl.store(lse + k * num_tokens + t, higher + tl.log(mass))
        if NORM:  # noqa: SIM102 (Triton knows it beforehand, and k only later)
            if k == 0:
                if TOGETHER:  # Σ h² from the sums above, but where those cancel
                    parts = shrink * shrink * other + p * p * square
                    length = parts + 2 * shrink * p * cross
                    if 4 * length < parts:
                        length = tl.sum(h * h, 0)
                    else:
                        length /= mass * mass
                else:
                    length = tl.sum(h * h, 0)
                h = h * w * rsqrt(length / dim + norm_eps)
        tl.store(pick(outs, k, S, ALIGNED) + t * dim + d, h.to(element), inside)


@on_their_device
def turn(
    partial: Tensor | None, output: Tensor, bank: Sequence[Tensor], known: Sequence[Tensor], queries: Tensor, num_reads: int,
    norm_weight: Tensor | None, eps: float, norm_eps: float,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:  # fmt: skip
    """Launch ``_turn`` on an output [..., D], a bank of rows and scores [K, ...]: the source that ends, its scores [K, ...], the
    S reads (the first normalised, if there is a ``norm_weight``) and their lse [S, ...]."""
    (num_tokens, dim), batch = size_of(output), output.shape[:-1]
    num_queries, num_sources = len(queries), len(bank)
    total = output if partial is None else torch.empty_like(output)
    scores, lse = statistic(output, num_queries, *batch), statistic(output, num_reads, *batch)
    outs = [torch.empty_like(output) for _ in range(num_reads)]
    block_d, count = power_of_two(dim, 16), padded(num_sources)
    # A tuple cannot be empty: without sources there is one, of which nothing is read.
    sources, scored = list(bank) or [output], list(known) or [scores]
    _turn[(num_tokens, num_queries)](
        partial, output, pointers(sources), strides_of(sources), pointers(scored), queries, norm_weight, total, scores,
        tuple(outs), lse, num_sources, num_tokens, dim, eps, norm_eps, PARTIAL=partial is not None, N=count,
        AT_ONCE=max(1, min(8, ELEMENTS // block_d, power_of_two(max(1, count)))), S=num_reads, NORM=norm_weight is not None,
        BLOCK_D=block_d, ALIGNED=is_aligned(output, *sources, *outs), ACC=accumulator(output), BYTES=output.element_size(),
        ACC_BYTES=scores.element_size(), TOGETHER=sums_together(output, block_d), num_warps=few_warps(block_d),
    )  # fmt: skip
    return total, scores, outs, lse
