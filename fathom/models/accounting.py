"""Counts of parameters, arithmetic and activation memory, each as named rows that add up to a checked total."""

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from fathom.models import kimi_counts
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.kimi_config import KimiConfig
from fathom.models.kimi_linear import build
from fathom.models.layers import AttentionInput, AttentionOutput
from fathom.models.transformer import Transformer
from fathom.residuals import make_stream
from fathom.residuals.rule import Rule
from fathom.stream import Stream


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters by part. ``assert_parameters`` holds them against a built model."""
    inner, kv = config.num_heads * config.head_width, config.kv_heads * config.head_width
    with FakeTensorMode():
        rule = sum(parameter.numel() for parameter in _stream(config).parameters())
    norms = (config.num_sublayers + 1) * config.dim
    if isinstance(config, KimiConfig):
        sublayers = kimi_counts.parameters(config)
    else:
        norms += 2 * config.num_layers * config.head_width if config.qk_norm else 0
        sublayers = {
            "attention": config.num_layers * (config.dim * (inner + 2 * kv) + inner * config.dim),
            "mlp": config.num_layers * 3 * config.dim * config.mlp_width,
        }
    return {
        "embedding": config.vocab_size * config.dim,
        **sublayers,
        "norms": norms,
        "residual rule": rule,
        "head": 0 if config.tie_embeddings else config.vocab_size * config.dim,
    }


def assert_parameters(model: Transformer) -> int:
    """The number of parameters of ``model``, after checking that the rows of ``parameters`` add up to it."""
    built = sum(parameter.numel() for parameter in model.parameters())
    counted = sum(parameters(model.config).values())
    assert built == counted, f"the model has {built} parameters, the count says {counted}"
    return built


def _stream(config: ModelConfig) -> Stream:
    """The stream of ``config``, read by read. Its callers want shapes and no data: in a ``FakeTensorMode``."""
    return make_stream(_read_by_read(config), config.num_sublayers, config.dim)


def _read_by_read(config: ModelConfig) -> ResidualConfig:
    if config.residual.rule not in ("full", "block"):
        return config.residual
    return replace(config.residual, schedule="single_pass", recompute=None)


def source_counts(config: ModelConfig) -> list[int]:
    """How many sources each site attends over, the output last; 1 where a rule has no depth attention."""
    with FakeTensorMode():
        stream = _stream(config)
    return [max(1, len(stream.source_names(site))) for site in range(config.num_sublayers + 1)]


def state_bytes(config: ModelConfig) -> int:
    """Bytes that the stream carries from one sublayer to the next for one token, in bf16, where it carries most."""
    heads = config.residual.heads or 1
    widths = [heads * -(-size // heads) for size in (256, 512)]
    if config.dim <= widths[0]:
        return 2 * _state_size(config, config.dim)
    # Every tensor of a state has a size that is linear in D, so a narrow stream tells what a wide one carries.
    small, large = (_state_size(config, width) for width in widths)
    return 2 * (small + (large - small) * (config.dim - widths[0]) // (widths[1] - widths[0]))


@torch.no_grad()
def _state_size(config: ModelConfig, dim: int) -> int:
    stream, zero = make_stream(_read_by_read(config), config.num_sublayers, dim), torch.zeros(1, 1, dim)
    state, most = stream.start(zero), 0
    for site in range(config.num_sublayers):
        x, state = stream.read(state, site, lambda h: h)
        output: Any = zero.clone()
        if isinstance(x, AttentionInput) and x.hand_over:
            output = AttentionOutput(output, torch.zeros(1, config.kv_heads, 1, config.head_width))
        state = stream.write(state, site, output)
        kept = {id(leaf): leaf.numel() for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)}
        most = max(most, sum(kept.values()))
    return most


def flops_per_token(config: ModelConfig, context: int) -> dict[str, float]:
    """Floating-point operations of one token's forward pass in a sequence of ``context``; training costs three times that.

    A multiply-add is two. Attention counts the causal half (on average (context + 1) / 2 keys), so a utilisation
    computed from this is lower than with the common full-square count. Norms, rotations and activations are left out.
    A depth-attention site with N sources scores and mixes each: 4 N D, and squares each for its norm: 2 N D. Other rules count
    what they add in their ``flops``; PreNorm's additions are left out everywhere.
    """
    counts = parameters(config)
    with FakeTensorMode():
        stream = _stream(config)
    if isinstance(stream, Rule):
        rule = float(stream.flops())
    else:
        rule = 0.0 if config.residual.rule == "prenorm" else 6.0 * config.dim * sum(source_counts(config))
    if isinstance(config, KimiConfig):
        sublayers = kimi_counts.flops_per_token(config, context)
    else:
        sublayers = {
            "attention matrices": 2.0 * counts["attention"],
            "attention scores": 4.0 * config.num_layers * config.num_heads * config.head_width * (context + 1) / 2,
            "mlp": 2.0 * counts["mlp"],
        }
    return {
        **sublayers,
        "residual rule": rule,
        "head": 2.0 * config.vocab_size * config.dim,
    }


def activation_bytes(
    config: ModelConfig, batch: int, context: int, *, device: str = "cpu", autocast: bool = False
) -> dict[str, int]:
    """Bytes that one eager forward pass of ``loss`` keeps for its backward pass, by part.

    Counted, not estimated: the pass runs on fake tensors (shapes without data, so any size fits) and every distinct storage
    that autograd saves is added once, to the part that saved it first. Parameters are not activations; casts of them
    that autocast saves are listed as ``weight casts``. ``device`` matters: kernels differ in what they save.
    """
    rows: dict[str, int] = defaultdict(int)
    seen: set[int] = set()
    part = "embedding"
    keep: list[Any] = []

    with FakeTensorMode(), torch.device(device):
        model = build(config, end_of_text=0)
        tokens = torch.zeros(batch, context, dtype=torch.int64)
        parameter_storages = {p.untyped_storage()._cdata for p in model.parameters()}
        parameter_shapes = {p.shape for p in model.parameters() if p.ndim == 2}
        parameter_shapes |= {shape[::-1] for shape in parameter_shapes}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameter_storages and storage._cdata not in seen:
                seen.add(storage._cdata)
                keep.append(tensor)
                is_cast = autocast and tensor.ndim == 2 and tensor.shape in parameter_shapes
                rows["weight casts" if is_cast else part] += storage.nbytes()
            return tensor

        def enter(name: str) -> Any:
            def hook(*_: Any) -> None:
                nonlocal part
                part = name

            return hook

        for site, sublayer in enumerate(model.sublayers):
            sublayer.register_forward_pre_hook(enter("mlp" if site % 2 else "attention"))
            sublayer.register_forward_hook(enter("stream and norms"))
        model.embedding.register_forward_hook(enter("stream and norms"))
        model.head.register_forward_pre_hook(enter("head and loss"))
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast(device, torch.bfloat16, enabled=autocast),
        ):
            model.loss(tokens, tokens)

    return dict(rows)
