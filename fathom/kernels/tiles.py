"""What the kernels share: how a list of tensors is addressed, and the shapes of their tiles.

A read attends over tensors that were allocated one by one, or are slices of a bank. A kernel is given them as a tuple of
pointers and a tuple of row strides, and picks among them by index, so nothing is stacked or copied. Addresses are 64 bit.
"""

import functools
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from fathom.depth_attention import compute_dtype

P = ParamSpec("P")
R = TypeVar("R")


def on_their_device(launch: Callable[P, R]) -> Callable[P, R]:
    """``launch`` with the device of its first tensor as the current one: Triton launches there, wherever the tensors are."""

    @functools.wraps(launch)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        for arg in args:
            first = arg[0] if isinstance(arg, list) and arg else arg
            if isinstance(first, Tensor):
                with torch.cuda.device_of(first):
                    return launch(*args, **kwargs)
        raise TypeError(f"{launch.__name__} was given no tensor")

    return run


ACCUMULATOR = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def row_pointers(
    tensors,
    strides,
    which,
    token,
    COUNT: tl.constexpr,
    ELEMENT: tl.constexpr,
    BYTES: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Pointers to row ``token`` (one, or one for each) of ``tensors[which]``; where ``which`` is COUNT or more, of tensor 0."""
    base = tl.full(which.shape, 0, tl.int64) + tensors[0].to(tl.int64)
    stride = tl.full(which.shape, 0, tl.int64) + strides[0]
    for i in tl.static_range(1, COUNT):
        base = tl.where(which == i, tensors[i].to(tl.int64), base)
    for i in tl.static_range(1, len(strides)):
        stride = tl.where(which == i, strides[i], stride)
    rows = (base + token * stride * BYTES).to(tl.pointer_type(ELEMENT))
    if ALIGNED:
        rows = tl.multiple_of(rows, 16)
    return rows


@triton.jit
def pick(tensors, which, COUNT: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer ``tensors[which]`` for a run-time scalar ``which``, as a tile [1], whose alignment can be told."""
    pointer = tl.full([1], 0, tl.int64) + tensors[0].to(tl.int64)
    for i in tl.static_range(1, COUNT):
        pointer = tl.where(which == i, tensors[i].to(tl.int64), pointer)
    pointer = pointer.to(tensors[0].dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def pick_stride(strides, which):
    """``strides[which]``, or the only one, for a run-time scalar ``which``, 64 bit."""
    stride = tl.full([], 0, tl.int64) + strides[0]
    for i in tl.static_range(1, len(strides)):
        stride = tl.where(which == i, strides[i], stride)
    return stride


GROUP = tl.constexpr(8)
"""Tensors that are chosen together where there are more."""


@triton.jit
def pick_of_group(tensors, group, which: tl.constexpr, COUNT: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer ``tensors[group + which]`` for a run-time multiple ``group`` of GROUP; a tile [1] if its alignment is told."""
    pointer = tl.full([1] if ALIGNED else [], 0, tl.int64) + tensors[which].to(tl.int64)
    for i in tl.static_range(GROUP, COUNT, GROUP):
        if i + which < COUNT:
            pointer = tl.where(group == i, tensors[i + which].to(tl.int64), pointer)
    pointer = pointer.to(tensors[0].dtype)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def pick_stride_of_group(strides, group, which: tl.constexpr):
    """``strides[group + which]``, or the only one, likewise, 64 bit."""
    stride = tl.full([], 0, tl.int64) + strides[0 if len(strides) == 1 else which]
    for i in tl.static_range(GROUP, len(strides), GROUP):
        if i + which < len(strides):
            stride = tl.where(group == i, strides[i + which], stride)
    return stride


@triton.jit
def nothing():
    """A tuple to add to, of any length as far as types go."""
    return ()


@triton.jit
def group_of(tensors, group, COUNT: tl.constexpr):
    """The pointers ``tensors[group : group + GROUP]``, to ``pick`` among them."""
    chosen = nothing()
    for j in tl.static_range(COUNT if COUNT < GROUP else GROUP):
        chosen += (pick_of_group(tensors, group, j, COUNT, False),)
    return chosen


@triton.jit
def joined_group(tiles, first: tl.constexpr, step: tl.constexpr):
    """GROUP tiles [...], each ``step`` th from ``first`` on, as one [..., GROUP]; a join puts what it joins last."""
    evens = tl.join(
        tl.join(tiles[first], tiles[first + 4 * step]), tl.join(tiles[first + 2 * step], tiles[first + 6 * step])
    )
    odds = tl.join(
        tl.join(tiles[first + step], tiles[first + 5 * step]), tl.join(tiles[first + 3 * step], tiles[first + 7 * step])
    )
    joined = tl.join(evens, odds)
    return tl.reshape(joined, joined.shape[:-3] + [GROUP])  # noqa: RUF005 (no * in Triton)


@triton.jit
def rsqrt(x):
    """1 / sqrt(x). All of a row is multiplied by it, and so has its error: a step of Newton's corrects a GPU's fast one."""
    r = tl.rsqrt(x)
    return r * (1.5 - 0.5 * x * r * r)


@triton.jit
def four_sums(a, b, c, d, DIM: tl.constexpr):
    """Sums of four tiles over ``DIM``, their last one, for one exchange between warps."""
    first, second = tl.split(tl.sum(tl.join(tl.join(a, b), tl.join(c, d)), DIM))
    a, b = tl.split(first)
    c, d = tl.split(second)
    return a, b, c, d


def as_rows(tensor: Tensor) -> Tensor:
    """``tensor`` [..., D] as rows with adjacent columns: itself if it is contiguous, else [tokens, D], a view if that can be."""
    if tensor.is_contiguous():
        return tensor
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def size_of(rows: Tensor) -> tuple[int, int]:
    """Tokens and D."""
    dim = rows.shape[-1]
    return rows.numel() // dim, dim


def padded(count: int) -> int:
    """The number of tensors that most kernels are compiled for: 1, up to 16 the next even number, above the next multiple of 16,
    because compiling takes a second, and there are rules whose every site has one source more than the site before."""
    step = 1 if count == 1 else 2 if count <= 16 else 16
    return cdiv(count, step) * step


def pointers(tensors: list[Tensor] | None) -> tuple[Tensor, ...] | None:
    """``tensors`` as a kernel takes them, filled up to ``padded`` with the first."""
    return None if tensors is None else (*tensors, *[tensors[0]] * (padded(len(tensors)) - len(tensors)))


def stride_of(rows: Tensor) -> int:
    """From row to row of one of ``as_rows``; where there are other dims it is contiguous, and a dim of 1 has any stride."""
    return rows.stride(0) if rows.ndim == 2 else rows.shape[-1]


def strides_of(tensors: list[Tensor]) -> tuple[int, ...]:
    """From row to row of each of ``as_rows``, filled up as ``pointers`` fills up; the only one if all are the same."""
    strides = tuple(stride_of(t) for t in pointers(tensors) or ())
    return strides[:1] if len(set(strides)) == 1 else strides


def is_aligned(*tensors: Tensor) -> bool:
    """Whether every row of ``tensors``, each of ``as_rows``, starts at a multiple of 16 bytes: loads may be 16 bytes wide."""
    return all(t.data_ptr() % 16 == 0 and stride_of(t) * t.element_size() % 16 == 0 for t in tensors)


def accumulator(tensor: Tensor) -> tl.dtype:
    """The dtype sums are kept in: float32, or float64 for float64 tensors."""
    return ACCUMULATOR[compute_dtype(tensor)]


def statistic(like: Tensor, *shape: int) -> Tensor:
    """An empty tensor for what is kept per token, in the dtype of sums."""
    return like.new_empty(shape, dtype=compute_dtype(like))


def present(grads: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """Gradients, contiguous; zeros (one tensor of them) where autograd has none."""
    # Not ``None in grads``, which compares each tensor with None.
    some_absent = any(grad is None for grad in grads)
    absent = torch.zeros_like(like, memory_format=torch.contiguous_format) if some_absent else None
    return [absent if grad is None else grad.contiguous() for grad in grads]  # type: ignore[misc]


def power_of_two(n: int, least: int = 1) -> int:
    return max(least, 1 << (n - 1).bit_length())


def cdiv(n: int, size: int) -> int:
    """How many parts of ``size`` cover n. Triton's own takes microseconds on the host."""
    return -(-n // size)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; one elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of it that a program may have on a GPU; elsewhere a Hopper's."""
    if device.type != "cuda":
        return 232448
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def warps(elements: int) -> int:
    """Warps for a tile: 64 elements a thread, between 1 and 16 of them."""
    return max(1, min(16, elements // 2048))


FEW_TOKENS = 256
"""So many do not keep a GPU busy with programs that take several each: what counts is how long one of them takes."""


def sums_together(tensor: Tensor, columns: int) -> bool:
    """Whether ``four_sums`` of a row of ``tensor`` pays: several warps share it. In the interpreter in float64 alone: numpy adds
    such tiles up one by one, with an error that grows with their length."""
    return few_warps(columns) > 1 and (tensor.is_cuda or tensor.dtype == torch.float64)


def few_warps(columns: int) -> int:
    """Warps of a program for a single row: 8 columns, which are 16 bytes, a thread."""
    return max(1, min(16, columns // 256))
