"""The three operations of the residual path, each with two backends, and the one place that chooses between them.

    inter_block   every read of a block over its finished sources, in one sweep       two_phase.py | inter.py
    update_read   residual add, intra-block merge and the next norm                   two_phase.py | update.py
    read          one site over all its sources                                       depth_attention.py | inter.py

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
from fathom.depth_attention import EPS, depth_attention_weights, fold_gain
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
    if tensor is None:
        return
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}: it must have {shape}")
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
        _check(f"sources[{index}]", source, tuple(sources[0].shape), sources[0])
    return tuple(sources[0].shape)


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

        rows, lse, _, _ = kernel.inter_block(
            [as_rows(source) for source in sources], fold_gain(queries, gain).contiguous(), eps, scale, normalize_values
        )
        outs = [row.view(shape) for row in rows]
        if norm_weight is not None:
            outs[0] = _norm(rows[0], norm_weight, norm_eps).view(shape)
        return outs, [row.view(shape[:-1]) for row in lse.unbind(0)]
    out, lse = two_phase.inter_block(sources, queries, gain, eps=eps, scale=scale, normalize_values=normalize_values)
    outs = list(out.unbind(0))
    if norm_weight is not None:
        outs[0] = two_phase.rms_norm(outs[0], norm_weight, norm_eps)
    return outs, lse.unbind(0)


def _norm(rows: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of [tokens, D]: what ``update_read`` is without a partial sum and without sources."""
    from fathom.kernels import update

    return update.update_read(None, rows, None, None, None, weight.contiguous(), 0.0, eps, False)[0]


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
    shape = tuple(output.shape)
    if not shape or not output.is_floating_point():
        raise UserError(f"output is {shape} {output.dtype}: it must be a floating-point [..., D]")
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
        from fathom.kernels.tiles import as_rows

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else as_rows(tensor).contiguous()

        folded = fold_gain(query, gain).contiguous() if query is not None and inter_out is not None else None
        lse = None if inter_lse is None else inter_lse.reshape(-1).contiguous()
        weight = None if norm_weight is None else norm_weight.contiguous()
        found = kernel.update_read(
            rows(partial), as_rows(output).contiguous(), rows(inter_out), lse, folded, weight, eps, norm_eps,
            return_mix or norm_weight is None,
        )  # fmt: skip
        parts = [output if partial is None else found.pop(0).view(shape), *(part.view(shape) for part in found[:-1])]
    else:
        total, x, mix = two_phase.update_read(
            partial, output, inter_out, inter_lse, query, gain, norm_weight, eps=eps, norm_eps=norm_eps
        )
        parts = [total, x, mix] if norm_weight is not None else [total, x]
    if return_mix and norm_weight is None:
        parts.append(parts[1])
    return tuple(parts) if return_mix else (parts[0], parts[1])
