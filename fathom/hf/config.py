"""Two configurations that Transformers can save and load, each with a ``residual`` section: a ``ResidualConfig`` as plain JSON.

Settings have the names that Transformers' decoders use; a wrong one is a ``UserError`` (a ``ValueError``) that names it.
"""

from dataclasses import asdict
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from fathom.errors import UserError
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.train.config import from_dict

NATIVE_NAMES = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context",
    "hidden_size": "dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp_dim",
    "qk_norm": "qk_norm",
    "rope_base": "rope_base",
    "tie_word_embeddings": "tie_embeddings",
    "rms_norm_eps": "norm_eps",
    "document_mask": "document_mask",
    "embedding_std": "embedding_std",
    "head_std": "head_std",
}
"""``FathomConfig``'s name of every setting of ``ModelConfig``, ``residual`` apart."""


def residual_config(values: dict[str, Any] | None) -> ResidualConfig:
    """The residual rule of a configuration; Block AttnRes if it names none."""
    return from_dict(ResidualConfig, values or {}, "residual")


def residual_values(config: ResidualConfig) -> dict[str, Any]:
    """``config`` as plain JSON, without the settings that are not given."""
    return {name: value for name, value in asdict(config).items() if value is not None}


class FathomConfig(PreTrainedConfig):
    """Fathom's own decoder (fathom/models/): ``ModelConfig`` under Transformers' names.

    ``eos_token_id`` is the token that ends a document; ``document_mask`` needs it.
    """

    model_type = "fathom"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 1024
    max_position_embeddings: int = 256
    hidden_size: int = 64
    num_hidden_layers: int = 12
    num_attention_heads: int = 2
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int | None = None
    qk_norm: bool = True
    rope_base: float = 10_000.0
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    document_mask: bool = False
    embedding_std: float = 1.0
    head_std: float = 0.0
    residual: dict[str, Any] | None = None
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        model = self.model_config()
        if model.document_mask and not isinstance(self.eos_token_id, int):
            raise UserError("document_mask needs eos_token_id, the one token that ends a document")
        self.residual = residual_values(model.residual)
        # What is derived is written out: a cache of Transformers reads these.
        self.num_key_value_heads = model.kv_heads
        self.head_dim = model.head_width
        self.intermediate_size = model.mlp_width
        super().__post_init__(**kwargs)

    def model_config(self) -> ModelConfig:
        """The same decoder for ``fathom.models``."""
        values = {native: getattr(self, name) for name, native in NATIVE_NAMES.items()}
        config = from_dict(ModelConfig, {**values, "residual": self.residual or {}}, "config")
        return config

    @classmethod
    def from_model_config(cls, config: ModelConfig, **kwargs: Any) -> "FathomConfig":
        """The configuration of ``config``; keywords are further settings of it."""
        values = {name: getattr(config, native) for name, native in NATIVE_NAMES.items()}
        return cls(**values, residual=residual_values(config.residual), **kwargs)


class ConvertedConfig(PreTrainedConfig):
    """A decoder of Transformers (``text_config``, its own configuration) on the residual rule ``residual``."""

    model_type = "fathom_converted"
    keys_to_ignore_at_inference = ["past_key_values"]
    sub_configs = {"text_config": AutoConfig}

    text_config: dict[str, Any] | PreTrainedConfig | None = None
    residual: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            values = dict(self.text_config)
            if "model_type" not in values:
                raise UserError("config.json: text_config has no model_type: it names the decoder that was converted")
            self.text_config = AutoConfig.for_model(values.pop("model_type"), **values)
        self.residual = residual_values(residual_config(self.residual))
        if self.text_config is not None:
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "dtype"):
                kwargs.setdefault(name, getattr(self.text_config, name, None))
        super().__post_init__(**kwargs)

    def network_config(self) -> PreTrainedConfig:
        """The configuration of the decoder that was converted."""
        if not isinstance(self.text_config, PreTrainedConfig):
            raise UserError("text_config is missing: it is the configuration of the decoder that was converted")
        return self.text_config


def decoder_config(model: Any) -> Any:
    """Where a model's vocabulary and positions stand: of a conversion, the configuration of the decoder in it."""
    return model.config.network_config() if isinstance(model.config, ConvertedConfig) else model.config
