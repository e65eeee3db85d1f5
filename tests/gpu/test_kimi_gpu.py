"""Kimi Linear on a GPU: fla-core's KDA and the grouped product are the plain equations, and activations are those counted."""

from dataclasses import replace

import pytest
import torch

from fathom.models.activations import gpu_activation_bytes
from fathom.models.config import ResidualConfig
from fathom.models.kimi_linear import build
from tests.models.test_kimi_activations import CONFIG

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
pytest.importorskip("fla.ops", reason="needs fla-core")

BIG = replace(
    CONFIG, dim=256, num_heads=2, head_dim=128, mlp_dim=512, expert_dim=128, kv_rank=64, vocab_size=1024, head_std=1.0
)


def test_fla_s_kernels_and_the_grouped_product_are_the_plain_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients in bf16, with documents, against float32 in PyTorch alone."""
    config = replace(BIG, document_mask=True)
    tokens = torch.randint(1024, (4, 193), generator=torch.Generator().manual_seed(1)).cuda()
    tokens[:, 50:150:20] = 0
    found = {}
    for kernels in (True, False):
        monkeypatch.setenv("FATHOM_KDA", "auto" if kernels else "chunked")
        model = build(config, end_of_text=0).cuda()
        with torch.autocast("cuda", torch.bfloat16, enabled=kernels):
            loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        found[kernels] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"loss": loss}
    for name, truth in found[False].items():
        # Near-ties choose other experts in bf16.
        assert (found[True][name] - truth).norm() < (
            0.3 if "experts" in name or "router" in name else 0.1
        ) * truth.norm(), name


@pytest.mark.parametrize("rule", ["prenorm", "block"])
def test_a_gpu_keeps_what_is_counted(rule: str) -> None:
    """Within 3 %: the kernels' own scratch, and casts of weights, which are left out on both sides."""
    config = replace(
        CONFIG, dim=256, num_heads=2, head_dim=128, mlp_dim=512, expert_dim=128, kv_rank=64, vocab_size=1024
    )
    if rule == "prenorm":
        config = replace(config, residual=ResidualConfig(rule="prenorm"))
    model = build(config).cuda()
    sizes = {p.numel() for p in model.parameters()}
    tokens = torch.zeros(16, 192, dtype=torch.int64, device="cuda")
    found: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().nbytes() // tensor.itemsize not in sizes:
            found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cuda", torch.bfloat16):
        loss = model.loss(tokens, tokens.clone())
    parts = gpu_activation_bytes(config, 16, 192)
    counted = parts["sublayers"] + parts["head and loss"] + parts[rule]
    assert sum(t.untyped_storage().nbytes() for t in found.values()) == pytest.approx(counted, rel=0.03)
    del loss
