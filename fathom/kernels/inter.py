"""Reads over the same sources in one sweep, forward and backward: the kernels behind ``inter_block`` and ``read``.

    r_n = 1 / sqrt(mean(v_n²) + eps)     s_sn = scale · r_n (q_s · v_n)     p_sn = softmax_n(s_sn)     out_s = Σ_n p_sn v_n

Saved for the backward pass: the sources, and per token r [N], s [N, S] and lse [S]; neither p nor out. Backward, one sweep
for all reads, whose gradients meet before they are written:

    dp_sn = dout_s · v_n              ds_sn = p_sn (dp_sn − Σ_m p_sm dp_sm + dlse_s)              c_sn = scale · r_n ds_sn
    dv_n  = Σ_s (p_sn dout_s + c_sn q_s) − v_n r_n² / D Σ_s ds_sn s_sn                          dq_s = Σ_tokens Σ_n c_sn v_n

What sums over D is a matrix product of small tiles, so that no thread waits for another's partial sum: q · v of all tokens in
a kernel of its own (``_scores``), dout · v of a few tokens at a time, their reads as rows and their sources as columns, of
which the ones of the same token are kept. What sums over N or S is done column by column, each thread with its own eight.

A float32 factor of a bfloat16 tile is a sum of three bfloat16 terms. The query gradient is a reduction of its own, in a fixed
order: each program sums its share of the tokens, then the shares are added. With ``NORMALIZE`` the values are v_n r_n as well
(Inkling-2).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.kernels.tiles import (
    accumulator,
    is_aligned,
    pick,
    pick_stride,
    power_of_two,
    row_pointers,
    statistic,
)

SCORE_ROWS, SCORE_COLUMNS = 64, 128
"""Tile of a source in ``_scores``."""
MIX_TOKENS, MIX_WARPS = 2, 4
"""Tokens of one program of ``_mix``, one after the other, and its warps: each takes 256 columns at a time."""
PAIR_COLUMNS = 256
"""Columns of one step of dout · v."""
QUERY_TOKENS, QUERY_COLUMNS, QUERY_SHARES = 64, 128, 64
"""Tokens and columns of one step of the query gradient, and into how many shares all tokens are cut."""


@triton.jit
def _times(a, b, COUNT: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """``a @ b`` for a wide ``a``, of which COUNT terms are used under ``SPLIT``, and a ``b`` in the sources' dtype."""
    if SPLIT:
        term = a.to(tl.bfloat16)
        total = tl.dot(term, b)
        for _ in tl.static_range(COUNT - 1):
            a -= term.to(a.dtype)
            term = a.to(tl.bfloat16)
            total = tl.dot(term, b, total)
        return total
    return tl.dot(a, b.to(a.dtype), input_precision=PRECISION, out_dtype=a.dtype)


@triton.jit
def _scores(
    sources, strides, queries, scores, rstd, num_tokens, dim, eps, scale,
    N: tl.constexpr, S: tl.constexpr, S_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [tokens, N, S] and reciprocal norms [tokens, N] of source ``program_id(1)``."""
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1)
    s, d = tl.arange(0, S_PAD), tl.arange(0, BLOCK_D)
    here = t < num_tokens
    source = pick(sources, n, N, ALIGNED)[:, None] + t[:, None] * pick_stride(strides, n, N)
    dots = tl.zeros([S_PAD, BLOCK_T], ACC)
    square = tl.zeros([BLOCK_T], ACC)
    for start in range(0, dim, BLOCK_D):
        column = start + d
        v = tl.load(source + column[None, :], here[:, None] & (column < dim)[None, :], other=0)
        q = tl.load(queries + s[:, None] * dim + column[None, :], (s < S)[:, None] & (column < dim)[None, :], other=0)
        dots += _times(q.to(ACC), tl.trans(v), 3, SPLIT, PRECISION)
        square += tl.sum(v.to(ACC) * v.to(ACC), 1)
    r = 1 / tl.sqrt(tl.where(here, square / dim + eps, 1))
    tl.store(rstd + t * N + n, r, here)
    at = (t[None, :] * N + n) * S + s[:, None]
    tl.store(scores + at, dots * (r * scale)[None, :], (s < S)[:, None] & here[None, :])


@triton.jit
def _mix(
    sources, strides, scores, rstd, outs, lse, num_tokens, dim,
    N: tl.constexpr, S: tl.constexpr, N_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    NORMALIZE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """The reads of ``BLOCK_T`` tokens, one after the other, and their lse."""
    element: tl.constexpr = sources[0].dtype.element_ty
    n, d = tl.arange(0, N_PAD), tl.arange(0, BLOCK_D)
    begin = tl.program_id(0).to(tl.int64) * BLOCK_T
    for i in range(tl.minimum(BLOCK_T, num_tokens - begin)):
        t = begin + i
        source = row_pointers(sources, strides, n, t, N, element, BYTES, ALIGNED)[:, None]
        r = tl.load(rstd + t * N + n, n < N, other=0)
        for start in range(0, dim, BLOCK_D):
            column = start + d
            v = tl.load(source + column[None, :], (n < N)[:, None] & (column < dim)[None, :], other=0).to(ACC)
            for s in range(S):
                score = tl.load(scores + (t * N + n) * S + s, n < N, other=float("-inf"))
                top = tl.max(score, 0)
                p = tl.exp(score - top)
                total = tl.sum(p, 0)
                if start == 0:
                    tl.store(lse + s * num_tokens + t, top + tl.log(total))
                weight = p / total
                if NORMALIZE:
                    weight *= r
                mix = tl.sum(weight[:, None] * v, 0)
                tl.store(pick(outs, s, S, ALIGNED) + t * dim + column, mix.to(element), column < dim)


@triton.jit
def _source_gradients(
    sources, strides, queries, douts, douts_strides, dsources, coefficients, shares, own, begin,
    num_tokens, dim,
    N: tl.constexpr, S: tl.constexpr, S_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """dv of the tokens from ``begin`` on, column by column, from what ``_backward`` has stored for them."""
    element: tl.constexpr = sources[0].dtype.element_ty
    d, s = tl.arange(0, BLOCK_D), tl.arange(0, S_PAD)
    for start in range(0, dim, BLOCK_D):
        column = start + d
        q = tl.load(
            queries + s[:, None] * dim + column[None, :], (s < S)[:, None] & (column < dim)[None, :], other=0
        ).to(ACC)
        for i in range(tl.minimum(BLOCK_T, num_tokens - begin)):
            t = begin + i
            dout = row_pointers(douts, douts_strides, s, t, S, element, BYTES, ALIGNED)[:, None]
            g = tl.load(
                dout + column[None, :],
                (s < S)[:, None] & (column < dim)[None, :],
                other=0,
                eviction_policy="evict_first",
            ).to(ACC)
            for j in range(N):
                at = (t * N + j) * S + s
                share = tl.load(shares + at, s < S, other=0)
                c = tl.load(coefficients + at, s < S, other=0)
                dv = tl.sum(share[:, None] * g + c[:, None] * q, 0)
                v = tl.load(
                    pick(sources, j, N, ALIGNED) + t * pick_stride(strides, j, N) + column, column < dim, other=0
                ).to(ACC)  # fmt: skip
                dv -= tl.load(own + t * N + j) * v
                dsource = pick(dsources, j, N, ALIGNED) + t * dim + column
                tl.store(dsource, dv.to(element), column < dim, eviction_policy="evict_first")


@triton.jit
def _backward(
    sources, strides, queries, douts, douts_strides, dlse, lse, scores, rstd, dsources,
    coefficients, shares, own, num_tokens, dim, scale,
    N: tl.constexpr, S: tl.constexpr, N_PAD: tl.constexpr, S_PAD: tl.constexpr, S_ALONE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, PAIR_D: tl.constexpr, NORMALIZE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    BYTES: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    element: tl.constexpr = sources[0].dtype.element_ty
    row, read = tl.arange(0, BLOCK_T * N_PAD), tl.arange(0, BLOCK_T * S_PAD)
    n, s = row % N_PAD, read % S_PAD
    same = (read // S_PAD)[:, None] == (row // N_PAD)[None, :]
    begin = tl.program_id(0).to(tl.int64) * BLOCK_T
    t, u = begin + row // N_PAD, begin + read // S_PAD
    live, wanted = (n < N) & (t < num_tokens), (s < S) & (u < num_tokens)
    use = same & live[None, :] & wanted[:, None]

    source = row_pointers(sources, strides, n, t, N, element, BYTES, ALIGNED)[:, None]
    dout = row_pointers(douts, douts_strides, s, u, S, element, BYTES, ALIGNED)[:, None]
    dp = tl.zeros([BLOCK_T * S_PAD, BLOCK_T * N_PAD], ACC)
    d = tl.arange(0, PAIR_D)
    if N > 1 or NORMALIZE:  # a single source has the whole weight whatever its score: what dp adds to ds cancels
        for start in range(0, dim, PAIR_D):
            column = (start + d)[None, :]
            v = tl.load(source + column, live[:, None] & (column < dim), other=0, eviction_policy="evict_last")
            g = tl.load(dout + column, wanted[:, None] & (column < dim), other=0, eviction_policy="evict_last")
            if SPLIT:
                dp += tl.dot(g, tl.trans(v))
            else:
                dp += tl.dot(g.to(ACC), tl.trans(v).to(ACC), input_precision=PRECISION, out_dtype=ACC)

    cell = (u[:, None] * N + n[None, :]) * S + s[:, None]
    score = tl.load(scores + cell, use, other=float("-inf"))
    p = tl.exp(score - tl.load(lse + s * num_tokens + u, wanted, other=0)[:, None])
    r = tl.load(rstd + t * N + n, live, other=0)
    weight = p * r[None, :] if NORMALIZE else p
    dweight = tl.where(use, dp * r[None, :] if NORMALIZE else dp, 0)
    dtotal = tl.load(dlse + s * num_tokens + u, wanted, other=0)
    ds = p * (dweight - tl.sum(p * dweight, 1)[:, None] + dtotal[:, None])
    shrink = tl.sum(ds * tl.where(use, score, 0), 0)
    if NORMALIZE:
        shrink += tl.sum(p * dweight, 0)
    tl.store(coefficients + cell, ds * (r * scale)[None, :], use)
    tl.store(shares + cell, weight, use)
    tl.store(own + t * N + n, shrink * r * r / dim, live)
    # The same columns again, now out of the caches, by other threads than those that stored what they need.
    tl.debug_barrier()
    _source_gradients(
        sources, strides, queries, douts, douts_strides, dsources, coefficients, shares, own, begin, num_tokens, dim,
        N, S, S_ALONE, BLOCK_T, BLOCK_D, ALIGNED, ACC, BYTES,
    )  # fmt: skip


@triton.jit
def _query_gradient(
    sources, strides, coefficients, dqueries, num_tokens, dim, tokens_each,
    N: tl.constexpr, S: tl.constexpr, S_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program sums ``tokens_each`` tokens of one chunk of columns into its own row of ``dqueries``."""
    share = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    s = tl.arange(0, S_PAD)
    total = tl.zeros([S_PAD, BLOCK_D], ACC)
    begin = share.to(tl.int64) * tokens_each
    for start in range(0, tokens_each, BLOCK_T):
        t = begin + start + tl.arange(0, BLOCK_T)
        here = t < num_tokens
        mask = here[:, None] & (d < dim)[None, :]
        for n in range(N):
            source = pick(sources, n, N, ALIGNED)[:, None] + t[:, None] * pick_stride(strides, n, N)
            v = tl.load(source + d[None, :], mask, other=0)
            at = (t[None, :] * N + n) * S + s[:, None]
            c = tl.load(coefficients + at, (s < S)[:, None] & here[None, :], other=0)
            total += _times(c, v, 3, SPLIT, PRECISION)
    out = dqueries + (share * S + s[:, None]) * dim + d[None, :]
    tl.store(out, total, (s < S)[:, None] & (d < dim)[None, :])


def _pair_tile(num_sources: int, num_reads: int) -> dict[str, int]:
    """Tokens whose reads meet their sources in one product, at least 16 rows of each, and the padded numbers of both.

    Few tokens, so that what all running programs hold, reads and sources alike, stays in the caches until it is used again.
    """
    tokens = 2 if num_sources <= 2 else 1
    reads = power_of_two(num_reads)
    return {
        "BLOCK_T": tokens, "N_PAD": power_of_two(num_sources, 16 // tokens), "S_PAD": max(reads, 16 // tokens),
        "S_ALONE": reads, "num_warps": 2 * tokens,
    }  # fmt: skip


def _tuples(tensors: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return tuple(tensors), tuple(t.stride(0) for t in tensors)


def _fixed(sources: list[Tensor], num_reads: int, *others: Tensor) -> dict[str, object]:
    """What all kernels are compiled for."""
    first = sources[0]
    return {
        "N": len(sources), "S": num_reads, "ALIGNED": is_aligned(*sources, *others), "ACC": accumulator(first),
    }  # fmt: skip


def _products(first: Tensor) -> dict[str, object]:
    """How matrix products are computed: in bfloat16 terms, or in the precision that the dtype needs."""
    split = (
        first.dtype == torch.bfloat16 and first.device.type == "cuda"
    )  # the interpreter's bfloat16 arithmetic is wrong
    return {"SPLIT": split, "PRECISION": "tf32x3" if first.dtype in (torch.float16, torch.bfloat16) else "ieee"}


@torch.library.custom_op("fathom::inter_block", mutates_args=())
def inter_block(
    sources: list[Tensor], queries: Tensor, eps: float, scale: float, normalize_values: bool
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:  # fmt: skip
    """S reads of N sources [tokens, D] by folded queries [S, D].

    Returns the S reads [tokens, D] and their lse [S, tokens], then scores [tokens, N, S] and reciprocal norms [tokens, N], which
    no gradient flows through.
    """
    first, (num_reads, dim), num_sources = sources[0], queries.shape, len(sources)
    num_tokens = first.shape[0]
    outs = [first.new_empty(num_tokens, dim) for _ in range(num_reads)]
    lse = statistic(first, num_reads, num_tokens)
    scores = statistic(first, num_tokens, num_sources, num_reads)
    rstd = statistic(first, num_tokens, num_sources)
    fixed = _fixed(sources, num_reads, *outs)
    _scores[(triton.cdiv(num_tokens, SCORE_ROWS), num_sources)](
        *_tuples(sources), queries, scores, rstd, num_tokens, dim, eps, scale, S_PAD=power_of_two(num_reads, 16),
        BLOCK_T=SCORE_ROWS, BLOCK_D=min(SCORE_COLUMNS, power_of_two(dim, 16)), **fixed, **_products(first),
    )  # fmt: skip
    _mix[(triton.cdiv(num_tokens, MIX_TOKENS),)](
        *_tuples(sources), scores, rstd, tuple(outs), lse, num_tokens, dim,
        N_PAD=power_of_two(num_sources), BLOCK_T=MIX_TOKENS, BLOCK_D=min(256 * MIX_WARPS, power_of_two(dim, 16)),
        NORMALIZE=normalize_values, BYTES=first.element_size(), num_warps=MIX_WARPS, **fixed,
    )  # fmt: skip
    return outs, lse, scores, rstd


@inter_block.register_fake
def _(sources, queries, eps, scale, normalize_values):
    first, num_reads, num_sources = sources[0], queries.shape[0], len(sources)
    num_tokens = first.shape[0]
    return (
        [first.new_empty(num_tokens, first.shape[1]) for _ in range(num_reads)],
        statistic(first, num_reads, num_tokens),
        statistic(first, num_tokens, num_sources, num_reads),
        statistic(first, num_tokens, num_sources),
    )


@torch.library.custom_op("fathom::inter_block_backward", mutates_args=())
def inter_block_backward(
    sources: list[Tensor], queries: Tensor, lse: Tensor, scores: Tensor, rstd: Tensor, douts: list[Tensor], dlse: Tensor,
    scale: float, normalize_values: bool,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Gradients of the sources [tokens, D] and of the folded queries [S, D]."""
    first, (num_reads, dim), num_sources = sources[0], queries.shape, len(sources)
    num_tokens = first.shape[0]
    dsources = [first.new_empty(num_tokens, dim) for _ in sources]
    coefficients, shares = torch.empty_like(scores), torch.empty_like(scores)
    own = torch.empty_like(rstd)
    pointers, strides = _tuples(sources)
    fixed = _fixed(sources, num_reads, *douts, *dsources)
    pair = _pair_tile(num_sources, num_reads)
    _backward[(triton.cdiv(num_tokens, pair["BLOCK_T"]),)](
        pointers, strides, queries, *_tuples(douts), dlse, lse, scores, rstd, tuple(dsources),
        coefficients, shares, own, num_tokens, dim, scale, NORMALIZE=normalize_values, BYTES=first.element_size(),
        BLOCK_D=min(256 * pair["num_warps"], power_of_two(dim, 16)), PAIR_D=min(PAIR_COLUMNS, power_of_two(dim, 16)),
        **fixed, **pair, **_products(first),
    )  # fmt: skip
    block_d = min(QUERY_COLUMNS, power_of_two(dim, 16))
    num_shares = max(1, min(triton.cdiv(num_tokens, QUERY_TOKENS), QUERY_SHARES))
    tokens_each = triton.cdiv(triton.cdiv(num_tokens, num_shares), QUERY_TOKENS) * QUERY_TOKENS
    dqueries = lse.new_empty(num_shares, num_reads, dim)
    _query_gradient[(triton.cdiv(dim, block_d), num_shares)](
        pointers, strides, coefficients, dqueries, num_tokens, dim, tokens_each,
        S_PAD=power_of_two(num_reads, 16), BLOCK_T=QUERY_TOKENS, BLOCK_D=block_d, num_warps=4, **fixed, **_products(first),
    )  # fmt: skip
    return dsources, dqueries.sum(0)


@inter_block_backward.register_fake
def _(sources, queries, lse, scores, rstd, douts, dlse, scale, normalize_values):
    return [source.new_empty(source.shape) for source in sources], lse.new_empty(queries.shape)


def _setup(ctx, inputs, output):
    sources, queries, _, ctx.scale, ctx.normalize_values = inputs
    _, lse, scores, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*sources, queries, lse, scores, rstd)


def _gradients(ctx, douts, dlse, *_):
    *sources, queries, lse, scores, rstd = ctx.saved_tensors
    absent = torch.zeros_like(sources[0], memory_format=torch.contiguous_format) if None in douts else None
    douts = [absent if dout is None else dout.contiguous() for dout in douts]
    dlse = torch.zeros_like(lse) if dlse is None else dlse.contiguous()
    dsources, dqueries = inter_block_backward(
        sources, queries, lse, scores, rstd, douts, dlse, ctx.scale, ctx.normalize_values
    )
    return dsources, dqueries.to(queries.dtype), None, None, None


inter_block.register_autograd(_gradients, setup_context=_setup)
