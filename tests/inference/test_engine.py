"""Prefill and decode are the forward pass: every rule, ragged batches, chunks, documents, reused slots; and bad input."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fathom.errors import UserError
from fathom.inference.engine import Engine
from fathom.inference.prenorm import FusedPreNorm
from fathom.models.config import ModelConfig
from fathom.models.layers import RMSNorm
from fathom.models.transformer import Transformer
from fathom.stream import PreNorm
from tests.residuals.zoo import CASES, config

TINY = {"vocab_size": 29, "context": 24, "dim": 16, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_std": 2.0}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8], [4, 6, 2]]
STEPS = 8


def build(case: str = "block heads", dtype: torch.dtype = torch.float64, **settings: Any) -> Transformer:
    """A model whose rule is away from its start: every parameter counts."""
    residual = settings.pop("residual", None) or config(case)
    model = Transformer(ModelConfig(**{**TINY, **settings}, residual=residual), end_of_text=0).to(dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.stream.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def expected(model: Transformer, tokens: list[int]) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens]))[0, -1]


def assert_decodes(engine: Engine, reference: Transformer, prompts: list[list[int]], steps: int = STEPS) -> float:
    """The largest difference between the engine's logits and the forward pass, over prefill and ``steps`` of decode."""
    histories = [list(prompt) for prompt in prompts]
    generator = torch.Generator().manual_seed(0)
    worst, logits = 0.0, engine.prefill(prompts)
    for _ in range(steps + 1):
        for history, row in zip(histories, logits, strict=True):
            worst = max(worst, float((row - expected(reference, history)).abs().max()))
        tokens = torch.randint(1, reference.config.vocab_size, (len(prompts),), generator=generator).tolist()
        for history, token in zip(histories, tokens, strict=True):
            history.append(token)
        logits = engine.decode(tokens)
    assert worst < 1e-10
    return worst


@pytest.mark.parametrize("chunk", [None, 1, 3, 4])
@pytest.mark.parametrize("case", ["prenorm", "full", "block", "block two"])
def test_decode_is_the_forward_pass(case: str, chunk: int | None) -> None:
    """Unequal prompts in one batch, whole and in chunks."""
    settings = {"residual": config("block", block_size=2)} if case == "block two" else {}
    reference, model = (build(case, **settings) for _ in range(2))
    assert_decodes(Engine(model, slots=len(PROMPTS), chunk=chunk), reference, PROMPTS)


@pytest.mark.parametrize("case", CASES)
def test_every_rule_of_the_zoo_is_served(case: str) -> None:
    reference, model = build(case), build(case)
    assert_decodes(Engine(model, slots=len(PROMPTS), chunk=4), reference, PROMPTS, steps=3)


@pytest.mark.parametrize("settings", [{"qk_norm": False}, {"num_kv_heads": None}, {"tie_embeddings": True}])
def test_every_shape_of_model_is_served(settings: dict[str, Any]) -> None:
    reference, model = build("block", **settings), build("block", **settings)
    assert_decodes(Engine(model, slots=len(PROMPTS)), reference, PROMPTS)


@pytest.mark.parametrize("chunk", [None, 3])
def test_attention_stays_inside_a_document(chunk: int | None) -> None:
    """End-of-text tokens in prompts, at their ends, at a chunk's edge and among the decoded ones."""
    reference, model = build("block", document_mask=True), build("block", document_mask=True)
    engine = Engine(model, slots=3, chunk=chunk)
    prompts = [[3, 0, 4, 1, 5, 0, 2, 7], [6, 0], [0]]
    histories, logits = [list(prompt) for prompt in prompts], engine.prefill(prompts)
    for tokens in ([1, 0, 2], [0, 5, 3], [4, 6, 0], [7, 7, 7]):
        for history, row in zip(histories, logits, strict=True):
            assert float((row - expected(reference, history)).abs().max()) < 1e-10
        for history, token in zip(histories, tokens, strict=True):
            history.append(token)
        logits = engine.decode(tokens)


def test_slots_are_used_again() -> None:
    """A slot that held a long sequence answers a short one; others keep theirs; rows that rest lose theirs."""
    reference = build("block")
    engine = Engine(build("block"), slots=3)
    assert_decodes(engine, reference, [PROMPTS[2], PROMPTS[0], PROMPTS[3]])
    assert_decodes(engine, reference, PROMPTS[1:])
    engine.prefill(PROMPTS[:3])
    again = engine.prefill([[8, 8]], first=1)
    assert float((again[0] - expected(reference, [8, 8])).abs().max()) < 1e-10
    logits = engine.decode([7, 7, 7])
    for row, history in zip(logits, [PROMPTS[0], [8, 8], PROMPTS[2]], strict=True):
        assert float((row - expected(reference, [*history, 7])).abs().max()) < 1e-10
    logits = engine.decode([1, 1, 1], rows=[True, False, True])
    assert engine.lengths == [9, 0, 13]
    assert float((logits[2] - expected(reference, [*PROMPTS[2], 7, 1])).abs().max()) < 1e-10


def test_cache_is_allocated_once() -> None:
    engine = Engine(build("block"), slots=4)
    places = engine.cache.keys.data_ptr(), engine.cache.values.data_ptr()
    engine.prefill(PROMPTS)
    engine.decode([1, 2, 3, 4])
    engine.reset()
    assert (engine.cache.keys.data_ptr(), engine.cache.values.data_ptr()) == places
    assert engine.cache.nbytes == 2 * 3 * 4 * 24 * 2 * 4 * 8


@pytest.mark.parametrize("case", ["prenorm", "full", "block", "ddl", "muddformer", "value_residual"])
def test_bf16_is_no_worse_than_the_full_forward_pass(case: str) -> None:
    """Logits no further from float32's than twice the bf16 full forward pass is itself."""
    single = build(case, torch.float32)
    histories = [list(prompt) for prompt in PROMPTS]
    engine = Engine(build(case, torch.float32), slots=4, dtype=torch.bfloat16)
    assert engine.cache.keys.dtype == engine.model.head.weight.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in engine.model.stream.parameters())
    logits = engine.prefill(PROMPTS)
    found = full = 0.0
    for tokens in ([1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]):
        for history, row in zip(histories, logits, strict=True):
            exact = expected(single, history)
            with torch.autocast("cpu", torch.bfloat16):
                rounded = expected(single, history).float()
            found += float((row.float() - exact).square().sum())
            full += float((rounded - exact).square().sum())
        for history, token in zip(histories, tokens, strict=True):
            history.append(token)
        logits = engine.decode(tokens)
    assert found**0.5 < 2 * full**0.5


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1] * 25], r"prompt 0 has 25 tokens: a sequence may have 24 here"),
        ([[1], [1, 29]], r"token 29 of prompt 1 is not in the model's vocabulary of 29"),
        ([[-1]], r"token -1 of prompt 0"),
        ([[1], [1], [1]], r"3 prompts from slot 0 on: the engine has 2 slots"),
        ([], r"0 prompts"),
    ],
)
def test_bad_prompt_is_one_line_and_the_engine_goes_on(prompts: list[list[int]], message: str) -> None:
    reference, engine = build("block"), Engine(build("block"), slots=2)
    with pytest.raises(UserError, match=message):
        engine.prefill(prompts)
    assert_decodes(engine, reference, PROMPTS[:2])


def test_bad_decode_is_one_line_and_the_engine_goes_on() -> None:
    reference, engine = build("block"), Engine(build("block"), slots=2, capacity=8)
    with pytest.raises(UserError, match="slot 0 holds 0 of 8 tokens"):
        engine.decode([1])
    engine.prefill([[1] * 8, [2]])
    with pytest.raises(UserError, match="slot 0 holds 8 of 8 tokens"):
        engine.decode([1, 1])
    with pytest.raises(UserError, match="token 29 is not in"):
        engine.decode([29, 1])
    with pytest.raises(UserError, match="3 tokens to decode"):
        engine.decode([1, 1, 1])
    assert engine.lengths == [8, 1]
    assert_decodes(engine, reference, [[7], [2, 3]], steps=4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots": 0}, "slots is 0"),
        ({"capacity": 25}, "capacity is 25: it must be between 1 and 24"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_wrong_setting_is_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Engine(build("block"), **settings)


def test_nothing_of_a_broken_model_stays_behind() -> None:
    """NaN in the cache would spoil every later answer, masked or not."""
    reference, engine = build("block"), Engine(build("block"), slots=2)
    weight = engine.model.embedding.weight
    with torch.no_grad():
        kept = weight[5].clone()
        weight[5] = math.nan
        assert engine.prefill([[1, 2, 5, 5], [5] * 24]).isnan().all()
        weight[5] = kept
    engine.reset()
    assert_decodes(engine, reference, PROMPTS[:2])


@pytest.mark.parametrize("norm", [RMSNorm(8, 1e-6), torch.tanh])
def test_fused_prenorm_is_prenorm(norm: Any) -> None:
    """With the norm in the kernel, and with a norm that is any function."""
    states: list[Any] = []
    streams = PreNorm(3, 8), FusedPreNorm(3, 8)
    for stream in streams:
        state = stream.start(torch.ones(2, 8))
        for site in range(3):
            x, state = stream.read(state, site, norm)
            state = stream.write(state, site, x * torch.arange(8) + site)
        states.append((stream.running_sum(state), stream.finish(state, norm)))
    for expected_value, found in zip(*states, strict=True):
        torch.testing.assert_close(found, expected_value, rtol=0, atol=0)
