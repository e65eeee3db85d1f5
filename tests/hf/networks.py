"""Every decoder that converts, as small as can be, built from Transformers' own classes with random weights."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_LLAMA = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": None, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_NEOX = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SETTINGS = {
    "llama": _LLAMA,
    "llama-tied": _LLAMA | {"tie_word_embeddings": True, "attention_bias": True},
    "mistral": _LLAMA | {"sliding_window": 8},
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA | {"sliding_window": 8},
    "gemma3_text": _LLAMA | {"sliding_window": 8, "final_logit_softcapping": 5.0},
    "gpt2": {
        "vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "gpt_neox": _NEOX,
    "gpt_neox-sequential": _NEOX | {"use_parallel_residual": False},
}  # fmt: skip


def network(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The decoder of ``SETTINGS[name]``, every parameter random, norms too."""
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name.split("-")[0], **SETTINGS[name]), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return model.eval()


def tokens(batch: int = 2, count: int = 20) -> torch.Tensor:
    return torch.randint(3, 97, (batch, count), generator=torch.Generator().manual_seed(3))


def checkpoint_layers(model: PreTrainedModel, **settings: object) -> None:
    """Activation checkpointing, by the name that this version of Transformers has for it."""
    newer = hasattr(model, "activation_checkpointing_enable")
    getattr(model, "activation_checkpointing_enable" if newer else "gradient_checkpointing_enable")(settings or None)
