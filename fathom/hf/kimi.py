"""Kimi Linear in its released form: names of tensors and settings of config.json, to and from Fathom's.

Kimi-Linear-48B-A3B and Kimi K3 name their tensors alike; K3 has some more, those of its reads among them (dialects.py). A
released tensor is a part of a parameter here: convolution taps of queries, keys and values are one parameter, gate and up
matrices are one, and all experts of a layer are one.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from fathom.block import BlockAttnRes
from fathom.errors import UserError
from fathom.full import FullAttnRes
from fathom.hf.dialects import from_k3, k3_names, to_k3
from fathom.inference.blocks import FusedBlocks
from fathom.models.config import ResidualConfig
from fathom.models.kimi_config import KimiConfig
from fathom.models.transformer import Transformer

Names = list[list[str]]
"""Of a parameter's slices: for each, the tensors that follow one another in it along dim 0."""


def _layer_names(config: KimiConfig, layer: int) -> Iterator[tuple[str, Names]]:
    """Our name of every parameter of a decoder layer, and the released names of its parts; one slice unless experts."""
    ours, theirs = f"sublayers.{2 * layer}.", f"model.layers.{layer}."
    attention = f"{theirs}self_attn."
    yield f"{ours}norm.weight", [[f"{theirs}input_layernorm.weight"]]
    plain: dict[str, str] = {"out": "o_proj"}
    if config.is_mla(layer):
        plain |= {"latent": "kv_a_proj_with_mqa", "latent_norm": "kv_a_layernorm", "expand": "kv_b_proj"}
        if config.query_rank is None:
            plain["query"] = "q_proj"
        else:
            plain |= {"query.0": "q_a_proj", "query.1": "q_a_layernorm", "query.2": "q_b_proj"}
        if config.mla_gate:
            plain["gate"] = "g_proj"
    else:
        plain |= {"query": "q_proj", "key": "k_proj", "value": "v_proj", "beta": "b_proj", "head_norm": "o_norm"}
        plain |= {"decay_in": "f_a_proj", "decay_out": "f_b_proj"}
        plain |= {"gate": "g_proj"} if config.full_rank_gate else {"gate.0": "g_a_proj", "gate.1": "g_b_proj"}
        yield f"{ours}taps", [[f"{attention}{part}_conv1d.weight" for part in "qkv"]]
        yield f"{ours}decay_bias", [[f"{attention}dt_bias"]]
        yield f"{ours}log_rate", [[f"{attention}A_log"]]
    for own, released in plain.items():
        yield f"{ours}{own}.weight", [[f"{attention}{released}.weight"]]
    yield from _mlp_names(config, layer, theirs)


def _mlp_names(config: KimiConfig, layer: int, theirs: str) -> Iterator[tuple[str, Names]]:
    ours = f"sublayers.{2 * layer + 1}."
    yield f"{ours}norm.weight", [[f"{theirs}post_attention_layernorm.weight"]]
    if config.is_dense(layer):
        yield f"{ours}mlp.gate_up.weight", [[f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight"]]
        yield f"{ours}mlp.down.weight", [[f"{theirs}mlp.down_proj.weight"]]
        return
    moe = f"{theirs}block_sparse_moe."
    experts = [f"{moe}experts.{number}." for number in range(config.num_experts)]
    yield f"{ours}router.weight", [[f"{moe}gate.weight"]]
    yield f"{ours}router.bias", [[f"{moe}gate.e_score_correction_bias"]]
    yield f"{ours}experts.gate_up", [[f"{expert}w1.weight", f"{expert}w3.weight"] for expert in experts]
    yield f"{ours}experts.down", [[f"{expert}w2.weight"] for expert in experts]
    if config.shared_experts:
        shared = f"{moe}shared_experts."
        yield f"{ours}shared.gate_up.weight", [[f"{shared}gate_proj.weight", f"{shared}up_proj.weight"]]
        yield f"{ours}shared.down.weight", [[f"{shared}down_proj.weight"]]
    if config.latent_dim is not None:
        yield f"{ours}into.weight", [[f"{moe}routed_expert_down_proj.weight"]]
        yield f"{ours}back.0.weight", [[f"{moe}routed_expert_norm.weight"]]
        yield f"{ours}back.1.weight", [[f"{moe}routed_expert_up_proj.weight"]]


def names(config: KimiConfig) -> dict[str, Names]:
    """The released names of the parts of every parameter but the stream's."""
    table = {"embedding.weight": [["model.embed_tokens.weight"]], "final_norm.weight": [["model.norm.weight"]]}
    if not config.tie_embeddings:
        table["head.weight"] = [["lm_head.weight"]]
    for layer in range(config.num_layers):
        table |= dict(_layer_names(config, layer))
    return table


def to_release(model: Transformer) -> dict[str, Tensor]:
    """The tensors of ``model``, a ``KimiLinear`` of PreNorm, Full or Block AttnRes, under their released names."""
    config = model.config
    assert isinstance(config, KimiConfig)
    parameters = dict(model.named_parameters())
    released: dict[str, Tensor] = {}
    for ours, slices in names(config).items():
        value = parameters[ours].detach()
        for part, group in zip(value if len(slices) > 1 else [value], slices, strict=True):
            if ours.endswith("log_rate"):
                part = part.view(1, 1, -1, 1)
            released |= {name: piece.clone() for name, piece in zip(group, part.chunk(len(group)), strict=True)}
    stream = _attnres(model)
    if stream is not None:
        query, gain = stream.query.detach(), stream.key_gain
        released |= to_k3(query, torch.ones_like(query) if gain is None else gain.detach())
    elif config.residual.rule != "prenorm":
        raise UserError(f"residual.rule {config.residual.rule} has no released form: prenorm, full and block have one")
    return released


def _attnres(model: Transformer) -> BlockAttnRes | FullAttnRes | None:
    """The stream of ``model`` if it is AttnRes itself, served or not: an ablation of it has other parameters."""
    kinds = (BlockAttnRes, FullAttnRes, FusedBlocks)
    return cast("BlockAttnRes | FullAttnRes", model.stream) if type(model.stream) in kinds else None


@torch.no_grad()
def load_release(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Load released tensors into ``model``, a ``KimiLinear``.

    Reads of AttnRes stay as they are where the tensors have none: with zero queries they are those of a plain residual.

    Raises:
        UserError: naming a tensor that is missing, of another shape, or not of this model.
    """
    config = model.config
    assert isinstance(config, KimiConfig)
    parameters = dict(model.named_parameters())
    left = set(tensors)
    for ours, slices in names(config).items():
        target = parameters[ours]
        for part, group in zip(target if len(slices) > 1 else [target], slices, strict=True):
            for name, piece in zip(group, part.chunk(len(group)), strict=True):
                if name not in tensors:
                    raise UserError(f"{name} is missing: these are not the weights of this model")
                value = tensors[name]
                if ours.endswith("log_rate"):  # [1, 1, H, 1], or padded
                    value = value.flatten()[: len(piece)]
                if value.shape != piece.shape:
                    raise UserError(f"{name} has shape {tuple(value.shape)}, the model's is {tuple(piece.shape)}")
                piece.copy_(value)
                left.discard(name)
    reads = {name for pair in k3_names(config.num_layers) for name in pair}
    if reads & left:
        rows = from_k3(tensors, config.num_layers)
        stream = _attnres(model)
        if stream is None or stream.key_gain is None:
            raise UserError(
                "the weights have reads of AttnRes: residual.rule must be full or block, with residual.gain"
            )
        stream.query.copy_(rows["query"])
        stream.key_gain.copy_(rows["key_gain"])
        left -= reads
    if left:
        raise UserError(f"{min(left)} is no weight of this model")


def write_release(model: Transformer, folder: Path) -> None:
    """Write ``config.json`` and ``model.safetensors`` of ``model`` as they are released.

    Transformers' ``KimiLinearForCausalLM`` opens a PreNorm model; it does not know the reads of AttnRes, named as Kimi K3's.
    """
    assert isinstance(model.config, KimiConfig)
    values = release_config(model.config) | {"eos_token_id": model.end_of_text, "pad_token_id": model.end_of_text}
    save_file(to_release(model), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")


_SAME = {
    "vocab_size": "vocab_size", "model_max_length": "context", "hidden_size": "dim", "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads", "intermediate_size": "mlp_dim", "kv_lora_rank": "kv_rank",
    "qk_rope_head_dim": "shared_key_dim", "q_lora_rank": "query_rank", "num_experts": "num_experts",
    "num_experts_per_token": "active_experts", "num_shared_experts": "shared_experts", "moe_intermediate_size": "expert_dim",
    "first_k_dense_replace": "dense_layers", "routed_scaling_factor": "routed_scaling", "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}  # fmt: skip
"""Settings that only their names tell apart."""

_FIXED = {
    "mla_use_nope": True, "moe_layer_freq": 1, "moe_renormalize": True, "moe_router_activation_func": "sigmoid",
    "num_expert_group": 1, "topk_group": 1,
}  # fmt: skip
"""Settings that a released config may name and that have one value here."""


def release_config(config: KimiConfig) -> dict[str, Any]:
    """``config`` as the settings of a released ``config.json``."""
    mla = [layer + 1 for layer in range(config.num_layers) if config.is_mla(layer)]
    values = {theirs: getattr(config, ours) for theirs, ours in _SAME.items()} | _FIXED
    values |= {
        "model_type": "kimi_linear", "architectures": ["KimiLinearForCausalLM"], "hidden_act": "silu",
        "intermediate_size": config.mlp_width, "num_key_value_heads": config.num_heads,
        "qk_nope_head_dim": config.head_width, "v_head_dim": config.head_width,
    }  # fmt: skip
    linear: dict[str, Any] = {
        "num_heads": config.num_heads, "head_dim": config.head_width, "short_conv_kernel_size": config.conv_size,
        "full_attn_layers": mla, "kda_layers": [n for n in range(1, config.num_layers + 1) if n not in mla],
    }  # fmt: skip
    if config.full_rank_gate:
        linear["use_full_rank_gate"] = True
    if config.decay_floor is not None:
        linear["gate_lower_bound"] = config.decay_floor
    if config.mla_gate:
        values["mla_use_output_gate"] = True
    if config.latent_dim is not None:
        values |= {"routed_expert_hidden_size": config.latent_dim, "latent_moe_use_norm": True}
    if config.mlp_activation == "situ":
        values |= {"hidden_act": "situ", "activation_situ_beta": 4.0, "activation_situ_linear_beta": 25.0}
    if (
        config.residual.rule == "block"
        and config.residual.block_size is not None
        and config.residual.block_size % 2 == 0
    ):
        values["attn_res_block_size"] = config.residual.block_size // 2
    return values | {"linear_attn_config": linear}


def config_from_release(values: Mapping[str, Any]) -> KimiConfig:
    """The config of a released ``config.json`` (of Kimi K3, of its ``text_config``); ``UserError`` for what is not built."""
    linear = dict(values.get("linear_attn_config") or {})
    for name, known in _FIXED.items():
        if values.get(name, known) != known:
            raise UserError(f"{name} is {values[name]!r}: only {known!r} is built")
    heads, width = values["num_attention_heads"], linear.get("head_dim")
    if linear.get("num_heads") != heads or values.get("v_head_dim") != width or values.get("qk_nope_head_dim") != width:
        raise UserError("KDA and MLA have heads of different number or width: only equal ones are built")
    given = {ours: values[theirs] for theirs, ours in _SAME.items() if values.get(theirs) is not None}
    full = linear.get("full_attn_layers") or []
    block = values.get("attn_res_block_size")
    config = KimiConfig(
        **given, head_dim=width, conv_size=linear.get("short_conv_kernel_size", 4), mla_every=full[0] if full else 1,
        full_rank_gate=bool(linear.get("use_full_rank_gate")), decay_floor=linear.get("gate_lower_bound"),
        mla_gate=bool(values.get("mla_use_output_gate")), latent_dim=values.get("routed_expert_hidden_size"),
        mlp_activation="situ" if values.get("hidden_act") == "situ" else "swiglu",
        residual=ResidualConfig(rule="prenorm") if block is None else ResidualConfig(rule="block", block_size=2 * block),
    )  # fmt: skip
    if full != [layer + 1 for layer in range(config.num_layers) if config.is_mla(layer)]:
        raise UserError(f"full_attn_layers are {full}: only every so many layers and the last are built")
    return config
