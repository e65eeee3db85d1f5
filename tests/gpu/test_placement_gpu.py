"""``device_map`` over two GPUs: the same logits, gradients and tokens as on one."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM

from fathom.hf import FathomForCausalLM
from fathom.hf.config import FathomConfig
from fathom.models.config import ModelConfig, ResidualConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]


@pytest.mark.parametrize("rule", ["prenorm", "block", "full", "mhc"])
def test_two_gpus_compute_what_one_does(rule: str, tmp_path: Path) -> None:
    blocks = {"num_blocks": 3} if rule == "block" else {}
    config = ModelConfig(
        vocab_size=61,
        context=64,
        dim=128,
        num_layers=6,
        num_heads=4,
        head_std=1.0,
        residual=ResidualConfig(rule, **blocks),
    )
    model = FathomForCausalLM(FathomConfig.from_model_config(config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.model.stream.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path)
    ends = {"model.embedding": 0, "model.stream": 0, "model.final_norm": 1, "head": 1}
    sublayers = {f"model.sublayers.{site}": int(site >= 5) for site in range(12)}
    two = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={**ends, **sublayers})
    one = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": 0})
    text = torch.randint(61, (2, 32), generator=generator).cuda()
    losses = [each(text, labels=text).loss for each in (one, two)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for (name, expected), found in zip(one.named_parameters(), two.parameters(), strict=True):
        assert found.grad is not None, name
        difference = float((found.grad.cpu() - expected.grad.cpu()).norm())
        assert difference <= 1e-4 * float(expected.grad.norm()) + 1e-7, name
    made = [each.generate(text[:1, :7], max_new_tokens=10, do_sample=False) for each in (one, two)]
    assert torch.equal(*made)
