"""The study: is AttnRes better than PreNorm on debian-docs, by how much, and how sure is that?

    python benchmarks/study.py plan OUT --data data/debian-docs     what will be run, what it costs, the budget
    python benchmarks/study.py run OUT --minutes 25                 go on for so long, stage by stage; every run resumes
    python benchmarks/study.py status OUT                           runs done, GPU time spent and left
    python benchmarks/study.py collect OUT RESULTS                  configs, metrics and outcomes, to be committed
    python benchmarks/study.py summarize RESULTS                    every number and figure, from those files alone

Stages, each a sweep of fathom/lab in OUT/<stage>, in this order:

    rates    PreNorm alone at the smallest size, two seeds: AdamW and Muon, with rates for matrices, embedding and head
    edges    PreNorm alone, likewise: beyond the grid of these rates, from its best, which was at its edge
    factors  PreNorm alone at the second size, two seeds: the best of these rates, all times a factor
    sizes    PreNorm, Block (N = 8, its default) and Full at four sizes, three seeds
    rows     Table 4's rows of arXiv 2603.15031 at the first size, beside its PreNorm and Full of ``sizes``, the same seeds
    shapes   depth against width, nine shapes of the first size's compute, PreNorm and Block

The rates are tuned for PreNorm, by means over seeds, and all arms of a size share them, as in the paper: the comparison favours
the baseline. The rule by which they are carried to the other sizes is ``carried_factor``. Budget: ``BUDGET`` GPU seconds, wall
clock times the GPUs, whatever runs side by side on them. Dear runs begin first, so that all GPUs end together. Several of these
small networks fill a GPU, best under NVIDIA's MPS (`nvidia-cuda-mps-control -d` before `run`, 14 workers a GPU).
"""

import argparse
import itertools
import json
import math
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from study_summary import summarize

from fathom.errors import UserError
from fathom.lab.plan import PLAN, Planned, Sweep, make_sweep, outcomes, read_sweep, training_flops
from fathom.lab.sweep import run_sweep
from fathom.lab.sweeps import ABLATIONS, residual, shapes
from fathom.models.config import ModelConfig
from fathom.train.config import DataConfig, OptimConfig, RunConfig, read_object
from fathom.train.data import Manifest
from fathom.train.environment import machine, pick_device
from fathom.train.loop import Interrupted, data_folder

STAGES = ("rates", "edges", "factors", "sizes", "rows", "shapes")
ARMS = {"prenorm": "prenorm", "block": "block", "full": "full"}
BUDGET = 7200.0


@dataclass(frozen=True)
class Scale:
    """How large the study is."""

    sizes: tuple[tuple[int, int, int, int], ...]
    """Decoder layers, width, heads and optimizer steps of each size."""
    muon: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    """Rates that are tried of matrices, embedding and head, the matrices' under Muon; vectors take the head's."""
    adamw: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    """Likewise, all under AdamW."""
    edges: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    """Factors of the best of these, of matrices, embedding and head."""
    factors: tuple[float, ...]
    context: int
    batch: int
    precision: str
    compile: str
    shapes: int
    """How many of the 25 shapes of Fig. 7 are taken, evenly."""
    rows: tuple[str, ...] = tuple(ABLATIONS)
    """Rows of Table 4."""
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seeds: tuple[int, ...] = (0, 1)


SCALES = {
    # 4.5e7 to 3.2e8 FLOPs a token forward and backward, 12 to 27 M tokens: 16 times the compute from first to last.
    "h100": Scale(((8, 192, 3, 732), (12, 256, 4, 1037), (16, 320, 5, 1465), (24, 384, 6, 1650)),
                  ((0.01, 0.02, 0.04), (0.03, 0.1, 0.3), (1e-3, 4e-3)), ((2e-3, 4e-3, 8e-3), (0.03, 0.1), (1e-3, 4e-3)),
                  ((0.25, 0.5, 1.0), (1.0, 3.0), (1.0, 4.0, 16.0)), (0.5, 0.71, 1.0, 1.41), 512, 32, "bf16", "layers", 9),
    "toy": Scale(((2, 8, 1, 6), (3, 12, 1, 8), (4, 16, 1, 16)), ((0.02,), (0.1,), (4e-3,)), ((8e-3,), (0.1,), (4e-3,)),
                 ((0.5, 1.0), (1.0,), (1.0,)), (0.5, 1.0), 32, 2, "float32", "none", 2, ("prenorm", "block-s4-heads16"),
                 (0,), (0,)),
}  # fmt: skip


def run_config(scale: Scale, data: str, size: int, arm: str, optim: OptimConfig, seed: int) -> RunConfig:
    """Of one run of size ``size`` (an index), at the rates of ``optim``."""
    layers, dim, heads, steps = scale.sizes[size]
    folder = DataConfig(folder=data, batch=scale.batch)
    config = RunConfig(
        model=ModelConfig(context=scale.context, dim=dim, num_layers=layers, num_heads=heads, residual=residual(arm)),
        data=folder, optim=replace(optim, warmup=max(1, steps // 10)), steps=steps, seed=seed,
        precision=scale.precision, compile=scale.compile, eval_every=max(1, steps // 8), eval_sequences=512 // scale.batch * 8,
        checkpoint_every=max(1, steps // 3), keep_checkpoints=1, log_every=max(1, steps // 200),
    )  # type: ignore[arg-type]  # fmt: skip
    vocab_size = Manifest.load(data_folder(config)).vocab_size
    return replace(config, model=replace(config.model, vocab_size=vocab_size))


def setting(name: str, matrix: float, embedding: float, head: float) -> tuple[str, OptimConfig]:
    """The optimizer ``name`` with its tuned rates, and what this setting is called."""
    rates = {"muon_lr": matrix, "lr": head} if name == "muon" else {"lr": matrix}
    optim = OptimConfig(optimizer=name, embedding_lr=embedding, head_lr=head, **rates)  # type: ignore[arg-type]
    return f"{name}-{matrix:g}-{embedding:g}-{head:g}", optim


def candidates(scale: Scale) -> dict[str, OptimConfig]:
    """Every setting of the optimizer that is tried first, by name."""
    grids = (("muon", scale.muon), ("adamw", scale.adamw))
    return dict(setting(name, *each) for name, grid in grids for each in itertools.product(*grid))


def beyond(scale: Scale, best: OptimConfig) -> dict[str, OptimConfig]:
    """Settings beyond the first grid, from its best."""
    muon = best.optimizer == "muon"
    at = (best.muon_lr if muon else best.lr, best.embedding_lr, best.head_lr)
    found = {}
    for factors in itertools.product(*scale.edges):
        name, optim = setting(best.optimizer, *(float(f"{a * f:.3g}") for a, f in zip(at, factors, strict=True)))
        if factors != (1.0, 1.0, 1.0):
            found[name] = optim
    return found


def scaled(optim: OptimConfig, factor: float) -> OptimConfig:
    """``optim`` with every tuned rate times ``factor``."""
    rates = ("lr", "muon_lr", "embedding_lr", "head_lr")
    return replace(optim, **{name: float(f"{factor * getattr(optim, name):.3g}") for name in rates})


def best_rate(rates: list[float], losses: list[float]) -> float:
    """The lowest point of the parabola through the best rate and its neighbours, over log rate; the best at an end itself."""
    at = int(np.argmin(losses))
    if at in (0, len(rates) - 1):
        return rates[at]
    a, b, _ = np.polyfit(np.log(rates[at - 1 : at + 2]), losses[at - 1 : at + 2], 2)
    return float(np.exp(-b / (2 * a)))


def carried_factor(first: float, second: float, compute: tuple[float, float], to: float) -> float:
    """The factor at compute ``to``: a power of compute through the two tuned ones, its exponent held between -0.25 and 0.

    Two optima are noisy: unheld, their line could send the largest size's rates anywhere. The paper's rates fall like C^-0.19.
    """
    exponent = math.log(second / first) / math.log(compute[1] / compute[0])
    exponent = min(0.0, max(-0.25, exponent))
    middle = math.sqrt(first * second)
    return middle * (to / math.sqrt(compute[0] * compute[1])) ** exponent


def of_prenorm(scale: Scale, data: str, size: int, settings: dict[str, OptimConfig]) -> list[Planned]:
    return [
        Planned(f"{name}-seed{seed}", name, "prenorm", seed, run_config(scale, data, size, "prenorm", optim, seed))
        for name, optim in settings.items() for seed in scale.tuning_seeds
    ]  # fmt: skip


def rates(out: Path, scale: Scale, data: str) -> list[Planned]:
    return of_prenorm(scale, data, 0, candidates(scale))


def edges(out: Path, scale: Scale, data: str) -> list[Planned]:
    return of_prenorm(scale, data, 0, beyond(scale, best_of(out, candidates(scale), "rates")))


def factors(out: Path, scale: Scale, data: str) -> list[Planned]:
    best = best_rates(out, scale)
    return of_prenorm(scale, data, 1, {f"x{factor:g}": scaled(best, factor) for factor in scale.factors})


def mean_losses(out: Path, stage: str) -> dict[str, float]:
    """Mean final loss of each case over its seeds; infinite if one did not end well."""
    found: dict[str, list[float]] = {}
    for end in outcomes(read_sweep(out / stage)):
        found.setdefault(end.planned.case, []).append(math.inf if end.val_loss is None else end.val_loss)
    return {case: statistics.mean(losses) for case, losses in found.items()}


def best_of(out: Path, settings: dict[str, OptimConfig], *stages: str) -> OptimConfig:
    """The setting with the lowest mean loss in ``stages``."""
    losses = {case: loss for stage in stages for case, loss in mean_losses(out, stage).items()}
    return settings[min(losses, key=losses.__getitem__)]


def best_rates(out: Path, scale: Scale) -> OptimConfig:
    first = candidates(scale)
    return best_of(out, first | beyond(scale, best_of(out, first, "rates")), "rates", "edges")


def tuned(out: Path, scale: Scale, data: str) -> list[OptimConfig]:
    """The optimizer of every size, from the finished stages ``rates`` and ``factors``."""
    best = best_rates(out, scale)
    losses = mean_losses(out, "factors")
    second = best_rate(list(scale.factors), [losses[f"x{factor:g}"] for factor in scale.factors])
    cost = [training_flops(run_config(scale, data, size, "prenorm", best, 0)) for size in range(len(scale.sizes))]
    return [scaled(best, carried_factor(1.0, second, (cost[0], cost[1]), each)) for each in cost]


def sizes(out: Path, scale: Scale, data: str) -> list[Planned]:
    found = tuned(out, scale, data)
    return [
        Planned(f"s{size + 1}-{arm}-seed{seed}", f"s{size + 1}", arm, seed,
                run_config(scale, data, size, rule, found[size], seed))
        for seed in scale.seeds for size in range(len(scale.sizes)) for arm, rule in ARMS.items()
    ]  # fmt: skip


def rows(out: Path, scale: Scale, data: str) -> list[Planned]:
    optim, model = tuned(out, scale, data)[0], scale.sizes[0]
    planned = []
    for seed in scale.seeds:
        for arm, rule in ((name, ABLATIONS[name]) for name in scale.rows if name not in ARMS):
            if "heads=" in rule:  # sixteen heads in the paper, of which each is as wide as a head of attention
                arm, rule = f"block-s4-heads{model[2]}", f"block:block_size=4,heads={model[2]}"
            planned.append(Planned(f"{arm}-seed{seed}", "s1", arm, seed, run_config(scale, data, 0, rule, optim, seed)))
    return planned


def depth_width(out: Path, scale: Scale, data: str) -> list[Planned]:
    base = run_config(scale, data, 0, "prenorm", tuned(out, scale, data)[0], 0)
    made = shapes(base)
    chosen = [list(made)[round(at)] for at in np.linspace(0, len(made) - 1, min(scale.shapes, len(made)))]
    return [
        Planned(f"{case}-{arm}-seed0", case, arm, 0,
                replace(made[case], model=replace(made[case].model, residual=residual(ARMS[arm]))))
        for case in dict.fromkeys(chosen) for arm in ("prenorm", "block")
    ]  # fmt: skip


MAKE: dict[str, Callable[[Path, Scale, str], list[Planned]]] = {
    "rates": rates, "edges": edges, "factors": factors, "sizes": sizes, "rows": rows, "shapes": depth_width
}  # fmt: skip


def stage_of(out: Path, name: str, settings: dict[str, Any]) -> Sweep:
    """The sweep of a stage, made when the rates that it needs are known."""
    if (out / name / PLAN).is_file():
        return read_sweep(out / name)
    planned = MAKE[name](out, SCALES[settings["scale"]], settings["data"])
    planned.sort(key=lambda run: training_flops(run.config) * (1 + (run.arm != "prenorm")), reverse=True)
    return make_sweep(out / name, "study", planned, threads=1)


def left(sweep: Sweep) -> int:
    return sum(end.state not in ("done", "diverged") for end in outcomes(sweep))


def settings_of(out: Path) -> dict[str, Any]:
    if not (out / "study.json").is_file():
        raise UserError(f"{out} holds no study; begin with `python benchmarks/study.py plan {out}`")
    return read_object(out / "study.json")


def spent(out: Path) -> float:
    """GPU seconds so far."""
    path = out / "spent.jsonl"
    return sum(json.loads(line)["seconds"] for line in path.read_text().splitlines()) if path.is_file() else 0.0


def plan(out: Path, data: str, scale: str) -> None:
    """Write study.json: the budget and the expected cost of each stage, before anything runs."""
    if (out / "study.json").is_file():
        raise UserError(f"{out} holds a study already")
    size = SCALES[scale]
    cost = [training_flops(run_config(size, data, at, "prenorm", OptimConfig(), 0)) for at in range(len(size.sizes))]
    seeds, tries = len(size.seeds), len(candidates(size)) * len(size.tuning_seeds)
    more = (math.prod(map(len, size.edges)) - 1) * len(size.tuning_seeds)
    scales, new_rows = len(size.factors) * len(size.tuning_seeds), len(set(size.rows) - set(ARMS))
    counts = {
        "rates": (tries, tries * cost[0]),
        "edges": (more, more * cost[0]),
        "factors": (scales, scales * cost[1]),
        "sizes": (seeds * len(ARMS) * len(cost), seeds * len(ARMS) * sum(cost)),
        "rows": (seeds * new_rows, seeds * new_rows * cost[0]),
        "shapes": (2 * size.shapes, 2 * size.shapes * cost[0]),
    }
    settings = {
        "scale": scale, "data": data, "budget_seconds": BUDGET, "arms": ARMS, "sizes": asdict(size),
        "flops_of_sizes": cost, "stages": {name: {"runs": n, "flops": flops} for name, (n, flops) in counts.items()},
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / "study.json").write_text(json.dumps(settings, indent=1) + "\n")
    status(out)


def status(out: Path) -> None:
    """Print every stage's runs and the GPU time, spent and left."""
    settings = settings_of(out)
    for name, expected in settings["stages"].items():
        if (out / name / PLAN).is_file():
            ends = outcomes(read_sweep(out / name))
            states = {
                state: sum(end.state == state for end in ends) for state in ("done", "diverged", "started", "waiting")
            }
            told = ", ".join(f"{count} {state}" for state, count in states.items() if count)
        else:
            told = "not begun"
        print(f"{name:7} {expected['runs']:3} runs, {expected['flops']:.2e} FLOPs: {told}")
    used, budget = spent(out), settings["budget_seconds"]
    print(f"budget {budget:,.0f} GPU seconds: {used:,.0f} spent, {budget - used:,.0f} left")


def run(out: Path, minutes: float, workers: int | None, only: tuple[str, ...] = STAGES) -> int:
    """Go on with the first stage that is not done; ends when the minutes or the budget are, or all of ``only`` is done."""
    settings = settings_of(out)
    every_failure: dict[str, str] = {}
    device, count = machine(pick_device("auto")), max(1, torch.cuda.device_count())
    end = time.monotonic() + min(60 * minutes, (settings["budget_seconds"] - spent(out)) / count)
    for name in only:
        sweep = stage_of(out, name, settings)
        seconds = end - time.monotonic()
        if not left(sweep):
            continue
        if seconds <= 0:
            print("the time is spent", file=sys.stderr)
            break
        # As Ctrl-C does: each run finishes its step and saves.
        alarm = threading.Timer(seconds, lambda: os.kill(os.getpid(), signal.SIGTERM))
        alarm.daemon = True
        begin = time.monotonic()
        alarm.start()
        try:
            _, failed = run_sweep(sweep, workers=workers)
        except Interrupted:
            failed = {}
        finally:
            alarm.cancel()
            seconds = round(count * (time.monotonic() - begin), 1)
            row = {"stage": name, "seconds": seconds, "gpus": count, "machine": device}
            with (out / "spent.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
        every_failure |= failed
        print("".join(f"{name}: {why}\n" for name, why in failed.items()), file=sys.stderr, end="")
        if left(sweep) > len(failed) or (failed and name in STAGES[:3]):
            break
    status(out)
    return 1 if every_failure else 0


def collect(out: Path, results: Path) -> None:
    """Copy what the numbers are made of: no checkpoints, no machine paths."""
    for file in ("study.json", "spent.jsonl"):
        if (out / file).is_file():
            results.mkdir(parents=True, exist_ok=True)
            shutil.copy(out / file, results / file)
    settings = settings_of(results) | {"data": Path(settings_of(out)["data"]).name}
    (results / "study.json").write_text(json.dumps(settings, indent=1) + "\n")
    for name in STAGES:
        if not (out / name / PLAN).is_file():
            continue
        sweep = read_sweep(out / name)
        text = (
            (out / name / PLAN).read_text().replace(json.dumps(settings_of(out)["data"]), json.dumps(settings["data"]))
        )
        (results / name).mkdir(exist_ok=True)
        (results / name / PLAN).write_text(text)
        for planned in sweep.runs:
            source, target = sweep.run_folder(planned), results / name / "runs" / planned.name
            for file in ("config.json", "data.json", "env.json", "metrics.jsonl", "summary.json", "diverged.json"):
                if (source / file).is_file():
                    target.mkdir(parents=True, exist_ok=True)
                    text = (source / file).read_text().replace(str(out.resolve()), "OUT")
                    text = text.replace(json.dumps(settings_of(out)["data"]), json.dumps(settings["data"]))
                    (target / file).write_text(thinned(text) if file == "metrics.jsonl" else text)


def thinned(metrics: str, most: int = 100) -> str:
    """Every validation, and at most so many of the training lines, evenly."""
    lines = [(json.loads(line)["kind"] == "train", line) for line in metrics.splitlines()]
    every = math.ceil(sum(train for train, _ in lines) / most) or 1
    kept, seen = [], 0
    for train, line in lines:
        seen += train
        if not train or seen % every == 1 % every:
            kept.append(line)
    return "\n".join(kept) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    each = {name: commands.add_parser(name) for name in ("plan", "run", "status", "collect", "summarize")}
    for name, command in each.items():
        command.add_argument("results" if name == "summarize" else "out", type=Path)
    each["plan"].add_argument("--data", default="data/debian-docs")
    each["plan"].add_argument("--scale", choices=list(SCALES), default="h100")
    each["run"].add_argument("--minutes", type=float, default=25)
    each["run"].add_argument(
        "--workers", type=int, default=None, help="runs at a time; by the GPUs' memory if not given"
    )
    each["run"].add_argument("--only", nargs="+", choices=STAGES, default=STAGES, help="stages; all if not given")
    each["collect"].add_argument("results", type=Path)
    options = parser.parse_args()
    try:
        if options.command == "plan":
            plan(options.out, options.data, options.scale)
        elif options.command == "run":
            return run(options.out, options.minutes, options.workers, tuple(options.only))
        elif options.command == "status":
            status(options.out)
        elif options.command == "collect":
            collect(options.out, options.results)
        else:
            summarize(options.results)
    except UserError as error:
        print(f"study: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
