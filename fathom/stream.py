"""The stream: how a network carries what its sublayers wrote, and how each sublayer reads it.

A network does not know its residual rule. It holds one loop, and the rule is a ``Stream``:

    state = stream.start(embedding)
    for site, sublayer in enumerate(sublayers):
        x, state = stream.read(state, site, sublayer.norm)     # the input of the sublayer, normalised by its own PreNorm
        state = stream.write(state, site, sublayer(x))
    return head(stream.finish(state, final_norm))

``state`` is a named tuple of tensors (and tuples of them) and nothing else, never changed in place: activation checkpointing,
a pipeline hop or a decode cache is a plain function of it. ``read`` returns the state as well, because a read may compute
something that the next reads share. Sites 0 .. L-1 are the L sublayers; site L is the output.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fathom.errors import UserError

Norm = Callable[[Tensor], Tensor]
State = Any


def norm_parts(norm: Norm) -> tuple[Tensor | None, float]:
    """Weight and epsilon of a plain RMSNorm module, for a kernel to apply it with the read; ``(None, 0)`` for anything else.

    Plain are ``torch.nn.RMSNorm`` over one dim and classes that say so themselves, ``plain_rms_norm = True``. A subclass may
    compute something else, and a hook wants to see the call, so neither is taken apart.
    """
    kind = type(norm)
    plain = kind is nn.RMSNorm or kind.__dict__.get("plain_rms_norm", False)
    if not plain or not isinstance(norm, nn.Module) or norm._forward_hooks or norm._forward_pre_hooks:
        return None, 0.0
    if "_hf_hook" in norm.__dict__:  # accelerate's, which may have the weight elsewhere until the call
        return None, 0.0
    weight, eps = norm.weight, norm.eps
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(eps, float | int):
        return None, 0.0
    return weight, eps


class Stream(nn.Module):
    """A residual rule for ``num_sublayers`` sublayers of width ``dim``. Subclasses define the methods below."""

    def __init__(self, num_sublayers: int, dim: int) -> None:
        super().__init__()
        if num_sublayers < 1:
            raise UserError(f"num_sublayers is {num_sublayers}: a stream needs at least one sublayer")
        if dim < 1:
            raise UserError(f"dim is {dim}: a stream needs a width of at least one")
        self.num_sublayers = num_sublayers
        self.dim = dim

    def start(self, embedding: Float[Tensor, "*batch D"]) -> State:
        """The state before the first sublayer."""
        raise NotImplementedError

    def read(self, state: State, site: int, norm: Norm) -> tuple[Float[Tensor, "*batch D"], State]:
        """``norm`` of what sublayer ``site`` reads, and the state to write to."""
        raise NotImplementedError

    def write(self, state: State, site: int, output: Float[Tensor, "*batch D"]) -> State:
        """The state after sublayer ``site`` has returned ``output``."""
        raise NotImplementedError

    def finish(self, state: State, norm: Norm) -> Float[Tensor, "*batch D"]:
        """``norm`` of what the output site reads."""
        raise NotImplementedError

    def running_sum(self, state: State) -> Float[Tensor, "*batch D"]:
        """The sum that the latest output was added to: the hidden state, or the current block's partial sum."""
        raise NotImplementedError

    def source_names(self, site: int) -> list[str]:
        """The sources of ``site``, oldest first; ``[]`` for a rule that does not attend over depth."""
        return []

    def weights(self, state: State, site: int) -> Float[Tensor, "N *batch"]:
        """The depth-attention weights of ``site``, from the state that its ``read`` was given or returned."""
        raise UserError(f"{type(self).__name__} does not attend over depth, so site {site} has no weights")

    def entropy(self, state: State, site: int) -> Float[Tensor, "*batch"]:
        """Entropy of each token's weights at ``site``, nats; with several heads the mean of the heads' own."""
        return torch.special.entr(self.weights(state, site).double()).sum(0)


class PreNormState(NamedTuple):
    hidden: Tensor


class PreNorm(Stream):
    """The baseline: ``h_l = h_{l-1} + f_{l-1}(norm(h_{l-1}))``, every output added with weight one, no parameters."""

    def start(self, embedding: Tensor) -> PreNormState:
        return PreNormState(embedding)

    def read(self, state: PreNormState, site: int, norm: Norm) -> tuple[Tensor, PreNormState]:
        return norm(state.hidden), state

    def write(self, state: PreNormState, site: int, output: Tensor) -> PreNormState:
        return PreNormState(state.hidden + output)

    def finish(self, state: PreNormState, norm: Norm) -> Tensor:
        return norm(state.hidden)

    def running_sum(self, state: PreNormState) -> Tensor:
        return state.hidden
