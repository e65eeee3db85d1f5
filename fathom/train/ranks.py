"""The network of a run on several processes: stages of a pipeline, or the whole one sharded by FSDP2.

Every process takes part in each of these calls, and all get the same numbers from them.
"""

import math
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fathom.errors import UserError
from fathom.models.kimi_config import KimiConfig
from fathom.models.kimi_linear import build
from fathom.models.moe import balance
from fathom.models.transformer import Transformer, next_token_loss
from fathom.parallel import checkpoint as distributed
from fathom.parallel.experts import shard_experts
from fathom.parallel.pipeline import Pipeline
from fathom.parallel.plan import describe, whole
from fathom.parallel.ranks import Ranks
from fathom.parallel.shard import reshard, shard
from fathom.parallel.stages import Stage
from fathom.parallel.tensor import own_tokens, split_parameters, sum_gradients
from fathom.train import checkpoint
from fathom.train.checkpoint import Progress
from fathom.train.config import RunConfig
from fathom.train.network import LossOf, Network, compile_layers
from fathom.train.optimizers import make_optimizers


def _alike(parameters: list[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    """Parameters by the ranks that their gradients lie on: torch's norms are of tensors that lie alike."""
    found: dict[DeviceMesh | None, list[nn.Parameter]] = defaultdict(list)
    for parameter in parameters:
        found[parameter.grad.device_mesh if isinstance(parameter.grad, DTensor) else None].append(parameter)
    return found.values()


class _SeveralNetwork(Network):
    """What the two have in common; a subclass sets ``parts`` before this is initialised."""

    def __init__(self, model: Transformer, config: RunConfig, ranks: Ranks) -> None:
        self.model, self.config, self.ranks, self.device = model, config, ranks, ranks.device
        self.optimizers = make_optimizers(self.parts, config.optim)
        self.saving: distributed.Saving | None = None

    def broken(self) -> str | None:
        local = ((name, p.to_local() if isinstance(p, DTensor) else p) for name, p in self.named_parameters())
        return self.ranks.agreed(next((name for name, values in local if not values.isfinite().all()), None))

    def share(self) -> range:
        """This process's part of a step's sequences, counted from the first."""
        dp = self.ranks.axis("dp")
        size = self.config.data.batch // self.config.parallel.dp
        first = 0 if dp is None else dp.get_local_rank() * size
        return range(first, first + size)

    def clip(self) -> Tensor:
        """As ``Network.clip``, for the whole network; gradients of what the ranks of ``tp`` all have are made whole first."""
        tp, pp = self.ranks.axis("tp"), self.ranks.axis("pp")
        if tp is not None:
            sum_gradients(self.parts, tp)
        own = split_parameters(self.parts)
        parameters = [p for part in self.parts for p in part.parameters() if p.grad is not None]
        square = self._square([p for p in parameters if p in own])
        if tp is not None:
            dist.all_reduce(square, group=tp.get_group())
        square += self._square([p for p in parameters if p not in own])
        if pp is not None:
            dist.all_reduce(square, group=pp.get_group())
        norm = square.sqrt().to(parameters[0].dtype)
        for alike in _alike(parameters):
            torch.nn.utils.clip_grads_with_norm_(alike, self.config.optim.clip or math.inf, norm)
        return norm

    def _square(self, parameters: list[nn.Parameter]) -> Tensor:
        """The square of the norm of their gradients, [] in float64."""
        square = torch.zeros((), dtype=torch.float64, device=self.device)
        for alike in _alike(parameters):
            norm = torch.nn.utils.get_total_norm([cast(Tensor, p.grad) for p in alike])
            square += (norm.full_tensor() if isinstance(norm, DTensor) else norm).double().square()
        return square

    def balance(self) -> Tensor | None:
        dp, pp = self.ranks.axis("dp"), self.ranks.axis("pp")
        found = [balance(part, None if dp is None else dp.get_group()) for part in self.parts]
        loads = [load for load in found if load is not None]
        if pp is None:
            return loads[0] if loads else None
        # Of all stages: their sum, and of how many layers.
        share = torch.zeros(2, device=self.device)
        for load in loads:
            share += torch.stack((load.sum(), load.new_tensor(len(load))))
        dist.all_reduce(share, group=pp.get_group())
        return None if not isinstance(self.config.model, KimiConfig) else share[:1] / share[1:]

    def load(self, folder: Path) -> None:
        if checkpoint.saved_by_several(folder):
            distributed.load(folder, self.parts, self.optimizers, checked=True)
            return
        # Each process reads all of what one process saved, and keeps its part.
        model = build(self.model.config, end_of_text=self.model.end_of_text)
        optimizers = make_optimizers(model, self.config.optim)
        checkpoint.load_model(folder, model)
        checkpoint.load_optimizers(folder, optimizers)
        distributed.spread(model, optimizers, self.parts, self.optimizers)

    def save(self, run: Path, progress: Progress) -> Path:
        """Begin to write a checkpoint, when the one before is on disk; training goes on once its tensors are copied."""
        self.finish_saving()
        folder = run / "checkpoints" / f"step-{progress.step:06d}"
        if self.ranks.once(folder.exists):
            return folder
        self.ranks.once(lambda: checkpoint.clear(run))
        if self.ranks.size == 1:  # with recomputation alone; there is no group for a thread to write in
            try:
                distributed.save(folder, self.parts, self.optimizers, vars(progress))
            except UserError as error:
                checkpoint.clear(run)
                raise UserError(f"{error}; {checkpoint.last_good(run)}") from None
            checkpoint.prune(run, self.config.keep_checkpoints)
            return folder
        self.saving = distributed.Saving(
            folder, self.parts, self.optimizers, vars(progress), self.ranks.background,
            after=lambda: checkpoint.prune(run, self.config.keep_checkpoints),
        )  # fmt: skip
        return folder

    def finish_saving(self) -> None:
        if self.saving is None:
            return
        saving, self.saving = self.saving, None
        if problem := self.ranks.agreed(saving.problem()):
            run = saving.folder.parent.parent
            self.ranks.once(lambda: checkpoint.clear(run))
            raise UserError(f"{problem}; {checkpoint.last_good(run)}")


class ShardedNetwork(_SeveralNetwork):
    """All sublayers, or its part of each, on every process, parameters spread over ``dp``; each takes its part of the batch."""

    def __init__(self, model: Transformer, config: RunConfig, ranks: Ranks) -> None:
        recompute = config.parallel.recompute
        network: Transformer | Stage = model
        if recompute != "none":
            network = Stage(model, whole(config.model), 0, recompute=recompute)
        if ep := ranks.axis("ep"):  # first: a device need not hold the experts of all
            shard_experts(network, ep)
        network.to(ranks.device)
        self._loss_of = compile_layers(model, config)
        if dp := ranks.axis("dp"):
            shard(network, dp, replicas=ranks.axis("replicas"), bf16=config.precision == "bf16")
        self.network = network
        self.parts = [network]
        super().__init__(model, config, ranks)

    def pieces(self, first: int) -> list[range]:
        share = self.share()
        size = self.config.data.micro_batch or len(share)
        return [range(at, at + size) for at in range(first + share.start, first + share.stop, size)]

    def _mean_loss(self, tokens: Tensor, targets: Tensor, loss_of: LossOf = next_token_loss) -> Tensor:
        """This process's share of it: the shares of ``tp`` add up."""
        tp = self.ranks.axis("tp")
        if tp is not None:
            targets = own_tokens(targets, tp)
        with self._autocast():
            loss = loss_of(self.network(tokens=tokens), targets)
        return loss if tp is None else loss / tp.size()

    def backward(self, tokens: Tensor, targets: Tensor, share: float) -> Tensor:
        loss = self._mean_loss(tokens, targets, self._loss_of) * share
        loss.backward()
        return loss.detach()

    def total(self, losses: list[Tensor]) -> Tensor:
        return self._summed(torch.stack(losses).sum()) / self.config.parallel.dp

    def _summed(self, value: Tensor) -> Tensor:
        for axis in (self.ranks.axis("dp"), self.ranks.axis("tp")):
            if axis is not None:
                dist.all_reduce(value, group=axis.get_group())
        return value

    @torch.no_grad()
    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        dp = self.ranks.axis("dp")
        number, size = (0, 1) if dp is None else (dp.get_local_rank(), dp.size())
        mine = slice(number * len(tokens) // size, (number + 1) * len(tokens) // size)
        count = len(tokens[mine])
        # Every process gathers parameters the same number of times: one without sequences takes the first for nothing.
        rows = mine if count else slice(1)
        loss = self._mean_loss(tokens[rows], targets[rows]) * count
        reshard(self.network)
        return self._summed(loss) / len(tokens)


class PipelinedNetwork(_SeveralNetwork):
    """The stages of this process, which the whole part of the batch goes through in one pass."""

    def __init__(self, model: Transformer, config: RunConfig, ranks: Ranks) -> None:
        parallel, pp = config.parallel, ranks.axis("pp")
        assert pp is not None
        if ep := ranks.axis("ep"):
            shard_experts(model, ep)
        self.pipeline = Pipeline(
            model, num_virtual=parallel.virtual, num_micro_batches=config.num_micro_batches,
            micro_batch=config.data.batch // parallel.dp // config.num_micro_batches, length=config.model.context,
            cache=parallel.cache, schedule=parallel.schedule, group=pp.get_group(), dp=ranks.axis("dp"), tp=ranks.axis("tp"),
            replicas=ranks.axis("replicas"),
            dtype=torch.bfloat16 if config.precision == "bf16" else None, device=ranks.device,
            compile=config.compile == "layers", recompute=parallel.recompute,
        )  # fmt: skip
        self.parts: list[nn.Module] = list(self.pipeline.stages)
        super().__init__(model, config, ranks)
        if ranks.first:
            rows = describe(self.pipeline.plan, config.model)
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            for row in rows:
                line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
                print(line.rstrip(), file=sys.stderr)

    def pieces(self, first: int) -> list[range]:
        share = self.share()
        return [range(first + share.start, first + share.stop)]

    def backward(self, tokens: Tensor, targets: Tensor, share: float) -> Tensor:
        assert share == 1
        return self.pipeline.step(tokens, targets)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.pipeline.evaluate(tokens, targets)
