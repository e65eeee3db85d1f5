"""Does depth let a network follow several steps? Two-layer and deeper decoders, PreNorm and Block, three seeds, two tasks.

    python benchmarks/reasoning_probe.py OUT [--tasks hops arithmetic] [--seeds 3]

trains what OUT/runs does not hold yet, one process and one thread, and writes OUT/result.json and accuracy.svg;
``--summarize`` only writes them.
"""

import argparse
import json
import platform
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from fathom.lab.figures import _STYLE, COLOURS, MARKERS, svg
from fathom.lab.intervals import paired
from fathom.lab.probe import ProbeConfig, train_probe
from fathom.lab.probe_tasks import TaskConfig
from fathom.models.config import ResidualConfig
from fathom.train.config import OptimConfig

RULES = ("prenorm", "block")
DEPTHS = (2, 6)
TASKS = {
    "hops": ProbeConfig(task=TaskConfig("hops", size=8, hops=4, questions=16), steps=1000, device="cpu"),
    "arithmetic": ProbeConfig(
        task=TaskConfig("arithmetic", size=5, hops=4, questions=4), batch=128, steps=400,
        optim=OptimConfig(lr=6e-3), device="cpu",
    ),
}  # fmt: skip


def configs(tasks: list[str], seeds: int) -> dict[str, ProbeConfig]:
    """Every run by its name, seeds outermost so that what is compared is complete early."""
    return {
        f"{task}-{rule}-l{layers}-seed{seed}": replace(
            TASKS[task], residual=ResidualConfig(rule=rule), layers=layers, seed=seed
        )
        for task in tasks
        for seed in range(seeds)
        for layers in DEPTHS
        for rule in RULES
    }  # type: ignore[misc]


def measure(folder: Path) -> dict[str, Any]:
    """The rows of result.json, from the accuracies in ``folder``."""
    found: dict[tuple[str, str, int], dict[int, list[float]]] = {}
    for path in sorted(folder.glob("runs/*/accuracy.json")):
        config = json.loads((path.parent / "probe.json").read_text())["config"]
        key = config["task"]["name"], config["residual"]["rule"], config["layers"]
        found.setdefault(key, {})[config["seed"]] = json.loads(path.read_text())
    rows = []
    for task, rule, layers in sorted(found, key=lambda key: (key[0] != "hops", key[2], key[1] != "prenorm")):
        seeds = found[task, rule, layers]
        twin = found.get((task, "prenorm", layers), {})
        for steps in range(len(next(iter(seeds.values())))):
            mean = paired([accuracies[steps] for accuracies in seeds.values()])
            rows.append(_row(f"{task}-l{layers}", rule, f"accuracy_{steps + 1}_steps", mean, 0.0, 1.0))
            gaps = [accuracies[steps] - twin[seed][steps] for seed, accuracies in seeds.items() if seed in twin]
            if rule != "prenorm" and gaps:
                rows.append(_row(f"{task}-l{layers}", rule, f"gain_{steps + 1}_steps", paired(gaps), -1.0, 1.0))
    return {"rows": rows}


def _row(case: str, arm: str, metric: str, mean: Any, least: float, most: float) -> dict[str, Any]:
    low, high = (mean.mean if end is None else end for end in (mean.low, mean.high))
    return {
        "case": case, "arm": arm, "metric": metric, "unit": "share right", "median": round(mean.mean, 4),
        "low": round(max(least, low), 4), "high": round(min(most, high), 4), "n": mean.n, "over_prenorm": None,
    }  # fmt: skip


def picture(rows: list[dict[str, Any]]) -> Figure:
    """Accuracy by number of steps with the intervals of the means, a panel a task."""
    tasks = [task for task in TASKS if any(row["case"].startswith(task) for row in rows)]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.6 * len(tasks), 3.2), layout="constrained")
        for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
            for layers in DEPTHS:
                for rule in RULES:
                    found = [
                        row for row in rows
                        if (row["case"], row["arm"]) == (f"{task}-l{layers}", rule) and row["metric"].startswith("accuracy")
                    ]  # fmt: skip
                    steps, means = range(1, len(found) + 1), [row["median"] for row in found]
                    label = f"{rule}, {layers} layers"
                    dash = "-" if layers == max(DEPTHS) else (0, (4, 1.5))
                    axes.plot(
                        steps, means, color=COLOURS[rule], marker=MARKERS[rule], ms=4, linestyle=dash, label=label
                    )
                    low, high = [row["low"] for row in found], [row["high"] for row in found]
                    axes.fill_between(steps, low, high, color=COLOURS[rule], alpha=0.15, lw=0)
            axes.axhline(1 / TASKS[task].task.num_answers, color="#7a7a7a", lw=0.8, linestyle=":")
            axes.set_title(f"{task}: right answers")
            axes.set_xlabel("steps that a question needs (dotted: guessing)")
            axes.set_xticks(range(1, TASKS[task].task.hops + 1))
            axes.set_ylim(0, 1.03)
        figure.axes[0].legend()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--summarize", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, config in {} if options.summarize else configs(options.tasks, options.seeds).items():
        run = options.out / "runs" / name
        if (run / "accuracy.json").is_file():
            continue
        for file in run.glob("*"):  # of a run that was cut: it is minutes long and begins anew
            file.unlink()
        found = train_probe(config, run)
        print(name, " ".join(f"{share:.3f}" for share in found), flush=True)
    result = {
        "name": "reasoning-probe", "date": "2026-11-22", "command": "python benchmarks/reasoning_probe.py OUT",
        "machine": f"1 CPU thread ({platform.machine()})",
        "versions": {"python": platform.python_version(), "torch": torch.__version__}, **measure(options.out),
    }  # fmt: skip
    (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "accuracy.svg").write_text(svg(picture(result["rows"])))


if __name__ == "__main__":
    sys.exit(main())
