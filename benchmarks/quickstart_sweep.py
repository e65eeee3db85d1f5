"""Find the quick start's learning rates: PreNorm and Block tuned over the same grid, several runs packed on one machine.

    python benchmarks/quickstart_sweep.py seeds --out OUT --gpu-workers 12 --minutes 5

Every finished run appends its config and validation loss to OUT/runs.jsonl; runs that are not done in time are dropped.
"""

import argparse
import json
import multiprocessing
import queue
import tempfile
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from fathom.models.config import ModelConfig, ResidualConfig
from fathom.train.config import DataConfig, OptimConfig, RunConfig, from_dict, to_dict

Run = tuple[str, RunConfig]


def config(rule: str, layers: int, steps: int, lr: float, seed: int = 0, **options: Any) -> RunConfig:
    residual = ResidualConfig(rule="prenorm") if rule == "prenorm" else ResidualConfig(rule="block", num_blocks=8)
    model = ModelConfig(
        dim=64, num_layers=layers, num_heads=2, context=256, residual=residual, **options.pop("model", {})
    )
    return RunConfig(
        model=model,
        data=DataConfig(batch=8),
        optim=OptimConfig(lr=lr, **options),
        steps=steps,
        seed=seed,
        eval_every=steps,
        eval_sequences=256,
        checkpoint_every=10**9,
        log_every=50,
    )


def explore() -> list[Run]:
    """Depth, embedding scale, learning rate and optimizer, with the depth queries at the rate of the matrices."""
    runs: list[Run] = []
    for (layers, steps), std, lr, rule in product(
        [(12, 550), (16, 420)], [0.3, 1.0, 0.05], [4e-3, 8e-3, 2e-3, 1.6e-2], ["prenorm", "block"]
    ):
        options = {"model": {"embedding_std": std}, "depth_lr": lr}
        runs.append((f"{layers}L std{std}", config(rule, layers, steps, lr, **options)))
    for muon_lr, rule in product([0.01, 0.02, 0.04], ["prenorm", "block"]):
        options = {"optimizer": "muon", "muon_lr": muon_lr, "model": {"embedding_std": 0.3}, "depth_lr": 8e-3}
        runs.append(("12L muon", config(rule, 12, 550, 8e-3, **options)))
    return runs


def depth() -> list[Run]:
    """The depth queries' own rate beside the matrices'."""
    return [
        ("depth_lr", config("block", 12, 550, lr, depth_lr=depth_lr))
        for lr, depth_lr in product([8e-3, 1.6e-2, 2.4e-2], [5e-4, 1e-3, 2e-3, 4e-3, 8e-3])
    ]


def seeds() -> list[Run]:
    """The quick start's own configuration: both rules over the same learning rates, three seeds each."""
    return [
        ("seeds", config(rule, 12, 550, lr, seed))
        for lr, seed, rule in product([1.6e-2, 1.2e-2, 2.4e-2, 8e-3], [0, 1, 2], ["prenorm", "block"])
    ]


GRIDS = {"explore": explore, "depth": depth, "seeds": seeds}


def worker(device: str, threads: int, tasks: Any, results: Any) -> None:
    import torch

    from fathom.train.loop import Diverged, train

    torch.set_num_threads(threads)
    while True:
        try:
            label, values = tasks.get(timeout=1)
        except queue.Empty:
            return
        run = replace(from_dict(RunConfig, values), device=device)
        with tempfile.TemporaryDirectory() as folder:
            begin = time.time()
            try:
                loss = train(run, Path(folder) / "run")["val_loss"]
            except Diverged:
                loss = float("nan")
            results.put({"label": label, "val_loss": loss, "seconds": time.time() - begin, "device": device,
                         "config": to_dict(run)})  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("grid", choices=GRIDS, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gpu-workers", type=int, default=0)
    parser.add_argument("--cpu-workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60)
    options = parser.parse_args()
    from fathom.train.embedded import embedded

    embedded()
    options.out.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    for name in options.grid:
        for label, run in GRIDS[name]():
            tasks.put((label, to_dict(run)))
    devices = ["cuda"] * options.gpu_workers + ["cpu"] * options.cpu_workers
    workers = [context.Process(target=worker, args=(d, 1, tasks, results), daemon=True) for d in devices]
    for process in workers:
        process.start()
    deadline = time.time() + 60 * options.minutes
    with (options.out / "runs.jsonl").open("a") as file:
        while time.time() < deadline and (any(p.is_alive() for p in workers) or not results.empty()):
            try:
                row = results.get(timeout=1)
            except queue.Empty:
                continue
            file.write(json.dumps(row) + "\n")
            file.flush()
            c = row["config"]
            print(f"{row['label']:14s} {c['model']['residual']['rule']:8s} lr {c['optim']['lr']:.4f} "
                  f"muon {c['optim']['muon_lr'] if c['optim']['optimizer'] == 'muon' else 0:.3f} seed {c['seed']} "
                  f"val {row['val_loss']:.4f}  {row['seconds']:.0f} s on {row['device']}", flush=True)  # fmt: skip
    for process in workers:
        process.terminate()


if __name__ == "__main__":
    main()
