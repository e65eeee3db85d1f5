"""The arms of the residual-path benchmark: ways to carry and read the stream, over the same sublayers.

prenorm             h + f(norm(h)), the add and the next norm compiled together
eager               the equations of Block AttnRes (arXiv 2603.15031, Eq. 2-6), read by read, in plain PyTorch
compile             the same function under torch.compile, one graph per read: the pending add, the mix and the norm
fathom              ``fathom.block.BlockAttnRes`` as it comes
fathom-recompute    the same with ``recompute=True``
*-checkpoint        the arm with each block of S sublayers checkpointed: what a peer that recomputes is compared with
fla ...             see peers.py

``eager``, ``compile`` and the peers share one stream, `ListAttnRes`, which hands its read the bank, the partial sum and the
pending output. Its queries are separate parameters, so that no arm pays for slicing a [L + 1, D] one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from workloads import EPS, Workload, forward

from fathom.block import BlockAttnRes
from fathom.models.layers import RMSNorm
from fathom.stream import Norm, Stream

Bank = tuple[Tensor, ...]
Read = Callable[[Bank, Tensor | None, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(bank, partial, output, query [D], gain [D], norm weight [D]) -> (partial + output, norm(mix of bank and that sum))."""


class Unavailable(Exception):
    """An arm that cannot run here, and why."""


@dataclass(frozen=True)
class Arm:
    """A way to run a workload: ``run(embedding)`` is the normalised output."""

    name: str
    run: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter]
    """Its own, whose gradients are dropped with the network's."""
    query_gradient: Callable[[], Tensor | None]
    """[L + 1, D] after a backward pass; None for PreNorm."""


def add_norm(hidden: Tensor, output: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = hidden + output
    return total, F.rms_norm(total, (total.shape[-1],), weight, EPS)


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, EPS)


compiled_add_norm = torch.compile(add_norm, fullgraph=True, dynamic=False)
compiled_norm = torch.compile(norm, fullgraph=True, dynamic=False)


class AddNormState(NamedTuple):
    hidden: Tensor
    pending: Tensor | None


class AddNorm(Stream):
    """PreNorm whose write leaves the output pending, so that the next read adds and normalises in one function."""

    def __init__(self, num_sublayers: int, dim: int, *, compiled: bool) -> None:
        super().__init__(num_sublayers, dim)
        self.add_norm, self.norm = (compiled_add_norm, compiled_norm) if compiled else (add_norm, norm)

    def start(self, embedding: Tensor) -> AddNormState:
        return AddNormState(embedding, None)

    def read(self, state: AddNormState, site: int, norm: Norm) -> tuple[Tensor, AddNormState]:
        weight = cast(RMSNorm, norm).weight
        if state.pending is None:
            return self.norm(state.hidden, weight), state
        hidden, x = self.add_norm(state.hidden, state.pending, weight)
        return x, AddNormState(hidden, None)

    def write(self, state: AddNormState, site: int, output: Tensor) -> AddNormState:
        return state._replace(pending=output)

    def finish(self, state: AddNormState, norm: Norm) -> Tensor:
        return self.read(state, self.num_sublayers, norm)[0]


def plain_read(
    bank: Bank, partial: Tensor | None, output: Tensor, query: Tensor, gain: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The equations as they stand, computed in float32 at least, the mix rounded to the sources' dtype."""
    total = output if partial is None else partial + output
    dtype = torch.promote_types(total.dtype, torch.float32)
    values = [source.to(dtype) for source in (*bank, total)]
    folded = query.to(dtype) * gain.to(dtype)
    scores = [(value * folded).sum(-1) * (value.square().mean(-1) + EPS).rsqrt() for value in values]
    weights = torch.stack(scores).softmax(0).unsqueeze(-1)
    mixed = weights[0] * values[0]
    for alpha, value in zip(weights[1:], values[1:], strict=True):
        mixed = mixed + alpha * value
    return total, norm(mixed.to(total.dtype), weight)


compiled_read = torch.compile(plain_read, fullgraph=True, dynamic=False)


class ListState(NamedTuple):
    bank: Bank
    partial: Tensor | None
    pending: Tensor


class ListAttnRes(Stream):
    """Block AttnRes, one read at a time over the list of sources, each by ``read``."""

    def __init__(self, workload: Workload, read: Read, *, compiled_norms: bool = True) -> None:
        case = workload.case
        super().__init__(case.num_sublayers, case.dim)
        self.starts = range(0, case.num_sublayers, case.block_size)
        self.mix = read
        self.norm = compiled_norm if compiled_norms else norm
        self.query = nn.ParameterList(row.clone() for row in workload.queries)
        self.gain = nn.ParameterList(row.clone() for row in workload.gains)

    def start(self, embedding: Tensor) -> ListState:
        return ListState((), None, embedding)

    def read(self, state: ListState, site: int, norm: Norm) -> tuple[Tensor, ListState]:
        weight = cast(RMSNorm, norm).weight
        if site == 0:
            return self.norm(state.pending, weight), state._replace(bank=(state.pending,))
        total, x = self.mix(state.bank, state.partial, state.pending, self.query[site], self.gain[site], weight)
        if site in self.starts:
            return x, ListState((*state.bank, total), None, total)
        return x, state._replace(partial=total)

    def write(self, state: ListState, site: int, output: Tensor) -> ListState:
        return state._replace(pending=output)

    def finish(self, state: ListState, norm: Norm) -> Tensor:
        return self.read(state, self.num_sublayers, norm)[0]

    def query_gradient(self) -> Tensor:
        rows = [torch.zeros_like(row) if row.grad is None else row.grad for row in self.query]
        return torch.stack(rows)


def stream_arm(name: str, workload: Workload, stream: Stream, checkpoint_every: int | None = None) -> Arm:
    """The arm that runs ``workload`` through ``stream``."""

    def run(embedding: Tensor) -> Tensor:
        return forward(stream, workload.network, embedding, checkpoint_every)

    def query_gradient() -> Tensor | None:
        if isinstance(stream, ListAttnRes):
            return stream.query_gradient()
        return stream.query.grad if isinstance(stream, BlockAttnRes) else None

    return Arm(name, run, list(stream.parameters()), query_gradient)


def fathom_stream(workload: Workload, **options: bool) -> BlockAttnRes:
    """``BlockAttnRes`` with the workload's queries, on its device and in its dtype; ``Unavailable`` if it lacks an option."""
    case = workload.case
    try:
        stream = BlockAttnRes(case.num_sublayers, case.dim, block_size=case.block_size, eps=EPS, **options)  # type: ignore[arg-type]
    except TypeError as error:
        raise Unavailable(str(error)) from None
    stream = stream.to(workload.embedding)
    assert stream.key_gain is not None
    with torch.no_grad():
        stream.query.copy_(workload.queries)
        stream.key_gain.copy_(workload.gains)
    return stream


def prenorm_stream(workload: Workload, *, compiled: bool) -> AddNorm:
    return AddNorm(workload.case.num_sublayers, workload.case.dim, compiled=compiled)


OWN: dict[str, Callable[[Workload], Arm]] = {
    "prenorm": lambda w: stream_arm("prenorm", w, prenorm_stream(w, compiled=True)),
    "fathom": lambda w: stream_arm("fathom", w, fathom_stream(w)),
    "fathom-recompute": lambda w: stream_arm("fathom-recompute", w, fathom_stream(w, recompute=True)),
    "compile": lambda w: stream_arm("compile", w, ListAttnRes(w, compiled_read)),
    "eager": lambda w: stream_arm("eager", w, ListAttnRes(w, plain_read, compiled_norms=False)),
    "prenorm-checkpoint": lambda w: stream_arm(
        "prenorm-checkpoint", w, prenorm_stream(w, compiled=True), w.case.block_size
    ),
    "fathom-checkpoint": lambda w: stream_arm("fathom-checkpoint", w, fathom_stream(w), w.case.block_size),
}
