"""Cross-stage caching on the schedules of ``torch.distributed.pipelining`` (arXiv 2603.15031, section 4.1).

A ``PipelineStage`` has its own number of tensors in and out, which is all that a hop of varying size needs. What a rank has
seen stays in its ``SourceCache``, one entry a micro-batch, of which ``torch.distributed`` knows nothing: a later stage of the
rank reads a source as a *leaf*, the same memory without history, whose ``grad`` is what all such readers have found so far. The
backward pass of each stage before begins by taking that up (``_TakeUp``) and ends by leaving it there, its own part added; in the
stage that the source entered the rank by, it goes back over the hop, one tensor. A leaf goes when the micro-batch has ended.
"""

import logging
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.schedules import ScheduleLoopedBFS

from fathom.models.transformer import Transformer, next_token_loss
from fathom.parallel.config import Recompute, check_micro_batches, check_schedule
from fathom.parallel.plan import Plan, make_plan
from fathom.parallel.shard import reshard, shard
from fathom.parallel.stages import Sources, Stage
from fathom.parallel.tensor import own_tokens

# On an error torch prints every rank's whole schedule, on every rank; the error itself says what it was.
logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)


IGNORED = -100
"""The target of a token without one: what ``F.cross_entropy`` leaves out."""


class _TakeUp(torch.autograd.Function):
    """The identity of what leaves a stage; backward hands to the stage's ``bank`` what later stages have left on its ``leaves``.

    So that sum flows through the stage's own reads, which add to it, and autograd puts what comes out into an empty ``grad``.
    """

    @staticmethod
    def forward(ctx: Any, leaves: Sources, *bank_and_leaving: Tensor) -> Sources:
        ctx.leaves = leaves
        leaving = bank_and_leaving[len(leaves) :]
        return tuple(tensor.detach() for tensor in leaving)  # no view, of which FSDP2 would warn

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        late = [leaf.grad for leaf in ctx.leaves]
        for leaf, gradient in zip(ctx.leaves, late, strict=True):
            assert gradient is not None or not leaf.requires_grad, "later stages' backward passes have yet to run"
            leaf.grad = None
        del ctx.leaves  # what is sent lives longer than this pass
        return None, *late, *gradients


class SourceCache:
    """The sources that a rank has seen, by micro-batch, oldest first: each a leaf, for later stages to read."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.micro_batch = -1
        """The one whose forward pass runs."""
        self._leaves: dict[int, list[Tensor]] = defaultdict(list)

    def bank(self, stage: int, new: Sources) -> Sources:
        """The whole bank of ``stage``, which was sent ``new``."""
        return (*self._leaves[self.micro_batch][: self.plan.held(stage)], *new)

    def keep(self, stage: int, bank: Sources, leaving: Sources) -> Sources:
        """``leaving``, what ``stage`` sends; its whole ``bank`` is kept if a later stage of the rank reads it."""
        if not self.plan.keeps(stage):
            return leaving
        leaves = self._leaves[self.micro_batch]
        leaves += [source.detach().requires_grad_(source.requires_grad) for source in bank[len(leaves) :]]
        return _TakeUp.apply(tuple(leaves), *bank, *leaving)

    def release(self, micro_batch: int) -> None:
        self._leaves.pop(micro_batch, None)

    def nbytes(self) -> int:
        """Bytes of all that is held now, shared memory counted once."""
        storages = [leaf.untyped_storage() for leaves in self._leaves.values() for leaf in leaves]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class CachedStage(PipelineStage):
    """A ``PipelineStage`` that tells the cache which micro-batch runs, counts what it sends, and frees what it received.

    ``torch`` allocates the receive buffers of all micro-batches at once and keeps them; here a buffer lives from its receive to
    the end of the backward pass that reads it.
    """

    def __init__(
        self,
        stage: Stage,
        cache: SourceCache,
        like: Tensor,
        group: dist.ProcessGroup | None,
        traffic: dict[tuple[int, str], int],
    ) -> None:
        plan = stage.plan
        inputs = tuple(like for _ in range(plan.tensors(stage.index)))
        outputs: tuple[Tensor, ...]
        if stage.is_last:
            outputs = (torch.empty(*like.shape[:2], stage.config.vocab_size, dtype=like.dtype, device="meta"),)
        else:
            outputs = tuple(like for _ in range(plan.tensors(stage.index + 1)))
        super().__init__(
            stage, stage.index, plan.num_stages, stage.cos.device,
            input_args=() if stage.is_first else inputs, output_args=outputs, group=group,
        )  # fmt: skip
        self.stage, self.cache, self.traffic, self.like = stage, cache, traffic, like
        self.nothing = torch.empty(0)

    def _buffers(self, infos: Sequence[Any], *, requires_grad: bool) -> None:
        for info in infos:
            info.buffer = torch.empty(
                self.like.shape, dtype=self.like.dtype, device=self.device, requires_grad=requires_grad
            )

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        infos = () if self.is_first else self.args_recv_info[fwd_chunk_id]
        self._buffers(infos, requires_grad=self.has_backward)  # torch 2.11 does not ask for it again
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        infos = () if self.is_last or not self.has_backward else self.grad_recv_info[bwd_chunk_id]
        self._buffers(infos, requires_grad=False)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        return self._count(self.stage_index + 1, "forward", super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        return self._count(self.stage_index, "backward", super().get_bwd_send_ops(bwd_chunk_id))

    def _count(self, hop: int, way: str, ops: list[dist.P2POp]) -> list[dist.P2POp]:
        if ops:
            self.traffic[hop, way] += sum(op.tensor.nbytes for op in ops)
        return ops

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        self.cache.micro_batch = fwd_chunk_id
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.like.dtype == torch.bfloat16):
            output = super().forward_one_chunk(fwd_chunk_id, args, kwargs, save_forward_output)
        if not self.has_backward:
            self._free(fwd_chunk_id, ended=self.stage_index + self.group_size >= self.num_stages)
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> None:
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        self._free(bwd_chunk_id, ended=self.stage_index < self.group_size)

    def _free(self, micro_batch: int, *, ended: bool) -> None:
        for info in (*self.args_recv_info[micro_batch], *self.grad_recv_info.get(micro_batch, ())):
            info.buffer = self.nothing  # not None: torch 2.11 clears its grad
        if ended:
            self.cache.release(micro_batch)


class Pipeline:
    """This rank's stages of ``model`` and a schedule that runs them; every rank of ``group`` makes one, of the same arguments.

    Args:
        model: the whole network, the same on every rank; the stages take their modules out of it.
        num_virtual: V, stages a rank.
        num_micro_batches: pieces of a batch; P or more keep all ranks busy.
        micro_batch, length: B and T of one piece.
        cache: cross-stage caching; without it every hop carries the whole bank.
        schedule: one of ``SCHEDULES``. One that splits the backward pass is refused.
        firsts: the first site of each stage, instead of cuts by cost.
        dtype: of the stream in the hops; the parameters' if not given. With bf16 the stages run under autocast.
        group: of the P ranks; all ranks if not given.
        dp: the mesh axis of the ranks that run the same stages on other parts of the batch; FSDP2 shards the stages over it.
        tp: the mesh axis of the ranks that share the sublayers of ``model``, split already: hops carry each one's own tokens.
        replicas: the part of ``dp`` whose ranks have the same experts, where ``shard_experts`` has spread them over the rest.
        device: where the stages are moved to; where the model is if not given.
        compile: compile each sublayer with ``torch.compile``.
        recompute: what of a stage's activations is computed again in the backward pass.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        num_virtual: int,
        num_micro_batches: int,
        micro_batch: int,
        length: int,
        cache: bool = True,
        schedule: str = "1f1b",
        firsts: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        group: dist.ProcessGroup | None = None,
        dp: DeviceMesh | None = None,
        tp: DeviceMesh | None = None,
        replicas: DeviceMesh | None = None,
        device: torch.device | None = None,
        compile: bool = False,
        recompute: Recompute = "none",
    ) -> None:
        check_schedule(schedule, num_virtual)
        self.group, self.dp, self.tp = group, dp, tp
        shares = 1 if tp is None else tp.size()
        self.num_micro_batches, self.micro_batch = num_micro_batches, micro_batch
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        check_micro_batches(num_micro_batches, schedule, self.num_ranks, num_virtual)
        self.plan = make_plan(model.config, self.num_ranks, num_virtual, cache=cache, firsts=firsts)
        self.cache = SourceCache(self.plan)
        self.traffic: dict[tuple[int, str], int] = defaultdict(int)
        """Bytes that this rank has sent, by the stage a hop leads into and by way."""
        self.stages = [
            Stage(model, self.plan, index, recompute=recompute).to(device)
            for index in range(self.rank, self.plan.num_stages, self.num_ranks)
        ]
        shape = (micro_batch, length // shares, model.config.dim)
        like = torch.empty(shape, dtype=dtype or model.head.weight.dtype, device="meta", requires_grad=True)
        for stage in self.stages:
            stage.bank, stage.keep = self.cache.bank, self.cache.keep
            if compile:
                for sublayer in stage.sublayers.values():
                    sublayer.compile()
            if dp is not None:
                shard(stage, dp, replicas=replicas, bf16=dtype == torch.bfloat16, keep_gathered=True)
        parts = [CachedStage(stage, self.cache, like, group, self.traffic) for stage in self.stages]
        kinds = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B if num_virtual == 1 else ScheduleInterleaved1F1B,
                 "looped_bfs": ScheduleLoopedBFS}  # fmt: skip
        kind: Any = kinds[schedule]
        single = kind in (ScheduleGPipe, Schedule1F1B)

        loss_of = torch.compile(next_token_loss) if compile else next_token_loss

        def share_of_loss(logits: Tensor, targets: Tensor) -> Tensor:
            return loss_of(logits, targets) / shares

        self.schedule = kind(parts[0] if single else parts, num_micro_batches, loss_fn=share_of_loss)

    def _own(self, targets: Tensor) -> Tensor:
        return targets if self.tp is None else own_tokens(targets, self.tp)

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Forward and backward of a batch [B, T], which every rank of the pipeline gives; returns its mean loss on every rank.

        Gradients are those of the mean, added to what parameters hold. With ``dp`` each pipeline gives its own part of the
        batch, and loss and gradients are means over all parts.
        """
        losses: list[Tensor] = []
        self.schedule.step(tokens=tokens, target=self._own(targets), losses=losses, return_outputs=False)
        loss = torch.stack(losses).mean() if losses else torch.zeros((), device=tokens.device)
        return self._everywhere(loss) / (1 if self.dp is None else self.dp.size())

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """The mean loss of any number of sequences [B, T], which every rank gives, ``dp`` or not; on every rank.

        The schedule takes whole steps only: rows without targets fill the last one up.
        """
        size = self.num_micro_batches * self.micro_batch
        dp, number = (1, 0) if self.dp is None else (self.dp.size(), self.dp.get_local_rank())
        total = torch.zeros((), device=tokens.device, dtype=torch.float64)
        for first in range(0, len(tokens), size * dp):
            here = slice(first + number * size, first + (number + 1) * size)
            real = targets[here]
            filled = targets.new_full((size, targets.shape[1]), IGNORED)
            filled[: len(real)] = real
            rows = tokens.new_zeros(filled.shape)
            rows[: len(real)] = tokens[here]
            losses: list[Tensor] = []
            self.schedule.eval(tokens=rows, target=self._own(filled), losses=losses, return_outputs=False)
            for loss, part in zip(losses, filled.split(self.micro_batch), strict=bool(losses)):
                if count := int((part[:, 0] != IGNORED).sum()):
                    total += loss.double() * count
        for stage in self.stages:
            reshard(stage)
        return self._everywhere(total) / len(tokens)

    def _everywhere(self, loss: Tensor) -> Tensor:
        """The last rank's ``loss`` on all of the pipeline, and summed over ``dp`` and ``tp``."""
        loss = loss.detach().to(torch.promote_types(self.stages[0].cos.dtype, torch.float64))
        dist.broadcast(loss, group=self.group, group_src=self.num_ranks - 1)
        for axis in (self.dp, self.tp):
            if axis is not None:
                dist.all_reduce(loss, group=axis.get_group())
        return loss
