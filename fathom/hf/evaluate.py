"""`fathom eval`: a run or a model folder through lm-evaluation-harness, task by task, without a network."""

import io
import logging
import math
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from fathom.errors import UserError
from fathom.hf.checkpoints import load_checkpoint
from fathom.hf.config import decoder_config
from fathom.hf.export import from_native, tokenizer_for
from fathom.hf.tasks import own_task
from fathom.inference.load import load_run
from fathom.train.environment import pick_device


def load(path: Path, device: torch.device) -> tuple[Any, Any]:
    """The model and tokenizer of a run folder (its newest checkpoint), a checkpoint of one, or a model folder."""
    if (path / "checkpoints").is_dir() or path.parent.name == "checkpoints":
        model, tokenizer = load_run(path, torch.device("cpu"))
        exported: Any = from_native(model)
        return exported.to(device), tokenizer_for(tokenizer, model.end_of_text, model.config.context)
    from transformers import AutoTokenizer

    loaded: Any = load_checkpoint(path)
    try:
        return loaded.to(device), AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} has no tokenizer that loads: {str(error).splitlines()[0]}") from None


def harness() -> Any:
    """The package lm_eval, told to be quiet and to ask no hub."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        missing = error.name or "lm_eval"
        raise UserError(
            f"fathom eval needs {missing}, which is not installed; pip install 'fathom-attnres[eval]'"
        ) from None
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return lm_eval


def evaluate(
    path: Path, names: list[str], *, limit: int | None = None, batch: int = 8, device: str = "auto"
) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Scores by task and metric, with standard errors as ``METRIC_stderr``; and why each task that cannot run cannot.

    Args:
        path: as ``load``.
        names: tasks of fathom/hf/tasks.py or of the harness.
        limit: documents of each task; all if None.
        batch: sequences at a time.
        device: cpu, cuda or auto.

    Raises:
        UserError: the model cannot be loaded, lm-eval is missing, or ``limit`` or ``batch`` is not positive.
    """
    for name, value in (("limit", limit), ("batch", batch)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")
    lm_eval = harness()
    place = pick_device(device)
    model, tokenizer = load(path, place)
    context = getattr(decoder_config(model), "max_position_embeddings", None) or tokenizer.model_max_length
    wrapped = lm_eval.models.huggingface.HFLM(
        pretrained=model, tokenizer=tokenizer, batch_size=batch, max_length=context, device=str(place)
    )
    manager = lm_eval.tasks.TaskManager()
    scores: dict[str, dict[str, float]] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            task = own_task(name, context // 2) or name
            if isinstance(task, str) and not manager.match_tasks([task]):
                raise UserError("it is no task of Fathom or of lm-evaluation-harness")
            with redirect_stdout(io.StringIO()):  # where the harness prints what it is at
                found = lm_eval.simple_evaluate(
                    wrapped, tasks=[task], limit=limit, task_manager=manager, log_samples=False, bootstrap_iters=1000
                )
        except UserError as error:
            missing[name] = str(error)
            continue
        except (OSError, ValueError) as error:
            # What `datasets` raises where it may not ask the hub; the first line names the data.
            if not _is_missing_data(error):
                raise
            missing[name] = f"its data is not on this machine: {str(error).splitlines()[0]}"
            continue
        for task_name, metrics in found["results"].items():
            scores[task_name] = {
                key.replace(",none", "").replace(",", " "): float(value)
                for key, value in metrics.items()
                if isinstance(value, int | float) and not math.isnan(value) and "," in key
            }
    return scores, missing


def _is_missing_data(error: Exception) -> bool:
    words = ("hub", "offline", "cache", "couldn't find", "connect")
    return any(word in str(error).lower() for word in words)
