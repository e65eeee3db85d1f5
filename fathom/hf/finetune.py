"""`fathom finetune`: train a model folder of Transformers further, converted or not, with the same steps and data order.

How parameters of a conversion train:

| parameters                      | rate               | decayed | from step         |
|---------------------------------|--------------------|---------|-------------------|
| the decoder's matrices          | ``lr``             | yes     | ``queries_first`` |
| embedding, head                 | ``lr``             | yes     | ``queries_first`` |
| norms, biases                   | ``lr``             | no      | ``queries_first`` |
| depth queries, their key gains  | ``depth_lr``       | no      | 0                 |

A query starts at zero, so its rate falls as 1 / D as in pretraining (train/optimizers.py). The control of a conversion is the
folder that it was made from, run with the same config.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoTokenizer

from fathom.errors import UserError
from fathom.hf.checkpoints import load_checkpoint
from fathom.hf.config import decoder_config
from fathom.hf.export import new_folder
from fathom.train.config import OptimConfig, to_dict
from fathom.train.data import Batches, TokenShards
from fathom.train.environment import environment, pick_device
from fathom.train.finetune import FinetuneConfig
from fathom.train.loop import Diverged, tokens_hash
from fathom.train.optimizers import DEPTH_LR_TIMES_DIM, lr_share


def make_optimizer(model: Any, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW by the table above; each group has its ``peak_lr``, and ``depth`` says whether it is the stream's."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        depth = name.startswith("stream.")
        groups.setdefault((depth, parameter.ndim >= 2 and not depth), []).append(parameter)
    width = model.get_input_embeddings().weight.shape[-1]
    rate = DEPTH_LR_TIMES_DIM / width if config.depth_lr is None else config.depth_lr
    return torch.optim.AdamW(
        [
            {"params": members, "depth": depth, "peak_lr": rate if depth else config.lr,
             "weight_decay": config.weight_decay if decayed else 0.0}
            for (depth, decayed), members in groups.items()
        ],
        lr=config.lr, betas=(config.beta1, config.beta2), fused=True,
    )  # fmt: skip


def check_data(folder: Path, model: Any, shards: TokenShards) -> None:
    """``UserError`` unless the dataset's tokens are those of the tokenizer in the model ``folder``."""
    own_size = decoder_config(model).vocab_size
    if shards.vocab_size > own_size:
        raise UserError(
            f"{shards.folder} has tokens up to {shards.vocab_size}, the model {own_size}: prepare it with "
            f"--tokenizer {folder / 'tokenizer.json'}"
        )
    if not (folder / "tokenizer.json").is_file():
        return
    text = "The state of the union, in 1862: ¿qué? \n\tdef f(x): return x"
    own = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    if own != Tokenizer.from_file(str(shards.folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids:
        raise UserError(
            f"{shards.folder} was made with another tokenizer than the model's: prepare it with "
            f"--tokenizer {folder / 'tokenizer.json'}"
        )


def finetune(folder: Path, out: Path, config: FinetuneConfig) -> dict[str, Any]:
    """Train the model in ``folder`` and write ``out``: a model folder with finetune.json, metrics.jsonl, env.json, summary.json.

    Returns the summary. The run is short and starts again if it is stopped: nothing is written before its end.

    Raises:
        UserError: a model or dataset that does not fit, or an ``out`` that exists.
        Diverged: a loss that is not finite.
    """
    device = pick_device(config.device)
    model: Any = load_checkpoint(folder, torch.float32)
    shards, held_out = TokenShards(Path(config.data.folder), "train"), TokenShards(Path(config.data.folder), "val")
    check_data(folder, model, shards)
    longest = getattr(decoder_config(model), "max_position_embeddings", None)
    if longest is not None and config.context > longest:
        raise UserError(f"context is {config.context}, but the model has positions for {longest} tokens")
    model.to(device).train()
    optimizer = make_optimizer(model, config.optim)
    batches = Batches(shards, config.context, config.seed)
    validation = Batches(held_out, config.context, 0, shuffle=False)
    rows: list[dict[str, Any]] = []
    with new_folder(out) as made:
        for step in range(config.steps):
            if step % config.eval_every == 0:
                rows.append({"kind": "val", "step": step, "loss": _validate(model, validation, config, device)})
            share = lr_share(config.optim, step, config.steps)
            for group in optimizer.param_groups:
                waits = step < config.queries_first and not group["depth"]
                group["lr"] = 0.0 if waits else group["peak_lr"] * share
            loss, norm = _step(model, optimizer, batches, config, step, device)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise Diverged(
                    f"the loss or gradient of step {step + 1} is not finite; a lower optim.lr is the usual cure"
                )
            rows.append(
                {"kind": "train", "step": step + 1, "loss": loss, "grad_norm": norm, "lr": config.optim.lr * share}
            )
        final = _validate(model, validation, config, device)
        rows.append({"kind": "val", "step": config.steps, "loss": final})
        summary = {
            "model": folder.name, "steps": config.steps, "tokens": config.steps * config.data.batch * config.context,
            "val_loss_before": rows[0]["loss"], "val_loss": final, "tokens_hash": tokens_hash(shards.manifest),
        }  # fmt: skip
        model.eval().cpu().save_pretrained(made)
        if (folder / "tokenizer.json").is_file():
            AutoTokenizer.from_pretrained(folder).save_pretrained(made)
        (made / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        about = {"model": folder.name, **to_dict(config)}
        for name, value in (("finetune.json", about), ("env.json", environment(device)), ("summary.json", summary)):
            (made / name).write_text(json.dumps(value, indent=2) + "\n")
    return summary


def _loss(model: Any, tokens: Tensor, targets: Tensor, config: FinetuneConfig) -> Tensor:
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        logits = model(input_ids=tokens, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def _tensors(batches: Batches, first: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    inputs, targets = batches.get(first, count)
    return torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)


def _step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batches: Batches,
    config: FinetuneConfig,
    step: int,
    device: torch.device,
) -> tuple[float, float]:
    batch, micro = config.data.batch, config.data.micro_batch or config.data.batch
    total = torch.zeros((), device=device)
    for first in range(step * batch, (step + 1) * batch, micro):
        loss = _loss(model, *_tensors(batches, first, micro, device), config) * (micro / batch)
        loss.backward()
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip or math.inf)
    optimizer.step()
    optimizer.zero_grad()
    return total.item(), norm.item()


@torch.no_grad()
def _validate(model: Any, batches: Batches, config: FinetuneConfig, device: torch.device) -> float:
    model.eval()
    count, size = min(config.eval_sequences, batches.num_sequences), config.data.micro_batch or config.data.batch
    total = 0.0
    for first in range(0, count, size):
        rows = min(size, count - first)
        total += _loss(model, *_tensors(batches, first, rows, device), config).item() * rows
    model.train()
    return total / count
