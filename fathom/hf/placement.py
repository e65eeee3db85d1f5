"""A model whose parts accelerate has placed (``device_map``): the stream follows the sublayers from device to device.

accelerate moves the arguments of every module that it placed to the module's device, and loads what it has offloaded, when the
module is called. A stream is used by its methods and is not called, so here its state moves where the sublayer changes devices,
its parameters are copied to where they are read, and what is offloaded of it is loaded for one pass of the network.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fathom.stream import Stream


def placed_on(module: nn.Module) -> torch.device | None:
    """Where accelerate runs ``module``; None if it did not place it."""
    hook = vars(module).get("_hf_hook")
    found = (getattr(each, "execution_device", None) for each in getattr(hook, "hooks", (hook,)))
    device = next((each for each in found if each is not None), None)
    return None if device is None else torch.device(device)


def follow(own: Stream, here: Stream, state: Any, module: nn.Module) -> tuple[Stream, Any]:
    """The stream and its state on the device where ``module`` runs.

    Args:
        own: the stream that has the parameters.
        here: the stream of the sites before, ``own`` or a copy of it on the device of ``state``.
    """
    device = placed_on(module)
    if device is None or next(leaf.device for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)) == device:
        return here, state
    moved = pytree.tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, state)
    return stream_on(own, device), moved


def stream_on(stream: Stream, device: torch.device) -> Stream:
    """``stream`` with its parameters on ``device``: a copy whose gradients flow to its own, or itself if they are there."""
    if all(tensor.device == device for tensor in (*stream.parameters(), *stream.buffers())):
        return stream
    return _copied(stream, device)


def _copied(module: Any, device: torch.device) -> Any:
    copied = copy.copy(module)
    copied._parameters, copied._buffers = {}, {}
    copied._modules = {name: child and _copied(child, device) for name, child in module._modules.items()}
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        # Not as a parameter, which would be a leaf of the autograd graph. The view takes the gradient on the parameter's own
        # device: from the copy's node, on another device's stream, autograd would add it up with a warning.
        vars(copied)[name] = None if tensor is None else tensor.view_as(tensor).to(device)
    return copied


@contextmanager
def loaded(module: nn.Module) -> Iterator[None]:
    """While active, what accelerate has offloaded of ``module`` is on the device where it runs."""
    hooked: list[Any] = [each for each in module.modules() if "_hf_hook" in vars(each)]
    for each in hooked:
        each._hf_hook.pre_forward(each)
    try:
        yield
    finally:
        for each in hooked:
            each._hf_hook.post_forward(each, None)
