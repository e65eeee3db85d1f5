"""The quick start's published numbers: the same twins, several seeds, with a paired interval.

    python benchmarks/quickstart_seeds.py --out runs/quickstart-seeds --seeds 3

Writes OUT/result.json, which the package ships as fathom/assets/quickstart-seeds.json. A seed that is done is not run again.
"""

import argparse
import datetime
import json
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
from summarize import row, seeds_rows

from fathom.quickstart import QuickstartOptions, train_twins
from fathom.train.environment import machine
from fathom.train.metrics import read_metrics
from fathom.train.recipes import RULES


def measure(out: Path, num_seeds: int) -> dict[str, Any]:
    """The losses, the gain and the rows of finished seeds; times are medians over a run's steps, their ratio over pairs."""
    pairs = [[out / f"seed-{seed}" / rule for rule in RULES] for seed in range(num_seeds)]
    prenorm, block = (
        [json.loads((pair[i] / "summary.json").read_text())["val_loss"] for pair in pairs] for i in (0, 1)
    )
    seconds = [
        [[line["step_seconds"] for line in read_metrics(run) if line["kind"] == "train"] for run in pair]
        for pair in pairs
    ]
    times = [[1e3 * statistics.median(pair[i]) for pair in seconds] for i in (0, 1)]
    ratio = statistics.median(b / a for pair in seconds for a, b in zip(*pair, strict=True))
    rows = seeds_rows("quickstart", prenorm, block)
    return {
        "prenorm": prenorm,
        "block": block,
        "gain": rows[-1]["median"],
        "gain_interval_90": [rows[-1]["low"], rows[-1]["high"]],
        "rows": [
            *rows,
            row("quickstart", "prenorm", "step_ms", "ms", times[0]),
            row("quickstart", "block", "step_ms", "ms", times[1], over_prenorm=ratio),
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for seed in range(options.seeds):
        folder = options.out / f"seed-{seed}"
        if not (folder / RULES[-1] / "summary.json").exists():
            train_twins(QuickstartOptions(seed=seed), folder)
        print(f"seed {seed} is done", flush=True)
    result = {
        "name": "quickstart",
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/quickstart_seeds.py --out {options.out} --seeds {options.seeds}",
        "machine": machine(torch.device("cpu")),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "steps": QuickstartOptions().steps,
        **measure(options.out, options.seeds),
    }
    (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
