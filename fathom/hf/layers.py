"""Decoder layers of Transformers on a stream: the original's own attention, MLP and norms, without its residual sums.

The network's own loop hands each layer what the layer before returned. Here that is the stream's state: the first layer
starts it from the embedding (scaled, positions added, or whatever else the network makes of it), the last one finishes it for
the network's final norm. All else, masks and caches and rotary positions, stays the network's business.

When is the result the original, if all depth queries are zero? A read is then the mean of its n sources, and these add up to
the original's hidden state h. If all that a sublayer sees of h has passed a norm that is scale-invariant, it sees the same:

    RMSNorm(h / n; eps) = RMSNorm(h; n² eps)            LayerNorm alike: the mean it subtracts is linear in h

so the norm of a site with n sources gets eps / n², and the conversion is exact at every epsilon. A norm after a sublayer
(Gemma 2, 3) is part of the sublayer, a multiplier of the embedding or of the outputs is part of what is summed, and a parallel
block (GPT-NeoX) is one sublayer that holds attention and MLP. A sublayer that reads h without a norm of its own (post-norm:
OLMo 2) has no such proof and is refused.
"""

import copy
from typing import Any, cast

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fathom.hf.placement import placed_on, stream_on
from fathom.stream import Stream


class Trace:
    """Where the layers of one network note what their attention reads, while somebody asks for it."""

    def __init__(self) -> None:
        self.hidden: list[Tensor] | None = None


class StreamLayer(GradientCheckpointingLayer):
    """One decoder layer on a stream; its modules keep the names that they had, so that weights do too.

    Subclasses say which norm each sublayer has and what a sublayer computes from its normalised input.
    """

    norms: tuple[tuple[str, ...], ...] = (("input_layernorm",), ("post_attention_layernorm",))
    """For each site of the layer, the norms that see its read."""

    def __init__(self, layer: nn.Module, stream: Stream, index: int, trace: Trace) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        # In a tuple, because the stream is the whole network's module and not this layer's.
        self._shared = (stream, trace)
        self.first_site = index * len(self.norms)
        for offset, names in enumerate(self.norms):
            for name in names:
                setattr(
                    self, name, scale_epsilon(getattr(layer, name), len(stream.source_names(self.first_site + offset)))
                )

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)  # any module of the layer that was wrapped

    def sublayer(self, site: int, x: Tensor, **kwargs: Any) -> Tensor:
        """What the sublayer of the layer's ``site`` returns for its normalised input ``x``."""
        raise NotImplementedError

    def norm(self, site: int, x: Tensor) -> Tensor:
        return getattr(self, self.norms[site][0])(x)

    def forward(self, state: Any, **kwargs: Any) -> Any:
        stream, trace = self._shared
        if (device := placed_on(self)) is not None:  # where accelerate has moved the state, an argument, already
            stream = stream_on(stream, device)
        if self.first_site == 0:
            state = stream.start(state)
        for site in range(len(self.norms)):
            # A function and not the module: a stream would take weight and eps of any norm for those of an RMSNorm.
            def norm(h: Tensor, site: int = site) -> Tensor:
                if site == 0 and trace.hidden is not None:
                    trace.hidden.append(h)
                return self.norm(site, h)

            x, state = stream.read(state, self.first_site + site, norm)
            output = self.sublayer(site, x, **kwargs)
            # Under autocast the stream stays in the embedding's dtype, as the original's residual sum does.
            state = stream.write(state, self.first_site + site, output.to(stream.running_sum(state).dtype))
        if self.first_site + len(self.norms) == stream.num_sublayers:
            return stream.finish(state, lambda h: h)
        return state


class LlamaStreamLayer(StreamLayer):
    """Llama, Mistral, Qwen 2 and 3, SmolLM, Gemma: two PreNorm sublayers."""

    def sublayer(self, site: int, x: Tensor, **kwargs: Any) -> Tensor:
        return self.self_attn(hidden_states=x, **kwargs)[0] if site == 0 else self.mlp(x)


class Gemma2StreamLayer(StreamLayer):
    """Gemma 2 and 3: a norm before each sublayer and one after it."""

    norms = (("input_layernorm",), ("pre_feedforward_layernorm",))

    def sublayer(self, site: int, x: Tensor, **kwargs: Any) -> Tensor:
        if site == 0:
            return self.post_attention_layernorm(self.self_attn(hidden_states=x, **kwargs)[0])
        return self.post_feedforward_layernorm(self.mlp(x))


class GPT2StreamLayer(StreamLayer):
    """GPT-2."""

    norms = (("ln_1",), ("ln_2",))

    def forward(
        self, state: Any, past_key_values: Any = None, attention_mask: Any = None, *_: Any, **kwargs: Any
    ) -> Any:
        return super().forward(state, past_key_values=past_key_values, attention_mask=attention_mask, **kwargs)

    def sublayer(self, site: int, x: Tensor, **kwargs: Any) -> Tensor:
        return self.attn(x, **kwargs)[0] if site == 0 else self.mlp(x)


class GPTNeoXStreamLayer(StreamLayer):
    """GPT-NeoX and Pythia with ``use_parallel_residual`` off."""

    def sublayer(self, site: int, x: Tensor, **kwargs: Any) -> Tensor:
        if site == 0:
            return self.post_attention_dropout(self.attention(x, **kwargs)[0])
        return self.post_mlp_dropout(self.mlp(x))


class ParallelGPTNeoXStreamLayer(GPTNeoXStreamLayer):
    """GPT-NeoX and Pythia as released: attention and MLP read the same, through a norm each, and are one sublayer."""

    norms = (("input_layernorm", "post_attention_layernorm"),)

    def norm(self, site: int, x: Tensor) -> Tensor:
        return x

    def sublayer(self, site: int, x: Tensor, **kwargs: Any) -> Tensor:
        return super().sublayer(0, self.input_layernorm(x), **kwargs) + super().sublayer(
            1, self.post_attention_layernorm(x)
        )


def scale_epsilon(norm: nn.Module, num_sources: int) -> nn.Module:
    """``norm`` with the same parameters and an epsilon of eps / num_sources²; a copy, because a norm may be shared."""
    scaled = copy.copy(norm)
    name = "variance_epsilon" if hasattr(scaled, "variance_epsilon") else "eps"
    setattr(scaled, name, cast(float, getattr(scaled, name)) / max(1, num_sources) ** 2)
    return scaled


def shallow_copy(module: nn.Module) -> nn.Module:
    """A module with the same children and parameters, whose children can be exchanged without touching ``module``'s."""
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied
