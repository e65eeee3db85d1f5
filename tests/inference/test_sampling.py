"""Sampling: the distribution of a draw, its settings, and that draws follow it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.errors import UserError
from fathom.inference.sampling import Sampling, draw, next_token_distribution, penalize

logit_lists = st.lists(st.integers(-400, 400).map(lambda i: i / 10), min_size=1, max_size=30, unique=True)


@settings(max_examples=200, deadline=None)
@given(
    logits=logit_lists,
    temperature=st.floats(0.05, 20),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0.01, 1),
    min_p=st.none() | st.floats(0, 1),
)
def test_distribution_is_the_definition(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    """Against the definition in plain Python: weights, the k likeliest, the fewest that hold p, those near the likeliest."""
    weights = [math.exp((value - max(logits)) / temperature) for value in logits]
    kept = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    if top_p is not None and top_p < 1:
        total, mass, count = sum(weights[i] for i in kept), 0.0, 0
        while mass < top_p * total and count < len(kept):
            mass += weights[kept[count]]
            count += 1
        # The definition's sum is rounded too: where it is a tie, either number of tokens is right.
        if abs(mass - top_p * total) < 1e-12 or abs(mass - weights[kept[count - 1]] - top_p * total) < 1e-12:
            return
        kept = kept[:count]
    if min_p is not None:
        if any(abs(weights[i] - min_p) < 1e-12 for i in kept[1:]):
            return
        kept = [i for i in kept if i == kept[0] or weights[i] >= min_p]
    total = sum(weights[i] for i in kept)
    expected = [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]

    got = next_token_distribution(torch.tensor(logits, dtype=torch.float64), temperature, top_k, top_p, min_p)

    assert got.dtype == torch.float64
    assert abs(float(got.sum()) - 1) < 1e-12
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-300)


def test_temperature_zero_takes_the_first_of_the_largest() -> None:
    assert next_token_distribution(torch.tensor([1.0, 3.0, 3.0, 2.0]), 0).tolist() == [0, 1, 0, 0]


def test_top_k_keeps_exactly_k_of_equals() -> None:
    assert next_token_distribution(torch.zeros(5000), 1, 2).nonzero().flatten().tolist() == [0, 1]


@pytest.mark.parametrize("temperature", [1e-320, 1e-8, 1e300])
def test_extreme_temperatures_stay_distributions(temperature: float) -> None:
    got = next_token_distribution(torch.tensor([-1e30, 5.0, 4.0, 1e30]), temperature)
    assert got.isfinite().all() and float(got.sum()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": math.nan}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"min_p": math.nan}, "min_p"),
    ],
)
def test_wrong_setting_is_named(values: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        next_token_distribution(torch.zeros(3), **values)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite(bad: float) -> None:
    with pytest.raises(UserError, match="not finite"):
        next_token_distribution(torch.tensor([0.0, bad]))


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"tokens": 0}, "number of tokens"),
        ({"seed": -1}, "seed"),
        ({"stop": ("",)}, "stop text"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": math.nan}, "repetition_penalty"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_wrong_sampling_is_named(values: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        Sampling(**values)


def test_several_positions_at_once() -> None:
    logits = torch.randn(3, 4, 11, dtype=torch.float64)
    got = next_token_distribution(logits, 0.7, 6, 0.8, 0.05)
    each = [next_token_distribution(row, 0.7, 6, 0.8, 0.05) for row in logits.flatten(0, 1)]
    torch.testing.assert_close(got, torch.stack(each).view(3, 4, 11), rtol=0, atol=0)


def test_repetition_penalty_makes_seen_tokens_less_likely() -> None:
    logits, seen = torch.tensor([2.0, -2.0, 2.0, -2.0]), torch.tensor([True, True, False, False])
    assert penalize(logits, seen, 4.0).tolist() == [0.5, -8.0, 2.0, -2.0]


def test_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    distribution = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64).expand(6, -1)
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(distribution, uniform).tolist() == [1, 1, 3, 3, 4, 4]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20).filter(any))
def test_draw_never_takes_a_token_without_mass(weights: list[float]) -> None:
    distribution = torch.tensor([weights], dtype=torch.float64)
    for uniform in (0.0, 0.5, 1 - 2**-53):
        token = int(draw(distribution, torch.tensor([uniform], dtype=torch.float64)))
        assert weights[token] > 0


@pytest.mark.parametrize(
    "cut", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.9, "min_p": 0.02}]
)
def test_draws_follow_the_distribution(cut: dict) -> None:
    """Chi-square of 20,000 draws: at most five standard deviations above its mean."""
    logits, count = torch.randn(12, dtype=torch.float64), 20_000
    expected = next_token_distribution(logits, 0.8, **cut)
    uniform = torch.rand(count, dtype=torch.float64)
    counts = draw(expected.expand(count, -1), uniform).bincount(minlength=12)
    support = expected > 0
    assert counts[~support].sum() == 0
    chi = float(((counts - count * expected)[support] ** 2 / (count * expected[support])).sum())
    degrees = int(support.sum()) - 1
    assert chi < degrees + 5 * (2 * degrees) ** 0.5
