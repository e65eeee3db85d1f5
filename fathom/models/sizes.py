"""Kimi Linear decoders of known size, each a function that checks its own counts.

Table 2 of the paper (arXiv 2603.15031) gives layers, heads, width and the width of an expert. The width of a head, the
compressed cache, the number of experts and the dense layer's width are not said; here they are Kimi Linear's: 128, 512 + 64,
8 of 64 and a shared one (its own scaling runs'), four times the width. 1.8 to 2.7 % of the published counts are missing then:
a dense layer of about six times the width would be one way to fill them. Kimi K3 has a vision tower and a layer that predicts a
second token besides, which are not built; the published counts of its decoder are met without them.
"""

from collections.abc import Callable

from fathom.models import kimi_counts
from fathom.models.accounting import parameters
from fathom.models.config import ResidualConfig
from fathom.models.kimi_config import KimiConfig


def active_parameters(config: KimiConfig) -> int:
    """The parameters that a token meets, embedding and head apart."""
    counts = parameters(config)
    sublayers = kimi_counts.parameters(config)
    return kimi_counts.active(config, sublayers) + counts["norms"] + counts["residual rule"]


def _checked(config: KimiConfig, *, total: int, active: int) -> KimiConfig:
    """``config``, whose counts must be these under the residual rule given."""
    found = sum(parameters(config).values()), active_parameters(config)
    assert found == (total, active), (
        f"the config has {found[0]} parameters, {found[1]} active: not {total} and {active}"
    )
    return config


def _table_2(layers: int, dim: int, expert_dim: int, *, total: int, active: int) -> KimiConfig:
    config = KimiConfig(
        vocab_size=163_840, context=8192, dim=dim, num_layers=layers, num_heads=layers, head_dim=128, mlp_dim=4 * dim,
        kv_rank=512, shared_key_dim=64, num_experts=64, active_experts=8, expert_dim=expert_dim,
        residual=ResidualConfig(rule="block", num_blocks=8),
    )  # fmt: skip
    return _checked(config, total=total, active=active)


def table_2_194m() -> KimiConfig:
    """Table 2, 194 M active: 12 layers of width 896."""
    return _table_2(12, 896, 400, total=1_144_718_380, active=188_793_900)


def table_2_241m() -> KimiConfig:
    """Table 2, 241 M active: 13 layers of width 960."""
    return _table_2(13, 960, 432, total=1_385_758_453, active=235_110_133)


def table_2_296m() -> KimiConfig:
    """Table 2, 296 M active: 14 layers of width 1024."""
    return _table_2(14, 1024, 464, total=1_662_577_356, active=289_336_012)


def table_2_436m() -> KimiConfig:
    """Table 2, 436 M active: 16 layers of width 1168, the size of the paper's ablations."""
    return _table_2(16, 1168, 528, total=2_364_444_464, active=427_620_144)


def table_2_528m() -> KimiConfig:
    """Table 2, 528 M active: 17 layers of width 1264."""
    return _table_2(17, 1264, 560, total=2_835_602_556, active=518_741_116)


def kimi_linear_48b() -> KimiConfig:
    """Kimi-Linear-48B-A3B with the paper's blocks of 6 sublayers: 9 and the embedding."""
    config = KimiConfig(
        vocab_size=163_840, context=4096, dim=2304, num_layers=27, num_heads=32, head_dim=128, mlp_dim=9216,
        kv_rank=512, shared_key_dim=64, num_experts=256, active_experts=8, expert_dim=1024, norm_eps=1e-5,
        residual=ResidualConfig(rule="block", block_size=6),
    )  # fmt: skip
    return _checked(config, total=49_122_935_168, active=2_729_738_624)


def kimi_k3() -> KimiConfig:
    """Kimi K3's decoder: blocks of 24 sublayers, so that the last is shorter; latent experts, gates, SiTU-GLU."""
    config = KimiConfig(
        vocab_size=163_840, context=2**20, dim=7168, num_layers=93, num_heads=96, head_dim=128, mlp_dim=33_792,
        full_rank_gate=True, decay_floor=-5.0, kv_rank=512, shared_key_dim=64, query_rank=1536, mla_gate=True,
        num_experts=896, active_experts=16, shared_experts=2, expert_dim=3072, latent_dim=3584, routed_scaling=1.0,
        mlp_activation="situ", balance="quantile", norm_eps=1e-5,
        residual=ResidualConfig(rule="block", block_size=24, eps=1e-5),
    )  # fmt: skip
    return _checked(config, total=2_779_484_476_000, active=103_015_207_520)


def nano() -> KimiConfig:
    """For one GPU: 87 M active (100 M with the head) of 385 M parameters."""
    config = KimiConfig(
        vocab_size=16_384, context=1024, dim=768, num_layers=12, num_heads=6, head_dim=128, mlp_dim=3072,
        kv_rank=256, shared_key_dim=64, num_experts=32, active_experts=4, expert_dim=384, balance_rate=1e-2, document_mask=True,
        residual=ResidualConfig(rule="block", num_blocks=8),
    )  # fmt: skip
    return _checked(config, total=384_977_686, active=87_313_174)


def micro() -> KimiConfig:
    """For a CPU: learns the embedded text within a minute."""
    config = KimiConfig(
        vocab_size=1024, context=128, dim=64, num_layers=4, num_heads=2, head_dim=32, mlp_dim=192,
        kv_rank=32, shared_key_dim=8, num_experts=8, active_experts=2, expert_dim=48, balance_rate=1e-2,
        residual=ResidualConfig(rule="block", num_blocks=4),
    )  # fmt: skip
    return _checked(config, total=512_670, active=215_710)


SIZES: dict[str, Callable[[], KimiConfig]] = {
    "micro": micro,
    "nano": nano,
    "194m": table_2_194m,
    "241m": table_2_241m,
    "296m": table_2_296m,
    "436m": table_2_436m,
    "528m": table_2_528m,
    "48b": kimi_linear_48b,
    "k3": kimi_k3,
}


PUBLISHED = {
    **{f"{size}m": f"published: {size} M active without embeddings (Table 2); found {found}: see fathom/models/sizes.py"
       for size, found in ((194, "2.7 % less"), (241, "2.4 % less"), (296, "2.3 % less"), (436, "1.9 % less"),
                           (528, "1.8 % less"))},
    "48b": "published: 48 B, 3 B active (arXiv 2510.26692); the config has 49.1 B and 3.1 B with the head: the name rounds",
    "k3": "published: 2.78 T, 104.2 B active (arXiv 2607.24653, Table 1); met, the head counted and the embedding not",
}  # fmt: skip
"""What is published of a size, and where the config disagrees."""
