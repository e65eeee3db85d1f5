"""The ``result.json`` of the GPU runs, computed from their raw rows; a test holds the committed files to it.

    python benchmarks/summarize.py

``median`` is a median over ``n`` logged stretches of steps, with the lowest and the highest beside it. Metrics that hold
something else say so in their name: ``mean_val_loss`` over seeds (lowest and highest seed beside it), ``mean_gain`` over
pairs of one seed (with the 90 % interval of the mean by Student's t), ``lowest_val_loss`` over learning rates.
"""

import json
import math
import statistics
from itertools import groupby
from pathlib import Path
from typing import Any

from fathom.train.metrics import read_metrics

RESULTS = Path(__file__).parent / "results"
MACHINE = "one NVIDIA H200"
VERSIONS = {"python": "3.12.3", "torch": "2.11.0+cu130", "cuda": "13.0"}

Rows = list[dict[str, Any]]

# Student's t at 95 % (a two-sided 90 % interval) for 1 to 9 degrees of freedom.
T_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)


def paired_interval(gains: list[float]) -> tuple[float, float]:
    """The 90 % interval of the mean of paired gains, by Student's t."""
    half = T_95[len(gains) - 2] * statistics.stdev(gains) / math.sqrt(len(gains))
    return statistics.mean(gains) - half, statistics.mean(gains) + half


def row(
    case: str, arm: str, metric: str, unit: str, values: list[float], *, over_prenorm: float | None = None
) -> dict[str, Any]:
    """A row of the schema: median, lowest, highest and number of ``values``."""
    return {"case": case, "arm": arm, "metric": metric, "unit": unit, "median": statistics.median(values),
            "low": min(values), "high": max(values), "n": len(values), "over_prenorm": over_prenorm}  # fmt: skip


def seeds_rows(case: str, prenorm: list[float], block: list[float], metric: str = "mean_val_loss") -> Rows:
    """The mean loss of both rules over the same seeds, and the mean of their paired gains, PreNorm minus Block."""
    rows = [
        row(case, arm, metric, "nats per token", found) | {"median": statistics.mean(found)}
        for arm, found in (("prenorm", prenorm), ("block", block))
    ]
    return [*rows, gain_row(case, prenorm, block)]


def gain_row(case: str, prenorm: list[float], block: list[float]) -> dict[str, Any]:
    """The mean of the paired gains, PreNorm minus Block, with its 90 % interval."""
    gains = [a - b for a, b in zip(prenorm, block, strict=True)]
    low, high = paired_interval(gains)
    return row(case, "block", "mean_gain", "nats per token", gains) | {
        "median": statistics.mean(gains), "low": low, "high": high,
    }  # fmt: skip


def read_sweep(name: str) -> Rows:
    lines = (RESULTS / "2026-11-22_quickstart" / "tuning" / name).read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(rows: Rows, rule: str, **optim: float | None) -> list[float]:
    """Validation losses of the runs of ``rule`` with these optimizer settings, in the order of their seeds."""
    found = [
        (run["config"]["seed"], run["val_loss"])
        for run in rows
        if run["config"]["model"]["residual"]["rule"] == rule
        and all(run["config"]["optim"][key] == value for key, value in optim.items())
    ]
    return [loss for _, loss in sorted(found)]


def tuning() -> Rows:
    """The quick start's sweeps: rates and seeds, the queries' rate, Muon, initialisation and depth."""
    rows: Rows = []
    sweep = read_sweep("seeds-and-depth.jsonl")
    seeds = [run for run in sweep if run["label"] == "seeds"]
    for lr in (8e-3, 1.2e-2, 1.6e-2, 2.4e-2):
        prenorm, block = losses(seeds, "prenorm", lr=lr), losses(seeds, "block", lr=lr)
        rows += seeds_rows(f"lr {lr}", prenorm, block)
    own = losses(seeds, "prenorm", lr=1.6e-2), losses(seeds, "block", lr=1.2e-2)
    rows += [gain_row("each at its best lr", *own)]

    scan = [run for run in sweep if run["label"] == "depth_lr"]
    for lr in (8e-3, 1.6e-2, 2.4e-2):
        for depth_lr in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3):
            found = losses(scan, "block", lr=lr, depth_lr=depth_lr)
            rows += [row(f"lr {lr}, depth_lr {depth_lr}", "block", "depth_lr_val_loss", "nats per token", found)]

    second = [run for run in read_sweep("explore-2.jsonl") if run["label"] == "muon"]
    muon = [losses(second, rule, lr=1.6e-2, muon_lr=0.02) for rule in ("prenorm", "block")]
    rows += seeds_rows("muon, muon_lr 0.02", muon[0], muon[1])

    first = read_sweep("explore.jsonl")
    for layers, std in ((12, 0.05), (12, 0.3), (12, 1.0), (16, 1.0)):
        for rule in ("prenorm", "block"):
            found = losses([run for run in first if run["label"] == f"{layers}L std{std}"], rule)
            lowest = row(f"{layers} layers, std {std}", rule, "lowest_val_loss", "nats per token", found)
            rows += [lowest | {"median": min(found), "low": min(found), "high": min(found)}]
    return rows


def debian_50m() -> Rows:
    """The 50M runs: speed after the first step, and validation losses at equal steps."""
    rows: Rows = []
    arms = {"prenorm": "prenorm", "block": "block", "block-compile-layers": "block-second"}
    speeds: dict[str, list[float]] = {}
    metrics = {arm: read_metrics(RESULTS / "2026-11-22_debian-50m" / folder) for arm, folder in arms.items()}
    for arm, lines in metrics.items():
        train = [line for line in lines if line["kind"] == "train"]
        # Steps that were logged together share one time: each stretch counts once.
        stretches = [next(group) for _, group in groupby(train[1:], key=lambda line: line["step_seconds"])]
        speeds[arm] = [line["tokens_per_second"] for line in stretches]
        ratio = statistics.median(speeds[arm]) / statistics.median(speeds["prenorm"])
        rows += [row("debian-50m", arm, "tokens_per_s", "tokens/s", speeds[arm], over_prenorm=ratio)]
        rows += [row("debian-50m", arm, "mfu", "%", [100 * line["mfu"] for line in stretches])]
        rows += [row("debian-50m", arm, "first_call_s", "s", [train[0]["step_seconds"]])]
    summary = json.loads((RESULTS / "2026-11-22_debian-50m" / "prenorm" / "summary.json").read_text())
    rows += [row("debian-50m", "prenorm", "peak_gib", "GiB", [summary["peak_gib"]])]
    for arm, case in (("prenorm", "step"), ("block", "step"), ("block-compile-layers", "other corpus, step")):
        for line in metrics[arm]:
            if line["kind"] == "val":
                rows += [row(f"{case} {line['step']}", arm, "val_loss", "nats per token", [line["loss"]])]
    return rows


RESULT_FILES: dict[str, dict[str, Any]] = {
    "2026-11-22_quickstart/tuning": {
        "name": "quickstart-tuning",
        "date": "2026-11-22",
        "command": "python benchmarks/quickstart_sweep.py explore (then: depth seeds) --out OUT --gpu-workers 12 --minutes 5",
        "machine": f"{MACHINE}, shared by 7 to 13 of these runs at a time; some runs on its CPU (device, in each row)",
        "versions": VERSIONS,
        "rows": tuning,
    },
    "2026-11-22_debian-50m": {
        "name": "debian-50m",
        "date": "2026-11-22",
        "command": "python benchmarks/twins.py debian-50m --data data/debian-docs-75M --out OUT",
        "machine": MACHINE,
        "versions": VERSIONS,
        "rows": debian_50m,
    },
}


def main() -> None:
    for folder, head in RESULT_FILES.items():
        result = head | {"rows": head["rows"]()}
        (RESULTS / folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
