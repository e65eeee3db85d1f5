"""Exact conversion: a pretrained PreNorm decoder of Transformers becomes an AttnRes model that computes the same.

    converted = fathom.hf.convert(AutoModelForCausalLM.from_pretrained(...))

The original's modules, weights and names stay as they are; its residual sums are replaced by a stream with zero queries
(layers.py says when, and why, that changes nothing).
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.initialization import no_init_weights
from transformers.modeling_outputs import CausalLMOutputWithPast

from fathom.errors import UserError
from fathom.hf.config import ConvertedConfig, residual_config, residual_values
from fathom.hf.layers import (
    Gemma2StreamLayer,
    GPT2StreamLayer,
    GPTNeoXStreamLayer,
    LlamaStreamLayer,
    ParallelGPTNeoXStreamLayer,
    StreamLayer,
    Trace,
    scale_epsilon,
    shallow_copy,
)
from fathom.hf.modeling import reset_stream
from fathom.hf.placement import loaded
from fathom.models.config import ResidualConfig
from fathom.residuals import make_stream
from fathom.stream import Stream

EXACT_RULES = ("prenorm", "full", "block")
"""The rules whose reads are means of their sources while all queries are zero, so that they start as the original."""


class Architecture(NamedTuple):
    """Where a decoder of Transformers keeps its parts."""

    layer: Callable[[PreTrainedConfig], type[StreamLayer]]
    layers: str = "layers"
    norm: str = "norm"


def _llama(config: PreTrainedConfig) -> type[StreamLayer]:
    return LlamaStreamLayer


def _gemma2(config: PreTrainedConfig) -> type[StreamLayer]:
    return Gemma2StreamLayer


def _gpt2(config: PreTrainedConfig) -> type[StreamLayer]:
    if config.add_cross_attention:
        raise UserError("gpt2 with add_cross_attention is not supported: it reads an encoder besides its own stream")
    return GPT2StreamLayer


def _gpt_neox(config: PreTrainedConfig) -> type[StreamLayer]:
    return ParallelGPTNeoXStreamLayer if config.use_parallel_residual else GPTNeoXStreamLayer


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama),
    "mistral": Architecture(_llama),
    "qwen2": Architecture(_llama),
    "qwen3": Architecture(_llama),
    "smollm3": Architecture(_llama),
    "gemma": Architecture(_llama),
    "gemma2": Architecture(_gemma2),
    "gemma3_text": Architecture(_gemma2),
    "gpt2": Architecture(_gpt2, layers="h", norm="ln_f"),
    "gpt_neox": Architecture(_gpt_neox, norm="final_layer_norm"),
}
"""The decoders that are converted, by their ``model_type``; SmolLM and SmolLM2 are Llamas, Pythia is a GPT-NeoX."""

REFUSED = {
    "olmo2": "its norms come after the sublayers, which read the hidden state as it is: a mean is not a sum to them",
    "olmo3": "its norms come after the sublayers, which read the hidden state as it is: a mean is not a sum to them",
    "exaone4": "its norms come after the sublayers, which read the hidden state as it is: a mean is not a sum to them",
    "openai-gpt": "its norms are on the residual sum itself (post-norm), so there is no sum to replace",
    "gemma3n": "its layers keep several residual streams",
    "mamba": "it is no decoder of attention and MLP sublayers",
}
"""Decoders that a conversion would change, with the reason."""


def architecture(config: PreTrainedConfig) -> Architecture:
    """The architecture of ``config``; ``UserError`` naming one that is not supported, with the reason where it is known."""
    kind = config.model_type
    if kind in ARCHITECTURES:
        return ARCHITECTURES[kind]
    reason = REFUSED.get(kind, "nobody has checked that its sublayers read their input through a norm alone")
    raise UserError(f"{kind} cannot be converted: {reason}; supported are {', '.join(ARCHITECTURES)}")


def stream_for(config: PreTrainedConfig, residual: ResidualConfig) -> Stream:
    """The stream of ``residual`` for the decoder ``config``; ``UserError`` if either does not fit."""
    if residual.rule not in EXACT_RULES or residual.query == "input" or residual.activation == "sigmoid":
        raise UserError(
            f"residual.rule {residual.rule} with these settings does not start as the original network; "
            f"convert to one of {', '.join(EXACT_RULES)}, without switches"
        )
    sites = len(architecture(config).layer(config).norms)
    return make_stream(residual, sites * config.num_hidden_layers, config.hidden_size)


def attach(network: PreTrainedModel, stream: Stream, trace: Trace) -> None:
    """Put ``stream`` in place of the residual sums of ``network``, a ``...ForCausalLM``."""
    kind = architecture(network.config)
    base = network.base_model
    layer = kind.layer(network.config)
    layers = getattr(base, kind.layers)
    # Sources of a site under the rule: PreNorm reads the sum itself.
    setattr(base, kind.layers, nn.ModuleList(layer(old, stream, index, trace) for index, old in enumerate(layers)))
    setattr(base, kind.norm, scale_epsilon(getattr(base, kind.norm), len(stream.source_names(stream.num_sublayers))))


class ConvertedForCausalLM(PreTrainedModel, GenerationMixin):
    """A decoder of Transformers (``network``) whose layers read and write ``stream``.

    Args:
        config: the network's own configuration and the residual rule.
        network: the network to take, whose parameters are then shared; a new one if not given.
    """

    config: ConvertedConfig
    config_class = ConvertedConfig
    base_model_prefix = "network"
    supports_gradient_checkpointing = True
    _no_split_modules = [
        "LlamaStreamLayer", "Gemma2StreamLayer", "GPT2StreamLayer", "GPTNeoXStreamLayer", "ParallelGPTNeoXStreamLayer",
    ]  # fmt: skip
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: ConvertedConfig, network: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        decoder = config.network_config()
        stream = stream_for(decoder, residual_config(config.residual))
        given = network is not None
        if network is None:
            network = AutoModelForCausalLM.from_config(decoder)
        else:
            base = network.base_model_prefix
            network = cast(PreTrainedModel, shallow_copy(network))
            setattr(network, base, shallow_copy(getattr(network, base)))
        self.trace = Trace()
        attach(network, stream, self.trace)
        self.network = network
        self.stream = stream
        with no_init_weights() if given else nullcontext():
            self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Stream):
            reset_stream(module, residual_config(self.config.residual))

    def get_input_embeddings(self) -> nn.Module:
        return self.network.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.network.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.network.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.network.set_output_embeddings(value)

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        function = kwargs.get("gradient_checkpointing_func", args[0] if args else None)
        if enable and getattr(function, "keywords", {}).get("use_reentrant"):
            raise UserError("gradient checkpointing with use_reentrant=True loses the stream's gradients; use False")
        super()._set_gradient_checkpointing(enable, *args, **kwargs)

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
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Arguments and result as the network's own.

        ``hidden_states`` are what each decoder layer's attention read, before its norm, and last the normalised output.
        """
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        self.trace.hidden = [] if wanted else None
        last: list[Tensor] = []
        handle = None
        if wanted:
            norm = getattr(self.network.base_model, architecture(self.config.network_config()).norm)
            handle = norm.register_forward_hook(lambda module, inputs, output: last.append(output))
        try:
            with loaded(self.stream):
                outputs = self.network(
                    input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, labels=labels,
                    past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
                    logits_to_keep=logits_to_keep, **kwargs,
                )  # fmt: skip
            if wanted:
                outputs["hidden_states"] = (*(self.trace.hidden or []), *last)
        finally:
            self.trace.hidden = None
            if handle is not None:
                handle.remove()
        return outputs


def convert(model: PreTrainedModel, residual: ResidualConfig | None = None) -> ConvertedForCausalLM:
    """``model`` with ``residual`` (Block AttnRes if not given) in place of its residual sums, computing the same.

    The parameters are shared with ``model``, which stays as it is: training one trains both.

    Raises:
        UserError: an architecture or a rule for which the conversion would change the network.
    """
    architecture(model.config)
    residual = residual or ResidualConfig()
    given = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
    config = ConvertedConfig(text_config=model.config, residual=residual_values(residual), **given)
    converted = ConvertedForCausalLM(config, model)
    converted.stream.to(device=model.device, dtype=model.dtype)
    converted.generation_config = model.generation_config
    return converted.train(model.training)
