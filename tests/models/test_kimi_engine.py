"""Prefill and decode in the engine are the network's own forward pass, with states, latents and documents in one cache."""

import copy
from dataclasses import replace

import pytest
import torch

from fathom.errors import UserError
from fathom.inference.engine import Engine
from fathom.inference.generate import generate
from fathom.inference.sampling import Sampling
from fathom.models.config import ResidualConfig
from fathom.models.kimi_counts import cache_bytes
from fathom.models.kimi_linear import build
from fathom.models.transformer import Transformer
from tests.models.test_kimi_linear import K3_OPTIONS, SMALL

BLOCK = ResidualConfig(rule="block", block_size=3)
PROMPTS = [[5, 9, 0, 7, 3, 2, 8], [4], [6, 1, 0, 0, 11]]
MORE = [[12, 0, 3, 9], [0, 2, 2, 5], [7, 8, 0, 1]]


def model(residual: ResidualConfig = BLOCK, **options) -> Transformer:
    net = build(replace(SMALL, residual=residual, **options), end_of_text=0).double()
    generator = torch.Generator().manual_seed(9)
    for name, parameter in net.named_parameters():
        if name.startswith("stream.") or "router.bias" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5
    return net.eval()


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize(
    ("residual", "options"),
    [
        (BLOCK, {}),
        (BLOCK, {"document_mask": True}),
        (ResidualConfig(rule="prenorm"), {"document_mask": True}),
        (ResidualConfig(rule="full"), K3_OPTIONS),
    ],
)
def test_prefill_and_decode_are_the_forward_pass(residual: ResidualConfig, options: dict, chunk: int | None):
    """Ragged prompts, in pieces and whole; slots that were used before."""
    net = model(residual, **options)
    engine = Engine(copy.deepcopy(net), slots=3, chunk=chunk)
    engine.prefill([[3] * 16, [1, 2], [9, 0, 8]])

    def expected(texts: list[list[int]]) -> torch.Tensor:
        return torch.stack([net(torch.tensor([text]))[0, -1] for text in texts])

    texts = [list(prompt) for prompt in PROMPTS]
    torch.testing.assert_close(engine.prefill(texts), expected(texts))
    for step in range(4):
        tokens = [more[step] for more in MORE]
        for text, token in zip(texts, tokens, strict=True):
            text.append(token)
        torch.testing.assert_close(engine.decode(tokens), expected(texts))


def test_rows_that_rest_are_put_back_by_a_prefill():
    net = model()
    engine = Engine(copy.deepcopy(net), slots=2)
    engine.prefill([[1, 2, 3], [4, 5]])
    engine.decode([6, 0], rows=[True, False])
    engine.prefill([[7, 8, 9]], first=1)
    found = engine.decode([3, 1])
    torch.testing.assert_close(found[0], net(torch.tensor([[1, 2, 3, 6, 3]]))[0, -1])
    torch.testing.assert_close(found[1], net(torch.tensor([[7, 8, 9, 1]]))[0, -1])


def test_it_samples_and_serves_bf16():
    net = model().float()
    engine = Engine(copy.deepcopy(net), slots=2)
    pieces = [p for p in generate(engine, [[5, 9], [4]], Sampling(tokens=4, temperature=0.0)) if p.prompt == 0]
    text = [5, 9]
    for piece in pieces:
        expected = net(torch.tensor([text]))[0, -1].argmax().item()
        assert piece.token == expected or (piece.ending == "end" and expected == 0)
        text.append(expected)
    exact = Engine(copy.deepcopy(net), slots=2).prefill([[5, 9, 3]])
    low = Engine(copy.deepcopy(net), slots=2, dtype=torch.bfloat16)
    assert low.cache.states.dtype == torch.float32 and low.cache.latents.dtype == torch.bfloat16
    assert (low.prefill([[5, 9, 3]]).float() - exact).abs().max() < 0.2 * exact.abs().max()


def test_the_cache_takes_what_is_counted():
    engine = Engine(model().float(), slots=3, capacity=12, dtype=torch.bfloat16)
    assert engine.cache.nbytes == 3 * sum(cache_bytes(engine.config, 12).values())


def test_several_ranks_are_refused():
    with pytest.raises(UserError, match="one rank"):
        Engine(model(), shards=object())  # type: ignore[arg-type]
