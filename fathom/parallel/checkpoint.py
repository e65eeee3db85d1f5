"""Checkpoints that load on any number of ranks: DCP, under the names that the whole network has on one device.

Parameters and optimizer tensors are saved by name, those of the stream row by row (``stream.query.7`` is site 7's), so that
where stages are cut leaves no trace: what was saved at one P, V or sharding loads at another, or in one process, bit for bit.

    <folder>/
        *.distcp, .metadata      DCP's
        sha256.json              the checksum of each of them

The ranks write into a hidden folder that is renamed when all have finished and all is on disk: a folder of this name is whole.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor, distribute_tensor

from fathom.errors import UserError
from fathom.parallel.stages import Stage

Optimizers = Sequence[torch.optim.Optimizer]
SUMS = "sha256.json"


def save(folder: Path, parts: Sequence[nn.Module], optimizers: Optimizers = ()) -> None:
    """Write ``parts`` (a rank's stages, or the whole network) and what their optimizers keep; called on every rank."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    if problem := _agree(f"{folder} exists already; give another name" if folder.exists() else None):
        raise UserError(problem)
    if _rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _agree(None)
    tensors, _ = _state(parts, optimizers)
    with _one_process_is_fine():
        dcp_save(tensors, checkpoint_id=temporary)
    if _rank() == 0:
        sums = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
        (temporary / SUMS).write_text(json.dumps(sums, indent=2) + "\n")
        for path in (*temporary.iterdir(), temporary):
            _flush(path)
        temporary.rename(folder)
        _flush(folder.parent)
    _agree(None)


@torch.no_grad()
def load(folder: Path, parts: Sequence[nn.Module], optimizers: Optimizers = ()) -> None:
    """Load what ``save`` wrote, whatever the cut and the sharding are now; called on every rank.

    Raises ``UserError`` on every rank if a file is missing or has changed, or the checkpoint is of another network.
    """
    if problem := _agree(_damage(folder)):
        raise UserError(problem)
    for optimizer in optimizers:
        _fill(optimizer)
    tensors, gathered = _state(parts, optimizers)
    try:
        with _one_process_is_fine():
            dcp_load(tensors, checkpoint_id=folder)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise UserError(f"{folder} is not a checkpoint of this network: {reason}") from None
    except RuntimeError as error:
        raise UserError(f"{folder} is not a checkpoint of this network: {error}") from None
    for sharded, whole in gathered:
        sharded.copy_(distribute_tensor(whole, sharded.device_mesh, sharded.placements))


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


def _damage(folder: Path) -> str | None:
    """What is wrong with the files of ``folder``; looked for on rank 0 only."""
    if _rank() != 0:
        return None
    try:
        sums = json.loads((folder / SUMS).read_text())
        for name, expected in sums.items():
            if _sha256(folder / name) != expected:
                return f"{folder / name} is damaged: its checksum is not the one in {SUMS}; use another checkpoint"
    except (OSError, ValueError, AttributeError) as error:
        return f"{folder} is missing, damaged or no checkpoint ({error}); use another checkpoint"
    return None


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    """DCP warns where there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _agree(problem: str | None) -> str | None:
    """Rank 0's ``problem``, on all ranks; also a barrier."""
    if not dist.is_initialized():
        return problem
    said = [problem]
    dist.broadcast_object_list(said, src=0)
    dist.barrier()
    return said[0]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
