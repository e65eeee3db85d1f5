"""Answers: each is the forward pass step by step, whatever its neighbours; endings, stop texts, and what is refused."""

import math
from pathlib import Path

import pytest
import torch

import fathom
from fathom.errors import UserError
from fathom.inference.engine import Engine
from fathom.inference.generate import Piece, generate
from fathom.inference.sampling import Sampling, draw, next_token_distribution, penalize
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.transformer import Transformer
from fathom.train.tokenizer import load_tokenizer

TOKENIZER = Path(fathom.__path__[0]) / "assets" / "sotu-tokenizer.json"
TINY = ModelConfig(
    vocab_size=8, context=20, dim=16, num_layers=2, num_heads=2, head_std=2.0, residual=ResidualConfig(num_blocks=2)
)
PROMPTS = [[2, 7], [1], [3, 1, 4, 1, 5], [6, 6, 6], [2]]


def model(end: int | None = None, **settings: int) -> Transformer:
    config = ModelConfig(**{**vars(TINY), **settings})
    return Transformer(config, end_of_text=end).double()


def tokens_of(pieces: list[Piece], prompt: int = 0) -> list[int]:
    return [piece.token for piece in pieces if piece.prompt == prompt and piece.token is not None]


def by_forward_passes(net: Transformer, prompt: list[int], sampling: Sampling, seed: int) -> list[int]:
    """The definition: every token drawn from a forward pass over all that came before."""
    history, random = list(prompt), torch.Generator().manual_seed(seed)
    for _ in range(sampling.tokens):
        logits = net(torch.tensor([history]))[0, -1].detach()
        seen = torch.zeros(8, dtype=torch.bool)
        seen[history] = True
        logits = penalize(logits, seen, sampling.repetition_penalty)
        distribution = next_token_distribution(
            logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
        )
        token = int(draw(distribution[None], torch.rand(1, generator=random, dtype=torch.float64)))
        if token == net.end_of_text:
            break
        history.append(token)
    return history[len(prompt) :]


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(tokens=15, seed=3),
        Sampling(tokens=12, temperature=0),
        Sampling(tokens=15, temperature=2, top_k=6, top_p=0.9, min_p=0.05, repetition_penalty=1.3, seed=7),
    ],
)
def test_answers_are_the_forward_pass_step_by_step(slots: int, sampling: Sampling) -> None:
    """More prompts than slots, of unequal lengths, some ended by the model: none depends on its neighbours."""
    reference = model(end=0)
    pieces = list(generate(Engine(model(end=0), slots=slots), PROMPTS, sampling))
    for index, prompt in enumerate(PROMPTS):
        assert tokens_of(pieces, index) == by_forward_passes(reference, prompt, sampling, sampling.seed + index)
        endings = [piece.ending for piece in pieces if piece.prompt == index]
        full = len(tokens_of(pieces, index)) == sampling.tokens
        assert endings[-1] == ("length" if full else "end") and not any(endings[:-1])


def test_a_sequence_outgrows_its_slot() -> None:
    """It goes on from the newest half of the slot, again and again; until it is full, the older half counts."""
    net, sampling = model(), Sampling(tokens=30, temperature=2, seed=3)
    found = tokens_of(list(generate(Engine(model(), capacity=6), [[2, 7]], sampling)))
    history, held, random = [2, 7], [2, 7], torch.Generator().manual_seed(3)
    for token in found:
        logits = net(torch.tensor([held]))[0, -1].detach()
        uniform = torch.rand(1, generator=random, dtype=torch.float64)
        assert token == int(draw(next_token_distribution(logits, 2)[None], uniform))
        history.append(token)
        held = [*held, token] if len(held) < 6 else history[-3:]
    assert len(found) == 30


def test_a_neighbour_that_outgrows_its_slot_changes_nothing() -> None:
    sampling = Sampling(tokens=40, temperature=2, seed=1)
    together = list(generate(Engine(model(), slots=3), [[1] * 18, [2], [3] * 20], sampling))
    for index, prompt in enumerate([[1] * 18, [2], [3] * 20]):
        alone = generate(Engine(model()), [prompt], Sampling(tokens=40, temperature=2, seed=1 + index))
        assert tokens_of(together, index) == tokens_of(list(alone))


def test_draws_follow_the_distribution() -> None:
    """Chi-square over one draw from each of many seeds; 22.46 is its 99.9 % point at 6 degrees of freedom."""
    prompt, draws = [3, 1, 4], 1500
    expected = next_token_distribution(model()(torch.tensor([prompt]))[0, -1].detach(), 0.7, top_k=7) * draws
    counts = torch.zeros(8, dtype=torch.float64)
    engine = Engine(model(), slots=50)
    for piece in generate(engine, [prompt] * draws, Sampling(tokens=1, temperature=0.7, top_k=7)):
        counts[piece.token] += 1
    support = expected > 0
    assert int(support.sum()) == 7 and counts[~support].sum() == 0
    assert float(((counts - expected)[support] ** 2 / expected[support]).sum()) < 22.46


def test_generation_depends_on_the_seed_alone() -> None:
    engine = Engine(model())
    first, again, other = (tokens_of(list(generate(engine, [[1]], Sampling(40, seed=seed)))) for seed in (5, 5, 6))
    assert first == again != other


def test_empty_prompt_begins_a_document() -> None:
    sampling = Sampling(tokens=9, seed=1)
    engine = Engine(model(end=4))
    assert list(generate(engine, [[]], sampling)) == list(generate(engine, [[4]], sampling))
    with pytest.raises(UserError, match="the prompt is empty"):
        generate(Engine(model()), [[]])
    with pytest.raises(UserError, match="prompt 2 is empty"):
        generate(Engine(model()), [[1], []])


def text_engine(slots: int = 1) -> Engine:
    tokenizer, end = load_tokenizer(TOKENIZER)
    return Engine(model(end, vocab_size=1024, context=64), tokenizer, slots=slots)


def test_text_of_answers() -> None:
    engine, prompts = text_engine(slots=2), ["The state of the Union", "", "It is"]
    pieces = list(generate(engine, prompts, Sampling(tokens=40, seed=2)))
    for index in range(3):
        text = "".join(piece.text for piece in pieces if piece.prompt == index)
        assert text == engine.tokenizer.decode(tokens_of(pieces, index))


def test_stop_text_ends_an_answer() -> None:
    engine = text_engine()
    whole = "".join(piece.text for piece in generate(engine, ["It is"], Sampling(tokens=40, seed=2)))
    stop = whole[20:24]
    pieces = list(generate(engine, ["It is"], Sampling(tokens=40, seed=2, stop=(stop, "no such text"))))
    assert "".join(piece.text for piece in pieces) == whole[: whole.index(stop)]
    assert [piece.ending for piece in pieces if piece.ending] == ["stop"] and pieces[-1].ending == "stop"


def test_model_that_diverged_leaves_a_usable_engine() -> None:
    """Also where a short sequence takes the slot of a long one that left NaN behind."""
    engine, prompts = Engine(model(), slots=2), [[1], [2] * 12]
    before = list(generate(engine, prompts, Sampling(tokens=5)))
    kept = engine.model.embedding.weight[3].clone()
    with torch.no_grad():
        engine.model.embedding.weight[3] = math.nan
    with pytest.raises(UserError, match="not finite"):
        list(generate(engine, [[3] * 15, [1]], Sampling(tokens=5)))
    with torch.no_grad():
        engine.model.embedding.weight[3] = kept
    assert list(generate(engine, prompts, Sampling(tokens=5))) == before


def test_bad_prompts_are_refused_before_anything_runs() -> None:
    engine = Engine(model(), slots=2)
    for prompts, message in (
        ([[1], [1] * 21], "prompt 2 has 21 tokens: a sequence may have 20 here"),
        ([[8]], "token 8 of the prompt is not in the model's vocabulary of 8"),
        (["text"], "need the tokenizer"),
    ):
        with pytest.raises(UserError, match=message):
            generate(engine, prompts)
    with pytest.raises(UserError, match="need the tokenizer"):
        generate(engine, [[1]], Sampling(stop=("a",)))
    assert engine.lengths == [0, 0]
    assert len(list(generate(engine, [[1]], Sampling(tokens=5)))) == 5


def test_tokenizer_of_another_model() -> None:
    tokenizer, _ = load_tokenizer(TOKENIZER)
    with pytest.raises(UserError, match="the tokenizer has 1024 tokens, the model 8: it belongs to another run"):
        Engine(model(), tokenizer)


def test_only_the_latest_generation_goes_on() -> None:
    engine = Engine(model())
    older = generate(engine, [[1]], Sampling(tokens=9))
    next(older)
    newer = list(generate(engine, [[2]], Sampling(tokens=9)))
    assert len(newer) == 9
    with pytest.raises(UserError, match="another generation has begun"):
        next(older)
