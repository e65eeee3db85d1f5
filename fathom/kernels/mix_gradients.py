"""The gradients of reads over the same sources (mixes.py), in one sweep. With g_s = dout_s / z_s and dp_sn = g_s · v_n,

    dv_n = Σ_s e_sn g_s (+ what was given)          ds_sn = e_sn (dp_sn − (Σ_m e_sm dp_sm − dlse_s) / z_s)

Every row is read once: a program holds its columns of one token's dout of all reads, and goes through the sources. The dot
products dp stay sums over the columns of a warp, so that no thread waits for another; ``_score_gradients``, which needs all
of them, adds them up. With ``NORMALIZE`` the values are v_n r_n.

To choose one of N tensors takes N − 1 selections. Where few reads share that work, or sources are many, they are taken by groups
of GROUP, whose tensors are chosen with N / GROUP − 1 each, and whose rows are all on the way at once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    row_pointers,
    size_of,
    strides_of,
)

FEW_SOURCES = 16
"""Most sources that are gone through one by one, if there are several reads; for one read GROUP."""
BACKWARD_COLUMNS, BACKWARD_ELEMENTS, BACKWARD_STAGES = 512, 5120, 5
"""Most columns of a program of ``_backward``, which is a warp, most elements of dout that it holds, and how many of few sources'
rows are on the way."""
SCORE_TOKENS, SCORE_ELEMENTS = 32, 4096
"""Most tokens of one program of ``_score_gradients``, and most parts of dp that it takes at a time, if a token has no more."""


@triton.jit(do_not_specialize=["num_sources"])
def _backward(
    sources, strides, scores, rstds, softmax, douts, dstrides, passed, dsources, products, num_sources, num_tokens, dim,
    N: tl.constexpr, S: tl.constexpr, FEW: tl.constexpr, BLOCK_D: tl.constexpr, PASSED: tl.constexpr, PRODUCTS: tl.constexpr,
    NORMALIZE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, BYTES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A piece of one token's columns: dv of every source, and its part of dp [tokens, N, S, pieces].

    The reads are tiles of as many as the binary digits of S say: a tile's rows are a power of two, and none is to be idle.
    """
    element: tl.constexpr = sources[0].dtype.element_ty
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < dim
    reads, gs, tops = nothing(), nothing(), nothing()
    for digit in tl.static_range(15, -1, -1):
        if (S >> digit) % 2 == 1:
            s = (S >> (digit + 1) << (digit + 1)) + tl.arange(0, 1 << digit)
            dout = row_pointers(douts, dstrides, s, t, S, element, BYTES, ALIGNED)[:, None]
            g = tl.load(dout + column[None, :], inside[None, :], other=0).to(ACC)
            if N > 1:  # a single source has the whole weight
                at = 2 * (s * num_tokens + t)
                tops += (tl.load(softmax + at),)
                g *= (1 / tl.load(softmax + at + 1))[:, None]
            reads += (s,)
            gs += (g,)
    piece, num_pieces = tl.program_id(1), tl.num_programs(1)
    if FEW:
        for n in tl.range(num_sources, num_stages=STAGES):
            if PRODUCTS:
                row = pick(sources, n, N, ALIGNED) + t * pick_stride(strides, n)
                v = tl.load(row + column, inside, other=0).to(ACC)
            for i in tl.static_range(len(reads)):
                weight = tl.full(reads[i].shape, 1, ACC)
                if N > 1:
                    weight = tl.exp(tl.load(pick(scores, n, N, False) + reads[i] * num_tokens + t) - tops[i])
                if NORMALIZE:
                    weight *= tl.load(pick(rstds, n, N, False) + t)
                part = tl.sum(weight[:, None] * gs[i], 0)
                dv = part if i == 0 else dv + part  # type: ignore[has-type]
            if PASSED:
                dv += tl.load(pick(passed, n, N, ALIGNED) + t * dim + column, inside, other=0).to(ACC)
            tl.store(pick(dsources, n, N, ALIGNED) + t * dim + column, dv.to(element), inside)
            if PRODUCTS:
                for i in tl.static_range(len(reads)):
                    out = products + ((t * num_sources + n) * S + reads[i]) * num_pieces + piece
                    tl.store(out, tl.sum(gs[i] * v[None, :], 1))
    else:
        for group in range(0, num_sources, GROUP):
            # No load can pass a store, so those of a group all come before its first.
            rows, known, given, parts = nothing(), nothing(), nothing(), nothing()
            for j in tl.static_range(GROUP):
                live = group + j < num_sources
                row = pick_of_group(sources, group, j, N, ALIGNED) + t * pick_stride_of_group(strides, group, j)
                rows += (tl.load(row + column, inside & live, other=0),)
                for i in tl.static_range(len(reads)):
                    score = pick_of_group(scores, group, j, N, False) + reads[i] * num_tokens + t
                    known += (tl.load(score, live & (reads[i] >= 0), other=float("-inf")),)
                if PASSED:
                    row = pick_of_group(passed, group, j, N, ALIGNED) + t * dim
                    given += (tl.load(row + column, inside & live, other=0),)
            for j in tl.static_range(GROUP):
                live = group + j < num_sources
                for i in tl.static_range(len(reads)):
                    weight = tl.exp(known[j * len(reads) + i] - tops[i])
                    if NORMALIZE:
                        weight *= tl.load(pick_of_group(rstds, group, j, N, False) + t, live, other=0)
                    part = tl.sum(weight[:, None] * gs[i], 0)
                    dv = part if i == 0 else dv + part
                    # A thread's own columns first, so that little is kept until the group's are summed together.
                    each = tl.reshape(gs[i] * rows[j].to(ACC)[None, :], [gs[i].shape[0], BLOCK_D // 8, 8])
                    parts += (tl.sum(each, 2),)
                if PASSED:
                    dv += given[j].to(ACC)
                row = pick_of_group(dsources, group, j, N, ALIGNED) + t * dim
                tl.store(row + column, dv.to(element), inside & live)
            n = group + tl.arange(0, GROUP)
            for i in tl.static_range(len(reads)):
                dp = tl.sum(joined_group(parts, i, len(reads)), 1)
                out = products + ((t * num_sources + n[None, :]) * S + reads[i][:, None]) * num_pieces + piece
                tl.store(out, dp, (reads[i] >= 0)[:, None] & (n < num_sources)[None, :])


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


def are_few(num_sources: int, num_reads: int) -> bool:
    """Whether sources are gone through one by one, and not by groups."""
    return num_sources <= (FEW_SOURCES if num_reads > 1 else GROUP)


@on_their_device
def mixed_backward(
    sources: list[Tensor], scores: list[Tensor], rstds: list[Tensor] | None, softmax: Tensor | None, douts: list[Tensor],
    dlse: Tensor, passed: list[Tensor] | None,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    """Launch the backward pass: gradients of the sources, ``passed`` added, of their scores and, if given, of ``rstds``;
    ``softmax`` is m and z, which a single source needs not."""
    first, num_reads, num_sources = sources[0], len(scores[0]), len(sources)
    num_tokens, dim = size_of(first)
    few, count = are_few(num_sources, num_reads), padded(num_sources)
    most = min(BACKWARD_COLUMNS if few or num_reads == 1 else BACKWARD_COLUMNS // 2, BACKWARD_ELEMENTS // num_reads)
    block_d = min(max(16, power_of_two(most + 1) // 2), power_of_two(dim, 16))
    num_pieces = cdiv(dim, block_d)
    dsources = [source.new_empty(source.shape) for source in sources]
    dscores = [torch.empty_like(scores[0]) for _ in sources]
    drstds = [torch.empty_like(rstd) for rstd in rstds] if rstds is not None else []
    # A single source has the whole weight whatever its score: what dp adds to ds cancels.
    use_products = num_sources > 1 or rstds is not None
    products = scores[0].new_empty(num_tokens, num_sources, num_reads, num_pieces) if use_products else None
    fixed = {
        "N": count, "S": num_reads, "PRODUCTS": use_products, "NORMALIZE": rstds is not None, "ACC": accumulator(first),
    }  # fmt: skip
    _backward[(num_tokens, num_pieces)](
        pointers(sources), strides_of(sources), pointers(scores), pointers(rstds), softmax, tuple(douts), strides_of(douts),
        pointers(passed), pointers(dsources), products, num_sources, num_tokens, dim, FEW=few, BLOCK_D=block_d,
        PASSED=passed is not None, ALIGNED=is_aligned(*sources, *douts, *dsources, *(passed or ())),
        BYTES=first.element_size(), STAGES=BACKWARD_STAGES, num_warps=1, **fixed,
    )  # fmt: skip
    reads, pieces = power_of_two(num_reads), power_of_two(num_pieces)
    block_t = max(1, min(SCORE_TOKENS, SCORE_ELEMENTS // (reads * pieces)))
    _score_gradients[(cdiv(num_tokens, block_t),)](
        pointers(scores), pointers(rstds), softmax, dlse, products, pointers(dscores), pointers(drstds or None), num_sources,
        num_tokens, num_pieces, S_PAD=reads, PIECES=pieces, BLOCK_T=block_t, num_warps=min(4, reads * pieces), **fixed,
    )  # fmt: skip
    return dsources, dscores, drstds
