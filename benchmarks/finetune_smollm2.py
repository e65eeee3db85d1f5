"""What converting a pretrained model gains or costs: SmolLM2-135M fine-tuned converted and unconverted, several seeds.

    python benchmarks/smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf work               makes work/smollm2 and work/smollm2-block8
    fathom data prepare debian-docs data/smollm2 --tokenizer work/smollm2/tokenizer.json
    python benchmarks/finetune_smollm2.py work/smollm2 work/smollm2-block8 --data data/smollm2 --out OUT

Every seed is a data order that both models see. The rate is the control's: of ``--rates``, the one with which the unconverted
model of seed 0 ends lowest after a third of the steps. Writes each run's metrics, and OUT/result.json anew after every run: the
gain is that of the seeds that both models have finished. A run that is done is not run again. Weights are not kept. ``--workers``
runs go side by side, best under NVIDIA's MPS.
"""

import argparse
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from summarize import row, seeds_rows
from timing import command

from fathom.errors import UserError
from fathom.hf.finetune import finetune
from fathom.train.config import DataConfig, OptimConfig, to_dict
from fathom.train.environment import machine, pick_device
from fathom.train.finetune import FinetuneConfig

ARMS = ("prenorm", "block")


def trained(model: Path, out: Path, config: FinetuneConfig, end: float) -> dict[str, Any] | None:
    """The summary of a run, which is in OUT already or is made; None if it would begin after ``end``, in seconds since 1970.

    Weights and tokenizer are deleted. ``UserError`` if the run in OUT has other settings.
    """
    if (out / "summary.json").is_file():
        made_with = json.loads((out / "finetune.json").read_text())
        if made_with != json.loads(json.dumps({"model": model.name, **to_dict(config)})):
            raise UserError(f"{out} was made with other settings: give another --out, or delete it")
    else:
        begin = time.monotonic()
        if time.time() > end:
            print(f"{out.name}: not begun, the minutes are over", file=sys.stderr)
            return None
        try:
            finetune(model, out, config)
        except KeyboardInterrupt:
            os._exit(130)  # with its worker, and so the pool, which would else begin the next run
        for path in out.iterdir():
            if path.name not in ("summary.json", "metrics.jsonl", "env.json", "finetune.json"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        print(f"{out.name}: {time.monotonic() - begin:.1f} s, model loading and compiling included", flush=True)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    print(f"{out.name}: {summary['val_loss_before']:.4f} before, {summary['val_loss']:.4f} after", flush=True)
    return summary


def rows_of(summaries: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Losses before and after of the seeds that every arm has, with the paired gain where there are two or more."""
    case, unit = "finetune-smollm2", "nats per token"
    pairs = min(len(found) for found in summaries.values())
    if not pairs:
        return []
    before, after = (
        {arm: [summary[key] for summary in found[:pairs]] for arm, found in summaries.items()}
        for key in ("val_loss_before", "val_loss")
    )
    rows = [row(case, arm, "val_loss_before", unit, found[:1]) for arm, found in before.items()]
    if pairs == 1:
        return rows + [row(case, arm, "val_loss", unit, found) for arm, found in after.items()]
    return rows + seeds_rows(case, *(after[arm] for arm in ARMS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("converted", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--eval-sequences", type=int, default=128)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4, 8e-4])
    parser.add_argument("--precision", default="bf16", choices=["bf16", "float32"])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no run later than this")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time")
    given = parser.parse_args()
    end = time.time() + 60 * given.minutes
    given.out.mkdir(parents=True, exist_ok=True)
    base = FinetuneConfig(
        data=DataConfig(folder=str(given.data), batch=given.batch, micro_batch=given.micro_batch), context=given.context,
        steps=given.steps, precision=given.precision, optim=OptimConfig(warmup=max(1, given.steps // 15)),
        eval_sequences=given.eval_sequences,
    )  # fmt: skip
    tuning: dict[float, dict[str, Any]] = {}
    summaries: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    result: dict[str, Any] = {
        "name": "SmolLM2-135M fine-tuned, converted against unconverted",
        "date": str(datetime.date.today()),
        "command": command("finetune_smollm2.py"),
        "machine": machine(pick_device("auto")),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
    }

    def best_rate() -> float:
        return min(tuning, key=lambda rate: tuning[rate]["val_loss"])

    def at(rate: float, **settings: int) -> FinetuneConfig:
        return replace(base, optim=replace(base.optim, lr=rate), **settings)

    def save() -> None:
        losses = {f"{rate:g}": summary["val_loss"] for rate, summary in tuning.items()}
        every = {arm: [summary["val_loss"] for summary in found] for arm, found in summaries.items()}
        found = result | {"rate": best_rate(), "tuning": losses, "runs": every, "rows": rows_of(summaries)}
        (given.out / "result.json").write_text(json.dumps(found, indent=2) + "\n")

    models = dict(zip(ARMS, (given.original, given.converted), strict=True))
    context, precise = multiprocessing.get_context("spawn"), torch.set_float32_matmul_precision
    with ProcessPoolExecutor(given.workers, context, initializer=precise, initargs=("high",)) as pool:
        short = max(1, given.steps // 3)
        tries = {
            rate: pool.submit(trained, given.original, given.out / f"tune-{rate:g}", at(rate, steps=short), end)
            for rate in given.rates
        }
        for rate, one in tries.items():
            if (summary := one.result()) is None:
                return
            tuning[rate] = summary
            save()
        runs = [
            (arm, pool.submit(trained, models[arm], given.out / f"{arm}-seed{seed}", at(best_rate(), seed=seed), end))
            for seed in range(given.seeds) for arm in ARMS
        ]  # fmt: skip
        for arm, one in runs:
            if (summary := one.result()) is None:
                return
            summaries[arm].append(summary)
            save()
    print(json.dumps(rows_of(summaries), indent=2))


if __name__ == "__main__":
    main()
