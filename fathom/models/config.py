"""What a decoder is: a typed, frozen description that goes into every run folder and loads back."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from fathom.errors import UserError

Rule = Literal[
    "prenorm", "full", "block", "rezero", "layerscale", "highway", "deepnorm", "keel", "siamesenorm", "denseformer", "laurel",
    "value_residual", "muddformer", "hyper_connections", "mhc", "mhc_lite", "ddl", "mrla", "delta", "lr_attnres", "mhar",
]  # fmt: skip

OPTIONS: dict[str, tuple[Rule, ...]] = {
    "num_blocks": ("block", "delta", "lr_attnres", "mhar"),
    "block_size": ("block", "delta", "lr_attnres", "mhar"),
    "query": ("full", "block"),
    "activation": ("full", "block"),
    "key_norm": ("full", "block"),
    "heads": ("full", "block", "mhar", "mrla"),
    "window": ("full",),
    "isolate_embedding": ("block",),
    "recompute": ("block",),
    "num_streams": ("hyper_connections", "mhc", "mhc_lite", "ddl"),
    "dynamic": ("hyper_connections",),
    "gate": ("highway",),
    "alpha": ("deepnorm", "keel"),
    "init": ("layerscale",),
    "rank": ("laurel",),
    "key_dim": ("lr_attnres",),
    "keys": ("lr_attnres",),
}
"""Which rules each setting of ``ResidualConfig`` belongs to; it is None where it is not given."""

GAIN: tuple[Rule, ...] = ("full", "block", "delta", "mhar")
"""The rules whose key norm can have a learned gain."""

SWITCHES = ("query", "activation", "key_norm", "heads", "window", "isolate_embedding")
"""The settings that exchange a part of AttnRes, as in the paper's ablations (residuals/ablations.py)."""

# depth_attention.EPS, without importing torch for it: the command line reads this file to print its help.
EPS = 1e-6


@dataclass(frozen=True)
class ResidualConfig:
    """How sublayers read what earlier ones wrote."""

    rule: Rule = "block"
    """The residual rule; `fathom residuals` lists them."""
    num_blocks: int | None = None
    """N, the number of blocks; Block AttnRes has 8 if neither this nor block_size is given (fewer for fewer sublayers)."""
    block_size: int | None = None
    """S, the sublayers of one block (a decoder layer is two)."""
    gain: bool = True
    """AttnRes: learn a weight on the key norm."""
    eps: float = EPS
    """Epsilon of the key norm, and of any other norm that a rule computes."""
    schedule: Literal["two_phase", "single_pass"] = "two_phase"
    """Full, Block: how reads are computed; changes speed and not the result."""
    recompute: bool | None = None
    """Block: compute phase 1 again in the backward pass instead of keeping it: slower, and as little memory as PreNorm."""
    query: Literal["learned", "input", "none"] | None = None
    """Full, Block: a learned query (default), one projected from the read before, or learned scores without query and key."""
    activation: Literal["softmax", "sigmoid"] | None = None
    """Full, Block: from scores to weights; softmax if not given."""
    key_norm: bool | None = None
    """Full, Block: normalise the keys; true if not given."""
    heads: int | None = None
    """Full, Block, MHAR, MRLA: heads, each with its own weights over depth; 1, 1, 4 and D / 32 if not given."""
    window: int | None = None
    """Full: read the embedding and this many latest outputs; all if not given."""
    isolate_embedding: bool | None = None
    """Block: the embedding is a source of its own (true if not given), not a term of the first block."""
    num_streams: int | None = None
    """Hyper-Connections, mHC, mHC-lite, DDL: n; 4 if not given."""
    dynamic: bool | None = None
    """Hyper-Connections: weights that depend on the token; true if not given."""
    gate: Literal["vector", "scalar"] | None = None
    """Highway: a gate per channel (default) or per token."""
    alpha: float | None = None
    """DeepNorm, KEEL: the weight of the residual; (2M)^(1/4) for M decoder layers, and L, if not given."""
    init: float | None = None
    """LayerScale: the first value of the scales; by depth if not given."""
    rank: int | None = None
    """LAuReL: r; 32 if not given."""
    key_dim: int | None = None
    """LR-AttnRes: r; 64 if not given."""
    keys: Literal["projected", "sliced"] | None = None
    """LR-AttnRes: keys projected from the value (default), or its last channels."""

    def __post_init__(self) -> None:
        rules = get_args(Rule)
        if self.rule not in rules:
            raise UserError(f"residual.rule is {self.rule!r}: it must be one of {', '.join(rules)}")
        for name, owners in OPTIONS.items():
            value = getattr(self, name)
            if value is None:
                continue
            if self.rule not in owners:
                raise UserError(f"residual.{name} belongs to rule {_listed(owners)}, but residual.rule is {self.rule}")
            # Not >, so that NaN is refused too; bool is an int.
            if not isinstance(value, str) and not value > 0 and value is not False:
                raise UserError(f"residual.{name} is {value}: it must be positive")
        if not self.gain and self.rule not in GAIN:
            raise UserError(f"residual.gain is of {_listed(GAIN)}, but residual.rule is {self.rule}")
        if self.schedule != "two_phase" and self.rule not in ("full", "block"):
            raise UserError(f"residual.schedule is of full or block, but residual.rule is {self.rule}")
        if self.num_blocks is not None and self.block_size is not None:
            raise UserError("residual.num_blocks and residual.block_size are both given: keep one")
        if self.recompute is not None:
            clash = [name for name in SWITCHES if getattr(self, name) is not None]
            if clash or self.schedule == "single_pass":
                other = clash[0] if clash else "schedule single_pass"
                raise UserError(
                    f"residual.recompute is of the two-phase schedule alone: it does not go with residual.{other}"
                )
        if self.query == "none":
            for name in ("key_norm", "heads"):
                if getattr(self, name) is not None:
                    raise UserError(f"residual.{name} is given, but residual.query none has no query and no key")
        if not self.eps >= 0:
            raise UserError(f"residual.eps is {self.eps}: it cannot be negative")

    def options(self) -> dict[str, Any]:
        """The rule's own settings that are given, by name."""
        return {name: value for name in OPTIONS if (value := getattr(self, name)) is not None}


def _listed(names: tuple[str, ...]) -> str:
    """``a, b or c``."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


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
