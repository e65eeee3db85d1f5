"""Attention over depth: the one equation everything else computes (Attention Residuals, arXiv 2603.15031, Eq. 2-4).

    s_i = q · RMSNorm(v_i)          RMSNorm(v) = gain ⊙ v / sqrt(mean(v²) + eps)
    α   = softmax_i(s_i)
    h   = Σ_i α_i v_i

v_i     a *source*: an earlier sublayer's output, or a block's sum of them           [..., D]
q       the *query*: learned, one per *site* (a place where the network reads)        [D]
gain    the key norm's learned weight, or None for a plain RMSNorm                    [D]

Keys are normalised so that a loud source does not win by loudness; values are not. There is no scale, no head,
no projection and no bias. Scores and the mix are computed in float32 at least (in float64 for float64 sources)
and rounded once, on return. This file is the reference that every kernel and every schedule must equal.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

from fathom.errors import UserError

EPS = 1e-6


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype scores and mixes are computed in: float32, or float64 for float64 sources."""
    return torch.promote_types(tensor.dtype, torch.float32)


def full_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Autocast switched off: it would round both factors of a matrix product to bf16, whatever ``compute_dtype`` says."""
    if tensor.is_meta:  # which has no autocast
        return nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)


def key_scores(
    source: Float[Tensor, "*batch D"], queries: Float[Tensor, "S D"], eps: float
) -> Float[Tensor, "*batch S"]:
    """``s = q · v / rms(v)`` of one source for S queries whose key gain is already folded in.

    The norm is a scalar per token, so it is applied to the score and never to the [..., D] key.
    """
    # vector_norm, not square().mean(): its backward pass writes one [..., D] tensor where that one writes three.
    mean_square = torch.linalg.vector_norm(source, dim=-1, keepdim=True).square() / source.shape[-1]
    with full_precision(source):
        return (source @ queries.mT) * (mean_square + eps).rsqrt()


def fold_gain(query: Float[Tensor, "*S D"], gain: Float[Tensor, "*S D"] | None) -> Float[Tensor, "*S D"]:
    """``q · (gain ⊙ k) = (q ⊙ gain) · k``: the key gain belongs to the query as far as the forward pass can tell."""
    return query if gain is None else query * gain


def check_sources(sources: Sequence[Tensor], dim: int) -> None:
    """Raise ``UserError`` unless ``sources`` is a non-empty sequence of tensors of one shape [..., D] and one dtype."""
    if not sources:
        raise UserError("sources is empty: a read needs at least the embedding to attend over")
    for index, source in enumerate(sources):
        if source.shape != sources[0].shape or source.dtype != sources[0].dtype:
            raise UserError(
                f"sources[{index}] is {tuple(source.shape)} {source.dtype}, but sources[0] is "
                f"{tuple(sources[0].shape)} {sources[0].dtype}: all sources of a read share shape and dtype"
            )
    if sources[0].shape[-1] != dim:
        raise UserError(f"query has width {dim}, but the sources have width {sources[0].shape[-1]}")


def depth_attention_weights(
    sources: Sequence[Float[Tensor, "*batch D"]],
    query: Float[Tensor, "D"],
    gain: Float[Tensor, "D"] | None = None,
    *,
    eps: float = EPS,
) -> Float[Tensor, "N *batch"]:
    """The mixing weights α of one read (Eq. 2): [N, ...], summing to one over the N sources."""
    check_sources(sources, query.shape[-1])
    dtype = compute_dtype(sources[0])
    folded = fold_gain(query, gain).to(dtype)
    scores = [key_scores(source.to(dtype), folded[None], eps)[..., 0] for source in sources]
    return torch.stack(scores).softmax(0)


def depth_attention(
    sources: Sequence[Float[Tensor, "*batch D"]],
    query: Float[Tensor, "D"],
    gain: Float[Tensor, "D"] | None = None,
    *,
    eps: float = EPS,
) -> Float[Tensor, "*batch D"]:
    """One read: the sources mixed by ``depth_attention_weights`` (Eq. 4), in the sources' dtype.

    Raises ``UserError`` (a ``ValueError``) if there is no source, or if shapes or dtypes differ.
    """
    weights = depth_attention_weights(sources, query, gain, eps=eps)
    mixed = torch.zeros_like(sources[0], dtype=weights.dtype)
    for weight, source in zip(weights, sources, strict=True):
        mixed = torch.addcmul(mixed, weight.unsqueeze(-1), source.to(weight.dtype))
    return mixed.to(sources[0].dtype)
