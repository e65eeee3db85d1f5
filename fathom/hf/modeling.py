"""Fathom's decoder as a model of Transformers: the native sublayers and stream, with Transformers' masks, caches and attention.

The loop is the one of fathom/models/transformer.py, and so are the parameters' names. A stream holds nothing from one token
to the next, so a key/value cache is all that generation needs.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from fathom.errors import UserError
from fathom.hf.config import FathomConfig
from fathom.hf.placement import follow, loaded, stream_on
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.layers import Attention, AttentionInput, AttentionOutput, RMSNorm, SwiGLU
from fathom.residuals import make_stream
from fathom.stream import Norm, Stream


def recorded(norm: Norm, hidden: list[Tensor] | None) -> Norm:
    """``norm``, appending what it is given to ``hidden``: the way to see a read before it is normalised."""
    if hidden is None:
        return norm

    def record(x: Tensor) -> Tensor:
        hidden.append(x)
        return norm(x)

    return record


def rotary(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, T, head_width / 2] of ``positions`` [B, T]: the numbers of ``rotary_table``, at any position."""
    steps = torch.arange(0, config.head_width, 2, dtype=torch.float64, device=positions.device)
    angle = positions[:, None, :, None].double() * config.rope_base ** -(steps / config.head_width)
    return angle.cos().float().to(dtype), angle.sin().float().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As ``layers.rotate``, for rows that stand at different positions."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def eager_attention(
    module: "FathomAttention", query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    """The plain equation, which also returns its weights [B, H, T, keys]."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = scaling * query @ key.mT
    weights = (scores if mask is None else scores + mask).softmax(
        -1, dtype=torch.promote_types(scores.dtype, torch.float32)
    )
    weights = weights.to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class FathomAttention(Attention, GradientCheckpointingLayer):
    """``layers.Attention`` through Transformers' attention functions and cache."""

    def __init__(self, config: FathomConfig, layer_idx: int) -> None:
        super().__init__(config.model_config())
        self.config, self.layer_idx = config, layer_idx
        self.num_key_value_groups = self.num_heads // self.kv_heads
        self.is_causal = True

    def forward(  # type: ignore[override]
        self,
        x: Tensor | AttentionInput,
        positions: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor | AttentionOutput, Tensor | None]:
        heads = rearrange(self._project(x), "B T (H W) -> B H T W", W=self.head_width)
        query, key, value = heads.split((self.num_heads, self.kv_heads, self.kv_heads), dim=1)
        own = value
        if isinstance(x, AttentionInput) and x.first is not None:
            assert x.mix is not None
            value = x.mix[0] * x.first + x.mix[1] * value
        query, key = rotate(self.query_norm(query), *positions), rotate(self.key_norm(key), *positions)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        mixed, weights = attend(
            self, query, key, value, attention_mask, scaling=self.head_width**-0.5, dropout=0.0, **kwargs
        )
        output = self.out(rearrange(mixed, "B T H W -> B T (H W)"))
        if isinstance(x, AttentionInput) and x.hand_over:
            return AttentionOutput(output, own), weights
        return output, weights


class FathomMLP(SwiGLU, GradientCheckpointingLayer):
    """``layers.SwiGLU``, which can be checkpointed."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)


class FathomPreTrainedModel(PreTrainedModel):
    config: FathomConfig
    config_class = FathomConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["FathomAttention", "FathomMLP"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {"attentions": FathomAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The table of ``fathom.models.transformer.initialize``, module by module as Transformers asks for it."""
        config = self.config.model_config()
        match module:
            case nn.Embedding():
                init.normal_(module.weight, std=config.dim**-0.5 if config.tie_embeddings else config.embedding_std)
            case nn.Linear():
                name = next(name for name, found in self.named_modules() if found is module).split(".")[-1]
                if name == "head":
                    std = config.head_std * config.dim**-0.5
                else:
                    std = (module.in_features * (config.num_sublayers if name in ("out", "down") else 1)) ** -0.5
                init.normal_(module.weight, std=std)
            case RMSNorm():
                init.ones_(module.weight)
            case Stream():
                reset_stream(module, config.residual)


def reset_stream(stream: Stream, config: ResidualConfig) -> None:
    """The first values of the stream's parameters and buffers, where they were not loaded: AttnRes has zero queries."""
    with torch.device("cpu"):
        fresh = make_stream(config, stream.num_sublayers, stream.dim)
    values = dict(chain(fresh.named_parameters(), fresh.named_buffers()))
    for name, tensor in chain(stream.named_parameters(), stream.named_buffers()):
        init.copy_(tensor, values[name])


class FathomModel(FathomPreTrainedModel):
    """The decoder without its head."""

    def __init__(self, config: FathomConfig) -> None:
        super().__init__(config)
        native = config.model_config()
        self.embedding = nn.Embedding(native.vocab_size, native.dim)
        self.sublayers = nn.ModuleList(
            sublayer
            for layer in range(native.num_layers)
            for sublayer in (FathomAttention(config, layer), FathomMLP(native))
        )
        self.stream = make_stream(native.residual, native.num_sublayers, native.dim)
        self.final_norm = RMSNorm(native.dim, native.norm_eps)
        self.native_config = native
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embedding = cast(nn.Embedding, value)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Arguments and result as those of any decoder of Transformers.

        ``hidden_states`` are what each decoder layer's attention read, before its norm, and last the normalised output.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("give exactly one of input_ids and inputs_embeds")
        embedding = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        if torch.is_autocast_enabled(embedding.device.type):
            embedding = embedding.to(torch.get_autocast_dtype(embedding.device.type))
        if use_cache and past_key_values is None and not self.config.document_mask:
            past_key_values = DynamicCache(config=self.config)
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = (torch.arange(embedding.shape[1], device=embedding.device) + seen)[None]
        mask = create_causal_mask(
            config=self.config, inputs_embeds=embedding, attention_mask=attention_mask, past_key_values=past_key_values,
            position_ids=position_ids, and_mask_function=self._same_document(input_ids, attention_mask, past_key_values),
        )  # fmt: skip
        positions = rotary(position_ids, self.native_config, embedding.dtype)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden: list[Tensor] | None = [] if output_hidden_states else None

        with loaded(self.stream):
            stream = stream_on(self.stream, embedding.device)
            state = stream.start(embedding)
            for site, sublayer in enumerate(self.sublayers):
                stream, state = follow(self.stream, stream, state, sublayer)
                if isinstance(sublayer, FathomAttention):
                    x, state = stream.read(state, site, recorded(cast(Norm, sublayer.norm), hidden))
                    output, _ = sublayer(
                        x, positions=positions, attention_mask=mask, past_key_values=past_key_values, **kwargs
                    )
                else:
                    x, state = stream.read(state, site, cast(Norm, sublayer.norm))
                    output = sublayer(x)
                state = stream.write(state, site, output)
            last = stream.finish(state, self.final_norm)
        return BaseModelOutputWithPast(
            last_hidden_state=last,
            past_key_values=past_key_values,
            hidden_states=None if hidden is None else (*hidden, last),
        )

    def _same_document(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, cache: Cache | None
    ) -> Callable[..., Tensor] | None:
        """What ``document_mask`` adds to the causal mask.

        A cache keeps keys and not tokens, so that what goes into one must be of one document; none is made unasked.
        """
        if not self.config.document_mask:
            return None
        if input_ids is None:
            raise UserError("document_mask needs input_ids: embeddings do not tell where a document ends")
        ends = input_ids.eq(cast(int, self.config.eos_token_id)).long()
        if cache is not None:
            inner = ends[:, :-1] if attention_mask is None else ends[:, :-1] * attention_mask[:, -ends.shape[1] : -1]
            if inner.any():
                raise UserError(
                    "this model attends inside one document: give the text after the last end, or use_cache=False"
                )
            return None
        document = ends.cumsum(-1) - ends
        return lambda batch, head, query, key: document[batch, query] == document[batch, key]


class FathomForCausalLM(FathomPreTrainedModel, GenerationMixin):
    """Fathom's decoder with its language-model head."""

    _tied_weights_keys = {"head.weight": "model.embedding.weight"}

    def __init__(self, config: FathomConfig) -> None:
        super().__init__(config)
        self.model = FathomModel(config)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.head = cast(nn.Linear, value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Arguments and result as those of any ``...ForCausalLM`` of Transformers."""
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            inputs_embeds=inputs_embeds, use_cache=use_cache, **kwargs,
        )  # fmt: skip
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
