"""The network of a run as the loop sees it: losses, gradients, their norm, checkpoints.

``Network`` is on one process; those of ranks.py are on several, and are used alike.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from fathom.models.moe import balance
from fathom.models.transformer import Transformer, next_token_loss
from fathom.parallel.ranks import Ranks
from fathom.train import checkpoint
from fathom.train.checkpoint import Progress
from fathom.train.config import RunConfig
from fathom.train.optimizers import make_optimizers

LossOf = Callable[[Tensor, Tensor], Tensor]


def compile_layers(model: Transformer, config: RunConfig) -> LossOf:
    """Compile the sublayers of ``model`` if ``config`` asks for it; returns the loss of logits and targets, compiled likewise."""
    if config.compile != "layers":
        return next_token_loss
    for sublayer in model.sublayers:
        sublayer.compile()
    return torch.compile(next_token_loss)


class Network:
    """``model`` with its optimizers, on one process."""

    def __init__(self, model: Transformer, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.model = model.to(device)
        self.parts: list[nn.Module] = [self.model]
        """The modules whose parameters this process holds."""
        self.optimizers = make_optimizers(self.parts, config.optim)
        loss_of = compile_layers(model, config)
        self._loss: LossOf = lambda tokens, targets: loss_of(model(tokens), targets)
        if config.compile == "model":
            self._loss = torch.compile(model.loss)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16")

    def pieces(self, first: int) -> list[range]:
        """The sequences that this process takes of the step that begins with sequence ``first``, pass by pass."""
        batch = self.config.data.batch
        size = self.config.data.micro_batch or batch
        return [range(at, at + size) for at in range(first, first + batch, size)]

    def backward(self, tokens: Tensor, targets: Tensor, share: float) -> Tensor:
        """Add the gradients of ``share`` times the mean loss of a piece to what parameters have; returns it, detached."""
        with self._autocast():
            loss = self._loss(tokens, targets) * share
        loss.backward()
        return loss.detach()

    def total(self, losses: list[Tensor]) -> Tensor:
        """The mean loss of a step from those of this process's pieces."""
        return torch.stack(losses).sum()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that this process holds, by their names in the whole network."""
        for part in self.parts:
            yield from part.named_parameters()

    def broken(self) -> str | None:
        """A parameter that is not finite, if there is one."""
        return next((name for name, p in self.named_parameters() if not p.isfinite().all()), None)

    def clip(self) -> Tensor:
        """Bring the norm of all gradients down to the config's limit; returns what it was."""
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip or math.inf)

    def balance(self) -> Tensor | None:
        """Even out experts after a step; the largest load over the mean of the layers that have them, None without."""
        return balance(self.model)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of some sequences, without gradients, never compiled."""
        with torch.no_grad(), self._autocast():
            return self.model.loss(tokens, targets)

    def load(self, folder: Path) -> None:
        """Load a checkpoint that has been checked."""
        if checkpoint.saved_by_several(folder):
            from fathom.parallel.checkpoint import load

            load(folder, self.parts, self.optimizers, checked=True)
        else:
            checkpoint.load_model(folder, self.model)
            checkpoint.load_optimizers(folder, self.optimizers)

    def save(self, run: Path, progress: Progress) -> Path:
        """Write a checkpoint of ``run``."""
        return checkpoint.save(run, progress, self.model, self.optimizers, keep=self.config.keep_checkpoints)

    def finish_saving(self) -> None:
        """Wait for a checkpoint that is being written."""


def make_network(model: Transformer, config: RunConfig, ranks: Ranks) -> Network:
    """The network of ``config`` on ``ranks``, which takes its modules out of ``model``."""
    if config.parallel.size == 1 and config.parallel.recompute == "none":
        return Network(model, config, ranks.device)
    from fathom.parallel.tensor import split_sublayers
    from fathom.train.ranks import PipelinedNetwork, ShardedNetwork

    if tp := ranks.axis("tp"):
        split_sublayers(model, tp)
    return (PipelinedNetwork if config.parallel.pp > 1 else ShardedNetwork)(model, config, ranks)
