"""Pruning sensitivity: how much the loss rises when one decoder layer, or one sublayer, writes nothing.

A pruned sublayer's output is zero, and all else is as it was: under PreNorm the running sum passes by; under AttnRes a zero
adds nothing to its block's sum, or is a source that reads may still give weight to.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fathom.lab.dynamics import load_newest, write_json
from fathom.models.layers import AttentionOutput
from fathom.models.transformer import Transformer
from fathom.train.dynamics import site_name

DEFINITIONS = {
    "loss": "mean validation loss, nats per token, of the whole network",
    "layers": "rise of that loss when the outputs of a decoder layer's attention and MLP are zero",
    "sublayers": "rise of that loss when the output of this sublayer alone is zero",
}


@contextmanager
def _silenced(model: Transformer, sites: list[int]) -> Iterator[None]:
    def silence(*arguments: Any) -> Any:
        output = arguments[-1]
        if isinstance(output, AttentionOutput):
            return output._replace(hidden=torch.zeros_like(output.hidden))
        return torch.zeros_like(output) if isinstance(output, Tensor) else None

    with ExitStack() as stack:
        for site in sites:
            handle = model.sublayers[site].register_forward_hook(silence)
            stack.callback(handle.remove)
        yield


@torch.no_grad()
def pruning(model: Transformer, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """The rise in loss without each decoder layer and each sublayer; 3 L/2 + 1 passes over ``batches``.

    Args:
        model: any decoder, left as it was.
        batches: (tokens [B, T], next tokens [B, T]) on the model's device.
    """

    def loss(sites: list[int]) -> float:
        with _silenced(model, sites):
            sums = [
                (model.loss(tokens, targets).item() * tokens.numel(), tokens.numel()) for tokens, targets in batches
            ]
        return sum(total for total, _ in sums) / sum(count for _, count in sums)

    whole, num_sublayers = loss([]), model.config.num_sublayers
    return {
        "definitions": DEFINITIONS,
        "loss": whole,
        "layers": [loss([site, site + 1]) - whole for site in range(0, num_sublayers, 2)],
        "sublayers": {site_name(site, num_sublayers): loss([site]) - whole for site in range(num_sublayers)},
    }


def write_pruning(run: Path, *, sequences: int = 16, device: str = "auto") -> Path:
    """Measure the newest checkpoint of ``run``; write and return ``run/pruning.json``. ``UserError`` as ``load_newest``."""
    found = load_newest(run, sequences=sequences, device=device)
    values = {"rule": found.model.config.residual.rule, "step": found.progress.step}
    return write_json(run / "pruning.json", values | pruning(found.model, found.arrays))
