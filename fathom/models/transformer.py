"""A decoder-only transformer over any residual rule: embedding, the one loop, head."""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from fathom.errors import UserError
from fathom.models.config import ModelConfig
from fathom.models.layers import Attention, Context, RMSNorm, SwiGLU, make_context, rotary_table
from fathom.residuals import make_stream
from fathom.residuals.rule import Rule

Observe = Callable[[int, Any, Tensor | None], None]


class Transformer(nn.Module):
    """The decoder of ``config``, initialised by ``initialize``.

    Args:
        config: the architecture.
        seed: of the initialisation. Two rules built from the same seed share every weight that both have.
        end_of_text: the token that ends a document; needed for ``config.document_mask``.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig, *, seed: int = 0, end_of_text: int | None = None) -> None:
        super().__init__()
        if config.document_mask and end_of_text is None:
            raise UserError("model.document_mask needs the end-of-text token: pass end_of_text")
        self.config = config
        self.end_of_text = end_of_text
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.sublayers = nn.ModuleList(
            sublayer for layer in range(config.num_layers) for sublayer in self._layer(layer)
        )
        self.stream = make_stream(config.residual, config.num_sublayers, config.dim)
        self.final_norm = RMSNorm(config.dim, config.norm_eps)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        cos, sin = self._rotary_table()
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        initialize(self, seed)

    def _layer(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """The two sublayers of decoder layer ``layer``."""
        return Attention(self.config, layer), SwiGLU(self.config)

    def _rotary_table(self) -> tuple[Tensor, Tensor]:
        return rotary_table(self.config)

    def initialize_more(self, name: str, parameter: Tensor, generator: torch.Generator) -> None:
        """Initialise a parameter that ``initialize`` has no rule for."""
        raise AssertionError(f"initialize has no rule for {name}")

    def _context(self, tokens: Tensor) -> Context:
        return make_context(self.config, tokens, self.cos, self.sin, self.end_of_text)

    def hidden(
        self, tokens: Int[Tensor, "B T"], observe: Observe | None = None, context: Context | None = None
    ) -> Float[Tensor, "B T D"]:
        """The normalised output that the head reads.

        ``context``: where the tokens stand and what attention sees; if not given, they begin a sequence and see one another.
        ``observe(site, state, output)`` is called at every site, the output site last (with output None), with the state that
        its read saw: the place for instruments, which must not change it.
        """
        if context is None:
            context = self._context(tokens)
        embedding = self.embedding(tokens)
        if torch.is_autocast_enabled(embedding.device.type):
            embedding = embedding.to(torch.get_autocast_dtype(embedding.device.type))
        state = self.stream.start(embedding)
        for site, sublayer in enumerate(self.sublayers):
            x, state = self.stream.read(state, site, cast(RMSNorm, sublayer.norm))
            output = sublayer(x, context)
            if observe is not None:
                observe(site, state, output)
            state = self.stream.write(state, site, output)
        if observe is not None:
            observe(len(self.sublayers), state, None)
        return self.stream.finish(state, self.final_norm)

    def forward(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T V"]:
        """Logits of the next token at every position."""
        return self.head(self.hidden(tokens))

    def loss(self, tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats, computed in float32 at least."""
        return next_token_loss(self(tokens), targets)

    def depth_weights(self, tokens: Int[Tensor, "B T"]) -> list[Float[Tensor, "N B T"]]:
        """The depth-attention weights of every site, the output's last; ``UserError`` for a rule that has none."""
        weights: list[Tensor] = []

        def record(site: int, state: Any, output: Tensor | None) -> None:
            weights.append(self.stream.weights(state, site))

        self.hidden(tokens, observe=record)
        return weights


def next_token_loss(logits: Float[Tensor, "B T V"], targets: Int[Tensor, "B T"]) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats, in float32 at least, of the targets that are not -100.

    Eager, it writes several float32 copies of the logits; compiled, none: they are cast as they are read.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """The whole initialisation.

    | parameter                       | value                | why                                             |
    |---------------------------------|----------------------|-------------------------------------------------|
    | embedding (untied)              | N(0, embedding_std²) | 1: sublayers must not drown it; starves at 0.05 |
    | embedding (tied)                | N(0, 1/D)            | it is the head too: logits of order one         |
    | qkv, gate_up                    | N(0, 1/fan_in)       | keeps unit variance                             |
    | out, down (write to the stream) | N(0, 1/(fan_in · L)) | L of them add up to about unit variance         |
    | head (untied)                   | N(0, head_std²/D)    | 0: the first prediction is uniform              |
    | norms, key gains                | 1                    |                                                 |
    | depth queries                   | 0                    | AttnRes starts as its PreNorm twin (section 5)  |
    | other rules of residuals/       | by the rule's file   | as published                                    |

    Random numbers are drawn in the order of ``named_parameters``, those of the stream last: twins share their weights.
    """
    config = model.config
    generator = torch.Generator().manual_seed(seed)

    def normal(parameter: Tensor, std: float) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * std)

    own_rule = isinstance(model.stream, Rule)
    for name, parameter in model.named_parameters():
        if own_rule and name.startswith("stream."):
            continue
        kind = name.split(".")[-2]
        if name == "embedding.weight":
            normal(parameter, config.dim**-0.5 if config.tie_embeddings else config.embedding_std)
        elif kind in ("qkv", "gate_up"):
            normal(parameter, parameter.shape[1] ** -0.5)
        elif kind in ("out", "down"):
            normal(parameter, (parameter.shape[1] * config.num_sublayers) ** -0.5)
        elif kind == "head":
            normal(parameter, config.head_std * config.dim**-0.5)
        elif kind.endswith("norm") or name == "stream.key_gain":
            parameter.fill_(1)
        elif name == "stream.query":
            parameter.zero_()
        else:
            model.initialize_more(name, parameter, generator)
    if isinstance(model.stream, Rule):
        model.stream.reset(generator)
