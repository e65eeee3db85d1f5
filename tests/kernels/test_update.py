"""The update kernels against the float64 equation: every output and every gradient, in every variant."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from fathom import kernels
from fathom.kernels import update, use_backend
from tests.kernels.cases import DRAWS, DTYPES, assert_as_good_as_plain, run


def make(
    tokens: int, d: int, dtype: torch.dtype, device: str, *, partial: bool = True, inter: bool = True, norm: bool = True
) -> list[Tensor | None]:
    """output, partial, inter_out, inter_lse, query, gain, norm_weight; None for what the variant lacks."""
    wide = torch.promote_types(dtype, torch.float32)

    def some(here: bool, *shape: int, kind: torch.dtype = wide) -> Tensor | None:
        return torch.randn(*shape).to(device, kind) if here else None

    return [
        some(True, tokens, d, kind=dtype), some(partial, tokens, d, kind=dtype), some(inter, tokens, d, kind=dtype),
        some(inter, tokens), some(inter, d), some(inter, d), some(norm, d),
    ]  # fmt: skip


def call(leaves, *, return_mix: bool = False):
    output, partial, *rest = leaves
    return kernels.update_read(partial, output, *rest, eps=1e-5, norm_eps=1e-4, return_mix=return_mix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "d"), [(1, 1), (5, 40), (9, 96), (3, 1000), (3, 2048)])
def test_equals_the_equation(tokens: int, d: int, dtype: torch.dtype, device: str):
    assert_as_good_as_plain(call, *(make(tokens, d, dtype, device) for _ in range(DRAWS[dtype])))


@pytest.mark.parametrize(("partial", "inter", "norm", "mix"), list(itertools.product([False, True], repeat=4)))
def test_every_variant(partial: bool, inter: bool, norm: bool, mix: bool, device: str):
    inputs = make(5, 40, DTYPES[0], device, partial=partial, inter=inter, norm=norm)
    assert_as_good_as_plain(lambda leaves: call(leaves, return_mix=mix), inputs)


@pytest.mark.parametrize(
    ("dim", "pieces"),
    [(33, (32, 16)), (49, (64, 0)), (64, (64, 0)), (96, (64, 32)), (150, (128, 32))],
)
@pytest.mark.parametrize(("inter", "norm", "mix"), [(True, True, False), (True, False, True), (False, True, True)])
def test_a_row_in_two_pieces(
    dim: int, pieces: tuple[int, int], inter: bool, norm: bool, mix: bool, device: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(update, "BACKWARD_ELEMENTS", 32)
    assert update._pieces_of(dim) == pieces
    dtype = DTYPES[0]
    draws = (make(7, dim, dtype, device, inter=inter, norm=norm) for _ in range(DRAWS[dtype]))
    assert_as_good_as_plain(lambda leaves: call(leaves, return_mix=mix), *draws)


def test_pieces_of_wide_rows():
    widths = {96: (128, 0), 2048: (2048, 0), 2304: (2048, 256), 3072: (2048, 1024), 4096: (4096, 0), 5120: (4096, 1024)}
    assert {dim: update._pieces_of(dim) for dim in widths} == widths
    assert update._pieces_of(7168) == (8192, 0)


def test_weight_gradients_of_many_programs(device: str, monkeypatch: pytest.MonkeyPatch):
    """More shares than are taken at a time, and not a multiple."""
    monkeypatch.setattr(update, "BACKWARD_WARPS", 4 * 70)
    assert_as_good_as_plain(call, make(8 * 70, 40, DTYPES[0], device))


def test_gradcheck(device: str):
    if device == "cuda":
        pytest.skip("float64 is the interpreter's")
    inputs = [t.requires_grad_() for t in make(2, 6, torch.float64, device) if t is not None]
    with use_backend("triton"):
        assert gradcheck(lambda *leaves: call(leaves, return_mix=True), inputs, fast_mode=True)


@pytest.mark.parametrize("unused", [0, 1])
def test_an_unused_output_adds_no_gradient(unused: int, device: str):
    inputs = [t.requires_grad_() for t in make(3, 16, torch.float32, device) if t is not None]
    with use_backend("triton"):
        call(inputs)[1 - unused].sum().backward()
    found = [t.grad for t in inputs]
    for t in inputs:
        t.grad = None
    with use_backend("reference"):
        call(inputs)[1 - unused].sum().backward()
    for a, b in zip(found, (t.grad for t in inputs), strict=True):
        if a is None or b is None:
            assert (a is None or not a.any()) and (b is None or not b.any())
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_repeats_have_the_same_bits(device: str):
    inputs = make(33, 40, DTYPES[1], device)
    first, second = run(call, inputs, "triton"), run(call, inputs, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_layouts(device: str):
    inputs = make(6, 32, torch.float32, device)
    odd = [t if t is None else t.t().contiguous().t() if t.ndim == 2 else torch.stack([t, t], -1)[:, 0] for t in inputs]
    first, second = run(call, inputs, "triton"), run(call, odd, "triton")
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


BAD = [
    (0, torch.zeros(3, 9), "partial has shape"),
    (0, torch.zeros(3, 8, dtype=torch.float16), "partial is torch.float16"),
    (2, torch.zeros(3, 9), "inter_out has shape"),
    (3, torch.zeros(4), "inter_lse has shape"),
    (3, None, "belong together"),
    (4, None, "belong together"),
    (4, torch.zeros(9), "query has shape"),
    (5, torch.zeros(8, device="meta"), "gain is on meta"),
    (6, torch.zeros(8, dtype=torch.long), "norm_weight is torch.int64"),
    (1, torch.zeros(3, 8, dtype=torch.long), "output is"),
]


@pytest.mark.parametrize(("index", "value", "message"), BAD)
def test_a_wrong_argument_is_named(index: int, value: object, message: str):
    good = [torch.zeros(3, 8)] * 3 + [torch.zeros(3)] + [torch.zeros(8)] * 3
    with pytest.raises(ValueError, match=message):
        kernels.update_read(*good[:index], value, *good[index + 1 :])
