"""What recomputation leaves: the bank, once on a rank, and a partial sum for each decoder layer, as PreNorm."""

from dataclasses import replace

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.transformer import Transformer
from fathom.parallel.footprint import kept
from fathom.parallel.plan import make_plan

BATCH, SMALL = 2, ModelConfig(vocab_size=17, context=16, dim=8, num_layers=8, num_heads=2, head_std=1.0)
TENSOR = BATCH * 16 * 8 * 4


def in_tensors(rule: str, level: str, block_size: int | None = None) -> float:
    """Kept on the first rank, whose stages have two decoder layers each, over what rotary tables and tokens take."""
    config = replace(SMALL, residual=ResidualConfig(rule=rule, block_size=block_size))  # type: ignore[arg-type]
    with FakeTensorMode():
        model = Transformer(config)
        return kept(model, make_plan(config, 2, 2, firsts=(0, 4, 8, 12)), 0, BATCH, level) / TENSOR  # type: ignore[arg-type]


def test_full_recomputation_keeps_a_sum_for_each_layer_and_one_copy_of_each_source() -> None:
    prenorm, block = in_tensors("prenorm", "full"), in_tensors("block", "full", 4)
    # PreNorm: what each of four layers begins with, and what two stages give. Blocks of four sublayers end with the stages:
    # half of the layers begin with a source and no sum; the sources b0 .. b3 are there once.
    assert prenorm == pytest.approx(6, abs=0.1)
    assert block == pytest.approx(2 + 4, abs=0.1)


@pytest.mark.parametrize("rule", ["prenorm", "block"])
def test_each_level_keeps_less(rule: str) -> None:
    none, selective, full = (
        in_tensors(rule, level, 4 if rule == "block" else None) for level in ("none", "selective", "full")
    )
    assert none > 1.5 * selective > 3 * full
