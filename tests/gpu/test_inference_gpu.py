"""Serving on a GPU: CUDA graphs are the same step, the kernels serve every AttnRes engine, and a step's launches are counted."""

import pytest
import torch

from fathom.inference.engine import Engine
from fathom.inference.generate import generate
from fathom.inference.sampling import Sampling
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.transformer import Transformer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8], [4, 6, 2], [7, 7]]
RESIDUALS = {
    "prenorm": ResidualConfig(rule="prenorm"),
    "block": ResidualConfig(rule="block", block_size=3),
    "full": ResidualConfig(rule="full"),
    "mhc": ResidualConfig(rule="mhc"),
}


def build(rule: str, **settings: int) -> Transformer:
    shape = {"vocab_size": 61, "context": 64, "dim": 128, "num_layers": 6, "num_heads": 4, "num_kv_heads": 2} | settings
    model = Transformer(ModelConfig(**shape, head_std=2.0, residual=RESIDUALS[rule]), end_of_text=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.stream.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.cuda()


@pytest.mark.parametrize("rule", RESIDUALS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_are_the_same_step(rule: str, dtype: torch.dtype) -> None:
    """Logits of ragged batches of every bucket, and after slots are used again; the same bits where the kernels are the same."""
    plain, graphed = (
        Engine(build(rule), slots=5, chunk=4, dtype=dtype, cuda_graphs=graphs) for graphs in (False, True)
    )
    for rows in (5, 1, 2, 3, 5):
        for engine in (plain, graphed):
            engine.prefill(PROMPTS[:rows])
        for step in range(6):
            tokens = [(7 * step + row) % 61 for row in range(rows)]
            expected, found = plain.decode(tokens), graphed.decode(tokens)
            # The graph's attention spans the whole cache, so that its sums may be cut differently.
            close = 1e-4 if dtype == torch.float32 else 5e-2
            assert float((found - expected).float().norm() / expected.float().norm()) < close


@pytest.mark.parametrize("rule", RESIDUALS)
def test_decode_is_the_forward_pass(rule: str) -> None:
    """bf16: no further from the float32 forward pass than twice the bf16 forward pass itself."""
    single, engine = build(rule), Engine(build(rule), slots=5, dtype=torch.bfloat16, cuda_graphs=True)
    histories, logits = [list(prompt) for prompt in PROMPTS], engine.prefill(PROMPTS)
    found = full = 0.0
    for step in range(5):
        for history, row in zip(histories, logits, strict=True):
            tokens = torch.tensor([history], device="cuda")
            with torch.no_grad():
                exact = single(tokens)[0, -1]
                with torch.autocast("cuda", torch.bfloat16):
                    rounded = single(tokens)[0, -1].float()
            found += float((row.float() - exact).square().sum())
            full += float((rounded - exact).square().sum())
        given = [(5 * step + row) % 60 + 1 for row in range(5)]
        for history, token in zip(histories, given, strict=True):
            history.append(token)
        logits = engine.decode(given)
    assert found**0.5 < 2 * full**0.5


def test_generation_with_graphs() -> None:
    sampling = Sampling(tokens=30, temperature=0)
    answers = [
        [p.token for p in generate(Engine(build("block"), slots=3, cuda_graphs=graphs), PROMPTS, sampling)]
        for graphs in (False, True)
    ]
    assert answers[0] == answers[1]


def test_a_step_leaves_the_other_slots_alone() -> None:
    """Three rows of five slots in use: the graph of four rows would write to a slot that waits."""
    plain, graphed = (Engine(build("block"), slots=5, cuda_graphs=graphs) for graphs in (False, True))
    for engine in (plain, graphed):
        engine.prefill(PROMPTS)
        engine.decode([1, 2, 3])
    expected, found = (engine.decode([1, 2, 3, 4, 5]) for engine in (plain, graphed))
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_cache_and_graphs_allocate_once() -> None:
    engine = Engine(build("block"), slots=4, cuda_graphs=True)
    engine.prefill(PROMPTS[:4])
    engine.decode([1, 2, 3, 4])
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        engine.decode([1, 2, 3, 4])
    assert torch.cuda.memory_allocated() == before
