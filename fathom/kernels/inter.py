"""Reads over the same sources in one sweep, forward and backward: the kernels behind ``inter_block`` and ``read``.

Forward, one program for a few tokens, sources v_n held in registers (or swept in column chunks where they do not fit):

    r_n = 1 / sqrt(mean(v_n²) + eps)     s_sn = scale · r_n (q_s · v_n)     p_sn = softmax_n(s_sn)     out_s = Σ_n p_sn v_n

Saved for the backward pass: the sources, and per token r [N], s [S, N] and lse [S]; neither p nor out. Backward, one sweep
for all reads, whose gradients meet in registers:

    dp_sn = dout_s · v_n              ds_sn = p_sn (dp_sn − Σ_m p_sm dp_sm + dlse_s)              c_sn = scale · r_n ds_sn
    dv_n  = Σ_s (p_sn dout_s + c_sn q_s) − v_n r_n² / D Σ_s ds_sn s_sn                          dq_s = Σ_tokens Σ_n c_sn v_n

The query gradient is a reduction of its own over [tokens], in a fixed order: each program sums its share, then the shares
are added. With ``NORMALIZE`` the values are v_n r_n as well (Inkling-2); with ``NORM`` the first read is returned RMS-normalised.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.kernels.tiles import (
    accumulator,
    as_rows,
    column,
    is_aligned,
    pick,
    pick_stride,
    power_of_two,
    read_tile,
    row_pointers,
    statistic,
)  # fmt: skip

QUERY_TOKENS = 32


@triton.jit
def _forward(
    sources, strides, queries, outs, lse, scores, rstd, norm_weight, norm_rstd, num_tokens, dim, eps, norm_eps, scale,
    N: tl.constexpr, S: tl.constexpr, N_PAD: tl.constexpr, S_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    SINGLE: tl.constexpr, NORM: tl.constexpr, NORMALIZE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n, reads, d = tl.arange(0, N_PAD), tl.arange(0, S_PAD), tl.arange(0, BLOCK_D)
    rows = row_pointers(sources, strides, n, t, N, sources[0].dtype.element_ty, BYTES, ALIGNED)[:, :, None]
    here, live = t < num_tokens, n < N
    mask = (here[:, None] & live[None, :])[:, :, None]

    square = tl.zeros([BLOCK_T, N_PAD], ACC)
    dots = tl.zeros([BLOCK_T, N_PAD, S_PAD], ACC)
    v = tl.load(rows + d[None, None, :], mask & (d < dim)[None, None, :], other=0).to(ACC)
    for start in range(0, dim, BLOCK_D):
        columns = start + d
        if not SINGLE:
            v = tl.load(rows + columns[None, None, :], mask & (columns < dim)[None, None, :], other=0).to(ACC)
        square += tl.sum(v * v, 2)
        for s in range(S):
            q = tl.load(queries + s * dim + columns, columns < dim, other=0).to(ACC)
            dots += tl.where(reads[None, None, :] == s, tl.sum(v * q[None, None, :], 2)[:, :, None], 0)

    r = 1 / tl.sqrt(square / dim + eps)
    score = tl.where(live[None, :, None], dots * (r * scale)[:, :, None], float("-inf"))
    largest = tl.max(score, 1)
    e = tl.exp(score - largest[:, None, :])
    total = tl.sum(e, 1)
    p = e / total[:, None, :]
    tl.store(rstd + n[None, :] * num_tokens + t[:, None], r, here[:, None] & live[None, :])
    small = reads < S
    tl.store(
        scores + (reads[None, None, :] * N + n[None, :, None]) * num_tokens + t[:, None, None],
        score, mask & small[None, None, :],
    )  # fmt: skip
    tl.store(lse + reads[None, :] * num_tokens + t[:, None], largest + tl.log(total), here[:, None] & small[None, :])
    weight = p * r[:, :, None] if NORMALIZE else p

    for start in range(0, dim, BLOCK_D):
        columns = start + d
        if not SINGLE:
            v = tl.load(rows + columns[None, None, :], mask & (columns < dim)[None, None, :], other=0).to(ACC)
        inside = here[:, None] & (columns < dim)[None, :]
        for s in range(S):
            mix = tl.sum(column(weight, reads, s)[:, :, None] * v, 1)
            if NORM and s == 0:
                m = 1 / tl.sqrt(tl.sum(mix * mix, 1) / dim + norm_eps)
                tl.store(norm_rstd + t, m, here)
                gain = tl.load(norm_weight + columns, columns < dim, other=0).to(ACC)
                mix = mix * m[:, None] * gain[None, :]
            out = pick(outs, s, S, ALIGNED) + t[:, None] * dim + columns[None, :]
            tl.store(out, mix.to(outs[0].dtype.element_ty), inside)


@triton.jit
def _backward(
    sources, strides, queries, douts, dlse, lse, scores, rstd, norm_weight, norm_rstd, dsources, dstrides, coefficients,
    num_tokens, dim, scale,
    N: tl.constexpr, S: tl.constexpr, N_PAD: tl.constexpr, S_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    SINGLE: tl.constexpr, NORM: tl.constexpr, NORMALIZE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    BYTES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n, reads, d = tl.arange(0, N_PAD), tl.arange(0, S_PAD), tl.arange(0, BLOCK_D)
    element: tl.constexpr = sources[0].dtype.element_ty
    rows = row_pointers(sources, strides, n, t, N, element, BYTES, ALIGNED)[:, :, None]
    drows = row_pointers(dsources, dstrides, n, t, N, element, BYTES, ALIGNED)[:, :, None]
    here, live = t < num_tokens, n < N
    mask = (here[:, None] & live[None, :])[:, :, None]
    small = reads < S
    cell = (reads[None, None, :] * N + n[None, :, None]) * num_tokens + t[:, None, None]
    row = reads[None, :] * num_tokens + t[:, None]
    score = tl.load(scores + cell, mask & small[None, None, :], other=float("-inf"))
    log_total = tl.load(lse + row, here[:, None] & small[None, :], other=0)
    dlog_total = tl.load(dlse + row, here[:, None] & small[None, :], other=0)
    p = tl.exp(score - log_total[:, None, :])
    r = tl.load(rstd + n[None, :] * num_tokens + t[:, None], here[:, None] & live[None, :], other=0)
    weight = p * r[:, :, None] if NORMALIZE else p

    v = tl.load(rows + d[None, None, :], mask & (d < dim)[None, None, :], other=0).to(ACC)
    first = tl.zeros([BLOCK_T, BLOCK_D], ACC)
    if NORM:
        inside = here[:, None] & (d < dim)[None, :]
        mix = tl.sum(column(weight, reads, 0)[:, :, None] * v, 1)
        m = tl.load(norm_rstd + t, here, other=0)[:, None]
        g = tl.load(pick(douts, 0, S, ALIGNED) + t[:, None] * dim + d[None, :], inside, other=0).to(ACC)
        g *= tl.load(norm_weight + d, d < dim, other=0).to(ACC)[None, :]
        first = m * (g - mix * (m * m * (tl.sum(g * mix, 1) / dim)[:, None]))

    dp = tl.zeros([BLOCK_T, N_PAD, S_PAD], ACC)
    for start in range(0, dim, BLOCK_D):
        columns = start + d
        inside = here[:, None] & (columns < dim)[None, :]
        if not SINGLE:
            v = tl.load(rows + columns[None, None, :], mask & (columns < dim)[None, None, :], other=0).to(ACC)
        for s in range(S):
            g = tl.load(pick(douts, s, S, ALIGNED) + t[:, None] * dim + columns[None, :], inside, other=0).to(ACC)
            if NORM:
                g = tl.where(s == 0, first, g)
            dp += tl.where(reads[None, None, :] == s, tl.sum(v * g[:, None, :], 2)[:, :, None], 0)

    # Scores of absent sources are -inf: their p is 0, and so must be what multiplies them.
    score = tl.where(mask & small[None, None, :], score, 0)
    dweight = dp * r[:, :, None] if NORMALIZE else dp
    ds = p * (dweight - tl.sum(p * dweight, 1)[:, None, :] + dlog_total[:, None, :])
    c = ds * (r * scale)[:, :, None]
    shrink = tl.sum(ds * score, 2)
    if NORMALIZE:
        shrink += tl.sum(p * dweight, 2)
    shrink *= r * r / dim
    tl.store(coefficients + cell, c, mask & small[None, None, :])

    for start in range(0, dim, BLOCK_D):
        columns = start + d
        inside = here[:, None] & (columns < dim)[None, :]
        if not SINGLE:
            v = tl.load(rows + columns[None, None, :], mask & (columns < dim)[None, None, :], other=0).to(ACC)
        dv = -shrink[:, :, None] * v
        for s in range(S):
            g = tl.load(pick(douts, s, S, ALIGNED) + t[:, None] * dim + columns[None, :], inside, other=0).to(ACC)
            if NORM:
                g = tl.where(s == 0, first, g)
            q = tl.load(queries + s * dim + columns, columns < dim, other=0).to(ACC)
            dv += column(weight, reads, s)[:, :, None] * g[:, None, :]
            dv += column(c, reads, s)[:, :, None] * q[None, None, :]
        tl.store(drows + columns[None, None, :], dv.to(element), mask & (columns < dim)[None, None, :])


@triton.jit
def _query_gradient(
    sources, strides, coefficients, scores, lse, dx, norm_rstd, rstd, dqueries, dnorm, num_tokens, dim, tokens_each,
    N: tl.constexpr, S: tl.constexpr, S_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    NORM: tl.constexpr, NORMALIZE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program sums ``tokens_each`` tokens of one chunk of columns into its own row of ``dqueries``."""
    share = tl.program_id(1)
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    reads = tl.arange(0, S_PAD)
    total = tl.zeros([S_PAD, BLOCK_D], ACC)
    total_norm = tl.zeros([BLOCK_D], ACC)
    begin = share.to(tl.int64) * tokens_each
    for start in range(0, tokens_each, BLOCK_T):
        t = begin + start + tl.arange(0, BLOCK_T)
        here = t < num_tokens
        mix = tl.zeros([BLOCK_T, BLOCK_D], ACC)
        for n in range(N):
            row = pick(sources, n, N, ALIGNED) + t[:, None] * pick_stride(strides, n, N)
            v = tl.load(row + d[None, :], here[:, None] & (d < dim)[None, :], other=0).to(ACC)
            at = (reads[:, None] * N + n) * num_tokens + t[None, :]
            c = tl.load(coefficients + at, (reads < S)[:, None] & here[None, :], other=0)
            total = tl.dot(c, v, total, input_precision="tf32x3", out_dtype=ACC)
            if NORM:
                weight = tl.exp(
                    tl.load(scores + n * num_tokens + t, here, other=float("-inf")) - tl.load(lse + t, here, other=0)
                )
                if NORMALIZE:
                    weight *= tl.load(rstd + n * num_tokens + t, here, other=0)
                mix += weight[:, None] * v
        if NORM:
            g = tl.load(dx + t[:, None] * dim + d[None, :], here[:, None] & (d < dim)[None, :], other=0).to(ACC)
            total_norm += tl.sum(g * mix * tl.load(norm_rstd + t, here, other=0)[:, None], 0)
    out = dqueries + (share * S + reads[:, None]) * dim + d[None, :]
    tl.store(out, total, (reads < S)[:, None] & (d < dim)[None, :])
    if NORM:
        tl.store(dnorm + share * dim + d, total_norm, d < dim)


def _tuples(tensors: list[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return tuple(tensors), tuple(t.stride(0) for t in tensors)


def fits(num_sources: int, dim: int) -> bool:
    """Whether one program holds whole rows of all sources, as the output norm needs."""
    return read_tile(num_sources, dim)[1] >= dim


@torch.library.custom_op("fathom::inter_block", mutates_args=())
def inter_block(
    sources: list[Tensor], queries: Tensor, norm_weight: Tensor | None,
    eps: float, norm_eps: float, scale: float, normalize_values: bool,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """S reads of N sources [tokens, D] by folded queries [S, D].

    Returns the S reads [tokens, D], the first RMS-normalised if there is a ``norm_weight``, and four statistics: lse [S, tokens];
    scores [S, N, tokens], reciprocal norms [N, tokens] and the first read's [tokens], which no gradient flows through.
    """
    first, (num_reads, dim), num_sources = sources[0], queries.shape, len(sources)
    num_tokens, acc = first.shape[0], accumulator(first)
    block_t, block_d, num_warps = read_tile(num_sources, dim)
    outs = [first.new_empty(num_tokens, dim) for _ in range(num_reads)]
    lse = statistic(first, num_reads, num_tokens)
    scores = statistic(first, num_reads, num_sources, num_tokens)
    rstd = statistic(first, num_sources, num_tokens)
    norm_rstd = statistic(first, num_tokens if norm_weight is not None else 0)
    pointers, strides = _tuples(sources)
    _forward[(triton.cdiv(num_tokens, block_t),)](
        pointers, strides, queries, tuple(outs), lse, scores, rstd, norm_weight, norm_rstd, num_tokens, dim, eps, norm_eps,
        scale, N=num_sources, S=num_reads, N_PAD=power_of_two(num_sources), S_PAD=power_of_two(num_reads), BLOCK_T=block_t,
        BLOCK_D=block_d, SINGLE=block_d >= dim, NORM=norm_weight is not None, NORMALIZE=normalize_values,
        ALIGNED=is_aligned(*sources, *outs), ACC=acc, BYTES=first.element_size(), num_warps=num_warps,
    )  # fmt: skip
    return outs, lse, scores, rstd, norm_rstd


@inter_block.register_fake
def _(sources, queries, norm_weight, eps, norm_eps, scale, normalize_values):
    first, num_reads, num_sources = sources[0], queries.shape[0], len(sources)
    num_tokens = first.shape[0]
    return (
        [first.new_empty(num_tokens, first.shape[1]) for _ in range(num_reads)],
        statistic(first, num_reads, num_tokens),
        statistic(first, num_reads, num_sources, num_tokens),
        statistic(first, num_sources, num_tokens),
        statistic(first, num_tokens if norm_weight is not None else 0),
    )


@torch.library.custom_op("fathom::inter_block_backward", mutates_args=())
def inter_block_backward(
    sources: list[Tensor], queries: Tensor, norm_weight: Tensor | None, lse: Tensor, scores: Tensor, rstd: Tensor,
    norm_rstd: Tensor, douts: list[Tensor], dlse: Tensor, scale: float, normalize_values: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:  # fmt: skip
    """Gradients of the sources [tokens, D], of the folded queries [S, D] and of the norm weight [D] (empty without one)."""
    first, (num_reads, dim), num_sources = sources[0], queries.shape, len(sources)
    num_tokens, acc, norm = first.shape[0], accumulator(first), norm_weight is not None
    block_t, block_d, num_warps = read_tile(num_sources, dim)
    dsources = [first.new_empty(num_tokens, dim) for _ in sources]
    coefficients = torch.empty_like(scores)
    (pointers, strides), (dpointers, dstrides) = _tuples(sources), _tuples(dsources)
    aligned = is_aligned(*sources, *douts, *dsources)
    shared = {
        "N": num_sources,
        "S": num_reads,
        "NORM": norm,
        "NORMALIZE": normalize_values,
        "ALIGNED": aligned,
        "ACC": acc,
    }
    _backward[(triton.cdiv(num_tokens, block_t),)](
        pointers, strides, queries, tuple(douts), dlse, lse, scores, rstd, norm_weight, norm_rstd, dpointers, dstrides,
        coefficients, num_tokens, dim, scale, N_PAD=power_of_two(num_sources), S_PAD=power_of_two(num_reads),
        BLOCK_T=block_t, BLOCK_D=block_d, SINGLE=block_d >= dim, BYTES=first.element_size(), num_warps=num_warps, **shared,
    )  # fmt: skip
    block_d = min(128, power_of_two(dim, 16))
    chunks = triton.cdiv(dim, block_d)
    shares = max(1, min(triton.cdiv(num_tokens, 8 * QUERY_TOKENS), triton.cdiv(512, chunks)))
    tokens_each = triton.cdiv(triton.cdiv(num_tokens, shares), QUERY_TOKENS) * QUERY_TOKENS
    dqueries = lse.new_empty(shares, num_reads, dim)
    dnorm = lse.new_empty(shares, dim if norm else 0)
    _query_gradient[(chunks, shares)](
        pointers, strides, coefficients, scores, lse, douts[0], norm_rstd, rstd, dqueries, dnorm, num_tokens, dim, tokens_each,
        S_PAD=power_of_two(num_reads, 16), BLOCK_T=QUERY_TOKENS, BLOCK_D=block_d, num_warps=4, **shared,
    )  # fmt: skip
    return dsources, dqueries.sum(0), dnorm.sum(0)


@inter_block_backward.register_fake
def _(sources, queries, norm_weight, lse, scores, rstd, norm_rstd, douts, dlse, scale, normalize_values):
    dnorm = lse.new_empty(queries.shape[1] if norm_weight is not None else 0)
    return [source.new_empty(source.shape) for source in sources], lse.new_empty(queries.shape), dnorm


def _setup(ctx, inputs, output):
    sources, queries, norm_weight, _, _, ctx.scale, ctx.normalize_values = inputs
    _, lse, scores, rstd, norm_rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*sources, queries, norm_weight, lse, scores, rstd, norm_rstd)


def _gradients(ctx, douts, dlse, *_):
    *sources, queries, norm_weight, lse, scores, rstd, norm_rstd = ctx.saved_tensors
    absent = torch.zeros_like(sources[0], memory_format=torch.contiguous_format) if None in douts else None
    douts = [absent if dout is None else as_rows(dout).contiguous() for dout in douts]
    dlse = torch.zeros_like(lse) if dlse is None else dlse.contiguous()
    dsources, dqueries, dnorm = inter_block_backward(
        sources, queries, norm_weight, lse, scores, rstd, norm_rstd, douts, dlse, ctx.scale, ctx.normalize_values
    )
    dnorm = None if norm_weight is None else dnorm.to(norm_weight.dtype)
    return dsources, dqueries.to(queries.dtype), dnorm, None, None, None, None


inter_block.register_autograd(_gradients, setup_context=_setup)
