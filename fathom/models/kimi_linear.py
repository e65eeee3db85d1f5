"""Kimi Linear: a decoder of KDA and MLA, three to one, and experts (arXiv 2510.26692), over any residual rule.

The paper of AttnRes measures it inside this decoder (arXiv 2603.15031, section 5.1). The loop, the head and the loss are the
transformer's own; what differs is what a decoder layer is made of. No sublayer knows a position.
"""

import math

import torch
from torch import Tensor, nn

from fathom.models.config import ModelConfig
from fathom.models.kda import KDA
from fathom.models.kimi_config import KimiConfig
from fathom.models.mla import MLA
from fathom.models.moe import Dense, MoE
from fathom.models.transformer import Transformer


class KimiLinear(Transformer):
    """The decoder of ``config``; see ``Transformer``.

    Beyond ``initialize``'s table:

    | parameter                  | value                 | why                                                        |
    |----------------------------|-----------------------|------------------------------------------------------------|
    | maps, gates, router        | N(0, 1/fan_in)        | keeps unit variance                                        |
    | experts' down, latent back | N(0, 1/(fan_in · L))  | they write to the stream                                   |
    | convolution taps           | N(0, 1/S)             | keeps unit variance                                        |
    | decay rate a, bias         | g = -a · d at x = 0   | memories of 1 to 1000 tokens: a in 1 .. 16, log-uniform d  |
    |                            |                       | in 0.001 .. 0.1, as published; with a floor the same g     |
    | router bias                | 0                     | no expert is preferred                                     |
    """

    config: KimiConfig

    def _layer(self, layer: int) -> tuple[nn.Module, nn.Module]:
        config = self.config
        attention = MLA(config, layer) if config.is_mla(layer) else KDA(config, layer)
        return attention, Dense(config) if config.is_dense(layer) else MoE(config)

    def _rotary_table(self) -> tuple[Tensor, Tensor]:
        nothing = torch.empty(self.config.context, 0)
        return nothing, nothing

    def initialize_more(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        def uniform(shape: torch.Size, low: float, high: float) -> Tensor:
            return torch.empty(shape, dtype=torch.float64).uniform_(low, high, generator=generator)

        def normal(std: float) -> None:
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)

        fan_in = parameter.shape[-1]
        if name.endswith("log_rate"):
            rate = uniform(parameter.shape, 1, 16)
            parameter.copy_(rate.log() if self.config.decay_floor is None else torch.zeros_like(rate))
        elif name.endswith("decay_bias"):
            step = uniform(parameter.shape, math.log(1e-3), math.log(1e-1)).exp()
            if self.config.decay_floor is None:
                parameter.copy_(step + torch.log(-torch.expm1(-step)))  # softplus gives step back
            else:
                rate = uniform(torch.Size((self.config.num_heads, 1)), 1, 16)
                decay = (rate * step.view(self.config.num_heads, -1)).flatten()
                parameter.copy_(torch.logit(decay / -self.config.decay_floor))
        elif name.endswith("router.bias"):
            parameter.zero_()
        elif parameter.ndim == 1:  # a norm inside a compressed query or a latent
            parameter.fill_(1)
        elif name.endswith(("experts.down", "back.1.weight")):
            normal((fan_in * self.config.num_sublayers) ** -0.5)
        else:
            normal(fan_in**-0.5)


def build(config: ModelConfig, *, seed: int = 0, end_of_text: int | None = None) -> Transformer:
    """The decoder that ``config`` describes."""
    kind = KimiLinear if isinstance(config, KimiConfig) else Transformer
    return kind(config, seed=seed, end_of_text=end_of_text)
