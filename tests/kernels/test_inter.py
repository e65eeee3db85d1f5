"""The inter-block kernels against the float64 equation: every output and every gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from fathom import kernels
from fathom.depth_attention import depth_attention
from fathom.errors import UserError
from fathom.kernels import use_backend
from fathom.two_phase import merge
from tests.kernels.cases import DRAWS, DTYPES, assert_as_good_as_plain, run


def make(n: int, s: int, d: int, tokens: int, dtype: torch.dtype, device: str, *, gain: bool = True) -> list[Tensor]:
    """Sources of very different size, queries that make the weights uneven, and a gain."""
    wide = torch.promote_types(dtype, torch.float32)
    sources = [(torch.randn(tokens, d) * 2.0 ** (i % 3)).to(device, dtype) for i in range(n)]
    queries = (torch.randn(s, d) * 2 / d**0.5).to(device, wide)
    return [*sources, queries, *([(0.5 + torch.rand(s, d)).to(device, wide)] if gain else [])]


def call(n: int, **settings: object):
    def inner(leaves):
        sources, queries, *gain = leaves[:n], *leaves[n:]
        out, lse = kernels.inter_block(sources, queries, *gain, **settings)
        return [*out, *lse]

    return inner


SHAPES = [
    (1, 1, 16, 3),
    (1, 8, 96, 5),
    (2, 3, 1, 7),
    (3, 1, 40, 1),
    (4, 8, 64, 6),
    (5, 13, 24, 3),
    (9, 2, 96, 6),
    (3, 2, 1000, 2),
    (2, 2, 2048, 2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_equation(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str):
    assert_as_good_as_plain(call(shape[0]), *(make(*shape, dtype, device) for _ in range(DRAWS[dtype])))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *(((17, 2, 96, 3), each) for each in DTYPES if each != torch.float32),
        ((17, 2, 96, 40 if torch.cuda.is_available() else 12), torch.float32),
        *(((n, 8, 96, 3), torch.float32) for n in (17, 33)),
        ((10, 1, 530, 2), DTYPES[0]),
    ],
    ids=str,
)
def test_equals_the_equation_with_many_sources(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str):
    # In float32 the scores' own rounding sways a single source's error: with few reads over more tokens, for a mean that tells.
    assert_as_good_as_plain(call(shape[0]), *(make(*shape, dtype, device) for _ in range(DRAWS[dtype])))


@pytest.mark.parametrize(
    "settings", [{"scale": 0.3}, {"normalize_values": True}, {"normalize_values": True, "scale": 0.2}], ids=str
)
@pytest.mark.parametrize("n", [1, 3, 9])
def test_the_variants_of_score_and_values(n: int, settings: dict[str, object], device: str):
    dtype = DTYPES[0]
    assert_as_good_as_plain(call(n, **settings), make(n, 3, 48, 5, dtype, device, gain=False))


def test_the_first_read_comes_normalised(device: str):
    dtype = DTYPES[0]
    inputs = make(3, 4, 48, 5, dtype, device, gain=False)
    weight = (0.5 + torch.rand(48)).to(device, inputs[3].dtype)

    def normalised(leaves):
        out, lse = kernels.inter_block(leaves[:3], leaves[3], norm_weight=leaves[4], norm_eps=1e-5)
        return [*out, *lse]

    assert_as_good_as_plain(normalised, [*inputs, weight])


@pytest.mark.parametrize("settings", [{}, {"scale": 0.3, "normalize_values": True}], ids=str)
def test_a_site_of_several_queries_and_its_weights(settings: dict[str, Any], device: str):
    """Inkling-2's reads: as many single reads, and weights that mix the sources (normalised ones, there) to what was read."""
    *sources, queries, gain = make(4, 3, 48, 5, DTYPES[0], device)
    together, weights = kernels.read(sources, queries, gain, return_weights=True, **settings)
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 2e-2}[DTYPES[0]]
    bank = torch.stack(sources).to(queries.dtype)
    values = bank * (bank.square().mean(-1, keepdim=True) + 1e-6).rsqrt() if settings else bank
    for index, (out, weight) in enumerate(zip(together, weights, strict=True)):
        alone, own = kernels.read(sources, queries[index], gain[index], return_weights=True, **settings)
        assert torch.equal(own, weight) and weight.shape == (4, 5)
        torch.testing.assert_close(alone, out)
        mixed = (weight.unsqueeze(-1).to(values.dtype) * values).sum(0)
        torch.testing.assert_close(out.to(mixed.dtype), mixed, rtol=tolerance, atol=tolerance)
    with pytest.raises(UserError, match="norm_weight goes with a single query"):
        kernels.read(sources, queries, gain, norm_weight=queries[0])
    with pytest.raises(UserError, match=r"query has shape \(1, 3, 48\)"):
        kernels.read(sources, queries[None])


def test_gradcheck(device: str):
    if device == "cuda":
        pytest.skip("float64 is the interpreter's")
    inputs = [t.requires_grad_() for t in make(3, 2, 6, 2, torch.float64, device)]
    with use_backend("triton"):
        assert gradcheck(lambda *leaves: tuple(call(3)(leaves)), inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_repeats_have_the_same_bits(dtype: torch.dtype, device: str):
    inputs = make(3, 4, 40, 9, dtype, device)
    first, second = run(call(3), inputs, "triton"), run(call(3), inputs, "triton")
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_bank_is_read_where_it_lies(device: str, monkeypatch: pytest.MonkeyPatch):
    """Lists, a packed bank and a token-major bank give the same bits, and none is copied."""
    from fathom.kernels import inter

    bank = torch.randn(2, 3, 4, 32).to(device)  # [B, T, N, D]
    queries = torch.randn(2, 32).to(device)
    seen: list[list[int]] = []
    original = inter.inter_block

    def spy(sources, *rest):
        seen.append([s.data_ptr() for s in sources])
        return original(sources, *rest)

    monkeypatch.setattr(inter, "inter_block", spy)
    token_major = [bank[..., n, :] for n in range(4)]
    packed = bank.movedim(2, 0).contiguous()
    with use_backend("triton"):
        results = [kernels.inter_block(s, queries) for s in (token_major, packed, [p.clone() for p in packed])]
    for out, lse in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip((*out, *lse), (*results[0][0], *results[0][1]), strict=True))
    assert seen[0] == [s.data_ptr() for s in token_major]
    assert seen[1] == [s.data_ptr() for s in packed]


@pytest.mark.parametrize("times", [1, 4])
def test_other_layouts_give_the_same(times: int, device: str):
    """A transposed source, rows that are apart in memory, columns that are."""
    sources = [torch.randn(6, 5, 32).to(device) for _ in range(3)]
    queries = torch.randn(2, 32).to(device)
    odd = [sources[0].transpose(0, 1).contiguous().transpose(0, 1)]
    odd.append(torch.stack([sources[1], sources[0]], 2)[:, :, 0])
    odd.append(torch.stack([sources[2], sources[2]], -1)[..., 0])
    with use_backend("triton"):
        plain, others = (kernels.inter_block(given * times, queries) for given in (sources, odd))
    assert all(torch.equal(a, b) for a, b in zip((*plain[0], *plain[1]), (*others[0], *others[1]), strict=True))


@pytest.mark.parametrize("split", [1, 3, 5])
def test_two_phases_equal_one(split: int, device: str):
    dtype = torch.float64 if device == "cpu" else torch.float32
    sources, query = [torch.randn(7, 24).to(device, dtype) for _ in range(6)], torch.randn(1, 24).to(device, dtype)
    with use_backend("triton"):
        (a, lse_a), (b, lse_b) = (
            kernels.inter_block(sources[:split], query),
            kernels.inter_block(sources[split:], query),
        )
        whole = kernels.read(sources, query[0])
    truth = depth_attention([s.double() for s in sources], query[0].double())
    tolerance = 1e-13 if dtype == torch.float64 else 2e-6
    for found in (merge(a[0], lse_a[0], b[0], lse_b[0]), whole):
        torch.testing.assert_close(found.double(), truth, rtol=tolerance, atol=tolerance)


def test_zero_queries_give_the_mean(device: str):
    sources = [torch.randn(5, 40).to(device) for _ in range(4)]
    with use_backend("triton"):
        out, lse = kernels.inter_block(sources, torch.zeros(2, 40).to(device))
    for read in out:
        torch.testing.assert_close(read, torch.stack(sources).mean(0), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse[0], torch.full_like(lse[0], 4.0).log())


GOOD = {"sources": [torch.zeros(2, 8)] * 2, "queries": torch.zeros(3, 8), "gain": torch.zeros(3, 8)}
BAD = [
    ("sources", [], "sources is empty"),
    ("sources", [torch.zeros(2, 8), torch.zeros(3, 8)], r"sources\[1\] has shape"),
    ("sources", [torch.zeros(2, 8), torch.zeros(2, 8, dtype=torch.float16)], r"sources\[1\] is torch.float16"),
    ("sources", [torch.zeros(2, 8, dtype=torch.long)] * 2, r"sources\[0\]"),
    ("sources", [torch.zeros(2, 8), torch.zeros(2, 8, device="meta")], r"sources\[1\] is on meta"),
    ("queries", torch.zeros(8), "queries has shape"),
    ("queries", torch.zeros(0, 8), "queries has shape"),
    ("queries", torch.zeros(3, 9), "queries has shape"),
    ("queries", torch.zeros(3, 8, dtype=torch.long), "queries is torch.int64"),
    ("gain", torch.zeros(2, 8), "gain has shape"),
    ("norm_weight", torch.zeros(9), "norm_weight has shape"),
]


@pytest.mark.parametrize(("name", "value", "message"), BAD)
def test_a_wrong_argument_is_named(name: str, value: object, message: str):
    with pytest.raises(ValueError, match=message):
        kernels.inter_block(**GOOD | {name: value})
