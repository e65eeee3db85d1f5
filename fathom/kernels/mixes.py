"""Reads over the same sources in one sweep, from scores that are known; mix_gradients.py has the way back.

    m_s = max_n s_sn          e_sn = exp(s_sn − m_s)          z_s = Σ_n e_sn
    p_sn = e_sn / z_s         out_s = Σ_n p_sn v_n            lse_s = m_s + log z_s

Saved for the backward pass: the sources, their scores, m and z; neither p nor out. Nor is lse used there: it is rounded at its
own size, which for many sources is an error of all the weights of a read at once. With ``NORMALIZE`` the values are v_n r_n
(Inkling-2).

Every row is read once: a program holds its columns of all sources of one token, and makes the reads one after the other. Many
sources are taken by groups, and then it holds its columns of all reads.

The reads of a block pass the sources on to the reads after them, and with the sources their gradient: ``mix`` returns them,
and its backward pass adds to the gradient that comes back, instead of leaving an addition for each block to autograd.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.kernels.mix_gradients import are_few, mixed_backward
from fathom.kernels.operators import operator
from fathom.kernels.tiles import (
    GROUP,
    accumulator,
    cdiv,
    is_aligned,
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
    size_of,
    strides_of,
)

Mixed = tuple[list[Tensor], Tensor, Tensor]
"""S reads [..., D], their lse [S, ...], and m and z of each [S, ..., 2]."""
MIX_COLUMNS, MIX_WEIGHTS = 1024, 32
"""Most columns of a program of ``_mix``, and most weights that it knows before it stores a read."""
WIDE, NARROW, WIDE_SOURCES = 512, 256, 6
"""Columns of a warp of it: 16 of each thread up to so many sources, else 8."""


@triton.jit
def _mix(
    sources, strides, scores, rstds, outs, lse, softmax, num_tokens, dim,
    N: tl.constexpr, S: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_D: tl.constexpr, NORMALIZE: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Some columns of one token over few sources: its reads, their lse, and m and z [S, tokens, 2]."""
    element: tl.constexpr = sources[0].dtype.element_ty
    t = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < dim
    rows, factors = nothing(), nothing()
    for n in tl.static_range(N):
        row = pick(sources, n, N, ALIGNED) + t * pick_stride(strides, n)
        rows += (tl.load(row + column, inside, other=0).to(ACC),)
        if NORMALIZE:
            factors += (tl.load(rstds[n] + t),)
    # No load can pass a store, so the scores of several reads all come before their first.
    for first in tl.static_range(0, S, AT_ONCE):
        weights, tops, totals = nothing(), nothing(), nothing()
        for s in tl.static_range(first, first + AT_ONCE if first + AT_ONCE < S else S):
            known, top = nothing(), tl.full([], float("-inf"), ACC)
            for n in tl.static_range(N):
                known += (tl.load(scores[n] + s * num_tokens + t),)
                top = tl.maximum(top, known[n])
            total = tl.full([], 0, ACC)
            for n in tl.static_range(N):
                weights += (tl.exp(known[n] - top),)
                total += weights[(s - first) * N + n]
            tops += (top,)
            totals += (total,)
        for s in tl.static_range(first, first + AT_ONCE if first + AT_ONCE < S else S):
            at, top, total = s * num_tokens + t, tops[s - first], totals[s - first]
            mix = tl.zeros([BLOCK_D], ACC)
            for n in tl.static_range(N):
                weight = weights[(s - first) * N + n]
                if NORMALIZE:
                    weight *= factors[n]
                mix += weight * rows[n]
            if tl.program_id(1) == 0:
                tl.store(lse + at, top + tl.log(total))
                tl.store(softmax + 2 * at, top)
                tl.store(softmax + 2 * at + 1, total)
            out = pick(outs, s, S, ALIGNED) + t * dim
            tl.store(out + column, (mix * (1 / total)).to(element), inside)


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


def _mix_columns(dim: int, num_sources: int) -> tuple[int, int]:
    """Columns of one program of ``_mix``, as many as add little to the width, and its warps."""
    wide = min((MIX_COLUMNS, WIDE, NARROW), key=lambda columns: cdiv(dim, columns) * columns)
    columns = min(wide, power_of_two(dim, 16))
    return columns, max(1, columns // (WIDE if num_sources <= WIDE_SOURCES else NARROW))


@on_their_device
def mixed(sources: list[Tensor], scores: list[Tensor], rstds: list[Tensor] | None) -> Mixed:
    """Launch ``_mix``, or ``_mix_many``."""
    first, num_reads, num_sources = sources[0], len(scores[0]), len(sources)
    num_tokens, dim = size_of(first)
    outs = [first.new_empty(first.shape) for _ in range(num_reads)]
    lse, softmax = torch.empty_like(scores[0]), scores[0].new_empty(*scores[0].shape, 2)
    fixed = {
        "S": num_reads, "NORMALIZE": rstds is not None, "ALIGNED": is_aligned(*sources, *outs), "ACC": accumulator(first),
    }  # fmt: skip
    if are_few(num_sources, num_reads):
        block_d, num_warps = _mix_columns(dim, num_sources)
        _mix[(num_tokens, cdiv(dim, block_d))](
            tuple(sources), strides_of(sources), tuple(scores), rstds and tuple(rstds), tuple(outs), lse, softmax, num_tokens,
            dim, N=num_sources, AT_ONCE=max(1, MIX_WEIGHTS // num_sources), BLOCK_D=block_d, num_warps=num_warps, **fixed,
        )  # fmt: skip
    else:
        block_d = min(WIDE if num_reads == 1 else NARROW, power_of_two(dim, 16))
        _mix_many[(num_tokens, cdiv(dim, block_d))](
            pointers(sources), strides_of(sources), pointers(scores), pointers(rstds), tuple(outs), lse, softmax, num_sources,
            num_tokens, dim, N=padded(num_sources), BLOCK_D=block_d, num_warps=1, **fixed,
        )  # fmt: skip
    return outs, lse, softmax


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
