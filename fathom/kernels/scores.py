"""The scores of a finished source for every read that is still to come, and what they give back to it.

    v = b + f (where a block ends)          r = 1 / sqrt(mean(v²) + eps)          s_k = scale · r (q_k · v)

A source is read for its scores once: in the kernel that ends its block or, where others made it, with all such sources at once,
as a stage of a pipeline begins. Backward, one sweep too, once all that later reads have to say of v and of its scores is there,
c_k = scale · r ds_k:

    dv = dv_given + Σ_k c_k q_k − v (r² Σ_k ds_k s_k + r³ dr) / D          dq_k = Σ_tokens c_k v          db = df = dv

All sums over D and over tokens are matrix products of small tiles. A float32 factor of a bfloat16 tile is a sum of bfloat16
*terms*, made beforehand: three keep float32's precision, two are enough where the product is rounded to bfloat16, one where the
factor is bfloat16 itself. The query gradient is summed in a fixed order: each program sums its share of the tokens, then the
shares are added.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.depth_attention import compute_dtype
from fathom.kernels.operators import operator
from fathom.kernels.tiles import (
    accumulator,
    cdiv,
    is_aligned,
    on_their_device,
    padded,
    pick,
    pick_stride,
    pointers,
    power_of_two,
    present,
    rsqrt,
    size_of,
    statistic,
    strides_of,
)

SCORE_TOKENS, SCORE_COLUMNS, SCORE_WARPS = 64, 128, 4
"""Tile of a source in ``_scores``, and the warps that share it."""
MOST_QUERIES, MOST_QUERIES_WIDE = 64, 16
"""Queries of one product, of bfloat16 terms and of wider ones; more take several. One of 64 rows, be they zeros, is the tensor
cores' own, and faster than one of fewer: but for the gradients of up to 16 queries."""
COEFFICIENT_TOKENS = 128
"""Tokens of one program of ``_coefficients``."""
GRADIENT_TOKENS, GRADIENT_COLUMNS, GRADIENT_WARPS, GRADIENT_PROGRAMS, GRADIENT_TURNS = 64, 64, 4, 256, 4
"""Tokens and columns of one step of ``_gradients``, its warps, for how many programs all tokens are cut into shares, and of
several sources at most how many times as many."""
GRADIENT_STAGES = 3
"""Steps whose loads are all on the way, of two terms; three take so much shared memory that many queries lose by it."""


@triton.jit
def _terms(wide, terms, size, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """``wide`` as a sum of COUNT bfloat16 tensors."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rest = tl.load(wide + at, at < size, other=0).to(tl.float32)
    for i in tl.static_range(COUNT):
        term = rest.to(tl.bfloat16)
        tl.store(terms + i * size + at, term, at < size)
        rest -= term.to(tl.float32)


@triton.jit
def _dot(a, b, total, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """``total + a @ b``, of two bfloat16 tiles under ``SPLIT``, else in the dtype and the precision of ``total``."""
    if SPLIT:
        return tl.dot(a, b, total)
    return total + tl.dot(a.to(total.dtype), b.to(total.dtype), input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit(do_not_specialize=["num_queries"])
def _scores(
    sources, strides, partial, total, queries, scores, rstds, num_tokens, num_queries, dim, eps, scale,
    PARTIAL: tl.constexpr, N: tl.constexpr, K_PAD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
    TERMS: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [K, tokens] and reciprocal norms [tokens] of source ``program_id(1)``, which is summed first if ``PARTIAL``."""
    element: tl.constexpr = sources[0].dtype.element_ty
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1)
    is_first = tl.program_id(2) == 0
    k, d = tl.program_id(2) * K_PAD + tl.arange(0, K_PAD), tl.arange(0, BLOCK_D)
    here, asked = t < num_tokens, k < num_queries
    source = pick(sources, n, N, ALIGNED)[:, None] + t[:, None] * pick_stride(strides, n)
    dots = tl.zeros([K_PAD, BLOCK_T], ACC)
    square = tl.zeros([BLOCK_T], ACC)
    for start in range(0, dim, BLOCK_D):
        column = start + d
        mask = here[:, None] & (column < dim)[None, :]
        v = tl.load(source + column[None, :], mask, other=0)
        if PARTIAL:
            at = t[:, None] * dim + column[None, :]
            v = (v.to(ACC) + tl.load(partial + at, mask, other=0).to(ACC)).to(element)
            tl.store(total + at, v, mask & is_first)
        # Each step's product apart: tensor cores add a long chain with less than float32's precision, and Triton 3.6 runs a chain
        # ahead of the loads that refill its tiles. The factor keeps the compiler from making one of the sum.
        step = tl.zeros([K_PAD, BLOCK_T], ACC)
        for i in tl.static_range(TERMS):
            row = ((TERMS - 1 - i) * num_queries + k)[:, None] * dim  # the smallest first
            q = tl.load(queries + row + column[None, :], asked[:, None] & (column < dim)[None, :], other=0)
            step = _dot(q, tl.trans(v), step, SPLIT, PRECISION)
        dots += step * scale
        square += tl.sum(v.to(ACC) * v.to(ACC), 1)
    r = rsqrt(tl.where(here, square / dim + eps, 1.0))
    tl.store(pick(rstds, n, N, False) + t, r, here & is_first)
    at = k[:, None].to(tl.int64) * num_tokens + t[None, :]
    tl.store(pick(scores, n, N, False)[:, None] + at, dots * r[None, :], asked[:, None] & here[None, :])


@triton.jit(do_not_specialize=["num_queries"])
def _coefficients(
    scores, rstds, dscores, drstds, terms, own, num_tokens, num_queries, dim,
    N: tl.constexpr, K_PAD: tl.constexpr, COUNT: tl.constexpr, BLOCK_T: tl.constexpr, DRSTD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """c / scale of source ``program_id(1)`` as COUNT terms [N, COUNT, K, tokens], and the factor of v in dv, [N, tokens]."""
    element: tl.constexpr = terms.dtype.element_ty
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    n = tl.program_id(1)
    here = t < num_tokens
    r = tl.load(pick(rstds, n, N, False) + t, here, other=0)
    shrink = tl.zeros([BLOCK_T], ACC)
    if DRSTD:
        shrink += tl.load(pick(drstds, n, N, False) + t, here, other=0) * r
    for start in range(0, num_queries, K_PAD):
        k = start + tl.arange(0, K_PAD)
        at, live = k[:, None].to(tl.int64) * num_tokens + t[None, :], (k < num_queries)[:, None] & here[None, :]
        ds = tl.load(pick(dscores, n, N, False)[:, None] + at, live, other=0)
        shrink += tl.sum(ds * tl.load(pick(scores, n, N, False)[:, None] + at, live, other=0), 0)
        rest = ds * r[None, :]
        for i in tl.static_range(COUNT):
            term = rest.to(element)
            tl.store(terms + (n * COUNT + i).to(tl.int64) * num_queries * num_tokens + at, term, live)
            rest -= term.to(ACC)
    tl.store(own + n.to(tl.int64) * num_tokens + t, shrink * r * r / dim, here)


@triton.jit(do_not_specialize=["num_queries", "first"])
def _gradients(
    sources, strides, given, queries, terms, own, dsources, dqueries, first, num_tokens, num_queries, dim,
    tokens_each, scale, GIVEN: tl.constexpr, OWN: tl.constexpr, N: tl.constexpr, K_PAD: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, TERMS: tl.constexpr, COUNT: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One chunk of columns of ``tokens_each`` tokens of one source: its gradient, and a share of that of the queries."""
    element: tl.constexpr = dsources[0].dtype.element_ty
    share, n = tl.program_id(1), tl.program_id(2) if N > 1 else 0
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    k = first + tl.arange(0, K_PAD)
    asked, inside = k < num_queries, d < dim
    kept = asked[:, None] & inside[None, :]
    total = tl.zeros([K_PAD, BLOCK_D], ACC)
    q = tl.load(queries + k[:, None] * dim + d[None, :], kept, other=0)
    if TERMS > 1:
        q_rest = tl.load(queries + (num_queries + k)[:, None] * dim + d[None, :], kept, other=0)
    source, stride = pick(sources, n, N, ALIGNED)[:, None] + d[None, :], pick_stride(strides, n)
    target = pick(dsources, n, N, ALIGNED)[:, None] + d[None, :]
    if GIVEN:
        before = pick(given, n, N, ALIGNED)[:, None] + d[None, :]
    begin = share.to(tl.int64) * tokens_each
    for start in tl.range(0, tokens_each, BLOCK_T, num_stages=STAGES):
        t = begin + start + tl.arange(0, BLOCK_T)
        here = t < num_tokens
        mask, live = here[:, None] & inside[None, :], asked[:, None] & here[None, :]
        v = tl.load(source + t[:, None] * stride, mask, other=0)
        if GIVEN:
            so_far = tl.load(before + t[:, None] * dim, mask, other=0)
        dv = tl.zeros([BLOCK_T, BLOCK_D], ACC)
        step = tl.zeros([K_PAD, BLOCK_D], ACC)
        for i in tl.static_range(COUNT):  # the smallest first
            row = ((n * COUNT + COUNT - 1 - i) * num_queries + k)[:, None].to(tl.int64) * num_tokens
            c = tl.load(terms + row + t[None, :], live, other=0)
            step = _dot(c, v, step, SPLIT, PRECISION)
            if i >= COUNT - 2:
                dv = _dot(tl.trans(c), q, dv, SPLIT, PRECISION)
            if i == COUNT - 1 and TERMS > 1:
                dv = _dot(tl.trans(c), q_rest, dv, SPLIT, PRECISION)
        total += step * scale  # apart, as in ``_scores``
        dv *= scale
        if OWN:
            dv -= tl.load(own + n * num_tokens + t, here, other=0)[:, None] * v.to(ACC)
        if GIVEN:
            dv += so_far.to(ACC)
        tl.store(target + t[:, None] * dim, dv.to(element), mask)
    part = n * tl.num_programs(1) + share
    out = dqueries + (part * num_queries + k)[:, None].to(tl.int64) * dim + d[None, :]
    tl.store(out, total, kept)


def _products(first: Tensor, queries: Tensor) -> dict[str, Any]:
    """How matrix products are computed: in bfloat16 terms, or in the precision that the dtype needs."""
    # The interpreter's bfloat16 arithmetic is wrong, so there bfloat16 is not split.
    split = first.dtype == torch.bfloat16 and first.device.type == "cuda"
    return {
        "SPLIT": split, "PRECISION": "tf32x3" if first.dtype in (torch.float16, torch.bfloat16) else "ieee",
        "TERMS": 3 if split and queries.dtype != torch.bfloat16 else 1, "ACC": accumulator(first),
    }  # fmt: skip


def _query_terms(queries: Tensor, products: dict[str, Any]) -> Tensor:
    """[terms, K, D]."""
    if products["TERMS"] == 1:
        return queries if products["SPLIT"] else queries.to(compute_dtype(queries))
    terms = queries.new_empty(products["TERMS"], *queries.shape, dtype=torch.bfloat16)
    _terms[(cdiv(queries.numel(), 1024),)](queries, terms, queries.numel(), COUNT=products["TERMS"], BLOCK=1024)
    return terms


def _query_tile(num_queries: int, products: dict[str, Any], fewest_padded: int) -> int:
    """Rows of a product over queries: all there can be from ``fewest_padded`` queries on, where those are terms."""
    most = MOST_QUERIES if products["SPLIT"] else MOST_QUERIES_WIDE
    return most if num_queries >= fewest_padded else power_of_two(num_queries, 16)


@on_their_device
def scores_of(
    sources: list[Tensor], queries: Tensor, eps: float, scale: float, partial: Tensor | None = None
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Launch ``_scores``: the sum (with ``partial``, of a single source), scores [K, ...] and reciprocal norms [...]."""
    first, num_queries, num_sources = sources[0], len(queries), len(sources)
    (num_tokens, dim), batch = size_of(first), first.shape[:-1]
    total = first.new_empty(first.shape) if partial is not None else None
    scores = [statistic(first, num_queries, *batch) for _ in sources]
    rstds = [statistic(first, *batch) for _ in sources]
    products = _products(first, queries)
    block_k = _query_tile(num_queries, products, 1)
    # What is on the way to a multiprocessor, rows and queries, must fit its shared memory.
    columns = SCORE_COLUMNS if products["SPLIT"] and block_k * products["TERMS"] < 128 else min(SCORE_COLUMNS, 64)
    _scores[(cdiv(num_tokens, SCORE_TOKENS), num_sources, cdiv(num_queries, block_k))](
        pointers(sources), strides_of(sources), partial, total, _query_terms(queries, products), pointers(scores),
        pointers(rstds), num_tokens, num_queries, dim, eps, scale, PARTIAL=partial is not None, N=padded(num_sources),
        K_PAD=block_k, BLOCK_T=SCORE_TOKENS, BLOCK_D=min(columns, power_of_two(dim, 16)), ALIGNED=is_aligned(*sources),
        num_warps=SCORE_WARPS, **products,
    )  # fmt: skip
    return total, scores, rstds


@on_their_device
def gradients_of(
    sources: list[Tensor], queries: Tensor, scores: list[Tensor], rstds: list[Tensor], dscores: list[Tensor],
    drstds: list[Tensor], given: list[Tensor] | None, dsources: list[Tensor], scale: float,
) -> Tensor:  # fmt: skip
    """Launch ``_gradients``: write those of the sources, with ``given`` added; return that of the queries [K, D]."""
    first, num_queries, num_sources = sources[0], len(queries), len(sources)
    num_tokens, dim = size_of(first)
    products = _products(first, queries)
    count = 1 if not products["SPLIT"] else 3 if products["TERMS"] > 1 else 2
    kind = torch.bfloat16 if products["SPLIT"] else compute_dtype(first)
    terms = first.new_empty(num_sources, count, num_queries, num_tokens, dtype=kind)
    own = statistic(first, num_sources, num_tokens)
    _coefficients[(cdiv(num_tokens, COEFFICIENT_TOKENS), num_sources)](
        pointers(scores), pointers(rstds), pointers(dscores), pointers(drstds or None), terms, own, num_tokens, num_queries,
        dim, N=padded(num_sources), K_PAD=16, COUNT=count, BLOCK_T=COEFFICIENT_TOKENS, DRSTD=bool(drstds),
        ACC=products["ACC"],
    )  # fmt: skip
    block_d = min(GRADIENT_COLUMNS, power_of_two(dim, 16))
    programs = GRADIENT_PROGRAMS * min(num_sources, GRADIENT_TURNS) // (num_sources * cdiv(dim, block_d))
    num_shares = max(1, min(cdiv(num_tokens, GRADIENT_TOKENS), programs))
    tokens_each = cdiv(cdiv(num_tokens, num_shares), GRADIENT_TOKENS) * GRADIENT_TOKENS
    dqueries = statistic(first, num_sources * num_shares, num_queries, dim)
    block_k, query_terms = _query_tile(num_queries, products, 17), _query_terms(queries, products)
    # Several chunks of queries add to a source's gradient one after the other; only the whole is rounded.
    is_one = num_queries <= block_k
    found = dsources if is_one else [statistic(first, *each.shape) for each in dsources]
    for start in range(0, num_queries, block_k):
        so_far = given if start == 0 else found
        _gradients[(cdiv(dim, block_d), num_shares, num_sources)](
            pointers(sources), strides_of(sources), pointers(so_far), query_terms, terms, own, pointers(found), dqueries, start,
            num_tokens, num_queries, dim, tokens_each, scale, GIVEN=so_far is not None, OWN=start == 0,
            N=padded(num_sources), K_PAD=block_k, BLOCK_T=GRADIENT_TOKENS, BLOCK_D=block_d, COUNT=count,
            STAGES=GRADIENT_STAGES if count == 2 else None, ALIGNED=is_aligned(*sources, *found, *(given or ())),
            num_warps=GRADIENT_WARPS, **products,
        )  # fmt: skip
    if not is_one:
        for target, wide in zip(dsources, found, strict=True):
            target.copy_(wide)
    return dqueries.sum(0)


@operator("score")
def score_op(
    partial: Tensor | None, sources: list[Tensor], queries: Tensor, eps: float, scale: float
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The sum of a block and its last output [..., D] (with ``partial`` and a single source, else nothing), then of each
    source the scores [K, ...] by folded queries [K, D] and the reciprocal norms [...]."""
    total, scores, rstds = scores_of(sources, queries, eps, scale, partial)
    return [] if total is None else [total], scores, rstds


@torch.library.register_fake(score_op)
def _(partial, sources, queries, eps, scale):
    first, batch = sources[0], sources[0].shape[:-1]
    return (
        [] if partial is None else [first.new_empty(first.shape)],
        [statistic(first, queries.shape[0], *batch) for _ in sources],
        [statistic(first, *batch) for _ in sources],
    )


@operator("score_backward")
def score_backward(
    sources: list[Tensor], queries: Tensor, scores: list[Tensor], rstds: list[Tensor], dscores: list[Tensor],
    passed: list[Tensor], scale: float,
) -> tuple[list[Tensor], Tensor]:  # fmt: skip
    """Gradients of the sources [..., D], ``passed`` (or nothing: an empty list) added, and of the queries [K, D]."""
    found = [source.new_empty(source.shape) for source in sources]
    return found, gradients_of(sources, queries, scores, rstds, dscores, [], passed or None, found, scale)


@torch.library.register_fake(score_backward)
def _(sources, queries, scores, rstds, dscores, passed, scale):
    return [source.new_empty(source.shape) for source in sources], scores[0].new_empty(queries.shape)


class _Score(torch.autograd.Function):
    """N sources, or ``partial`` and the only one, to the N sources again, or the sum, and their N scores."""

    @staticmethod
    def forward(
        ctx: Any, partial: Tensor | None, queries: Tensor, eps: float, scale: float, *sources: Tensor
    ) -> tuple[Tensor, ...]:
        total, scores, rstds = score_op(partial, list(sources), queries, eps, scale)
        finished = total or sources
        ctx.count, ctx.is_sum, ctx.scale = len(sources), partial is not None, scale
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(queries, *finished, *scores, *rstds)
        return (*finished, *scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        queries, *rest = ctx.saved_tensors
        n, dqueries = ctx.count, None
        sources, scores, rstds = rest[:n], rest[n : 2 * n], rest[2 * n :]
        dsources, dscores = grads[:n], grads[n:]
        if any(grad is not None for grad in dscores):
            passed = [] if all(grad is None for grad in dsources) else present(dsources, sources[0])
            given = present(dscores, scores[0])
            dsources, dqueries = score_backward(sources, queries, scores, rstds, given, passed, ctx.scale)
            dqueries = dqueries.to(queries.dtype)
        return dsources[0] if ctx.is_sum else None, dqueries, None, None, *dsources


def score(
    partial: Tensor | None, sources: Sequence[Tensor], queries: Tensor, eps: float, scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    """N sources, rows each, or ``partial`` and the only one added, and their N scores [K, ...] by folded queries [K, D].

    The sources come back for their reads: what those add to the gradient, this backward pass takes up.
    """
    found = list(_Score.apply(partial, queries, eps, scale, *sources))
    return found[: len(sources)], found[len(sources) :]
