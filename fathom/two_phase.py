"""The two-phase schedule: the same reads, with each block's sources swept once (arXiv 2603.15031, Algorithm 1).

A block's queries are parameters, so all are known when the block starts. Phase 1 attends over the sources that are
complete by then, for all S queries at once, and keeps the log of each softmax's denominator:

    out_s = Σ_n e^(s_n - lse_s) v_n          lse_s = log Σ_n e^(s_n)             for every query s of the block

Phase 2, at each read, merges that with the sources that came later. Two normalised partial softmaxes a and b
merge exactly by the share of the total mass that each holds:

    h = (e^(lse_a) out_a + e^(lse_b) out_b) / (e^(lse_a) + e^(lse_b)) = lerp(out_a, out_b, sigmoid(lse_b - lse_a))

A single source is its own partial softmax: out = v and lse = its score. Nothing here is an approximation.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from fathom.depth_attention import EPS, check_sources, compute_dtype, fold_gain, full_precision, key_scores


def inter_block(
    sources: Sequence[Float[Tensor, "*batch D"]],
    queries: Float[Tensor, "S D"],
    gain: Float[Tensor, "S D"] | None = None,
    *,
    eps: float = EPS,
    scale: float = 1.0,
    normalize_values: bool = False,
) -> tuple[Float[Tensor, "S *batch D"], Float[Tensor, "S *batch"]]:
    """Phase 1: S reads of the same N sources in one sweep: their scores, then the mixes.

    Returns ``(out, lse)``; ``out`` keeps the sources' dtype, ``lse`` is float32 or float64. ``scale`` multiplies the scores;
    with ``normalize_values`` the values are RMS-normalised like the keys, without the gain (both are Inkling-2's).
    """
    check_sources(sources, queries.shape[-1])
    dtype = compute_dtype(sources[0])
    folded = fold_gain(queries, gain)
    scores = [score(source, folded, eps=eps, scale=scale) for source in sources]
    if not normalize_values:
        return mix(sources, scores)
    values = [source.to(dtype) for source in sources]
    out, lse = mix([v * (v.square().mean(-1, keepdim=True) + eps).rsqrt() for v in values], scores)
    return out.to(sources[0].dtype), lse


def score(
    source: Float[Tensor, "*batch D"], queries: Float[Tensor, "K D"], *, eps: float = EPS, scale: float = 1.0
) -> Float[Tensor, "K *batch"]:
    """The scores of one source for K queries, key gain folded in: all that later reads need to know to weigh it."""
    dtype = compute_dtype(source)
    return scale * key_scores(source.to(dtype), queries.to(dtype), eps).movedim(-1, 0)


def mix(
    sources: Sequence[Float[Tensor, "*batch D"]], scores: Sequence[Float[Tensor, "S *batch"]]
) -> tuple[Float[Tensor, "S *batch D"], Float[Tensor, "S *batch"]]:
    """S reads of N sources by their scores, ``out`` in the sources' dtype, and ``lse``."""
    known = torch.stack(list(scores), dim=-1)
    lse = known.logsumexp(-1)
    weights = (known - lse.unsqueeze(-1)).exp().movedim(0, -2)
    values = torch.stack([source.to(weights.dtype) for source in sources], dim=-2)
    with full_precision(values):
        # Token-major inside, so that one batched product over tokens does it.
        out = (weights @ values).to(sources[0].dtype)
    return out.movedim(-2, 0), lse


def as_partial(
    source: Float[Tensor, "*batch D"],
    query: Float[Tensor, "D"],
    gain: Float[Tensor, "D"] | None = None,
    *,
    eps: float = EPS,
) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch"]]:
    """One source as a partial softmax of its own: itself, and its score as the lse."""
    dtype = compute_dtype(source)
    return source, key_scores(source.to(dtype), fold_gain(query, gain)[None].to(dtype), eps)[..., 0]


def merge(
    out_a: Float[Tensor, "*batch D"],
    lse_a: Float[Tensor, "*batch"],
    out_b: Float[Tensor, "*batch D"],
    lse_b: Float[Tensor, "*batch"],
) -> Float[Tensor, "*batch D"]:
    """Phase 2: the read over the union of two disjoint sets of sources, in ``out_a``'s dtype."""
    share = torch.sigmoid(lse_b - lse_a).unsqueeze(-1)
    return torch.lerp(out_a.to(share.dtype), out_b.to(share.dtype), share).to(out_a.dtype)


def update_read(
    partial: Float[Tensor, "*batch D"] | None,
    output: Float[Tensor, "*batch D"],
    inter_out: Float[Tensor, "*batch D"] | None,
    inter_lse: Float[Tensor, "*batch"] | None,
    query: Float[Tensor, "D"] | None,
    gain: Float[Tensor, "D"] | None = None,
    norm_weight: Float[Tensor, "D"] | None = None,
    *,
    eps: float = EPS,
    norm_eps: float = EPS,
) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "*batch D"], Float[Tensor, "*batch D"]]:
    """What happens between two sublayers: ``output`` joins the partial sum, phase 2 merges it in, the next norm is applied.

    Returns the partial sum, the normalised read and the read itself. Without ``partial`` the sum starts with ``output``; without
    ``inter_out`` the read is the sum alone, which is PreNorm; without ``norm_weight`` the read is returned as it is.
    """
    total = output if partial is None else partial + output
    mix = total
    if inter_out is not None:
        assert inter_lse is not None and query is not None
        mix = merge(inter_out, inter_lse, *as_partial(total, query, gain, eps=eps))
    return total, mix if norm_weight is None else rms_norm(mix, norm_weight, norm_eps), mix


def rms_norm(x: Float[Tensor, "*batch D"], weight: Float[Tensor, "D"], eps: float) -> Float[Tensor, "*batch D"]:
    """``weight ⊙ x / sqrt(mean(x²) + eps)`` over the last dim, in the dtype of ``x``."""
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)
