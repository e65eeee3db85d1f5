"""What converting a pretrained model gains or costs: SmolLM2-135M fine-tuned converted and unconverted, several seeds.

    python benchmarks/smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf work               makes work/smollm2 and work/smollm2-block8
    fathom data prepare debian-docs data/smollm2 --tokenizer work/smollm2/tokenizer.json
    python benchmarks/finetune_smollm2.py work/smollm2 work/smollm2-block8 --data data/smollm2 --out OUT

Every seed is a data order that both models see. The rate is the control's: of ``--rates``, the one with which the unconverted
model of seed 0 ends lowest after a third of the steps. Writes OUT/result.json and each run's metrics; a seed that is done is
not run again. Weights are not kept.
"""

import argparse
import importlib.metadata
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from summarize import seeds_rows

from fathom.hf.finetune import FinetuneConfig, finetune
from fathom.train.config import DataConfig, OptimConfig
from fathom.train.environment import machine, pick_device


def trained(model: Path, out: Path, config: FinetuneConfig) -> float:
    """The last validation loss, from OUT if the run is there; weights and tokenizer are deleted."""
    if not (out / "summary.json").is_file():
        finetune(model, out, config)
        for path in out.iterdir():
            if path.name not in ("summary.json", "metrics.jsonl", "env.json", "finetune.json"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    loss: float = json.loads((out / "summary.json").read_text())["val_loss"]
    print(f"{out.name}: {loss:.4f}", flush=True)
    return loss


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
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-5, 1e-4, 2e-4, 4e-4])
    parser.add_argument("--precision", default="bf16", choices=["bf16", "float32"])
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    base = FinetuneConfig(
        data=DataConfig(folder=str(given.data), batch=given.batch, micro_batch=given.micro_batch), context=given.context,
        steps=given.steps, precision=given.precision, optim=OptimConfig(warmup=max(1, given.steps // 15)),
    )  # fmt: skip

    def at(rate: float, **settings: int) -> FinetuneConfig:
        return replace(base, optim=replace(base.optim, lr=rate), **settings)

    short = max(1, given.steps // 3)
    tuning = {
        rate: trained(given.original, given.out / f"tune-{rate:g}", at(rate, steps=short)) for rate in given.rates
    }
    rate = min(tuning, key=lambda each: tuning[each])
    losses = {
        arm: [trained(model, given.out / f"{arm}-seed{seed}", at(rate, seed=seed)) for seed in range(given.seeds)]
        for arm, model in (("prenorm", given.original), ("block", given.converted))
    }
    result = {
        "name": "SmolLM2-135M fine-tuned, converted against unconverted",
        "command": "python benchmarks/finetune_smollm2.py " + " ".join(sys.argv[1:]),
        "machine": machine(pick_device("auto")),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "rate": rate, "tuning": {f"{each:g}": loss for each, loss in tuning.items()},
        "rows": seeds_rows("finetune-smollm2", losses["prenorm"], losses["block"]),
    }  # fmt: skip
    (given.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["rows"], indent=2))


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
