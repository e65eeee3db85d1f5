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
WIDE = replace(
    CONFIG, dim=256, num_heads=2, head_dim=128, mlp_dim=512, expert_dim=128, kv_rank=64, vocab_size=1024, head_std=1.0
)
"""Wide enough for a GPU's kernels."""
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


def test_streams_keep_each_sum_and_each_mix_once():
    """Per token: under PreNorm every norm's input and one number of it; under Block every source and every partial sum, the reads
    of several sources, and the scores, norms and denominators that go with them."""
    sites, sources, ahead = 11, 3, 11 + 7 + 3  # blocks of 4, 4 and 2 sublayers, the last one's with the output's read
    mixes, updates, normed = 4 + 3, 3 + 3 + 2, 3
    parts = gpu_activation_bytes(WIDE, 5, 192)
    assert parts["prenorm"] == 5 * 192 * sites * (2 * 256 + 4)
    # Of each mix two numbers for its own backward pass, and its lse, for the update that merges with it.
    rows, numbers = sites + mixes, ahead + sources + 3 * mixes + 3 * (updates + normed)
    queries = 4 * sites * 256  # folded with their gains
    assert parts["block"] == 5 * 192 * (2 * 256 * rows + 4 * numbers) + queries
