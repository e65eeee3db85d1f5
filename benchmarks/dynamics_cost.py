"""What recording training dynamics costs: a record's time over the time of the steps between two records.

    python benchmarks/dynamics_cost.py quick --every 50 --out OUT

Steps and records take turns in one process on one trainer, so that both see the same machine;
a share is of one round: a record against the three steps before it.
"""

import argparse
import datetime
import json
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from summarize import row

from fathom.lab.sweeps import base_config, residual
from fathom.train.environment import machine
from fathom.train.loop import Trainer


def wait(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="a recipe or a config.json")
    parser.add_argument("--set", nargs="*", default=[], help="settings of it to change: compile=none ...")
    parser.add_argument("--rules", nargs="+", default=["prenorm", "block", "full"])
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    for rule in options.rules:
        config = base_config(options.base, [*options.set, f"dynamics_every={options.every}"])
        config = replace(config, model=replace(config.model, residual=residual(rule)))
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(config, Path(folder) / "run")
            recorder = trainer.recorder()
            assert recorder is not None
            steps, costs, shares = [], [], []
            for turn in range(options.rounds + 1):
                for _ in range(3):
                    begin = wait(trainer.device)
                    trainer.step()
                    steps.append(wait(trainer.device) - begin)
                begin = wait(trainer.device)
                recorder.before_step()
                middle = wait(trainer.device)
                trainer.step()
                end = wait(trainer.device)
                trainer.record_dynamics(recorder)
                costs.append(wait(trainer.device) - end + middle - begin)
                shares.append(100 * costs[-1] / (options.every * statistics.median(steps[-3:])))
                if turn == 0:  # the first of both warms up
                    for values in (steps, costs, shares):
                        values.clear()
            trainer.close()
        case = f"{options.base}-every{options.every}"
        rows += [
            row(case, rule, "step_ms", "ms", [1e3 * seconds for seconds in steps]),
            row(case, rule, "record_ms", "ms", [1e3 * seconds for seconds in costs]),
            row(case, rule, "record_share", "% of step time", shares),
        ]
        print(
            f"{rule}: a record every {options.every} steps takes {statistics.median(shares):.2f} % of step time",
            flush=True,
        )
    command = " ".join([options.base, "--set", *options.set]) if options.set else options.base
    result = {
        "name": "dynamics-cost", "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/dynamics_cost.py {command} --every {options.every} --out OUT",
        "machine": machine(trainer.device), "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": rows,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
