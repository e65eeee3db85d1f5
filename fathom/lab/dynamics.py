"""What depth attention does in a trained network: how loud each layer is, what gradient it gets, what each site reads.

``measure_depth`` runs a model forward and backward over some text and returns the content of a run's ``depth.json``:

    rule, tokens     the residual rule, and over how many tokens all means were taken
    definitions      what each number below is, in words (the paper's Fig. 5 prints no definition)
    layers           per decoder layer: output_magnitude, gradient_magnitude
    sites            per read: its sources, mean weights, entropy, effective sources; empty for PreNorm (Fig. 8)

``write_depth`` does so for the newest checkpoint of a run and adds ``step``, the optimizer step of that checkpoint.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.errors import UserError
from fathom.models.transformer import Transformer
from fathom.train import checkpoint
from fathom.train.config import load_config, read_object
from fathom.train.data import Batches, TokenShards
from fathom.train.environment import pick_device
from fathom.train.loop import data_folder
from fathom.train.metrics import writing

DEFINITIONS = {
    "output_magnitude": (
        "root mean square over tokens and channels of the running sum after the decoder layer: the hidden state "
        "(PreNorm), the current block's partial sum (Block AttnRes), or the output of the layer's MLP (Full AttnRes)"
    ),
    "gradient_magnitude": (
        "root mean square over tokens and channels of the gradient of the summed token losses (nats) with respect to "
        "the output of the decoder layer's MLP; under PreNorm also the gradient of the hidden state after the layer"
    ),
    "weights": "depth-attention weight of each source, mean over tokens",
    "entropy_nats": "mean over tokens of the entropy of a token's own depth-attention weights, in nats",
    "effective_sources": "exp(entropy_nats): how many equally weighted sources would have that entropy",
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
                    weights = stream.weights(state, site).double()
                    self.weights[site] += weights.flatten(1).sum(1)
                    self.entropy[site] += torch.special.entr(weights).sum()
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


def write_depth(run: Path, *, sequences: int = 32, device: str = "auto") -> Path:
    """Measure the newest checkpoint of ``run`` on its first validation sequences; write and return ``run/depth.json``.

    Args:
        run: a run folder; its data must still be where its config says.
        sequences: how many validation sequences, at most; fewer if the split is shorter.
        device: cpu, cuda or auto.

    Raises:
        UserError: not a run folder, no whole checkpoint, or data that is gone or has changed.
    """
    if sequences < 1:
        raise UserError(f"sequences is {sequences}: it must be at least 1")
    for file in ("config.json", "data.json"):
        if not (run / file).is_file():
            raise UserError(f"{run} is not a run folder: it has no {file}")
    config, place = load_config(run / "config.json"), pick_device(device)
    found = checkpoint.checkpoints(run)
    if not found:
        raise UserError(f"{run} has no checkpoint to measure; let it train until it writes one")
    progress = checkpoint.read_progress(found[-1])
    folder = data_folder(config)
    shards = TokenShards(folder, "val")
    if read_object(run / "data.json").get("corpus_hash") != shards.corpus_hash:
        raise UserError(f"{folder} holds another corpus than the one {run} was trained on; give the original data")
    model = Transformer(config.model, end_of_text=progress.end_of_text)
    checkpoint.load_model(found[-1], model)
    model.to(place)

    held_out = Batches(shards, config.model.context, 0, shuffle=False)
    count = min(sequences, held_out.num_sequences)
    arrays = (held_out.get(first, min(4, count - first)) for first in range(0, count, 4))
    batches = ((torch.from_numpy(x).to(place), torch.from_numpy(y).to(place)) for x, y in arrays)
    depth = {"step": progress.step, **measure_depth(model, batches)}
    path = run / "depth.json"
    temporary = path.with_suffix(".tmp")
    with writing(path):
        temporary.write_text(json.dumps(depth, indent=2) + "\n")
        temporary.replace(path)
    return path
