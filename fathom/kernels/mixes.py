"""Reads over the same sources in one sweep, forward and backward, from scores that are known.

    m_s = max_n s_sn          e_sn = exp(s_sn − m_s)          z_s = Σ_n e_sn
    p_sn = e_sn / z_s         out_s = Σ_n p_sn v_n            lse_s = m_s + log z_s

Saved for the backward pass: the sources, their scores, m and z; neither p nor out. Nor is lse used there: it is rounded at its
own size, which for many sources is an error of all the weights of a read at once. Backward, with g_s = dout_s / z_s and
dp_sn = g_s · v_n,

    dv_n = Σ_s e_sn g_s (+ what was given)          ds_sn = e_sn (dp_sn − (Σ_m e_sm dp_sm − dlse_s) / z_s)

Every row is read once: a program holds its columns of one token's dout of all reads, and goes through the sources. The dot
products dp stay sums over the columns of a warp, so that no thread waits for another; ``_score_gradients``, which needs all
of them, adds them up. With ``NORMALIZE`` the values are v_n r_n (Inkling-2).

To choose one of N tensors takes N − 1 selections. More than GROUP sources are therefore taken by groups, whose tensors are
chosen with N / GROUP − 1 each, and whose rows are all on the way at once.

The reads of a block pass the sources on to the reads after them, and with the sources their gradient: ``mix`` returns them,
and its backward pass adds to the gradient that comes back, instead of leaving an addition for each block to autograd.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.kernels.operators import operator
from fathom.kernels.tiles import (
    GROUP,
    accumulator,
    cdiv,
    group_of,
    is_aligned,
    joined_group,
    nothing,
    on_their_device,
    padded,
    pick,
    pick_of_group,
    pick_stride,
    pick_stride_of_group,
    pointers,
    power_of_two,
    present,
    row_pointers,
    size_of,
    strides_of,
)

Mixed = tuple[list[Tensor], Tensor, Tensor]
"""S reads [..., D], their lse [S, ...], and m and z of each [S, ..., 2]."""
WARP_COLUMNS = 256
"""Columns of a warp: 8, which are 16 bytes in half precision, of each thread."""
MIX_TOKENS, MIX_WARPS = 2, 4
"""Tokens of one program of ``_mix``, one after the other, and its warps."""
BACKWARD_ELEMENTS, BACKWARD_COLUMNS, BACKWARD_STAGES = 16384, 1024, 4
"""Most elements of dout that a program of ``_backward`` holds, most columns, and how many of few sources' rows are on the way."""
SCORE_TOKENS = 32
"""Tokens of one program of ``_score_gradients``."""


@triton.jit(do_not_specialize=["num_sources"])
def _mix(
    sources, strides, scores, rstds, outs, lse, softmax, num_sources, num_tokens, dim,
    N: tl.constexpr, S: tl.constexpr, N_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, BYTES: tl.constexpr, ACC_BYTES: tl.constexpr,
):  # fmt: skip
    """The reads of ``BLOCK_T`` tokens, one after the other, over at most GROUP sources, their lse, and m and z [S, tokens, 2]."""
    element: tl.constexpr = sources[0].dtype.element_ty
    n, d = tl.arange(0, N_PAD), tl.arange(0, BLOCK_D)
    begin = tl.program_id(0).to(tl.int64) * BLOCK_T
    for i in range(tl.minimum(BLOCK_T, num_tokens - begin)):
        t = begin + i
        source = row_pointers(sources, strides, n, t, N, element, BYTES, ALIGNED)[:, None]
        known = row_pointers(scores, strides, n, 0, N, ACC, ACC_BYTES, False) + t
        if NORMALIZE:
            r = tl.load(row_pointers(rstds, strides, n, 0, N, ACC, ACC_BYTES, False) + t, n < num_sources, other=0)
        for start in range(0, dim, BLOCK_D):
            column = start + d
            v = tl.load(source + column[None, :], (n < num_sources)[:, None] & (column < dim)[None, :], other=0).to(ACC)
            for s in range(S):
                score = tl.load(known + s * num_tokens, n < num_sources, other=float("-inf"))
                top = tl.max(score, 0)
                p = tl.exp(score - top)
                total = tl.sum(p, 0)
                if start == 0:
                    tl.store(lse + s * num_tokens + t, top + tl.log(total))
                    tl.store(softmax + 2 * (s * num_tokens + t), top)
                    tl.store(softmax + 2 * (s * num_tokens + t) + 1, total)
                weight = p / total
                if NORMALIZE:
                    weight *= r
                mix = tl.sum(weight[:, None] * v, 0)
                tl.store(pick(outs, s, S, ALIGNED) + t * dim + column, mix.to(element), column < dim)


@triton.jit(do_not_specialize=["num_sources"])
def _mix_many(
    sources, strides, scores, rstds, outs, lse, softmax, num_sources, num_tokens, dim,
    N: tl.constexpr, S: tl.constexpr, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """As ``_mix``, some columns of one token, its sources group by group: m, z and the mix of each read so far are kept."""
    element: tl.constexpr = sources[0].dtype.element_ty
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < dim
    tops, totals, mixes = nothing(), nothing(), nothing()
    for _ in tl.static_range(S):
        tops += (tl.full([], float("-inf"), ACC),)
        totals += (tl.full([], 0, ACC),)
        mixes += (tl.zeros([BLOCK_D], ACC),)
    for group in range(0, num_sources, GROUP):
        rows, factors = nothing(), nothing()
        for j in tl.static_range(GROUP):
            live = group + j < num_sources
            row = pick_of_group(sources, group, j, N, ALIGNED) + t * pick_stride_of_group(strides, group, j)
            rows += (tl.load(row + column, inside & live, other=0),)
            if NORMALIZE:
                factors += (tl.load(pick_of_group(rstds, group, j, N, False) + t, live, other=0),)
        new_tops, new_totals, new_mixes = nothing(), nothing(), nothing()
        for s in tl.static_range(S):
            known = nothing()
            top = tops[s]
            for j in tl.static_range(GROUP):
                score = pick_of_group(scores, group, j, N, False) + s * num_tokens + t
                known += (tl.load(score, group + j < num_sources, other=float("-inf")),)
                top = tl.maximum(top, known[j])
            shrink = tl.exp(tops[s] - top)
            total, mix = totals[s] * shrink, mixes[s] * shrink
            for j in tl.static_range(GROUP):
                weight = tl.exp(known[j] - top)
                total += weight
                if NORMALIZE:
                    weight *= factors[j]
                mix += weight * rows[j].to(ACC)
            new_tops += (top,)
            new_totals += (total,)
            new_mixes += (mix,)
        tops, totals, mixes = new_tops, new_totals, new_mixes
    for s in tl.static_range(S):
        if tl.program_id(1) == 0:
            tl.store(lse + s * num_tokens + t, tops[s] + tl.log(totals[s]))
            tl.store(softmax + 2 * (s * num_tokens + t), tops[s])
            tl.store(softmax + 2 * (s * num_tokens + t) + 1, totals[s])
        mix = mixes[s] / totals[s]
        tl.store(pick(outs, s, S, ALIGNED) + t * dim + column, mix.to(element), inside)


@triton.jit(do_not_specialize=["num_sources"])
def _backward(
    sources, strides, scores, rstds, softmax, douts, dstrides, passed, dsources, products, num_sources, num_tokens, dim,
    N: tl.constexpr, S: tl.constexpr, S_PAD: tl.constexpr, BLOCK_D: tl.constexpr, PIECE: tl.constexpr, PASSED: tl.constexpr,
    PRODUCTS: tl.constexpr, NORMALIZE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, BYTES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Some columns of one token: dv of every source, and their part of dp [tokens, N, S, pieces]."""
    element: tl.constexpr = sources[0].dtype.element_ty
    t = tl.program_id(0).to(tl.int64)
    s, column = tl.arange(0, S_PAD), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    wanted, inside = s < S, column < dim
    dout = row_pointers(douts, dstrides, s, t, S, element, BYTES, ALIGNED)[:, None]
    g = tl.load(dout + column[None, :], wanted[:, None] & inside[None, :], other=0).to(ACC)
    at = s * num_tokens + t
    if N > 1:  # a single source has the whole weight
        top = tl.load(softmax + 2 * at, wanted, other=0)
        g *= (1 / tl.load(softmax + 2 * at + 1, wanted, other=1))[:, None]
    count: tl.constexpr = BLOCK_D // PIECE
    piece = tl.program_id(1) * count + tl.arange(0, count)
    num_pieces = tl.num_programs(1) * count
    if N <= GROUP:
        for n in tl.range(num_sources, num_stages=STAGES):
            if PRODUCTS:
                row = pick(sources, n, N, ALIGNED) + t * pick_stride(strides, n)
                v = tl.load(row + column, inside, other=0).to(ACC)
            weight = tl.full([S_PAD], 1, ACC)
            if N > 1:
                weight = tl.exp(tl.load(pick(scores, n, N, False) + at, wanted, other=float("-inf")) - top)
            if NORMALIZE:
                weight *= tl.load(pick(rstds, n, N, False) + t)
            dv = tl.sum(weight[:, None] * g, 0)
            if PASSED:
                dv += tl.load(pick(passed, n, N, ALIGNED) + t * dim + column, inside, other=0).to(ACC)
            tl.store(pick(dsources, n, N, ALIGNED) + t * dim + column, dv.to(element), inside)
            if PRODUCTS:
                dp = tl.sum(tl.reshape(g * v[None, :], [S_PAD, count, PIECE]), 2)
                out = products + ((t * num_sources + n) * S + s[:, None]) * num_pieces + piece[None, :]
                tl.store(out, dp, wanted[:, None])
    else:
        for group in range(0, num_sources, GROUP):
            # No load can pass a store, so those of a group all come before its first.
            rows, known, given, parts = nothing(), nothing(), nothing(), nothing()
            for j in tl.static_range(GROUP):
                live = group + j < num_sources
                row = pick_of_group(sources, group, j, N, ALIGNED) + t * pick_stride_of_group(strides, group, j)
                rows += (tl.load(row + column, inside & live, other=0),)
                score = pick_of_group(scores, group, j, N, False) + at
                known += (tl.load(score, wanted & live, other=float("-inf")),)
                if PASSED:
                    row = pick_of_group(passed, group, j, N, ALIGNED) + t * dim
                    given += (tl.load(row + column, inside & live, other=0),)
            for j in tl.static_range(GROUP):
                live = group + j < num_sources
                weight = tl.exp(known[j] - top)
                if NORMALIZE:
                    weight *= tl.load(pick_of_group(rstds, group, j, N, False) + t, live, other=0)
                dv = tl.sum(weight[:, None] * g, 0)
                if PASSED:
                    dv += given[j].to(ACC)
                row = pick_of_group(dsources, group, j, N, ALIGNED) + t * dim
                tl.store(row + column, dv.to(element), inside & live)
                # A thread's own columns first, so that little is kept until the group's are summed together.
                parts += (tl.sum(tl.reshape(g * rows[j].to(ACC)[None, :], [S_PAD, count, PIECE // 8, 8]), 3),)
            n = group + tl.arange(0, GROUP)
            dp = tl.sum(joined_group(parts), 2)
            out = products + ((t * num_sources + n[None, None, :]) * S + s[:, None, None]) * num_pieces
            tl.store(out + piece[None, :, None], dp, wanted[:, None, None] & (n < num_sources)[None, None, :])


@triton.jit(do_not_specialize=["num_sources"])
def _score_gradients(
    scores, rstds, softmax, dlse, products, dscores, drstds, num_sources, num_tokens, num_pieces,
    N: tl.constexpr, S: tl.constexpr, S_PAD: tl.constexpr, PIECES: tl.constexpr, BLOCK_T: tl.constexpr,
    PRODUCTS: tl.constexpr, NORMALIZE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """ds [S, tokens] of every source, and dr [tokens] if ``NORMALIZE``."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    s, piece = tl.arange(0, S_PAD), tl.arange(0, PIECES)
    mask = (t < num_tokens)[:, None] & (s < S)[None, :]
    at = s[None, :] * num_tokens + t[:, None]
    if N > 1:
        top, total = tl.load(softmax + 2 * at, mask, other=0), tl.load(softmax + 2 * at + 1, mask, other=1)
    mean = tl.zeros([BLOCK_T, S_PAD], ACC)
    size: tl.constexpr = N if N < GROUP else GROUP
    for turn in tl.static_range(2):  # first the mean of dp over the sources, then the gradients
        for group in range(0, num_sources if N > GROUP else 1, GROUP):
            scored, found = group_of(scores, group, N), group_of(dscores, group, N)
            if NORMALIZE:
                factors, dfactors = group_of(rstds, group, N), group_of(drstds, group, N)
            for n in range(group, tl.minimum(num_sources, group + GROUP) if N > GROUP else num_sources):
                e = tl.full([BLOCK_T, S_PAD], 1, ACC)
                if N > 1:
                    score = pick(scored, n - group, size, False)[:, None] + at
                    e = tl.exp(tl.load(score, mask, other=float("-inf")) - top)
                dp = tl.zeros([BLOCK_T, S_PAD], ACC)
                if PRODUCTS:
                    row = ((t[:, None] * num_sources + n) * S + s[None, :])[:, :, None] * num_pieces
                    inside = mask[:, :, None] & (piece < num_pieces)[None, None, :]
                    dp += tl.sum(tl.load(products + row + piece[None, None, :], inside, other=0), 2)
                if NORMALIZE:
                    if turn == 1:
                        tl.store(pick(dfactors, n - group, size, False) + t, tl.sum(e * dp, 1), t < num_tokens)
                    dp *= tl.load(pick(factors, n - group, size, False) + t, t < num_tokens, other=0)[:, None]
                if turn == 0:
                    mean += e * dp
                else:
                    tl.store(pick(found, n - group, size, False)[:, None] + at, e * (dp - mean), mask)
        if turn == 0:
            mean -= tl.load(dlse + at, mask, other=0)
            if N > 1:
                mean /= total


def _columns(dim: int, num_reads: int, num_sources: int) -> tuple[int, int]:
    """Columns of one program of ``_backward`` and of ``_mix_many``, and its warps."""
    columns = power_of_two(dim, 16)
    if num_reads == 1 and num_sources > GROUP:  # little work each: more of them to choose a source's tensors for
        return min(2 * WARP_COLUMNS, columns), 1
    block_d = min(BACKWARD_COLUMNS, BACKWARD_ELEMENTS // power_of_two(num_reads), columns)
    return block_d, max(1, block_d // WARP_COLUMNS)


@on_their_device
def mixed(sources: list[Tensor], scores: list[Tensor], rstds: list[Tensor] | None) -> Mixed:
    """Launch ``_mix``, or ``_mix_many``."""
    first, num_reads, num_sources = sources[0], len(scores[0]), len(sources)
    (num_tokens, dim), count = size_of(first), padded(num_sources)
    outs = [first.new_empty(first.shape) for _ in range(num_reads)]
    lse, softmax = torch.empty_like(scores[0]), scores[0].new_empty(*scores[0].shape, 2)
    if num_sources > GROUP:
        block_d, num_warps = _columns(dim, num_reads, num_sources)
        _mix_many[(num_tokens, cdiv(dim, block_d))](
            pointers(sources), strides_of(sources), pointers(scores), pointers(rstds), tuple(outs), lse, softmax, num_sources,
            num_tokens, dim, N=count, S=num_reads, BLOCK_D=block_d, NORMALIZE=rstds is not None,
            ALIGNED=is_aligned(*sources, *outs), ACC=accumulator(first), num_warps=num_warps,
        )  # fmt: skip
        return outs, lse, softmax
    block_d = min(WARP_COLUMNS * MIX_WARPS, power_of_two(dim, 16))
    _mix[(cdiv(num_tokens, MIX_TOKENS),)](
        pointers(sources), strides_of(sources), pointers(scores), pointers(rstds), tuple(outs), lse, softmax, num_sources,
        num_tokens, dim, N=count, S=num_reads, N_PAD=power_of_two(count), BLOCK_T=MIX_TOKENS, BLOCK_D=block_d,
        NORMALIZE=rstds is not None, ALIGNED=is_aligned(*sources, *outs), ACC=accumulator(first),
        BYTES=first.element_size(), ACC_BYTES=lse.element_size(), num_warps=MIX_WARPS,
    )  # fmt: skip
    return outs, lse, softmax


@on_their_device
def mixed_backward(
    sources: list[Tensor], scores: list[Tensor], rstds: list[Tensor] | None, softmax: Tensor | None, douts: list[Tensor],
    dlse: Tensor, passed: list[Tensor] | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """Launch the backward pass: gradients of the sources, ``passed`` added, of their scores and, if given, of ``rstds``;
    ``softmax`` is m and z, which a single source needs not."""
    first, num_reads, num_sources = sources[0], len(scores[0]), len(sources)
    (num_tokens, dim), reads = size_of(first), power_of_two(num_reads)
    block_d, num_warps = _columns(dim, num_reads, num_sources)
    piece = block_d // num_warps
    chunks = cdiv(dim, block_d)
    num_pieces = chunks * num_warps
    dsources = [source.new_empty(source.shape) for source in sources]
    dscores = [torch.empty_like(scores[0]) for _ in sources]
    drstds = [torch.empty_like(rstd) for rstd in rstds] if rstds is not None else []
    # A single source has the whole weight whatever its score: what dp adds to ds cancels.
    use_products = num_sources > 1 or rstds is not None
    products = scores[0].new_empty(num_tokens, num_sources, num_reads, num_pieces) if use_products else None
    fixed = {
        "N": padded(num_sources), "S": num_reads, "S_PAD": reads, "PRODUCTS": use_products, "NORMALIZE": rstds is not None,
        "ACC": accumulator(first),
    }  # fmt: skip
    _backward[(num_tokens, chunks)](
        pointers(sources), strides_of(sources), pointers(scores), pointers(rstds), softmax, tuple(douts), strides_of(douts),
        pointers(passed), pointers(dsources), products, num_sources, num_tokens, dim, BLOCK_D=block_d, PIECE=piece,
        PASSED=passed is not None, ALIGNED=is_aligned(*sources, *douts, *dsources, *(passed or ())),
        BYTES=first.element_size(), STAGES=BACKWARD_STAGES, num_warps=num_warps, **fixed,
    )  # fmt: skip
    _score_gradients[(cdiv(num_tokens, SCORE_TOKENS),)](
        pointers(scores), pointers(rstds), softmax, dlse, products, pointers(dscores), pointers(drstds or None), num_sources,
        num_tokens, num_pieces, PIECES=power_of_two(num_pieces), BLOCK_T=SCORE_TOKENS,
        num_warps=min(4, reads * power_of_two(num_pieces)), **fixed,
    )  # fmt: skip
    return dsources, dscores, drstds


@operator("mix")
def mix_op(sources: list[Tensor], scores: list[Tensor]) -> Mixed:
    """S reads of N sources [..., D] by their scores [S, ...], their lse, and of each the largest score and the sum that
    it divides by."""
    return mixed(sources, scores, None)


@torch.library.register_fake(mix_op)
def _(sources, scores):
    known = scores[0]
    outs = [sources[0].new_empty(sources[0].shape) for _ in range(known.shape[0])]
    return outs, torch.empty_like(known), known.new_empty(*known.shape, 2)


@operator("mix_backward")
def mix_backward(
    sources: list[Tensor], scores: list[Tensor], softmax: Tensor | None, douts: list[Tensor], dlse: Tensor,
    passed: list[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Gradients of the sources, ``passed`` (or nothing: an empty list) added, and of their scores."""
    dsources, dscores, _ = mixed_backward(sources, scores, None, softmax, douts, dlse, passed or None)
    return dsources, dscores


@torch.library.register_fake(mix_backward)
def _(sources, scores, softmax, douts, dlse, passed):
    return [source.new_empty(source.shape) for source in sources], [torch.empty_like(each) for each in scores]


class _Mix(torch.autograd.Function):
    """N sources and N scores to S reads, their lse, and the N sources again."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        sources, scores = tensors[:count], tensors[count:]
        ctx.count = count
        ctx.set_materialize_grads(False)
        if count == 1:  # every read is the source, its lse the score: nothing to compute, and nothing to store
            ctx.save_for_backward(*tensors, None)
            outs = [sources[0].view_as(sources[0]) for _ in range(len(scores[0]))]
            return (*outs, scores[0].view_as(scores[0]), *sources)
        outs, lse, softmax = mix_op(list(sources), list(scores))
        ctx.save_for_backward(*tensors, softmax)
        return (*outs, lse, *sources)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, softmax = ctx.saved_tensors
        sources, scores = tensors[: ctx.count], tensors[ctx.count :]
        num_reads = scores[0].shape[0]
        douts, dlse, passed = grads[:num_reads], grads[num_reads], grads[num_reads + 1 :]
        if all(grad is None for grad in (*douts, dlse)):
            return None, *passed, *(None for _ in scores)
        given = [] if all(grad is None for grad in passed) else present(passed, sources[0])
        [given_lse] = present([dlse], scores[0])
        dsources, dscores = mix_backward(sources, scores, softmax, present(douts, sources[0]), given_lse, given)
        return None, *dsources, *dscores


def mix(sources: Sequence[Tensor], scores: Sequence[Tensor]) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """S reads of N sources [..., D] by N scores [S, ...], their lse [S, ...], and the sources, for later reads: what those add to
    the gradient, this backward pass takes up."""
    num_reads = scores[0].shape[0]
    found = list(_Mix.apply(len(sources), *sources, *scores))
    return found[:num_reads], found[num_reads], found[num_reads + 1 :]
