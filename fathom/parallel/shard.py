"""FSDP2: parameters, gradients and optimizer state spread over a mesh axis, a sublayer's matrices gathered at a time.

A stream applies a sublayer's PreNorm *before* it calls the sublayer, and reads queries without calling any module. So a
sublayer's norm, the queries, the embedding and the head belong to the root's group, which is gathered when the network is
called; each sublayer's other parameters are a group of their own. Gradients are averaged over the axis.
"""

from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from fathom.models.transformer import Transformer
from fathom.parallel.stages import Stage


def shard(network: Transformer | Stage, mesh: DeviceMesh, *, bf16: bool = False, keep_gathered: bool = False) -> None:
    """Shard ``network`` over the one-dimensional ``mesh``, in place; its parameters become DTensors.

    Args:
        bf16: gather and compute in bf16, reduce gradients in float32; the shards and the optimizer stay as they are.
        keep_gathered: keep a sublayer's parameters from forward to backward: for a pipeline, whose micro-batches would else
            gather them once each.
    """
    if bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    else:
        policy = MixedPrecisionPolicy()
    sublayers = network.sublayers.values() if isinstance(network, Stage) else network.sublayers
    for sublayer in cast("list[nn.Module]", sublayers):
        group = [
            part for name, part in sublayer.named_children() if name != "norm" and any(True for _ in part.parameters())
        ]
        fully_shard(group, mesh=mesh, mp_policy=policy, reshard_after_forward=not keep_gathered)
    fully_shard(network, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def reshard(network: nn.Module) -> None:
    """Let go of what a forward pass gathered that no backward pass follows; until then parameters are not the optimizer's."""
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
