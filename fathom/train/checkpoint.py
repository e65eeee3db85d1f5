"""Checkpoints: one folder each, written whole or not at all, refused if a byte has changed.

    checkpoints/step-000200/
        model.safetensors        the model's parameters
        optimizer.safetensors    every optimizer tensor, named <optimizer>.<parameter number>.<key>
        checkpoint.json          step, sequences consumed, end of text, the sha256 of both files and of itself

A folder is written under a temporary name, flushed to disk and renamed: a killed or failed save leaves the earlier ones alone.
An old one is renamed before it is deleted, so that a folder named step-... is whole at any moment. What several processes
save has files of parallel/checkpoint.py beside checkpoint.json; it is loaded here too.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fathom import sealed
from fathom.errors import UserError

NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Progress:
    """Where a run is: everything that resuming needs besides tensors."""

    step: int
    """Optimizer steps done."""
    consumed: int
    """Training sequences consumed: the whole state of the data order."""
    end_of_text: int
    """The tokenizer's end-of-text token."""


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]))


def clear(run: Path) -> None:
    """Delete what a killed or failed save left behind; the run's lock keeps other writers away."""
    for leftover in (run / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def _optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    return {
        f"{number}.{index}.{key}": value.contiguous()
        for number, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Each parameter once: a tied head is the embedding's second name."""
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


def save(
    run: Path, progress: Progress, model: nn.Module, optimizers: list[torch.optim.Optimizer], *, keep: int
) -> Path:
    """Write a checkpoint, then delete all but the newest ``keep``. A full disk is a ``UserError``; nothing half-written stays."""
    folder = run / "checkpoints" / f"step-{progress.step:06d}"
    if folder.exists():
        return folder
    clear(run)
    temporary = sealed.hidden(folder)
    try:
        temporary.mkdir(parents=True)
        save_file(_model_tensors(model), temporary / "model.safetensors")
        save_file(_optimizer_tensors(optimizers), temporary / "optimizer.safetensors")
        sealed.publish(folder, vars(progress))
    except (OSError, SafetensorError) as error:
        clear(run)
        raise UserError(f"checkpoint {folder} could not be written: {error}; {last_good(run)}") from None
    prune(run, keep)
    return folder


def prune(run: Path, keep: int) -> None:
    """Delete all checkpoints but the newest ``keep``."""
    for old in checkpoints(run)[:-keep]:
        old.rename(sealed.hidden(old))
    clear(run)


def last_good(run: Path) -> str:
    """What to say of the earlier checkpoints when one could not be written."""
    earlier = checkpoints(run)
    return f"the last good checkpoint is {earlier[-1]}" if earlier else "there is no earlier checkpoint"


def read_progress(folder: Path) -> Progress:
    """The progress of a checkpoint whose files are all present and unchanged; otherwise a ``UserError`` naming the file."""
    values = sealed.check(folder)
    try:
        return Progress(**values)
    except TypeError as error:
        raise UserError(f"{folder / sealed.NAME} is missing or damaged ({error}); use another checkpoint") from None


def newest(run: Path) -> tuple[Path, Progress] | None:
    """The newest checkpoint of a run, checked; a ``UserError`` about a damaged one offers the newest that is whole."""
    found = checkpoints(run)
    if not found:
        return None
    try:
        return found[-1], read_progress(found[-1])
    except UserError as error:
        for earlier in reversed(found[:-1]):
            try:
                read_progress(earlier)
            except UserError:
                continue
            raise UserError(f"{error}: {earlier} is whole, and is taken if you delete {found[-1].name}") from None
        raise


def saved_by_several(folder: Path) -> bool:
    """Whether parallel/checkpoint.py wrote ``folder``."""
    return (folder / ".metadata").is_file()


def load_model(folder: Path, model: nn.Module) -> None:
    """Load the parameters of a checkpoint, checked by ``read_progress``, into ``model``."""
    if saved_by_several(folder):
        from fathom.parallel.checkpoint import load

        load(folder, [model], checked=True)
        return
    path = folder / "model.safetensors"
    saved = load_file(path)
    for name, parameter in model.named_parameters():
        value = saved.pop(name, None)
        if value is None or value.shape != parameter.shape:
            found = "missing" if value is None else f"of shape {tuple(value.shape)}"
            raise UserError(
                f"{path}: {name} is {found}, the model's is {tuple(parameter.shape)}: not a checkpoint of this model"
            )
        with torch.no_grad():
            parameter.copy_(value)
    if saved:
        raise UserError(f"{path}: {next(iter(saved))} is not a parameter of this model")


def load_optimizers(folder: Path, optimizers: list[torch.optim.Optimizer]) -> None:
    """Load every optimizer's tensors; rates and decays come from the config. ``UserError`` if other optimizers made them."""
    path = folder / "optimizer.safetensors"
    states: list[dict[int, dict[str, Tensor]]] = [
        {index: {} for group in optimizer.state_dict()["param_groups"] for index in group["params"]}
        for optimizer in optimizers
    ]
    for name, value in load_file(path).items():
        owner, index, key = name.split(".", 2)
        if int(owner) >= len(states) or int(index) not in states[int(owner)]:
            raise UserError(f"{path}: {name} belongs to none of this run's optimizers: not a checkpoint of this run")
        states[int(owner)][int(index)][key] = value
    for number, (optimizer, state) in enumerate(zip(optimizers, states, strict=True)):
        if missing := [index for index, tensors in state.items() if not tensors]:
            raise UserError(f"{path}: {number}.{missing[0]} is missing: not a checkpoint of this run")
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
