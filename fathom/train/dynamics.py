"""Training dynamics: how loud each layer is, what gradient it gets, how fast it moves, what each site reads.

``measure_depth`` runs a model forward and backward over some text (the content of a run's ``depth.json``):

    rule, tokens     the residual rule, and over how many tokens all means were taken
    definitions      what each number below is, in words (the paper's Fig. 5 prints no definition)
    layers           per decoder layer: output_magnitude, gradient_magnitude
    sites            per read: its sources, mean weights, entropy, effective sources; empty for PreNorm (Fig. 8)

``Recorder`` does so every so many steps of a training run, on one fixed sequence, and adds how much the step moved each layer.
It runs the model once more by itself, outside the training step: no number of the training changes by a bit.
"""

import time
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.errors import UserError
from fathom.models.transformer import Transformer

DEFINITIONS = {
    "output_magnitude": (
        "root mean square over tokens and channels of the running sum after the decoder layer: the hidden state "
        "(PreNorm), the current block's partial sum (Block AttnRes), the output of the layer's MLP (Full AttnRes), or what "
        "the rule's file says of ``running_sum``"
    ),
    "gradient_magnitude": (
        "root mean square over tokens and channels of the gradient of the summed token losses (nats) with respect to "
        "the output of the decoder layer's MLP; under PreNorm also the gradient of the hidden state after the layer"
    ),
    "weights": "depth-attention weight of each source, mean over tokens (and heads)",
    "entropy_nats": (
        "mean over tokens (and heads, each by itself) of the entropy of a token's own depth-attention weights, in nats"
    ),
    "effective_sources": "exp(entropy_nats): how many equally weighted sources would have that entropy",
    "update_to_weight": (
        "over all matrices of the decoder layer's attention and MLP: Euclidean norm of the change that the optimizer step "
        "made, decay included, over the norm of the weights before it"
    ),
}


def site_name(site: int, num_sublayers: int) -> str:
    """``layer 3 attention``, ``layer 3 mlp`` (decoder layers count from 1) or ``output``."""
    if site == num_sublayers:
        return "output"
    return f"layer {site // 2 + 1} {'mlp' if site % 2 else 'attention'}"


class _Sums:
    """Float64 sums over all tokens seen, on the model's device."""

    def __init__(self, model: Transformer) -> None:
        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64, device=model.embedding.weight.device)

        num_sites = model.config.num_sublayers + 1
        self.model = model
        self.tokens = 0
        self.output_squares = zeros(model.config.num_layers)
        self.gradient_squares = zeros(model.config.num_layers)
        self.weights = [zeros(len(model.stream.source_names(site))) for site in range(num_sites)]
        self.entropy = zeros(num_sites)

    def add(self, tokens: Tensor, targets: Tensor) -> None:
        """One forward and one backward pass of a batch."""
        stream = self.model.stream
        mlp_outputs: list[Tensor] = []

        def observe(site: int, state: Any, output: Tensor | None) -> None:
            with torch.no_grad():
                if len(self.weights[site]):
                    self.weights[site] += stream.weights(state, site).double().flatten(1).sum(1)
                    self.entropy[site] += stream.entropy(state, site).sum()
                if output is not None and site % 2:
                    after = stream.running_sum(stream.write(state, site, output))
                    self.output_squares[site // 2] += after.double().square().sum()
            if output is not None and site % 2:
                mlp_outputs.append(output)

        with torch.enable_grad(), torch.autocast(tokens.device.type, enabled=False):
            logits = self.model.head(self.model.hidden(tokens, observe))
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            # Asked for these only, autograd leaves the parameters' .grad alone and skips their share of the work.
            gradients = torch.autograd.grad(loss, mlp_outputs)
        for layer, gradient in enumerate(gradients):
            self.gradient_squares[layer] += gradient.double().square().sum()
        self.tokens += tokens.numel()


def measure_depth(model: Transformer, batches: Iterable[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """The content of ``depth.json`` (see the top of this file), computed in the parameters' dtype without autocast.

    The model is left as it was: parameters, their gradients and its mode.

    Args:
        model: any decoder.
        batches: (tokens [B, T], next tokens [B, T]) on the model's device; the sizes may differ.

    Raises:
        UserError: there is no batch.
    """
    config, stream = model.config, model.stream
    sums = _Sums(model)
    for tokens, targets in batches:
        sums.add(tokens, targets)
    if not sums.tokens:
        raise UserError("batches is empty: measuring depth needs at least one batch of text")

    values = sums.tokens * config.dim
    output, gradient = (sums.output_squares / values).sqrt(), (sums.gradient_squares / values).sqrt()
    entropy = sums.entropy / sums.tokens
    return {
        "rule": config.residual.rule,
        "tokens": sums.tokens,
        "definitions": DEFINITIONS,
        "layers": [
            {"output_magnitude": o, "gradient_magnitude": g}
            for o, g in zip(output.tolist(), gradient.tolist(), strict=True)
        ],
        "sites": [
            {
                "site": site,
                "name": site_name(site, config.num_sublayers),
                "sources": stream.source_names(site),
                "weights": (weights / sums.tokens).tolist(),
                "entropy_nats": entropy[site].item(),
                "effective_sources": entropy[site].exp().item(),
            }
            for site, weights in enumerate(sums.weights)
            if len(weights)
        ],
    }


class Recorder:
    """Records dynamics of ``model`` on one fixed batch; call ``before_step`` and ``after_step`` around an optimizer step.

    Args:
        model: the model that is trained.
        tokens: [B, T], the text that every record is measured on.
        targets: [B, T], its next tokens.
        every: steps from record to record.
    """

    def __init__(self, model: Transformer, tokens: Tensor, targets: Tensor, *, every: int) -> None:
        self.model, self.batch, self.every = model, (tokens, targets), every
        pairs = zip(model.sublayers[::2], model.sublayers[1::2], strict=True)
        self.matrices = [
            [p for sublayer in pair for p in sublayer.parameters() if p.ndim == 2] for pair in pairs
        ]  # fmt: skip
        self.before: list[list[Tensor]] = []
        self.seconds = 0.0

    def due(self, step: int) -> bool:
        """Whether ``step`` (1-based) is to be recorded."""
        return step % self.every == 0

    @torch.no_grad()
    def before_step(self) -> None:
        """Keep a copy of the matrices that the step will move."""
        begin = time.perf_counter()
        self.before = [[matrix.detach().clone() for matrix in layer] for layer in self.matrices]
        self.seconds = time.perf_counter() - begin

    @torch.no_grad()
    def _update_to_weight(self) -> Tensor:
        ratios = []
        for new, old in zip(self.matrices, self.before, strict=True):
            change = torch.stack(torch._foreach_norm(torch._foreach_sub([p.detach() for p in new], old))).norm()
            ratios.append(change / torch.stack(torch._foreach_norm(old)).norm())
        self.before = []
        return torch.stack(ratios)

    def after_step(self) -> dict[str, Any]:
        """The record: ``layers`` and ``sites`` as in ``DEFINITIONS``, and the ``seconds`` that recording took."""
        begin = time.perf_counter()
        ratios = self._update_to_weight().tolist()
        # The probe's shape must not make a compiled model compile again, and perhaps train on with another kernel.
        with torch.compiler.set_stance("force_eager"):
            depth = measure_depth(self.model, [self.batch])
        layers = [
            {**layer, "update_to_weight": ratio} for layer, ratio in zip(depth["layers"], ratios, strict=True)
        ]  # fmt: skip
        sites = [
            {
                "site": site["site"],
                "entropy_nats": site["entropy_nats"],
                "effective_sources": site["effective_sources"],
                "weights": [round(weight, 6) for weight in site["weights"]],
            }
            for site in depth["sites"]
        ]
        return {"layers": layers, "sites": sites, "seconds": self.seconds + time.perf_counter() - begin}
