"""FSDP2: parameters, gradients and optimizer state spread over a mesh axis, a sublayer's matrices gathered at a time.

A stream applies a sublayer's PreNorm *before* it calls the sublayer, and reads queries without calling any module. So a
sublayer's norm, the queries, the embedding and the head belong to the root's group, which is gathered when the network is
called; each sublayer's other parameters are a group of their own. Gradients are averaged over the axis.

Of experts that lie on an axis of their own (experts.py), a rank's part is sharded over the ranks that have the same part, if
there are several; over those alone its gradients are averaged. A router's bias has no gradient and is whole on every rank.
"""

from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

from fathom.models.transformer import Transformer
from fathom.parallel.experts import ShardedExperts, biases
from fathom.parallel.stages import Stage


def shard(
    network: Transformer | Stage,
    mesh: DeviceMesh,
    *,
    replicas: DeviceMesh | None = None,
    bf16: bool = False,
    keep_gathered: bool = False,
) -> None:
    """Shard ``network`` over the one-dimensional ``mesh``, in place; its parameters become DTensors.

    Args:
        replicas: the axis of the ranks that have the same part of sharded experts; none if there is one such rank.
        bf16: gather and compute in bf16, reduce gradients in float32; the shards and the optimizer stay as they are.
        keep_gathered: keep a sublayer's parameters from forward to backward: for a pipeline, whose micro-batches would else
            gather them once each.
    """
    if bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    else:
        policy = MixedPrecisionPolicy()
    spread = [module for module in network.modules() if isinstance(module, ShardedExperts)]
    ignored = biases(network)
    for experts in spread:
        if replicas is None:
            ignored |= set(experts.parameters())
        else:
            fully_shard(
                experts, mesh=replicas, mp_policy=policy, reshard_after_forward=not keep_gathered,
                shard_placement_fn=lambda parameter: Shard(1),
            )  # fmt: skip
    sublayers = network.sublayers.values() if isinstance(network, Stage) else network.sublayers
    for sublayer in cast("list[nn.Module]", sublayers):
        group = [
            part
            for name, part in sublayer.named_children()
            if name != "norm" and part not in spread and any(True for _ in part.parameters())
        ]
        fully_shard(group, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep_gathered, ignored_params=ignored)
    fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=ignored)


def reshard(network: nn.Module) -> None:
    """Let go of what a forward pass gathered that no backward pass follows; until then parameters are not the optimizer's."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
