"""How the kernels' operators are defined: what ``torch.library.custom_op`` defines, at a third of its cost a call.

``custom_op`` goes through three Python functions of its own on each call, for checks that tests make once (``opcheck``) and for
gradients, which here stand around the operators. An operator of a ``torch.library.Library`` is as well known to torch.compile,
to CUDA graphs and to dispatch modes, and the dispatcher calls its function at once.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_library = torch.library.Library("fathom", "FRAGMENT")


def operator(name: str) -> Callable[[Callable[..., Any]], OpOverload]:
    """Decorate a function to be ``fathom::name`` on every device; its annotations are the schema.

    It must change no argument and return none. Shapes alone are given by ``torch.library.register_fake``, gradients by an
    ``autograd.Function`` around it or by ``torch.library.register_autograd``; without those it raises where one would be lost.
    """

    def define(function: Callable[..., Any]) -> OpOverload:
        def run(*args: Any) -> Any:
            # Where a gradient is defined around the operator, grad mode is off; but not for a gradient of that gradient.
            if torch.is_grad_enabled() and any(each.requires_grad for each in _tensors(args)):
                raise NotImplementedError(f"fathom::{name} has no gradient: use the backend reference for a second one")
            return function(*args)

        _library.define(
            name + torch.library.infer_schema(function, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,)
        )
        # As torch.compiler.disable, which loads torch._dynamo at once: a second that only compiling needs.
        _library.impl(name, torch._disable_dynamo(run), "CompositeExplicitAutograd")  # type: ignore[attr-defined]
        return getattr(torch.ops.fathom, name).default

    return define


def _tensors(args: tuple[Any, ...]) -> list[Tensor]:
    given = (each for arg in args for each in (arg if isinstance(arg, list) else [arg]))
    return [each for each in given if isinstance(each, Tensor)]
