"""Counts of a Kimi Linear decoder's sublayers: parameters, arithmetic, what decoding keeps; ``accounting`` adds the rest."""

from fathom.models.kimi_config import KimiConfig


def parameters(config: KimiConfig) -> dict[str, int]:
    """Parameters of the sublayers by part, without their PreNorms."""
    dim, width, heads = config.dim, config.head_width, config.num_heads
    inner, mla, moe = heads * width, config.mla_layers, config.num_layers - config.dense_layers
    low_rank = dim * width + width * inner
    # query, key, value, out; taps; decay and its bias and rate; gate; beta; the norm of the heads.
    kda = 4 * dim * inner + 3 * inner * config.conv_size + low_rank + inner + heads
    kda += (dim * inner if config.full_rank_gate else low_rank) + dim * heads + width
    keys = heads * (width + config.shared_key_dim)
    query = dim * keys
    if config.query_rank is not None:
        query = config.query_rank * (dim + 1 + keys)
    full = query + dim * (config.kv_rank + config.shared_key_dim) + config.kv_rank + config.kv_rank * 2 * inner
    full += inner * dim * (2 if config.mla_gate else 1)
    latent = config.latent_dim
    return {
        "kda": (config.num_layers - mla) * kda,
        "mla": mla * full,
        "dense mlp": config.dense_layers * 3 * dim * config.mlp_width,
        "routed experts": moe * config.num_experts * 3 * (latent or dim) * config.expert_dim,
        "shared experts": moe * config.shared_experts * 3 * dim * config.expert_dim,
        "router": moe * config.num_experts * (dim + 1),
        "latent": 0 if latent is None else moe * latent * (2 * dim + 1),
    }


def float32_parameters(config: KimiConfig) -> int:
    """Those that stay in float32 where the rest is served in less: KDA's taps, decay biases and rates, and the routers."""
    inner, kda = config.num_heads * config.head_width, config.num_layers - config.mla_layers
    moe = config.num_layers - config.dense_layers
    return kda * (inner * (3 * config.conv_size + 1) + config.num_heads) + moe * config.num_experts * (config.dim + 1)


def active(config: KimiConfig, counts: dict[str, int]) -> int:
    """Of ``counts``, the parameters that one token meets."""
    idle = counts["routed experts"] * (config.num_experts - config.active_experts) // config.num_experts
    return sum(counts.values()) - idle


def flops_per_token(config: KimiConfig, context: int) -> dict[str, float]:
    """``accounting.flops_per_token`` of the sublayers.

    The delta rule is counted as its recurrence: 7 K V a head and token (decay, correct, write, read). Kernels that work on
    pieces of a sequence do more.
    """
    counts = parameters(config)
    width, heads, mla = config.head_width, config.num_heads, config.mla_layers
    kda = config.num_layers - mla
    experts = counts["routed experts"] * config.active_experts // config.num_experts
    return {
        "kda matrices": 2.0 * counts["kda"],
        "delta rule": 7.0 * kda * heads * width * width,
        "mla matrices": 2.0 * counts["mla"],
        "attention scores": 2.0 * mla * heads * (2 * width + config.shared_key_dim) * (context + 1) / 2,
        "mlp": 2.0 * (experts + sum(counts[name] for name in ("dense mlp", "shared experts", "router", "latent"))),
    }


def site_flops(config: KimiConfig, context: int) -> list[float]:
    """The same, by sublayer: what KDA, MLA, a dense MLP and a layer of experts each take."""
    flops, mla = flops_per_token(config, context), config.mla_layers
    kda, moe = config.num_layers - mla, config.num_layers - config.dense_layers
    kda_one = (flops["kda matrices"] + flops["delta rule"]) / max(1, kda)
    mla_one = (flops["mla matrices"] + flops["attention scores"]) / max(1, mla)
    dense = 2.0 * 3 * config.dim * config.mlp_width
    experts = (flops["mlp"] - config.dense_layers * dense) / max(1, moe)
    return [
        cost
        for layer in range(config.num_layers)
        for cost in (mla_one if config.is_mla(layer) else kda_one, dense if config.is_dense(layer) else experts)
    ]


def cache_bytes(config: KimiConfig, tokens: int, itemsize: int = 2) -> dict[str, int]:
    """Bytes that decoding keeps of a sequence of ``tokens``; the KDA state is float32 whatever ``itemsize`` is."""
    inner, mla = config.num_heads * config.head_width, config.mla_layers
    kda = config.num_layers - mla
    return {
        "kda_state": kda * inner * config.head_width * 4,
        "kda_tails": kda * 3 * inner * (config.conv_size - 1) * itemsize,
        "mla_cache": mla * tokens * (config.kv_rank + config.shared_key_dim) * itemsize,
    }
