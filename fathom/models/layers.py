"""The sublayers of a decoder: attention and SwiGLU, each with the PreNorm that its input passes through.

A sublayer takes its *normalised* input: the stream applies ``sublayer.norm``, so that a kernel can fuse it with the read.
An attention sublayer also takes an ``AttentionInput``, from a stream whose rule reaches into the attention.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from fathom.errors import UserError
from fathom.models.config import ModelConfig
from fathom.models.kimi_config import KimiConfig


class RMSNorm(nn.Module):
    """``weight ⊙ x / sqrt(mean(x²) + eps)`` over the last dim."""

    plain_rms_norm = True

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Attend(Protocol):
    """Attention over more than the tokens at hand: those of a key/value cache (inference/cache.py)."""

    def __call__(
        self,
        layer: int,
        query: Float[Tensor, "B H T W"],
        key: Float[Tensor, "B K T W"],
        value: Float[Tensor, "B K T W"],
    ) -> Float[Tensor, "B H T W"]:
        """What the queries of decoder layer ``layer`` take from the cached tokens and from these, which join them."""


class Context(NamedTuple):
    """What all attention sublayers of one forward pass share."""

    cos: Tensor
    """Rotary cosines [T, head_width / 2], or [B, 1, T, head_width / 2] where the rows are at different positions."""
    sin: Tensor
    mask: Tensor | None
    """[B, 1, T, T], True where attention may look; None for plain causal attention."""
    attend: Attend | None = None
    """In place of attention among these T tokens alone."""
    documents: Tensor | None = None
    """[B, T], the number of each token's document; None if documents do not matter."""
    cuts: Tensor | None = None
    """[N + 1], where the N documents begin, rows end to end, and where the last ends: for KDA's kernels on a GPU."""


def rotary_table(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines of ``position · base^(-2i / head_width)``: two float32 tensors [context, head_width / 2]."""
    frequency = config.rope_base ** -(torch.arange(0, config.head_width, 2, dtype=torch.float64) / config.head_width)
    angle = torch.outer(torch.arange(config.context, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def rotate(
    x: Float[Tensor, "B H T W"], cos: Float[Tensor, "*rows T W2"], sin: Float[Tensor, "*rows T W2"]
) -> Float[Tensor, "B H T W"]:
    """Rotary position embedding (arXiv 2104.09864) on the two halves of each head."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def document_numbers(tokens: Int[Tensor, "B T"], end_of_text: int) -> Int[Tensor, "B T"]:
    """How many documents ended before each token; the end-of-text token belongs to the document that it ends."""
    ends = (tokens == end_of_text).long()
    return ends.cumsum(-1) - ends


def document_mask(tokens: Int[Tensor, "B T"], end_of_text: int) -> Bool[Tensor, "B 1 T T"]:
    """True where query t may see key s: s <= t, and no document ends in s .. t-1."""
    document = document_numbers(tokens, end_of_text)
    same = document.unsqueeze(-1) == document.unsqueeze(-2)
    return same.tril().unsqueeze(1)


def document_cuts(documents: Int[Tensor, "B T"]) -> Int[Tensor, " N1"]:
    """Where documents begin in the rows end to end, and where the last ends; a row begins one. Waits for a GPU."""
    begins = F.pad(documents.diff(dim=1) != 0, (1, 0), value=True).flatten()
    return F.pad(begins.nonzero().flatten(), (0, 1), value=begins.numel())


def make_context(
    config: ModelConfig, tokens: Int[Tensor, "B T"], cos: Tensor, sin: Tensor, end_of_text: int | None
) -> Context:
    """What a forward pass over ``tokens``, which begin a sequence, shares; ``cos`` and ``sin`` are the whole tables."""
    length = tokens.shape[-1]
    if length > config.context:
        raise UserError(f"a sequence of {length} tokens is longer than model.context, {config.context}")
    if not config.document_mask:
        return Context(cos[:length], sin[:length], None)
    assert end_of_text is not None
    documents = document_numbers(tokens, end_of_text)
    # Once for all layers: each would wait for the GPU.
    cuts = document_cuts(documents) if isinstance(config, KimiConfig) and tokens.is_cuda else None
    return Context(cos[:length], sin[:length], document_mask(tokens, end_of_text), documents=documents, cuts=cuts)


class AttentionInput(NamedTuple):
    """A sublayer input that tells the attention's projections apart, or mixes the first layer's values into its own."""

    query: Float[Tensor, "B T D"]
    """What the query projection takes; ``key`` and ``value`` likewise."""
    key: Float[Tensor, "B T D"]
    value: Float[Tensor, "B T D"]
    first: Tensor | None = None
    """The values [B, kv heads, T, W] that the first attention handed over, or None to use its own alone."""
    mix: Tensor | None = None
    """The weights [2] of ``first`` and of its own."""
    hand_over: bool = False
    """Return an ``AttentionOutput``."""


class AttentionOutput(NamedTuple):
    """What an attention returns when its input asked for its values."""

    hidden: Float[Tensor, "B T D"]
    values: Tensor
    """[B, kv heads, T, W]."""


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions and optional QK norm; ``layer`` is its place in a cache."""

    def __init__(self, config: ModelConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.kv_heads, self.head_width = config.num_heads, config.kv_heads, config.head_width
        inner, kv = self.num_heads * self.head_width, self.kv_heads * self.head_width
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.qkv = nn.Linear(config.dim, inner + 2 * kv, bias=False)
        self.out = nn.Linear(inner, config.dim, bias=False)
        self.query_norm = RMSNorm(self.head_width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(self.head_width, config.norm_eps) if config.qk_norm else nn.Identity()

    def head_rows(self) -> dict[str, int]:
        """Rows of one head in each matrix that makes queries, keys or values, by its name here."""
        return {"qkv.weight": self.head_width}

    def _project(self, x: Float[Tensor, "B T D"] | AttentionInput) -> Float[Tensor, "B T HW"]:
        if isinstance(x, Tensor):
            return self.qkv(x)
        if x.query is x.key and x.key is x.value:
            return self.qkv(x.query)
        sizes = [heads * self.head_width for heads in (self.num_heads, self.kv_heads, self.kv_heads)]
        inputs = (x.query, x.key, x.value)
        return torch.cat([F.linear(i, w) for i, w in zip(inputs, self.qkv.weight.split(sizes), strict=True)], dim=-1)

    def forward(
        self, x: Float[Tensor, "B T D"] | AttentionInput, context: Context
    ) -> Float[Tensor, "B T D"] | AttentionOutput:
        heads = rearrange(self._project(x), "B T (H W) -> B H T W", W=self.head_width)
        query, key, value = heads.split((self.num_heads, self.kv_heads, self.kv_heads), dim=1)
        own = value
        if isinstance(x, AttentionInput) and x.first is not None:
            assert x.mix is not None
            value = x.mix[0] * x.first + x.mix[1] * value
        query = rotate(self.query_norm(query), context.cos, context.sin)
        key = rotate(self.key_norm(key), context.cos, context.sin)
        if context.attend is not None:
            mixed = context.attend(self.layer, query, key, value)
        else:
            mixed = F.scaled_dot_product_attention(
                query, key, value, context.mask, is_causal=context.mask is None,
                enable_gqa=self.kv_heads != self.num_heads,
            )  # fmt: skip
        output = self.out(rearrange(mixed, "B H T W -> B T (H W)"))
        return AttentionOutput(output, own) if isinstance(x, AttentionInput) and x.hand_over else output


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) ⊙ up(x))`` (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.gate_up = nn.Linear(config.dim, 2 * config.mlp_width, bias=False)
        self.down = nn.Linear(config.mlp_width, config.dim, bias=False)

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
