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
from jaxtyping import Float
from torch import Tensor

from fathom.depth_attention import EPS, check_sources, compute_dtype, fold_gain, full_precision, key_scores


def inter_block(
    sources: Sequence[Float[Tensor, "*batch D"]],
    queries: Float[Tensor, "S D"],
    gain: Float[Tensor, "S D"] | None = None,
    *,
    eps: float = EPS,
) -> tuple[Float[Tensor, "*batch S D"], Float[Tensor, "*batch S"]]:
    """Phase 1: S reads of the same N sources in one sweep.

    Returns ``(out, lse)``, token-major so that one batched product over tokens does each of the two contractions;
    read s is ``out[..., s, :], lse[..., s]``. ``out`` keeps the sources' dtype, ``lse`` is float32 or float64.
    """
    check_sources(sources, queries.shape[-1])
    dtype = compute_dtype(sources[0])
    values = torch.stack([source.to(dtype) for source in sources], dim=-2)
    scores = key_scores(values, fold_gain(queries, gain).to(dtype), eps)
    lse = scores.logsumexp(-2)
    weights = (scores - lse.unsqueeze(-2)).exp()
    with full_precision(values):
        return (weights.mT @ values).to(sources[0].dtype), lse


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
