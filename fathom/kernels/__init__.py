"""The operations of the residual path, each with two backends, and the one place that chooses between them.

    score         the sum that ends a block, and its scores for all later reads       two_phase.py | scores.py
    score_bank    the scores of finished sources, of which nothing is known           two_phase.py | scores.py
    mix           every read of a block over its finished sources, from their scores  two_phase.py | mixes.py, mix_gradients.py
    turn          ``score``, then ``mix``, where a block ends and the next begins     the two      | turns.py, for a few tokens
    update_read   residual add, intra-block merge and the next norm                   two_phase.py | update.py
    inter_block   ``mix`` of sources that have no scores yet                          two_phase.py | inter.py
    read          one site over all its sources                                       two_phase.py | inter.py

``reference`` is the plain equation in PyTorch, on any device and dtype. ``triton`` is the fused kernels: on a GPU, or anywhere in
Triton's interpreter (``TRITON_INTERPRET=1``). Unless ``use_backend`` or the environment's ``FATHOM_BACKEND`` says otherwise,
tensors on a CUDA device take the kernels and all others, float64 included, the reference.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fathom import two_phase
from fathom.depth_attention import EPS, compute_dtype, depth_attention_weights, fold_gain
from fathom.errors import UserError

Backend = Literal["auto", "reference", "triton"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "triton")

_chosen: Backend | None = None
_has_triton = importlib.util.find_spec("triton") is not None  # looked up here, because torch.compile cannot


def _asked() -> str:
    return _chosen or os.environ.get("FATHOM_BACKEND", "auto")


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Run the block with one backend, whatever the device; ``"auto"`` chooses by device."""
    global _chosen
    if name not in BACKENDS:
        raise UserError(f"backend is {name!r}: it must be one of {', '.join(BACKENDS)}")
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def backend_for(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> Literal["reference", "triton"]:
    """The backend that tensors of ``device`` and ``dtype`` are computed with; ``UserError`` if the one asked for is missing."""
    asked = _asked()
    if asked not in BACKENDS:
        raise UserError(f"FATHOM_BACKEND is {asked!r}: it must be one of {', '.join(BACKENDS)}")
    if asked == "triton":
        if not _has_triton:
            raise UserError("backend triton is asked for, but the package triton is not installed; pip install triton")
        # Meta tensors stand for a GPU's: the operations have their shapes.
        if torch.device(device).type not in ("cuda", "meta") and os.environ.get("TRITON_INTERPRET") != "1":
            where = torch.device(device).type
            raise UserError(f"backend triton is asked for on {where}: it needs a CUDA device, or TRITON_INTERPRET=1")
        return "triton"
    if asked == "auto" and _has_triton and torch.device(device).type == "cuda" and dtype != torch.float64:
        return "triton"
    return "reference"


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...], like: Tensor, *, dtype: bool = True) -> None:
    if tensor is None or (tensor.shape == shape and tensor.dtype == like.dtype and tensor.device == like.device):
        return
    if tensor.shape != shape:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}: it must have {tuple(shape)}")
    if tensor.device != like.device:
        raise UserError(f"{name} is on {tensor.device}, but the sources are on {like.device}")
    if not tensor.is_floating_point() or (dtype and tensor.dtype != like.dtype):
        raise UserError(f"{name} is {tensor.dtype}: it must be {like.dtype if dtype else 'a floating-point tensor'}")


def _check_sources(sources: Sequence[Tensor]) -> tuple[int, ...]:
    if len(sources) == 0:
        raise UserError("sources is empty: a read needs at least the embedding to attend over")
    if sources[0].ndim < 1 or not sources[0].is_floating_point():
        raise UserError(
            f"sources[0] is {tuple(sources[0].shape)} {sources[0].dtype}: a source is a floating-point [..., D]"
        )
    for index, source in enumerate(sources):
        _check(f"sources[{index}]", source, sources[0].shape, sources[0])
    return sources[0].shape


def _shaped(tensors: Sequence[Tensor], shape: Sequence[int]) -> list[Tensor]:
    """From or to [tokens, D], which sources that are not contiguous are taken as."""
    return [each if each.shape == shape else each.view(shape) for each in tensors]


def _whole(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def score(
    partial: Float[Tensor, "*batch D"] | None,
    output: Float[Tensor, "*batch D"],
    queries: Float[Tensor, "K D"],
    *,
    eps: float = EPS,
) -> tuple[Float[Tensor, "*batch D"], Float[Tensor, "K *batch"]]:
    """``partial + output`` (or ``output``), a finished source, and its scores for K queries, key gain folded in."""
    sources, scores = _score(partial, [output], queries, eps)
    return sources[0], scores[0]


def score_bank(
    bank: Sequence[Float[Tensor, "*batch D"]], queries: Float[Tensor, "K D"], *, eps: float = EPS
) -> tuple[Sequence[Float[Tensor, "*batch D"]], Sequence[Float[Tensor, "K *batch"]]]:
    """N finished sources, and of each its scores for K queries, key gain folded in; as ``score``, all at once.

    The sources come back for the reads, for the same reason as from ``mix``.
    """
    return _score(None, bank, queries, eps)


def _score(
    partial: Tensor | None, sources: Sequence[Tensor], queries: Tensor, eps: float
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The sources, or ``partial`` and the only one added, and their scores."""
    shape = _check_sources(sources)
    first = sources[0]
    _check("partial", partial, shape, first)
    if queries.ndim != 2 or queries.shape[0] < 1:
        raise UserError(f"queries has shape {tuple(queries.shape)}: it must be [K, D] with at least one read")
    _check("queries", queries, (queries.shape[0], shape[-1]), first, dtype=False)
    if backend_for(first.device, first.dtype) == "triton":
        from fathom.kernels import scores as kernel
        from fathom.kernels.tiles import as_rows

        rows = [as_rows(source) for source in sources]
        before = None if partial is None else _shaped([partial.contiguous()], rows[0].shape)[0]
        rows, scores = kernel.score(before, rows, queries.contiguous(), eps, 1.0)
        return _shaped(rows, shape), _shaped(scores, (len(queries), *shape[:-1]))
    if partial is not None:
        sources = [partial + first]
    return sources, [two_phase.score(source, queries, eps=eps) for source in sources]


def mix(
    sources: Sequence[Float[Tensor, "*batch D"]],
    scores: Sequence[Float[Tensor, "S *batch"]],
    *,
    norm_weight: Float[Tensor, "D"] | None = None,
    norm_eps: float = EPS,
) -> tuple[Sequence[Float[Tensor, "*batch D"]], Sequence[Float[Tensor, "*batch"]], Sequence[Float[Tensor, "*batch D"]]]:
    """S reads of N sources whose scores are known: ``(out, lse, sources)``, the first two as ``inter_block`` returns them.

    The sources come back for the reads after these. Whoever uses those, and not the ones that were given, has the gradient of
    each source pass through its reads one after the other, where adding to it costs less than autograd's additions.
    """
    shape = _check_sources(sources)
    first = sources[0]
    if len(scores) != len(sources):
        raise UserError(f"there are {len(scores)} scores for {len(sources)} sources: each source has its own")
    for index, each in enumerate(scores):
        _check(f"scores[{index}]", each, (scores[0].shape[0], *shape[:-1]), first, dtype=False)
    _check("norm_weight", norm_weight, (shape[-1],), first, dtype=False)
    if backend_for(first.device, first.dtype) == "triton":
        from fathom.kernels import mixes as kernel
        from fathom.kernels.tiles import as_rows

        known = [each.to(compute_dtype(first)).contiguous() for each in scores]
        rows, lse, passed = kernel.mix([as_rows(each) for each in sources], known)
        outs, lses, sources = _shaped(rows, shape), _shaped(lse.unbind(0), shape[:-1]), _shaped(passed, shape)
    else:
        out, lse = two_phase.mix(sources, scores)
        outs, lses = list(out.unbind(0)), list(lse.unbind(0))
    if norm_weight is not None:
        outs[0] = _norm(outs[0], norm_weight, norm_eps)
    return outs, lses, sources


def turn(
    partial: Float[Tensor, "*batch D"] | None,
    output: Float[Tensor, "*batch D"],
    bank: Sequence[Float[Tensor, "*batch D"]],
    scores: Sequence[Float[Tensor, "K *batch"]],
    queries: Float[Tensor, "K D"],
    num_reads: int,
    *,
    eps: float = EPS,
    norm_weight: Float[Tensor, "D"] | None = None,
    norm_eps: float = EPS,
) -> tuple[
    Float[Tensor, "*batch D"],
    Float[Tensor, "K *batch"],
    Sequence[Float[Tensor, "*batch D"]],
    Sequence[Float[Tensor, "*batch"]],
]:
    """``partial + output`` joins the bank as its last source, and the first ``num_reads`` of K reads over it are made.

    Returns the source and its scores as ``score`` does, then the reads and their lse as ``mix`` does. Where no gradient is
    wanted and the tokens are few, one kernel does it all.

    Raises ``UserError`` (a ``ValueError``) naming the argument that has a wrong shape, dtype or device.
    """
    shape, num_queries = _check_sources([output, *bank]), len(queries)
    _check("partial", partial, shape, output)
    _check("queries", queries, (num_queries, shape[-1]), output, dtype=False)
    if not 1 <= num_reads <= num_queries:
        raise UserError(f"num_reads is {num_reads}: it must be between 1 and the {num_queries} queries")
    if len(scores) != len(bank):
        raise UserError(f"there are {len(scores)} scores for {len(bank)} sources: each source has its own")
    for index, each in enumerate(scores):
        _check(f"scores[{index}]", each, (num_queries, *shape[:-1]), output, dtype=False)
    _check("norm_weight", norm_weight, shape[-1:], output, dtype=False)
    if backend_for(output.device, output.dtype) == "triton" and not torch.is_grad_enabled():
        from fathom.kernels import turns as kernel
        from fathom.kernels.tiles import FEW_TOKENS, as_rows, size_of

        if size_of(output)[0] <= FEW_TOKENS:
            known = [each.to(compute_dtype(output)).contiguous() for each in scores]
            source, own, reads, lse = kernel.turn(
                _whole(partial), output.contiguous(), [as_rows(each) for each in bank], known, queries.contiguous(), num_reads,
                _whole(norm_weight), eps, norm_eps,
            )  # fmt: skip
            return source, own, reads, lse.unbind(0)
    source, own = score(partial, output, queries, eps=eps)
    now = [each[:num_reads] for each in (*scores, own)]
    outs, lses, _ = mix([*bank, source], now, norm_weight=norm_weight, norm_eps=norm_eps)
    return source, own, outs, lses


def inter_block(
    sources: Sequence[Float[Tensor, "*batch D"]],
    queries: Float[Tensor, "S D"],
    gain: Float[Tensor, "S D"] | None = None,
    *,
    eps: float = EPS,
    scale: float = 1.0,
    normalize_values: bool = False,
    norm_weight: Float[Tensor, "D"] | None = None,
    norm_eps: float = EPS,
) -> tuple[Sequence[Float[Tensor, "*batch D"]], Sequence[Float[Tensor, "*batch"]]]:
    """S reads of the same N sources: ``(out, lse)``, S tensors [..., D] and S tensors [...].

    The sources may be a list of tensors, a packed bank [N, ..., D], or slices of a token-major bank; none is copied. ``lse`` is
    the log of each softmax's denominator, with a gradient of its own. ``scale`` and ``normalize_values`` are those of
    ``two_phase.inter_block``. With ``norm_weight`` the first read is returned RMS-normalised, ready for its sublayer.

    Raises ``UserError`` (a ``ValueError``) naming the argument that has a wrong shape, dtype or device.
    """
    shape = _check_sources(sources)
    first = sources[0]
    if queries.ndim != 2 or queries.shape[0] < 1:
        raise UserError(f"queries has shape {tuple(queries.shape)}: it must be [S, D] with at least one read")
    _check("queries", queries, (queries.shape[0], shape[-1]), first, dtype=False)
    _check("gain", gain, tuple(queries.shape), first, dtype=False)
    _check("norm_weight", norm_weight, (shape[-1],), first, dtype=False)
    if backend_for(first.device, first.dtype) == "triton":
        from fathom.kernels import inter as kernel
        from fathom.kernels.tiles import as_rows

        flat, folded = [as_rows(source) for source in sources], fold_gain(queries, gain).contiguous()
        rows, lse, *_ = kernel.inter_block(flat, folded, eps, scale, normalize_values)
        outs, lses = _shaped(rows, shape), _shaped(lse.unbind(0), shape[:-1])
    else:
        out, lse = two_phase.inter_block(
            sources, queries, gain, eps=eps, scale=scale, normalize_values=normalize_values
        )
        outs, lses = list(out.unbind(0)), list(lse.unbind(0))
    if norm_weight is not None:
        outs[0] = _norm(outs[0], norm_weight, norm_eps)
    return outs, lses


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm: what ``update_read`` is without a partial sum and without sources."""
    return update_read(None, x, None, None, None, norm_weight=weight, norm_eps=eps)[1]


def read(
    sources: Sequence[Float[Tensor, "*batch D"]],
    query: Float[Tensor, "*M D"],
    gain: Float[Tensor, "*M D"] | None = None,
    *,
    eps: float = EPS,
    norm_weight: Float[Tensor, "D"] | None = None,
    norm_eps: float = EPS,
    scale: float = 1.0,
    normalize_values: bool = False,
    return_weights: bool = False,
) -> Any:
    """One site over all its sources (Eq. 2-4), RMS-normalised if a ``norm_weight`` is given: [..., D].

    M queries [M, D] at one site give a tuple of M reads. With ``return_weights`` the result is ``(read, weights)``, weights
    [N, ...] or a tuple of M of them, by the plain equation and with its gradient: they are for looking at, not for speed.
    """
    if query.ndim not in (1, 2):
        raise UserError(f"query has shape {tuple(query.shape)}: it must be [D], or [M, D] for M reads")
    single = query.ndim == 1
    if not single and norm_weight is not None:
        raise UserError(
            "norm_weight goes with a single query: several reads are several inputs, each with its own norm"
        )
    queries, gains = (query[None], None if gain is None else gain[None]) if single else (query, gain)
    outs, _ = inter_block(
        sources, queries, gains, eps=eps, scale=scale, normalize_values=normalize_values, norm_weight=norm_weight,
        norm_eps=norm_eps,
    )  # fmt: skip
    found = outs[0] if single else tuple(outs)
    if not return_weights:
        return found
    folded = fold_gain(queries, gains) * scale
    weights = tuple(depth_attention_weights(sources, each, eps=eps) for each in folded)
    return found, weights[0] if single else weights


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
    return_mix: bool = False,
) -> tuple[Float[Tensor, "*batch D"], ...]:
    """``two_phase.update_read`` in one kernel each way: ``(partial', x)``, and the un-normalised read with ``return_mix``.

    Raises ``UserError`` (a ``ValueError``) naming the argument that has a wrong shape, dtype or device.
    """
    shape = output.shape
    if not shape or not output.is_floating_point():
        raise UserError(f"output is {tuple(shape)} {output.dtype}: it must be a floating-point [..., D]")
    _check("partial", partial, shape, output)
    _check("inter_out", inter_out, shape, output)
    _check("inter_lse", inter_lse, shape[:-1], output, dtype=False)
    _check("query", query, shape[-1:], output, dtype=False)
    _check("gain", gain, shape[-1:], output, dtype=False)
    _check("norm_weight", norm_weight, shape[-1:], output, dtype=False)
    if (inter_out is None) != (inter_lse is None) or (inter_out is not None and query is None):
        raise UserError("inter_out, inter_lse and query belong together: give all three, or none of the first two")
    if backend_for(output.device, output.dtype) == "triton":
        from fathom.kernels import update as kernel

        folded = _whole(fold_gain(query, gain)) if query is not None and inter_out is not None else None
        parts = kernel.update_read(
            _whole(partial), output.contiguous(), _whole(inter_out), _whole(inter_lse), folded, _whole(norm_weight), eps,
            norm_eps, return_mix or norm_weight is None,
        )  # fmt: skip
    else:
        total, x, mix = two_phase.update_read(
            partial, output, inter_out, inter_lse, query, gain, norm_weight, eps=eps, norm_eps=norm_eps
        )
        parts = [total, x, mix] if norm_weight is not None else [total, x]
    if return_mix and norm_weight is None:
        parts.append(parts[1])
    return tuple(parts) if return_mix else (parts[0], parts[1])
