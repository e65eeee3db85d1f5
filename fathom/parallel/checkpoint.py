"""Checkpoints that load on any number of ranks: DCP, under the names that the whole network has on one device.

Parameters and optimizer tensors are saved by name, those of the stream row by row (``stream.query.7`` is site 7's), so that
where stages are cut leaves no trace, nor do the heads that a rank has: what was saved at one P, V, tp or sharding loads at
another, or in one process, bit for bit.

    <folder>/
        *.distcp, .metadata      DCP's
        checkpoint.json          the checksum of each of them, and what the caller gives

The ranks write into a hidden folder that the first one seals and renames when all have finished: see sealed.py.
"""

import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor, distribute_tensor

from fathom import sealed
from fathom.errors import UserError
from fathom.parallel.stages import Stage
from fathom.parallel.tensor import Pieces, SplitLinear

Optimizers = Sequence[torch.optim.Optimizer]


def save(
    folder: Path, parts: Sequence[nn.Module], optimizers: Optimizers = (), values: dict[str, Any] | None = None
) -> None:
    """Write ``parts`` (a rank's stages, or the whole network) and what their optimizers keep; called on every rank.

    ``UserError`` on every rank if there is such a folder, or a rank cannot write.
    """
    _clear(folder)
    tensors, _ = _state(parts, optimizers)
    problem = None
    with _one_process_is_fine():
        try:
            dcp_save(tensors, checkpoint_id=sealed.hidden(folder))
            if _rank() == 0:
                sealed.publish(folder, values or {})
        except (CheckpointException, OSError) as error:
            problem = f"checkpoint {folder} could not be written: {_reason(error)}"
    if problem := _agree(problem):
        raise UserError(problem)


class Saving:
    """A checkpoint that is being written while training goes on; ``result`` waits for it.

    The tensors are copied to the CPU before this returns. Then DCP writes them in a thread, in the group ``background``, which
    nothing else may use; the first rank's thread seals the folder and calls ``after``.
    """

    def __init__(
        self,
        folder: Path,
        parts: Sequence[nn.Module],
        optimizers: Optimizers,
        values: dict[str, Any],
        background: dist.ProcessGroup,
        after: Callable[[], None],
    ) -> None:
        _clear(folder)
        tensors, _ = _state(parts, optimizers)
        self._done: Future[None] = Future()
        self.folder, self._values, self._after = folder, values, after
        future = async_save(tensors, checkpoint_id=sealed.hidden(folder), process_group=background)
        cast("Future[Any]", future).add_done_callback(self._seal)

    def _seal(self, written: "Future[Any]") -> None:
        try:
            written.result()
            if _rank() == 0:
                sealed.publish(self.folder, self._values)
                self._after()
            self._done.set_result(None)
        except BaseException as error:
            self._done.set_exception(error)

    def problem(self) -> str | None:
        """Wait until this rank has finished; what went wrong, if anything has."""
        try:
            self._done.result()
        except (CheckpointException, OSError) as error:
            return f"checkpoint {self.folder} could not be written: {_reason(error)}"
        return None


def _clear(folder: Path) -> None:
    """Make the hidden folder, which a killed save may have left behind."""
    problem = None
    if _rank() == 0:
        temporary = sealed.hidden(folder)
        if folder.exists():
            problem = f"{folder} exists already; give another name"
        else:
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
            except OSError as error:
                problem = f"checkpoint {folder} could not be written: {_reason(error)}"
    if problem := _agree(problem):
        raise UserError(problem)


def _reason(error: BaseException) -> str:
    """In one line; DCP carries what each rank raised."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).partition("\n")[0]


@torch.no_grad()
def load(folder: Path, parts: Sequence[nn.Module], optimizers: Optimizers = (), *, checked: bool = False) -> None:
    """Load what ``save`` wrote, whatever the cut and the sharding are now; called on every rank.

    ``checked`` says that the checksums have been compared already. Raises ``UserError`` on every rank if a file is missing
    or has changed, or the checkpoint is of another network.
    """
    if not checked:
        check(folder)
    for optimizer in optimizers:
        _fill(optimizer)
    tensors, gathered = _state(parts, optimizers)
    try:
        with _one_process_is_fine():
            dcp_load(tensors, checkpoint_id=folder)
    except (CheckpointException, RuntimeError) as error:
        raise UserError(f"{folder} is not a checkpoint of this network: {_reason(error)}") from None
    for sharded, rows in gathered:
        _copy(sharded, rows)


def check(folder: Path) -> dict[str, Any]:
    """The values that were saved with ``folder``; ``UserError`` on every rank if a file is missing or has changed."""
    problem, values = None, None
    if _rank() == 0:
        try:
            values = sealed.check(folder)
        except UserError as error:
            problem = str(error)
    problem, values = _agree((problem, values))
    if problem is not None:
        raise UserError(problem)
    return cast("dict[str, Any]", values)


@torch.no_grad()
def spread(model: nn.Module, full: Optimizers, parts: Sequence[nn.Module], optimizers: Optimizers) -> None:
    """Give ``parts`` and their optimizers what the whole ``model`` and its own, ``full``, hold on every rank."""
    for optimizer in optimizers:
        _fill(optimizer)
    whole, _ = _state([model], full)
    tensors, gathered = _state(parts, optimizers)
    for name, tensor in tensors.items():
        _copy(tensor, whole[name])
    for sharded, rows in gathered:
        _copy(sharded, rows)


def _copy(into: Tensor, whole: Tensor) -> None:
    if isinstance(into, Pieces):
        into.fill_from(whole)
        return
    whole = whole.to(into.device)
    into.copy_(distribute_tensor(whole, into.device_mesh, into.placements) if isinstance(into, DTensor) else whole)


def _state(
    parts: Sequence[nn.Module], optimizers: Optimizers
) -> tuple[dict[str, Tensor], list[tuple[DTensor, Tensor]]]:
    """Every tensor by its name in the whole network, and the sharded ones of the stream with their gathered copies.

    A number of a parameter, like Adam's step, is as many as the parameter has rows.
    """
    kept = {parameter: state for optimizer in optimizers for parameter, state in optimizer.state.items()}
    tensors: dict[str, Tensor] = {}
    gathered: list[tuple[DTensor, Tensor]] = []
    for part in parts:
        first = part.rows().start if isinstance(part, Stage) else 0
        for name, parameter in part.named_parameters():
            kinds = {f"optimizer.{key}": v for key, v in kept.get(parameter, {}).items() if isinstance(v, Tensor)}
            for kind, tensor in {"model": parameter.detach(), **kinds}.items():
                if not name.startswith("stream."):
                    owner = part.get_submodule(name.rpartition(".")[0])
                    if isinstance(owner, SplitLinear) and tensor.ndim == 2:
                        tensor = owner.pieces(tensor)
                    tensors[f"{kind}.{name}"] = tensor
                    continue
                if isinstance(tensor, DTensor):
                    whole = tensor.full_tensor()
                    gathered.append((tensor, whole))
                    tensor = whole
                for row, values in enumerate(tensor.expand(len(parameter)) if tensor.ndim == 0 else tensor):
                    tensors[f"{kind}.{name}.{first + row}"] = values
    return tensors, gathered


def _fill(optimizer: torch.optim.Optimizer) -> None:
    """Make the state of an optimizer that has not stepped yet: a step of rate zero on gradients of zero."""
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """DCP warns where there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _agree(said: Any) -> Any:
    """What rank 0 says, on all ranks; also a barrier."""
    if not dist.is_initialized():
        return said
    values = [said]
    dist.broadcast_object_list(values, src=0)
    dist.barrier()
    return values[0]
