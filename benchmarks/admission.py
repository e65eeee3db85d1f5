"""Admitting training runs: many tiny runs with what became of them, and how the guard would have judged each beforehand.

    python benchmarks/admission.py train OUT     train the grid below; writes OUT/runs.csv
    python benchmarks/admission.py judge         leave out each run in turn and ask the guard; writes result.json

A run spikes if its loss ever rises 1 nat above what it had been, or is no number. Memory is the process's peak, so it holds
the interpreter and PyTorch as well; minutes are wall-clock time of the steps on a machine that others shared.
"""

import csv
import itertools
import json
import math
import os
import platform
import subprocess
import sys
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np

from fathom.scientist import Scientist, read
from fathom.scientist.build import build
from fathom.scientist.document import Issues

RESULT = Path(__file__).resolve().parent / "results" / "2026-11-22_run-admission"
GRID = {"lr": (0.003, 0.01, 0.03, 0.1, 0.2, 0.5, 1.5), "dim": (32, 64), "batch": (2, 8)}
FIXED = "--model.num-layers 2 --model.context 64 --optim.warmup 5 --steps 60 --eval-sequences 4 --eval-every 60"
SPIKE = 1.0
HARMS = {"spike": "spiked == 1", "memory": "log_gib > log(0.41)", "minutes": "log_minutes > log(0.06)"}
"""What each world's guard is asked about."""
THRESHOLDS, DELTA = (0.05, 0.1, 0.2, 0.3), 0.1


def train(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed, (lr, dim, batch) in enumerate(itertools.product(*GRID.values())):
        folder = out / f"lr{lr:g}-dim{dim}-batch{batch}"
        flags = f"--optim.lr {lr} --model.dim {dim} --data.batch {batch} {FIXED} --seed {seed} --out {folder}"
        process = subprocess.Popen(
            [sys.executable, "-m", "fathom.cli", "train", "quick", *flags.split()],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        steps = [row for row in lines if row["kind"] == "train"]
        losses = [math.inf if row["loss"] is None else row["loss"] for row in steps]
        rise = max(loss - min(losses[:i]) for i, loss in enumerate(losses) if i > 0)
        spiked = int(not rise < SPIKE or os.waitstatus_to_exitcode(status) == 1)
        minutes = sum(row["step_seconds"] for row in steps) / 60
        rows.append({
            "run": folder.name, "lr": lr, "dim": dim, "batch": batch, "spiked": spiked,
            "gib": round(usage.ru_maxrss / 2**20, 4), "minutes": round(minutes, 5), "rise": round(rise, 3),
            "loss": round(losses[-1], 3),
        })  # fmt: skip
        print(rows[-1], flush=True)
    with (out / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def judge() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, harm in HARMS.items():
        whole = read(RESULT / f"{name}.yaml").document
        data = whole["evidence"][0]["data"]
        counts: dict[float, Counter[str]] = {threshold: Counter() for threshold in THRESHOLDS}
        for index, run in enumerate(data):
            document = deepcopy(whole)
            del document["evidence"][0]["data"][index]
            issues = Issues(name, {})
            world = build(document, issues)
            assert world is not None
            outcome = run[world.outcome]
            limit = 0.5 if name == "spike" else math.log(float(harm.split("log(")[1].rstrip(")")))
            design = {key: value for key, value in run.items() if key in world.designs}
            scientist = Scientist(world)
            for threshold in THRESHOLDS:
                decision = scientist.guard(design, harm, threshold, DELTA)["decision"] or "escalate"
                counts[threshold][f"{decision}, {'harm' if outcome > limit else 'no harm'}"] += 1
        for threshold, ends in counts.items():
            print(name, threshold, dict(ends), flush=True)
            for decision, what in itertools.product(("admit", "refuse", "escalate"), ("harm", "no harm")):
                count = ends[f"{decision}, {what}"]
                found.append({
                    "case": f"{name}-threshold-{threshold:g}", "arm": decision, "metric": what.replace(" ", "_"), "unit": "runs",
                    "median": count, "low": count, "high": count, "n": len(data), "over_prenorm": None,
                })  # fmt: skip
    return found


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train(Path(sys.argv[2]))
    else:
        (RESULT / "result.json").write_text(json.dumps({
            "name": "run-admission", "date": "2026-11-22", "command": "python benchmarks/admission.py judge",
            "machine": "2 CPU cores, shared with other work", "rows": judge(),
            "versions": {"python": platform.python_version(), "numpy": np.__version__},
        }, indent=1) + "\n")  # fmt: skip
