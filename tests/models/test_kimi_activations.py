"""Activations of a whole network are those of its parts; and, on a GPU, what autograd saves there."""

from dataclasses import replace

import pytest
import torch

from fathom.kernels import use_backend
from fathom.models import activations, transformer
from fathom.models.activations import gpu_activation_bytes
from fathom.models.config import ResidualConfig
from fathom.models.kimi_config import KimiConfig
from fathom.models.kimi_linear import KimiLinear

CONFIG = KimiConfig(
    vocab_size=56, context=192, dim=32, num_layers=5, num_heads=2, head_dim=16, mlp_dim=48, kv_rank=16, shared_key_dim=8,
    num_experts=8, active_experts=2, expert_dim=24, residual=ResidualConfig(rule="block", block_size=4),
)  # fmt: skip
K3 = {"full_rank_gate": True, "decay_floor": -5.0, "query_rank": 24, "mla_gate": True, "latent_dim": 16}


@pytest.mark.parametrize("options", [{}, {"document_mask": True}, K3])
@pytest.mark.parametrize("rule", ["prenorm", "block"])
def test_a_network_keeps_what_its_parts_keep(rule: str, options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole forward pass at another length than the parts were counted at."""
    config = replace(CONFIG, **options)
    if rule == "prenorm":
        config = replace(config, residual=ResidualConfig(rule="prenorm"))
    monkeypatch.setattr(transformer, "initialize", lambda *_: None)
    tokens, targets = (torch.empty(3, 192, dtype=torch.int64, device="meta") for _ in range(2))
    with torch.device("meta"), use_backend("triton"):
        model = activations._stand_in(KimiLinear(config, end_of_text=0))
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
        found = activations._saved(model, lambda: model.loss(tokens, targets))
    block = {} if rule == "block" else {"residual": ResidualConfig(rule="block", block_size=4)}
    parts = gpu_activation_bytes(replace(config, **block), 3, 192)
    assert found == parts["sublayers"] + parts["head and loss"] + parts[rule]
