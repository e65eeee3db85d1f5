"""Kimi Linear under PreNorm and under Block AttnRes, side by side: same data, seeds and steps, on one GPU.

    python benchmarks/kimi_nano.py --out OUT                                (kimi-nano, Debian documentation, one GPU)
    python benchmarks/kimi_nano.py --out OUT --size micro --steps 30        (kimi-micro, the text inside the package, a CPU)

Rules take turns, seed by seed, in one process each. Writes OUT/SEED/RULE, run folders as `fathom train` makes them, curves.png,
and result.json: validation loss with an interval over seeds, step time, peak memory, expert load. A run that is done is not run
again, and one that was stopped goes on.
"""

import argparse
import datetime
import json
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from summarize import row, seeds_rows

from fathom.models.config import ResidualConfig
from fathom.train.config import RunConfig, save_config
from fathom.train.environment import machine, pick_device
from fathom.train.metrics import read_metrics
from fathom.train.recipes import RECIPES, RULES

COLORS = {"prenorm": "#888888", "block": "#1f6feb"}


def config_of(options: argparse.Namespace, rule: str, seed: int) -> RunConfig:
    """The run of one rule and seed; all else equal."""
    config = RECIPES[f"kimi-{options.size}"]()
    residual = ResidualConfig(rule="prenorm") if rule == "prenorm" else config.model.residual
    data = replace(config.data, folder=options.data or config.data.folder, batch=options.batch or config.data.batch)
    steps = options.steps or config.steps
    return replace(
        config, model=replace(config.model, residual=residual), data=data, seed=seed, steps=steps,
        optim=replace(config.optim, warmup=min(config.optim.warmup, steps // 5)),
        eval_every=min(config.eval_every, steps), checkpoint_every=min(config.checkpoint_every, steps), compile=options.compile,
        device=options.device,
    )  # fmt: skip


def train_one(config: RunConfig, run: Path) -> None:
    """Train in a process of its own, so that its peak memory is its own."""
    code = "import sys; from pathlib import Path; from fathom.train.config import load_config; from fathom.train.loop import"
    if (run / "summary.json").exists():
        return
    if (run / "config.json").exists():
        command = [sys.executable, "-c", f"{code} resume; resume(Path(sys.argv[1]))", str(run)]
    else:
        given = run.with_suffix(".json")
        given.parent.mkdir(parents=True, exist_ok=True)
        save_config(config, given)
        body = f"{code} train; train(load_config(Path(sys.argv[1])), Path(sys.argv[2]))"
        command = [sys.executable, "-c", body, str(given), str(run)]
    subprocess.run(command, check=True)


def measured(run: Path) -> dict[str, Any]:
    """What a finished run says: median step time after the first tenth, peak memory, expert load of the last tenth."""
    lines = [line for line in read_metrics(run) if line["kind"] == "train"]
    tenth = max(1, len(lines) // 10)
    summary = json.loads((run / "summary.json").read_text())
    return {
        "val_loss": summary["val_loss"],
        "step_ms": 1e3 * statistics.median(line["step_seconds"] for line in lines[tenth:]),
        "tokens_per_s": statistics.median(line["tokens_per_second"] for line in lines[tenth:]),
        "peak_gib": summary["peak_gib"],
        "expert_load": statistics.mean(line["expert_load"] for line in lines[-tenth:]),
    }


def rows_of(case: str, found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    losses = {rule: [run["val_loss"] for run in found[rule]] for rule in RULES}
    if len(losses["prenorm"]) > 1:
        rows = seeds_rows(case, losses["prenorm"], losses["block"])
    else:
        rows = [row(case, rule, "val_loss", "nats per token", losses[rule]) for rule in RULES]
    units = {"step_ms": "ms", "tokens_per_s": "tokens/s", "peak_gib": "GiB", "expert_load": "largest over mean"}
    for metric, unit in units.items():
        values = {rule: [run[metric] for run in found[rule]] for rule in RULES}
        if None in values["prenorm"]:
            continue
        for rule in RULES:
            pairs = zip(values[rule], values["prenorm"], strict=True)
            over = None if rule == "prenorm" else statistics.median(a / b for a, b in pairs)
            rows.append(row(case, rule, metric, unit, values[rule], over_prenorm=over))
    return rows


def draw(out: Path, seeds: int) -> None:
    figure, (losses, loads) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for rule in RULES:
        for seed in range(seeds):
            lines = read_metrics(out / f"seed-{seed}" / rule)
            label = rule if seed == 0 else None
            held_out = [(line["step"], line["loss"]) for line in lines if line["kind"] == "val"]
            losses.plot(*zip(*held_out, strict=True), color=COLORS[rule], label=label)
            load = [(line["step"], line["expert_load"]) for line in lines if line["kind"] == "train"]
            loads.plot(*zip(*load, strict=True), color=COLORS[rule], label=label, linewidth=0.8)
    losses.set(xlabel="step", ylabel="validation loss, nats per token")
    loads.set(xlabel="step", ylabel="largest expert load over the mean")
    losses.legend()
    figure.savefig(out / "curves.png", dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=("nano", "micro"), default="nano")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--data")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", choices=("none", "layers"), default="none")
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    found: dict[str, list[dict[str, Any]]] = {rule: [] for rule in RULES}
    for seed in range(options.seeds):
        for rule in RULES:
            run = options.out / f"seed-{seed}" / rule
            train_one(config_of(options, rule, seed), run)
            found[rule].append(measured(run))
            print(f"seed {seed}, {rule}: {found[rule][-1]}", flush=True)
    draw(options.out, options.seeds)
    result = {
        "name": f"kimi-{options.size}",
        "date": datetime.date.today().isoformat(),
        "command": f"python benchmarks/kimi_nano.py --out OUT --size {options.size} --seeds {options.seeds}"
        + "".join(f" --{name} {value}" for name in ("steps", "batch") if (value := getattr(options, name))),
        "machine": machine(device),
        "versions": {"torch": torch.__version__},
        "rows": rows_of(f"kimi-{options.size}", found),
    }
    (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
