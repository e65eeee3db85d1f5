"""What a rank of a pipeline keeps of a micro-batch from its forward to its backward pass, measured.

The rank's stages run one after another in this process, on tensors without data, so that any size can be asked for: every
stage is handed what its hop carries, beside the rank's cache. What is alive at the end is what is kept, shared memory once.
"""

import weakref
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.transformer import Transformer
from fathom.parallel.config import Recompute
from fathom.parallel.pipeline import SourceCache
from fathom.parallel.plan import Plan, make_plan
from fathom.parallel.stages import Stage


class _Alive(TorchDispatchMode):
    """Counts the bytes of all storages that are made under it and are still alive."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self.bytes = 0
        self._seen = {parameter.untyped_storage()._cdata for parameter in parameters}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.bytes += size

        def freed() -> None:
            self._seen.discard(key)
            self.bytes -= size

        weakref.finalize(storage, freed)


def footprints(
    config: ModelConfig, num_ranks: int, num_virtual: int, micro_batch: int
) -> dict[str, dict[str, dict[int, int]]]:
    """Bytes by arm, by level of recomputation, by rank: the first and the last."""
    prenorm = replace(config, residual=ResidualConfig(rule="prenorm"))
    arms = {"prenorm": prenorm} if config == prenorm else {"prenorm": prenorm, config.residual.rule: config}
    found: dict[str, dict[str, dict[int, int]]] = {}
    for name, arm in arms.items():
        plan = make_plan(arm, num_ranks, num_virtual)
        with FakeTensorMode():
            model = Transformer(arm, end_of_text=0)
            found[name] = {
                level: {rank: kept(model, plan, rank, micro_batch, level) for rank in (0, num_ranks - 1)}
                for level in get_args(Recompute)
            }
    return found


def kept(model: Transformer, plan: Plan, rank: int, micro_batch: int, recompute: Recompute) -> int:
    """Bytes that ``rank`` keeps of one micro-batch, what it received with it; ``model`` is made of fake tensors, and runs so."""
    config, cache = model.config, SourceCache(plan)
    stages = [Stage(model, plan, index, recompute=recompute) for index in range(rank, plan.num_stages, plan.num_ranks)]
    tokens = torch.zeros(micro_batch, config.context, dtype=torch.int64)
    held = []
    with _Alive(t for stage in stages for t in (*stage.parameters(), *stage.buffers())) as alive:
        for stage in stages:
            stage.bank, stage.keep = cache.bank, cache.keep
            count = 0 if stage.is_first else plan.tensors(stage.index)
            received = [torch.empty(micro_batch, config.context, config.dim, requires_grad=True) for _ in range(count)]
            held.append((received, stage(*received, tokens=tokens)))
        return alive.bytes
