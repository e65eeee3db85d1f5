"""The quick start's published numbers: the same twins, several seeds, with a paired interval.

    python benchmarks/quickstart_seeds.py --out runs/quickstart-seeds --seeds 3

Writes OUT/result.json, which the package ships as fathom/assets/quickstart-seeds.json. A seed that is done is not run again.
"""

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from fathom.quickstart import QuickstartOptions, train_twins
from fathom.train.environment import machine
from fathom.train.recipes import RULES

# Student's t at 95 % (a two-sided 90 % interval) for 1 to 9 degrees of freedom.
T_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)


def paired_interval(gains: list[float]) -> tuple[float, float]:
    """The 90 % interval of the mean of paired gains, by Student's t."""
    half = T_95[len(gains) - 2] * statistics.stdev(gains) / math.sqrt(len(gains))
    return statistics.mean(gains) - half, statistics.mean(gains) + half


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    losses: dict[str, list[float]] = {rule: [] for rule in RULES}
    steps = QuickstartOptions().steps
    for seed in range(options.seeds):
        folder = options.out / f"seed-{seed}"
        if not (folder / RULES[-1] / "summary.json").exists():
            train_twins(QuickstartOptions(seed=seed), folder)
        for rule in RULES:
            losses[rule].append(json.loads((folder / rule / "summary.json").read_text())["val_loss"])
        print(seed, {rule: round(values[-1], 4) for rule, values in losses.items()}, flush=True)
    gains = [a - b for a, b in zip(losses["prenorm"], losses["block"], strict=True)]
    result: dict[str, Any] = {
        "command": f"python benchmarks/quickstart_seeds.py --out {options.out} --seeds {options.seeds}",
        "machine": machine(torch.device("cpu")),
        "torch": torch.__version__,
        "steps": steps,
        **losses,
        "gain": statistics.mean(gains),
        "gain_interval_90": paired_interval(gains),
    }
    (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
