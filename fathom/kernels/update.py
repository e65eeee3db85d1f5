"""What happens between two sublayers, in one kernel each way: residual add, intra-block score, merge, and the next norm.

    b' = b + f          s = (q · b') r,  r = 1 / sqrt(mean(b'²) + eps)          a = sigmoid(s − lse)
    h  = o + a (b' − o)                                                         x = w ⊙ h m,  m = 1 / sqrt(mean(h²) + norm_eps)

b       the partial sum of the block so far (absent at its second site), f the sublayer's output, both [tokens, D]
o, lse  the inter-block part of this read, from ``inter_block`` (absent: h = b', and x is PreNorm's)
b'      is rounded to its dtype before it is used, as the plain path does; h is rounded only where it is returned

Saved for the backward pass: b', o, and per token r, s and m. With g = w ⊙ dx and the sums over D

    dh  = m (g − h m² mean(g ⊙ h)) + dh_returned          da = dh · (b' − o)        ds = a (1 − a) da = −dlse
    db' = a dh + ds (q r − s r² b' / D) + db'_returned    do = (1 − a) dh           dq = Σ ds r b'      dw = Σ dx ⊙ h m

b and f share the gradient db'. Each program walks over tokens and keeps its share of dq and dw in registers; the shares are
added afterwards in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.kernels.operators import operator
from fathom.kernels.tiles import (
    FEW_TOKENS,
    accumulator,
    cdiv,
    few_warps,
    four_sums,
    multiprocessors,
    nothing,
    on_their_device,
    power_of_two,
    rsqrt,
    shared_memory,
    size_of,
    statistic,
    sums_together,
    warps,
)


@triton.jit
def _forward(
    partial, output, inter, lse, query, norm_weight, total, x, mix_out, stats, num_tokens, dim, eps, norm_eps,
    PARTIAL: tl.constexpr, INTER: tl.constexpr, NORM: tl.constexpr, MIX: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, FEW: tl.constexpr, TOGETHER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    here, inside = t < num_tokens, d < dim
    at, mask = t[:, None] * dim + d[None, :], here[:, None] & inside[None, :]
    element: tl.constexpr = output.dtype.element_ty
    b = tl.load(output + at, mask, other=0).to(ACC)
    if PARTIAL:
        summed = (b + tl.load(partial + at, mask, other=0).to(ACC)).to(element)
        tl.store(total + at, summed, mask)
        b = summed.to(ACC)
    h = b
    if NORM and FEW:  # all loads are on the way before anything waits for one
        w = tl.load(norm_weight + d, inside, other=0).to(ACC)
    if INTER:
        o = tl.load(inter + at, mask, other=0).to(ACC)
        q = tl.load(query + d, inside, other=0).to(ACC)
        before = tl.load(lse + t, here, other=0)
        if TOGETHER:
            square, dot, other, cross = four_sums(b * b, b * q[None, :], o * o, o * b, 1)
        else:
            square, dot = tl.sum(b * b, 1), tl.sum(b * q[None, :], 1)
        r = rsqrt(tl.where(here, square / dim + eps, 1.0))
        s = dot * r
        a = 1 / (1 + tl.exp(before - s))
        h = o + a[:, None] * (b - o)
        tl.store(stats + t, r, here)
        tl.store(stats + num_tokens + t, s, here)
    else:
        tl.store(stats + t, tl.zeros([BLOCK_T], ACC), here)
        tl.store(stats + num_tokens + t, tl.zeros([BLOCK_T], ACC), here)
    if MIX:
        tl.store(mix_out + at, h.to(element), mask)
    if NORM:
        if TOGETHER and INTER:  # Σ h² from the sums above, since h = (1 − a) o + a b, but where those cancel
            parts = (1 - a) * (1 - a) * other + a * a * square
            length = parts + 2 * a * (1 - a) * cross
            if tl.max((4 * length < parts).to(tl.int32), 0) > 0:
                length = tl.sum(h * h, 1)
        else:
            length = tl.sum(h * h, 1)
        m = rsqrt(tl.where(here, length / dim + norm_eps, 1.0))
        tl.store(stats + 2 * num_tokens + t, m, here)
        if not FEW:
            w = tl.load(norm_weight + d, inside, other=0).to(ACC)
        tl.store(x + at, (h * m[:, None] * w[None, :]).to(element), mask)
    else:
        tl.store(stats + 2 * num_tokens + t, tl.zeros([BLOCK_T], ACC), here)


@triton.jit
def _pieces(rows, at, mask, ACC: tl.constexpr):
    """The pieces of some tokens' rows."""
    found = nothing()
    for i in tl.static_range(len(at)):
        found += (tl.load(rows + at[i], mask[i], other=0).to(ACC),)
    return found


@triton.jit
def _backward(
    total, inter, lse, query, norm_weight, stats, dtotal_in, dx, dmix, dtotal, dinter, dlse, dweights, num_tokens, dim,
    INTER: tl.constexpr, NORM: tl.constexpr, DTOTAL: tl.constexpr, DMIX: tl.constexpr, BLOCK_T: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, ACC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some tokens after another, their rows in a piece of FIRST columns and, if not 0, one of SECOND."""
    element: tl.constexpr = total.dtype.element_ty
    columns, dqs, dws = nothing(), nothing(), nothing()
    columns += (tl.arange(0, FIRST),)
    dqs += (tl.zeros([FIRST], ACC),)
    dws += (tl.zeros([FIRST], ACC),)
    if SECOND > 0:
        columns += (FIRST + tl.arange(0, SECOND),)
        dqs += (tl.zeros([SECOND], ACC),)
        dws += (tl.zeros([SECOND], ACC),)
    qs, ws = nothing(), nothing()
    for i in tl.static_range(len(columns)):
        if INTER:
            qs += (tl.load(query + columns[i], columns[i] < dim, other=0).to(ACC)[None, :],)
        if NORM:
            ws += (tl.load(norm_weight + columns[i], columns[i] < dim, other=0).to(ACC)[None, :],)
    for tile in tl.range(tl.program_id(0), tl.cdiv(num_tokens, BLOCK_T), tl.num_programs(0), num_stages=STAGES):
        t = tile * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        here = t < num_tokens
        at, mask = nothing(), nothing()
        for i in tl.static_range(len(columns)):
            at += (t[:, None] * dim + columns[i][None, :],)
            mask += (here[:, None] & (columns[i] < dim)[None, :],)
        b = _pieces(total, at, mask, ACC)
        h, a = b, 0.0
        if INTER:
            r = tl.load(stats + t, here, other=0)
            s = tl.load(stats + num_tokens + t, here, other=0)
            a = (1 / (1 + tl.exp(tl.load(lse + t, here, other=0) - s)))[:, None]
            o = _pieces(inter, at, mask, ACC)
            h = nothing()
            for i in tl.static_range(len(columns)):
                h += (o[i] + a * (b[i] - o[i]),)
        if NORM:
            m = tl.load(stats + 2 * num_tokens + t, here, other=0)[:, None]
            gs = _pieces(dx, at, mask, ACC)
            along, weighed, shares = tl.zeros([BLOCK_T], ACC), nothing(), nothing()
            for i in tl.static_range(len(columns)):
                shares += (dws[i] + tl.sum(gs[i] * h[i] * m, 0),)
                weighed += (gs[i] * ws[i],)
                along += tl.sum(weighed[i] * h[i], 1)
            dws = shares
            shrink = m * m * m * (along / dim)[:, None]
        dh = nothing()
        for i in tl.static_range(len(columns)):
            each = tl.zeros([BLOCK_T, columns[i].shape[0]], ACC)
            if NORM:
                each += m * weighed[i] - h[i] * shrink
            if DMIX:
                each += tl.load(dmix + at[i], mask[i], other=0).to(ACC)
            dh += (each,)
        if INTER:
            along, shares = tl.zeros([BLOCK_T], ACC), nothing()
            for i in tl.static_range(len(columns)):
                along += tl.sum(dh[i] * (b[i] - o[i]), 1)
            ds = along[:, None] * a * (1 - a)
            for i in tl.static_range(len(columns)):
                shares += (dqs[i] + tl.sum(b[i] * (ds * r[:, None]), 0),)
            dqs = shares
            tl.store(dlse + t[:, None], -ds, here[:, None])
        for i in tl.static_range(len(columns)):
            db = dh[i]
            if INTER:
                db = a * dh[i] + ds * (qs[i] * r[:, None] - b[i] * (s * r * r / dim)[:, None])
                tl.store(dinter + at[i], ((1 - a) * dh[i]).to(element), mask[i])
            if DTOTAL:
                db += tl.load(dtotal_in + at[i], mask[i], other=0).to(ACC)
            tl.store(dtotal + at[i], db.to(element), mask[i])
    out = dweights + tl.program_id(0).to(tl.int64) * 2 * dim
    for i in tl.static_range(len(columns)):
        tl.store(out + columns[i], dqs[i], columns[i] < dim)
        tl.store(out + dim + columns[i], dws[i], columns[i] < dim)


@triton.jit
def _weight_gradients(
    dweights, dquery, dnorm_weight, num_shares, dim,
    INTER: tl.constexpr, NORM: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Some columns of dq (``program_id(1)`` 0) or dw (1): the shares of all programs, added in a fixed order."""
    d, which = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D), tl.program_id(1)
    inside = d < dim
    total = tl.zeros([BLOCK_S, BLOCK_D], ACC)
    for start in range(0, num_shares, BLOCK_S):
        share = start + tl.arange(0, BLOCK_S)
        at = (2 * share + which)[:, None] * dim + d[None, :]
        total += tl.load(dweights + at, (share < num_shares)[:, None] & inside[None, :], other=0)
    found = tl.sum(total, 0)
    if INTER:
        tl.store(dquery + d, found.to(dquery.dtype.element_ty), inside & (which == 0))
    if NORM:
        tl.store(dnorm_weight + d, found.to(dnorm_weight.dtype.element_ty), inside & (which == 1))


BACKWARD_ELEMENTS, WARP_ELEMENTS = 2048, 768
"""Elements of a tensor that ``_backward`` takes at a time, if a row is not longer, and most of a warp, which keeps a dozen
values for each."""
BACKWARD_WARPS, BACKWARD_STAGES, BACKWARD_BYTES = 8, 3, 131072
"""Its warps on each multiprocessor, how many tokens' rows a program has on the way, and the most shared memory for them all."""
SHARES, SHARE_COLUMNS = 64, 32
"""Shares that ``_weight_gradients`` takes at a time, and columns of one of its programs."""


def _tile(dim: int, few: bool) -> tuple[int, int, int]:
    columns = power_of_two(dim, 16)
    if few:
        return 1, columns, few_warps(columns)
    tokens = max(1, min(8, 4096 // columns))
    return tokens, columns, max(4, warps(2 * tokens * columns))


def _pieces_of(dim: int) -> tuple[int, int]:
    """Columns of a row's pieces: all in one power of two, or, beyond BACKWARD_ELEMENTS, in two if they are fewer."""
    first = power_of_two(dim, 16)
    if first > BACKWARD_ELEMENTS:
        second = power_of_two(dim - first // 2, 16)
        if second < first // 2:
            return first // 2, second
    return first, 0


def _backward_tile(total: Tensor) -> tuple[int, int, int, int, int]:
    """Tokens, columns of both pieces, warps and stages."""
    first, second = _pieces_of(total.shape[-1])
    tokens = max(1, min(8, BACKWARD_ELEMENTS // first))
    elements = tokens * (first + second)
    num_warps = max(4, min(16, power_of_two(cdiv(elements, WARP_ELEMENTS))))
    each = min(BACKWARD_BYTES * num_warps // max(BACKWARD_WARPS, num_warps), shared_memory(total.device) - 4096)
    stages = 1 + each // (4 * elements * total.element_size())
    return tokens, first, second, num_warps, min(stages, BACKWARD_STAGES)


@operator("update_read")
@on_their_device
def update_read_op(
    partial: Tensor | None, output: Tensor, inter: Tensor | None, lse: Tensor | None, query: Tensor | None,
    norm_weight: Tensor | None, eps: float, norm_eps: float, return_mix: bool,
) -> list[Tensor]:  # fmt: skip
    """The equations above for contiguous [..., D]; ``query`` with its key gain folded in.

    Returns what there is of b' (with ``partial``), x (with ``norm_weight``) and h (with ``return_mix``), then [3, tokens] of
    statistics.
    """
    num_tokens, dim = size_of(output)
    total = torch.empty_like(output) if partial is not None else None
    x = torch.empty_like(output) if norm_weight is not None else None
    mix = torch.empty_like(output) if return_mix else None
    stats = statistic(output, 3, num_tokens)
    few = num_tokens <= FEW_TOKENS
    block_t, block_d, num_warps = _tile(dim, few)
    _forward[(cdiv(num_tokens, block_t),)](
        partial, output, inter, lse, query, norm_weight, total, x, mix, stats, num_tokens, dim, eps, norm_eps,
        PARTIAL=partial is not None, INTER=inter is not None, NORM=norm_weight is not None, MIX=return_mix,
        BLOCK_T=block_t, BLOCK_D=block_d, FEW=few, TOGETHER=few and sums_together(output, block_d), ACC=accumulator(output),
        num_warps=num_warps,
    )  # fmt: skip
    return [tensor for tensor in (total, x, mix, stats) if tensor is not None]


@torch.library.register_fake(update_read_op)
def _(partial, output, inter, lse, query, norm_weight, eps, norm_eps, return_mix):
    count = (partial is not None) + (norm_weight is not None) + return_mix
    stats = statistic(output, 3, size_of(output)[0])
    return [*(torch.empty_like(output) for _ in range(count)), stats]


@operator("update_read_backward")
@on_their_device
def update_read_backward(
    total: Tensor, inter: Tensor | None, lse: Tensor | None, query: Tensor | None, norm_weight: Tensor | None, stats: Tensor,
    dtotal_in: Tensor | None, dx: Tensor | None, dmix: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of b and f alike [..., D], of the inter-block part and its lse [...], of the query and of the norm's weight [D];
    empty where there is none."""
    num_tokens, dim = size_of(total)
    dtotal = torch.empty_like(total)
    dinter = torch.empty_like(total) if inter is not None else total.new_empty(0)
    dlse = stats.new_empty(lse.shape if lse is not None else 0)
    block_t, first, second, num_warps, stages = _backward_tile(total)
    programs = min(max(1, BACKWARD_WARPS // num_warps) * multiprocessors(total.device), cdiv(num_tokens, block_t))
    dweights = stats.new_empty(programs, 2, dim)
    _backward[(programs,)](
        total, inter, lse, query, norm_weight, stats, dtotal_in, dx, dmix, dtotal, dinter, dlse, dweights, num_tokens, dim,
        INTER=inter is not None, NORM=dx is not None, DTOTAL=dtotal_in is not None, DMIX=dmix is not None,
        BLOCK_T=block_t, FIRST=first, SECOND=second, ACC=accumulator(total), STAGES=stages, num_warps=num_warps,
    )  # fmt: skip
    dquery = torch.empty_like(query) if inter is not None and query is not None else total.new_empty(0)
    dnorm_weight = torch.empty_like(norm_weight) if dx is not None and norm_weight is not None else total.new_empty(0)
    _weight_gradients[(cdiv(dim, SHARE_COLUMNS), 2)](
        dweights, dquery, dnorm_weight, programs, dim, INTER=inter is not None, NORM=dx is not None, BLOCK_S=SHARES,
        BLOCK_D=SHARE_COLUMNS, ACC=accumulator(total), num_warps=4,
    )  # fmt: skip
    return dtotal, dinter, dlse, dquery, dnorm_weight


@torch.library.register_fake(update_read_backward)
def _(total, inter, lse, query, norm_weight, stats, dtotal_in, dx, dmix):
    here = inter is not None
    return (
        torch.empty_like(total),
        torch.empty_like(total) if here else total.new_empty(0),
        stats.new_empty(lse.shape if here else 0),
        torch.empty_like(query) if here else total.new_empty(0),
        torch.empty_like(norm_weight) if dx is not None else total.new_empty(0),
    )


class _Update(torch.autograd.Function):
    """b' (f itself, without a partial sum), and what there is of x and h.

    f passes through as b', so that the gradient of its later use meets the others in the kernel and not in autograd.
    """

    @staticmethod
    def forward(
        ctx: Any, partial: Tensor | None, output: Tensor, inter: Tensor | None, lse: Tensor | None, query: Tensor | None,
        norm_weight: Tensor | None, eps: float, norm_eps: float, return_mix: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        *found, stats = update_read_op(partial, output, inter, lse, query, norm_weight, eps, norm_eps, return_mix)
        total, *rest = found if partial is not None else (output, *found)
        ctx.parts = (partial is not None, norm_weight is not None, return_mix)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, inter, lse, query, norm_weight, stats)
        return (total, *rest)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        total, inter, lse, query, norm_weight, stats = ctx.saved_tensors
        is_sum, is_normed, is_mixed = ctx.parts
        dtotal_in, *rest = (None if grad is None else grad.contiguous() for grad in grads)
        dx = rest[0] if is_normed else None
        dmix = rest[-1] if is_mixed else None
        if dx is None and dmix is None:
            return dtotal_in if is_sum else None, dtotal_in, *(None for _ in range(7))
        dtotal, dinter, dlse, dquery, dnorm_weight = update_read_backward(
            total, inter, lse, query, norm_weight, stats, dtotal_in, dx, dmix
        )
        here = inter is not None
        return (
            dtotal if is_sum else None, dtotal, dinter if here else None, dlse if here else None,
            dquery if here else None, dnorm_weight if dx is not None else None, None, None, None,
        )  # fmt: skip


def update_read(
    partial: Tensor | None, output: Tensor, inter: Tensor | None, lse: Tensor | None, query: Tensor | None,
    norm_weight: Tensor | None, eps: float, norm_eps: float, return_mix: bool,
) -> list[Tensor]:  # fmt: skip
    """The equations at the top for contiguous [..., D]: b', then x (with ``norm_weight``) and h (with ``return_mix``)."""
    return list(
        _Update.apply(partial, output, inter, lse, query, norm_weight, eps, norm_eps, return_mix)
    )  # fmt: skip
