"""A model and its tokenizer from a run folder, or from one of its checkpoints."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from fathom.errors import UserError
from fathom.models.kimi_linear import build
from fathom.models.transformer import Transformer
from fathom.train import checkpoint
from fathom.train.config import load_config
from fathom.train.tokenizer import load_tokenizer


def load_run(run: Path, device: torch.device, *, step: int | None = None) -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer of a run folder.

    Args:
        run: a folder written by ``fathom train``, or a checkpoint in it, ``RUN/checkpoints/step-...``.
        device: where the model goes; its parameters stay float32.
        step: which checkpoint; the newest one if not given.

    Raises:
        UserError: no run, no (such) checkpoint, or one that is damaged or of another model or tokenizer.
    """
    folder = None
    if checkpoint.NAME.fullmatch(run.name) and run.parent.name == "checkpoints":
        run, folder = run.parents[1], run
        if step is not None:
            raise UserError(f"{folder} is a checkpoint already: give its run folder, {run}, to choose one by its step")
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is not a run folder: it has no config.json")
    config = load_config(run / "config.json")
    folder = folder or _checkpoint(run, step)
    progress = checkpoint.read_progress(folder)
    tokenizer, end_of_text = load_tokenizer(run / "tokenizer.json")
    check_tokenizer(tokenizer, config.model.vocab_size, str(run / "tokenizer.json"))
    if end_of_text != progress.end_of_text:
        raise UserError(
            f"{run / 'tokenizer.json'} ends documents with token {end_of_text}, the model with {progress.end_of_text}: "
            "it belongs to another run"
        )
    model = build(config.model, end_of_text=progress.end_of_text)
    checkpoint.load_model(folder, model)
    return model.to(device).eval(), tokenizer


def check_tokenizer(tokenizer: Tokenizer, vocab_size: int, name: str) -> None:
    """Raise ``UserError`` if the tokenizer called ``name`` makes tokens that a model of ``vocab_size`` does not have."""
    if tokenizer.get_vocab_size() > vocab_size:
        raise UserError(
            f"{name} has {tokenizer.get_vocab_size()} tokens, the model {vocab_size}: it belongs to another run"
        )


def _checkpoint(run: Path, step: int | None) -> Path:
    found = checkpoint.checkpoints(run)
    if not found:
        raise UserError(f"{run} has no checkpoint yet; train on with `fathom train --resume {run}`")
    if step is None:
        return found[-1]
    steps = {int(folder.name.removeprefix("step-")): folder for folder in found}
    if step not in steps:
        raise UserError(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    return steps[step]
