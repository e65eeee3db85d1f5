import math

import pytest
import torch
from torch.autograd import gradcheck

from fathom.depth_attention import check_sources, depth_attention, depth_attention_weights
from fathom.errors import UserError
from fathom.two_phase import as_partial, inter_block, merge


def randn(*shape: int, **options) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, **options)


def test_three_sources_by_hand():
    # D = 2, eps = 0: rms(3, 4) = sqrt(12.5), rms(0, 2) = sqrt(2), rms(1, 1) = 1.
    sources = [torch.tensor(v, dtype=torch.float64) for v in ([3.0, 4.0], [0.0, 2.0], [1.0, 1.0])]
    query = torch.tensor([1.0, 2.0], dtype=torch.float64)
    scores = [11 / math.sqrt(12.5), 4 / math.sqrt(2), 3.0]
    total = sum(math.exp(s) for s in scores)
    weights = [math.exp(s) / total for s in scores]
    expected = [weights[0] * 3 + weights[2] * 1, weights[0] * 4 + weights[1] * 2 + weights[2] * 1]
    torch.testing.assert_close(
        depth_attention_weights(sources, query, eps=0.0), torch.tensor(weights, dtype=torch.float64), rtol=1e-14, atol=0
    )
    torch.testing.assert_close(
        depth_attention(sources, query, eps=0.0), torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0
    )


def test_the_gain_multiplies_the_key():
    sources, query, gain = list(randn(4, 5, 8)), randn(8), randn(8)
    torch.testing.assert_close(
        depth_attention(sources, query, gain), depth_attention(sources, query * gain), rtol=1e-13, atol=1e-13
    )


def test_autocast_changes_no_bit_of_a_read():
    """It would round scores and mixes to bf16, though both are promised in float32."""
    sources = [torch.randn(2, 5, 64, dtype=torch.bfloat16) for _ in range(4)]
    queries = torch.randn(3, 64)

    def reads() -> list[torch.Tensor]:
        weights, read = depth_attention_weights(sources, queries[0]), depth_attention(sources, queries[0])
        return [weights, read, *inter_block(sources, queries), *as_partial(sources[0], queries[0])]

    expected = reads()
    with torch.autocast("cpu", torch.bfloat16):
        found = reads()
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("num_sources", [1, 2, 17])
@pytest.mark.parametrize("with_gain", [False, True])
def test_gradcheck_of_a_read(num_sources: int, with_gain: bool):
    sources = [randn(2, 3, 4, requires_grad=True) for _ in range(num_sources)]
    query, gain = randn(4, requires_grad=True), randn(4, requires_grad=True) if with_gain else None
    assert gradcheck(lambda q, g, *v: depth_attention(v, q, g), (query, gain, *sources))


@pytest.mark.parametrize("with_gain", [False, True])
def test_gradcheck_of_the_two_phases(with_gain: bool):
    sources = [randn(2, 3, 4, requires_grad=True) for _ in range(3)]
    queries = randn(2, 4, requires_grad=True)
    gain = randn(2, 4, requires_grad=True) if with_gain else None
    partial = randn(2, 3, 4, requires_grad=True)
    assert gradcheck(lambda q, g, *v: inter_block(v, q, g), (queries, gain, *sources))

    def read(q, g, p, *v):
        out, lse = inter_block(v, q, g)
        return merge(out[1], lse[1], *as_partial(p, q[1], None if g is None else g[1]))

    assert gradcheck(read, (queries, gain, partial, *sources))


@pytest.mark.parametrize("split", range(1, 6))
def test_two_phases_equal_one_read_at_every_split(split: int):
    sources, query, gain = list(randn(6, 2, 3, 8)), 3 * randn(8), randn(8)
    first = inter_block(sources[:split], query[None], gain[None])
    second = inter_block(sources[split:], query[None], gain[None])
    merged = merge(first[0][0], first[1][0], second[0][0], second[1][0])
    torch.testing.assert_close(merged, depth_attention(sources, query, gain), rtol=1e-13, atol=1e-13)


def test_merging_is_exact_where_one_side_has_all_the_mass():
    a, b = randn(3, 4), randn(3, 4)
    low, high = torch.full((3,), -900.0, dtype=torch.float64), torch.full((3,), 900.0, dtype=torch.float64)
    assert torch.equal(merge(a, low, b, high), b)
    torch.testing.assert_close(merge(a, high, b, low), a, rtol=0, atol=0)


def test_weights_sum_to_one_and_follow_a_permutation():
    sources, query = list(randn(5, 2, 3, 8) * 10.0 ** torch.arange(-2, 3)[:, None, None, None]), 3 * randn(8)
    weights = depth_attention_weights(sources, query)
    torch.testing.assert_close(weights.sum(0), torch.ones(2, 3, dtype=torch.float64), rtol=1e-14, atol=0)
    order = [3, 0, 4, 2, 1]
    permuted = [sources[i] for i in order]
    torch.testing.assert_close(depth_attention_weights(permuted, query), weights[order], rtol=1e-13, atol=0)
    torch.testing.assert_close(
        depth_attention(permuted, query), depth_attention(sources, query), rtol=1e-12, atol=1e-12
    )


def test_keys_are_normalised_and_values_are_not():
    sources, query = list(randn(3, 2, 8)), randn(8)
    weights = depth_attention_weights(sources, query, eps=0.0)
    louder = [100 * sources[0], *sources[1:]]
    torch.testing.assert_close(depth_attention_weights(louder, query, eps=0.0), weights, rtol=1e-13, atol=0)
    change = depth_attention(louder, query, eps=0.0) - depth_attention(sources, query, eps=0.0)
    torch.testing.assert_close(change, 99 * weights[0][:, None] * sources[0], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype: torch.dtype):
    sources, query = [v.to(dtype) for v in randn(4, 64, 32)], randn(32).to(dtype)
    exact = depth_attention([v.double() for v in sources], query.double())
    got = depth_attention(sources, query)
    assert got.dtype == dtype
    # Half a unit in the last place of the result, and float32's own error: nothing in between was rounded to dtype.
    spacing = torch.finfo(dtype).eps * exact.abs().clamp_min(1e-3)
    assert ((got.double() - exact).abs() <= 0.51 * spacing + 1e-5).all()


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "empty"),
        ([torch.zeros(2, 4), torch.zeros(3, 4)], r"sources\[1\]"),
        ([torch.zeros(2, 4), torch.zeros(2, 4).double()], r"sources\[1\]"),
        ([torch.zeros(2, 5)], "width 4"),
    ],
)
def test_impossible_sources_are_refused_by_name(sources: list, message: str):
    with pytest.raises(UserError, match=message):
        check_sources(sources, 4)


def test_every_read_checks_its_sources():
    with pytest.raises(ValueError, match="empty"):
        depth_attention([], torch.zeros(4))
    with pytest.raises(ValueError, match="empty"):
        inter_block([], torch.zeros(1, 4))
