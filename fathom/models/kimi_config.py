"""What a Kimi Linear decoder is (arXiv 2510.26692; Kimi K3, arXiv 2607.24653), beside what every decoder has."""

from dataclasses import dataclass, fields
from typing import Literal, get_args

from fathom.errors import UserError
from fathom.models.config import ModelConfig

NOT_OURS = ("num_kv_heads", "qk_norm", "rope_base")
"""Settings of a plain transformer's attention, which has neither a compressed cache nor a recurrent state."""

Activation = Literal["swiglu", "situ"]
Balance = Literal["bias", "quantile", "none"]

REACHING = ("value_residual", "muddformer")
"""The rules that reach into the projections of a plain attention."""


@dataclass(frozen=True)
class KimiConfig(ModelConfig):
    """A Kimi Linear decoder: KDA and MLA interleaved, experts after the first layers.

    ``num_heads`` heads of width ``head_dim`` serve KDA and MLA alike; ``mlp_dim`` is inside the dense layers' MLP.
    """

    architecture: Literal["kimi_linear"] = "kimi_linear"
    """Tells this decoder from a plain transformer in a config.json."""
    mla_every: int = 4
    """Every so many decoder layers attend by MLA, and so does the last; the others by KDA."""
    conv_size: int = 4
    """Taps of KDA's short convolutions."""
    full_rank_gate: bool = False
    """KDA: the output gate is one matrix (Kimi K3), not two of rank head_dim."""
    decay_floor: float | None = None
    """KDA: the smallest log-decay of a step, below 0 (Kimi K3: -5); none if not given."""
    kv_rank: int = 64
    """MLA: width of the compressed keys and values that the cache holds."""
    shared_key_dim: int = 16
    """MLA: width of the key that all heads share."""
    query_rank: int | None = None
    """MLA: width of compressed queries; not compressed if not given."""
    mla_gate: bool = False
    """MLA: a sigmoid gate on the output (Kimi K3)."""
    num_experts: int = 8
    """Routed experts of a layer."""
    active_experts: int = 2
    """Routed experts that a token passes through."""
    shared_experts: int = 1
    """Experts that every token passes through."""
    expert_dim: int = 32
    """Width inside an expert."""
    dense_layers: int = 1
    """The first so many decoder layers have a dense MLP."""
    routed_scaling: float = 2.446
    """What the sum of the routed experts is multiplied by."""
    latent_dim: int | None = None
    """Width that tokens are projected to before the routed experts (Kimi K3's latent MoE); the decoder's own if not given."""
    mlp_activation: Activation = "swiglu"
    """SwiGLU, or Kimi K3's SiTU-GLU."""
    balance: Balance = "bias"
    """How expert loads are evened out: a bias moved by its sign (arXiv 2408.15664), Kimi K3's quantiles, or not at all."""
    balance_rate: float = 1e-3
    """How far a step of training moves the bias (balance bias)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        plain = {field.name: field.default for field in fields(ModelConfig)}
        for name in NOT_OURS:
            if getattr(self, name) != plain[name]:
                raise UserError(f"model.{name} is {getattr(self, name)}: Kimi Linear has no such setting; leave it out")
        for name, known in (("mlp_activation", Activation), ("balance", Balance)):
            if getattr(self, name) not in get_args(known):
                raise UserError(f"model.{name} is {getattr(self, name)!r}: it must be {' or '.join(get_args(known))}")
        for name in ("mla_every", "kv_rank", "shared_key_dim", "num_experts", "active_experts", "expert_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}: it must be at least 1")
        if self.conv_size < 2:
            raise UserError(f"model.conv_size is {self.conv_size}: it must be at least 2")
        for name in ("query_rank", "latent_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"model.{name} is {value}: it must be at least 1")
        if self.active_experts > self.num_experts:
            raise UserError(
                f"model.active_experts is {self.active_experts}: there are {self.num_experts} model.num_experts"
            )
        if self.shared_experts < 0:
            raise UserError(f"model.shared_experts is {self.shared_experts}: it cannot be negative")
        if not 0 <= self.dense_layers <= self.num_layers:
            raise UserError(
                f"model.dense_layers is {self.dense_layers}: it must be between 0 and the {self.num_layers} layers"
            )
        for name in ("routed_scaling", "balance_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"model.{name} is {getattr(self, name)}: it must be positive")
        if self.decay_floor is not None and not self.decay_floor < 0:
            raise UserError(f"model.decay_floor is {self.decay_floor}: it must be below 0")
        if self.balance == "quantile" and self.active_experts == self.num_experts:
            raise UserError("model.balance quantile needs more model.num_experts than model.active_experts")
        if self.residual.rule in REACHING:
            raise UserError(
                f"residual.rule {self.residual.rule} reaches into a plain attention's projections: Kimi Linear has others"
            )

    def is_mla(self, layer: int) -> bool:
        """Whether decoder layer ``layer`` (0-based) attends by MLA."""
        return (layer + 1) % self.mla_every == 0 or layer + 1 == self.num_layers

    def is_dense(self, layer: int) -> bool:
        return layer < self.dense_layers

    @property
    def mla_layers(self) -> int:
        return sum(self.is_mla(layer) for layer in range(self.num_layers))
