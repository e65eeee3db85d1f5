"""What a decoder is: a typed, frozen description that goes into every run folder and loads back."""

from dataclasses import dataclass, field
from typing import Literal

from fathom.errors import UserError

# depth_attention.EPS, without importing torch for it: the command line reads this file to print its help.
EPS = 1e-6


@dataclass(frozen=True)
class ResidualConfig:
    """How sublayers read what earlier ones wrote."""

    rule: Literal["prenorm", "full", "block"] = "block"
    """The residual rule; `fathom residuals` lists them."""
    num_blocks: int | None = None
    """Block AttnRes: N, the number of blocks; 8 if neither this nor block_size is given (fewer if there are fewer sublayers)."""
    block_size: int | None = None
    """Block AttnRes: S, the sublayers of one block (a decoder layer is two)."""
    gain: bool = True
    """AttnRes: learn a weight on the key norm."""
    eps: float = EPS
    """AttnRes: epsilon of the key norm."""
    schedule: Literal["two_phase", "single_pass"] = "two_phase"
    """AttnRes: how reads are computed; changes speed and not the result."""

    def __post_init__(self) -> None:
        if self.rule not in ("prenorm", "full", "block"):
            raise UserError(f"residual.rule is {self.rule!r}: it must be prenorm, full or block")
        if self.rule != "block":
            for name in ("num_blocks", "block_size"):
                if getattr(self, name) is not None:
                    raise UserError(f"residual.{name} belongs to rule block, but residual.rule is {self.rule}")
        elif self.num_blocks is not None and self.block_size is not None:
            raise UserError("residual.num_blocks and residual.block_size are both given: keep one")
        if not self.eps >= 0:
            raise UserError(f"residual.eps is {self.eps}: it cannot be negative")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer."""

    vocab_size: int = 1024
    """V; set from the data when training."""
    context: int = 256
    """The longest sequence T that the rotary table serves."""
    dim: int = 64
    """D, the width."""
    num_layers: int = 12
    """Decoder layers; each is two sublayers, attention and MLP, so L = 2 num_layers."""
    num_heads: int = 2
    """H, query heads."""
    num_kv_heads: int | None = None
    """Key/value heads (grouped-query attention); as many as query heads if not given."""
    head_dim: int | None = None
    """Width of a head; D / H if not given."""
    mlp_dim: int | None = None
    """Width inside the SwiGLU; 8/3 D rounded up to a multiple of 32 if not given."""
    qk_norm: bool = True
    """RMS-normalise each query and key head before the rotation."""
    rope_base: float = 10_000.0
    """Base of the rotary frequencies."""
    tie_embeddings: bool = False
    """Share the embedding matrix with the output head."""
    norm_eps: float = EPS
    """Epsilon of every RMSNorm except the key norms."""
    document_mask: bool = False
    """Keep attention inside a document (documents end with the tokenizer's end-of-text token)."""
    embedding_std: float = 1.0
    """Standard deviation of the embedding at initialisation."""
    head_std: float = 0.0
    """Standard deviation of an untied head at initialisation, times 1/sqrt(D)."""
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    """How sublayers read earlier ones."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "dim", "num_layers", "num_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("num_kv_heads", "head_dim", "mlp_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"model.{name} is {value}: it must be at least 1")
        if self.head_dim is None and self.dim % self.num_heads:
            raise UserError(
                f"model.dim {self.dim} is not a multiple of model.num_heads {self.num_heads}; set model.head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise UserError(f"model.num_heads {self.num_heads} is not a multiple of model.num_kv_heads {self.kv_heads}")
        if self.head_width % 2:
            raise UserError(
                f"the head width is {self.head_width}: rotary positions need an even one; set model.head_dim"
            )
        for name in ("norm_eps", "embedding_std", "head_std"):
            if not getattr(self, name) >= 0:  # nor NaN
                raise UserError(f"model.{name} is {getattr(self, name)}: it cannot be negative")
        if not self.rope_base > 0:
            raise UserError(f"model.rope_base is {self.rope_base}: it must be positive")

    @property
    def num_sublayers(self) -> int:
        """L."""
        return 2 * self.num_layers

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def head_width(self) -> int:
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def mlp_width(self) -> int:
        return -(-8 * self.dim // 96) * 32 if self.mlp_dim is None else self.mlp_dim
