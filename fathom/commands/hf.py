"""`fathom export` and `fathom convert`: models for Transformers."""

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from fathom.commands.output import Function, Json, columns, print_json
from fathom.errors import UserError


def export() -> Function:
    def run(run: Positional[Path], out: Positional[Path], checkpoint: int | None = None) -> None:
        """Write a run as a model folder of Transformers, with the same weights and its tokenizer.

        Args:
            run: The run folder, or `debian-5m` or `sotu-1m`, the models that come with Fathom.
            out: The folder to make.
            checkpoint: The step of the checkpoint; the newest if not given.
        """
        _offline()
        from fathom.hf.export import export
        from fathom.train.released import run_folder

        folder = export(run_folder(run), out, step=checkpoint)
        print(folder)

    return run


def convert() -> Function:
    def run(
        checkpoint: Positional[Path],
        out: Positional[Path],
        residual: Literal["block", "full", "prenorm"] = "block",
        num_blocks: int | None = None,
        block_size: int | None = None,
        text: Annotated[
            Path | None, arg(help="A text file to measure on; the text inside the package if not given.")
        ] = None,
        tokens: int = 128,
        as_json: Json = False,
    ) -> None:
        """Put a pretrained decoder's sublayers on a stream with zero queries: the same function, ready to be trained on.

        What the conversion changes, loss and all gradients, is measured and printed before anything is written.

        Args:
            checkpoint: A model folder of Transformers.
            out: The folder to make.
            residual: The residual rule.
            num_blocks: N, the number of blocks; 8 if neither this nor --block-size is given.
            block_size: S, the sublayers of one block.
            tokens: How many tokens of the text to measure on.
        """
        if tokens < 2:
            raise UserError(f"--tokens is {tokens}: a loss needs at least 2")
        _offline()
        from fathom.hf.checkpoints import convert_checkpoint
        from fathom.models.config import ResidualConfig

        rule = ResidualConfig(rule=residual, num_blocks=num_blocks, block_size=block_size)
        report = convert_checkpoint(
            checkpoint, out, rule, text=text, num_tokens=tokens, tell=None if as_json else print
        )
        if as_json:
            print_json({"out": str(out), "differences": [each.as_dict() for each in report]})
        else:
            print(out)

    return run


def finetune() -> Function:
    from fathom.train.finetune import FinetuneConfig

    def run(
        model: Positional[Path],
        out: Positional[Path],
        options: Annotated[FinetuneConfig, arg(name="")],
        as_json: Json = False,
    ) -> int | None:
        """Train a model folder further on a dataset made with its tokenizer: a conversion, or the original as its control.

        Args:
            model: A model folder of Transformers.
            out: The folder to make.
            options: How.
        """
        _offline()
        from fathom.hf.finetune import finetune
        from fathom.train.loop import Diverged

        try:
            summary = finetune(model, out, options)
        except Diverged as error:
            print(f"fathom finetune: {error}", file=sys.stderr)
            return 1
        if as_json:
            print_json({"out": str(out), **summary})
        else:
            before, after = summary["val_loss_before"], summary["val_loss"]
            print(f"{out}: validation {before:.4f} before, {after:.4f} after {summary['tokens']:,} tokens")
        return None

    return run


def evaluate() -> Function:
    def run(
        model: Positional[Path],
        tasks: tuple[str, ...] = ("heldout", "lastword"),
        limit: int | None = None,
        batch: int = 8,
        device: str = "auto",
        as_json: Json = False,
    ) -> int | None:
        """Evaluate a run or a model folder through lm-evaluation-harness, offline.

        Tasks with data in packages: heldout, lastword, humaneval, reasoning_NAME, bigbench_NAME (docs/hf.md). Every other name
        is the harness's own, `paper` those of the paper's Table 3; a task whose data is missing is a line, and the rest run.

        Args:
            model: A run folder, a checkpoint of one, `debian-5m` or `sotu-1m`, or a model folder of Transformers.
            tasks: Names of tasks.
            limit: Documents of each task; all if not given.
            batch: Sequences at a time.
            device: cpu, cuda, or auto for the GPU where there is one.
        """
        if not tasks:
            raise UserError("--tasks is empty: name at least one task")
        _offline()
        from fathom.hf.evaluate import evaluate
        from fathom.hf.tasks import PAPER
        from fathom.train.released import run_folder

        names = [name for task in tasks for name in (PAPER.values() if task == "paper" else (task,))]
        scores, missing = evaluate(run_folder(model), names, limit=limit, batch=batch, device=device)
        if as_json:
            print_json({"model": str(model), "limit": limit, "scores": scores, "missing": missing})
        else:
            rows = [["task", "metric", "value", "standard error"]]
            for task, metrics in scores.items():
                for metric, value in metrics.items():
                    if "_stderr" not in metric:
                        error = metrics.get(f"{metric}_stderr")
                        rows.append([task, metric, f"{value:.4f}", "" if error is None else f"{error:.4f}"])
            if scores:
                print(columns(rows))
        for task, why in missing.items():
            print(f"fathom eval: {task}: {why}", file=sys.stderr)
        return 1 if missing else None

    return run


def _offline() -> None:
    """Read and write folders only: a name that is no folder is a mistake and nothing to look for on a hub."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
