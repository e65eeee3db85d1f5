"""Sampling: the distribution of a draw, generation, streaming of split characters, loading a run."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fathom
from fathom.errors import UserError
from fathom.inference.sample import decode_stream, encode_prompt, generate, load_run, next_token_distribution
from fathom.models.config import ModelConfig
from fathom.models.transformer import Transformer
from fathom.train import checkpoint
from fathom.train.config import RunConfig, save_config
from fathom.train.tokenizer import load_tokenizer

TOKENIZER = Path(fathom.__path__[0]) / "assets" / "sotu-tokenizer.json"
TINY = ModelConfig(vocab_size=8, context=6, dim=16, num_layers=2, num_heads=2, head_std=2.0)


logit_lists = st.lists(st.integers(-400, 400).map(lambda i: i / 10), min_size=1, max_size=30, unique=True)


@settings(max_examples=200, deadline=None)
@given(
    logits=logit_lists,
    temperature=st.floats(0.05, 20),
    top_k=st.none() | st.integers(1, 40),
    top_p=st.none() | st.floats(0.01, 1),
)
def test_distribution_is_the_definition(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Against the definition in plain Python: weights, the k likeliest, the fewest that hold p."""
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
    total = sum(weights[i] for i in kept)
    expected = [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]

    got = next_token_distribution(torch.tensor(logits, dtype=torch.float64), temperature, top_k, top_p)

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
    ],
)
def test_wrong_setting_is_named(values: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        next_token_distribution(torch.zeros(3), **values)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite(bad: float) -> None:
    with pytest.raises(UserError, match="not finite"):
        next_token_distribution(torch.tensor([0.0, bad]))


def test_draws_follow_the_distribution() -> None:
    """Chi-square over one draw from each of many seeds; 22.46 is its 99.9 % point at 6 degrees of freedom."""
    model, prompt, draws = Transformer(TINY), [3, 1, 4], 1500
    expected = next_token_distribution(model(torch.tensor([prompt]))[0, -1].detach(), 0.7, top_k=7) * draws
    counts = torch.zeros(TINY.vocab_size, dtype=torch.float64)
    for seed in range(draws):
        (token,) = generate(model, prompt, count=1, temperature=0.7, top_k=7, seed=seed)
        counts[token] += 1
    support = expected > 0
    assert int(support.sum()) == 7 and counts[~support].sum() == 0
    assert float(((counts - expected)[support] ** 2 / expected[support]).sum()) < 22.46


def test_generation_is_the_forward_pass_step_by_step() -> None:
    """Each token is drawn from the model on what came before, cut to the context."""
    model = Transformer(TINY)
    history, generator = [2, 7], torch.Generator().manual_seed(3)
    for token in generate(model, history, count=60, temperature=2, seed=3):
        logits = model(torch.tensor([history[-TINY.context :]]))[0, -1].detach()
        assert token == int(torch.multinomial((logits.double() / 2).softmax(-1), 1, generator=generator))
        history.append(token)
    assert len(history) == 62


def test_generation_depends_on_the_seed_alone() -> None:
    model = Transformer(TINY)
    first, again, other = (list(generate(model, [1], count=40, seed=seed)) for seed in (5, 5, 6))
    assert first == again != other


def test_generation_ends_before_the_end_of_text() -> None:
    endless = list(generate(Transformer(TINY), [1], count=40, seed=5))
    end = endless[3]
    assert list(generate(Transformer(TINY, end_of_text=end), [1], count=40, seed=5)) == endless[: endless.index(end)]


def test_empty_prompt_starts_from_the_end_of_text() -> None:
    model = Transformer(TINY, end_of_text=4)
    assert list(generate(model, [], count=9, seed=1)) == list(generate(model, [4], count=9, seed=1))
    with pytest.raises(UserError, match="empty prompt"):
        next(generate(Transformer(TINY), [], count=1))


@pytest.mark.parametrize("token", [8, -1])
def test_token_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(UserError, match=f"token {token} "):
        next(generate(Transformer(TINY), [0, token], count=1))


def test_model_that_diverged() -> None:
    model = Transformer(TINY)
    with torch.no_grad():
        model.head.weight[3] = math.nan
    with pytest.raises(UserError, match="not finite"):
        next(generate(model, [0], count=1))


@pytest.mark.parametrize("text", ["plain", "héllo → 日本 👩‍👩‍👧\n\n naïve  x", "𝔘" * 7, " "])
def test_stream_gives_whole_characters(text: str) -> None:
    tokenizer, _ = load_tokenizer(TOKENIZER)
    pieces = list(decode_stream(tokenizer, encode_prompt(tokenizer, text)))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_stream_does_not_wait_longer_than_it_must() -> None:
    tokenizer, _ = load_tokenizer(TOKENIZER)
    tokens = encode_prompt(tokenizer, "aé b")
    fed: list[int] = []

    def feed() -> Iterator[int]:
        for token in tokens:
            fed.append(token)
            yield token

    for piece in decode_stream(tokenizer, feed()):
        assert tokenizer.decode(fed).endswith(piece)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1023), max_size=40))
def test_stream_of_any_tokens_is_their_decoding(tokens: list[int]) -> None:
    tokenizer, _ = load_tokenizer(TOKENIZER)
    assert "".join(decode_stream(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_special_tokens_in_a_prompt_are_text() -> None:
    tokenizer, end = load_tokenizer(TOKENIZER)
    tokens = encode_prompt(tokenizer, "<|endoftext|>")
    assert end not in tokens and tokenizer.decode(tokens) == "<|endoftext|>"


def test_prompt_that_is_not_text() -> None:
    tokenizer, _ = load_tokenizer(TOKENIZER)
    with pytest.raises(UserError, match="UTF-8"):
        encode_prompt(tokenizer, "a\udcff")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 1 and 2, of different weights."""
    config = RunConfig(model=ModelConfig(context=8, dim=16, num_layers=1, head_std=1.0))
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(config, folder / "config.json")
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    for step in (1, 2):
        model = Transformer(config.model, seed=step)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        checkpoint.save(folder, checkpoint.Progress(step, step, end_of_text=0), model, [optimizer], keep=2)
    return folder


def test_load_run(run: Path) -> None:
    cpu = torch.device("cpu")
    config = RunConfig(model=ModelConfig(context=8, dim=16, num_layers=1, head_std=1.0))
    for step, seed in ((None, 2), (1, 1)):
        model, tokenizer = load_run(run, cpu, step=step)
        torch.testing.assert_close(model.head.weight, Transformer(config.model, seed=seed).head.weight, rtol=0, atol=0)
        assert model.end_of_text == 0 and tokenizer.get_vocab_size() == 1024


def test_load_run_names_what_is_wrong(run: Path, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="not a run folder"):
        load_run(tmp_path, cpu)
    with pytest.raises(UserError, match="no checkpoint of step 7; it has 1, 2"):
        load_run(run, cpu, step=7)
    weights = run / "checkpoints" / "step-000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(UserError, match="damaged"):
        load_run(run, cpu)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="no checkpoint yet"):
        load_run(run, cpu)


def test_load_run_with_another_tokenizer(run: Path) -> None:
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text.replace('"vocab_size": 1024', '"vocab_size": 1000'))
    with pytest.raises(UserError, match="belongs to another run"):
        load_run(run, torch.device("cpu"))
