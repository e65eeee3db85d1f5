"""The study: is AttnRes better than PreNorm on debian-docs, by how much, and how sure is that?

    python benchmarks/study.py plan OUT --data data/debian-docs     what will be run, what it costs, the budget
    python benchmarks/study.py run OUT --minutes 25                 go on for so long, stage by stage; every run resumes
    python benchmarks/study.py status OUT                           runs done, GPU time spent and left
    python benchmarks/study.py collect OUT RESULTS                  configs, metrics and outcomes, to be committed
    python benchmarks/study.py summarize RESULTS                    every number and figure, from those files alone

Stages, each a sweep of fathom/lab in OUT/<stage>, in this order:

    rates    PreNorm alone at the two smallest sizes, five learning rates
    sizes    PreNorm, Block (N = 8, its default) and Full at four sizes, three seeds
    rows     Table 4's rows of arXiv 2603.15031 at the second size, three seeds that all rows share
    shapes   depth against width, nine shapes of the first size's compute, PreNorm and Block

The learning rate is tuned for PreNorm and all arms of a size share it, as in the paper: the comparison favours the baseline. The
rule by which it is carried is ``carried_rate``. Budget: ``BUDGET`` GPU seconds: wall clock times the GPUs, whatever runs side by
side on them. Dear runs begin first, so that all GPUs end together.
"""

import argparse
import json
import math
import os
import shutil
import signal
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

STAGES = ("rates", "sizes", "rows", "shapes")
ARMS = {"prenorm": "prenorm", "block": "block", "full": "full"}
BUDGET = 7200.0


@dataclass(frozen=True)
class Scale:
    """How large the study is."""

    sizes: tuple[tuple[int, int, int, int], ...]
    """Decoder layers, width, heads and optimizer steps of each size."""
    rates: tuple[float, ...]
    context: int
    batch: int
    precision: str
    compile: str
    shapes: int
    """How many of the 25 shapes of Fig. 7 are taken, evenly."""
    rows: tuple[str, ...] = tuple(ABLATIONS)
    """Rows of Table 4."""
    seeds: tuple[int, ...] = (0, 1, 2)


SCALES = {
    # 4.5e7 to 3.2e8 FLOPs a token forward and backward, 12 to 33 M tokens: 20 times the compute from first to last.
    "h100": Scale(((8, 192, 3, 732), (12, 256, 4, 1037), (16, 320, 5, 1465), (24, 384, 6, 2014)),
                  (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2), 512, 32, "bf16", "layers", 9),
    "toy": Scale(((2, 8, 1, 6), (3, 12, 1, 8), (4, 16, 1, 16)), (2e-3, 8e-3, 3.2e-2), 32, 2, "float32", "none", 2,
                 ("prenorm", "block-s4-heads16"), (0,)),
}  # fmt: skip


def run_config(scale: Scale, data: str, size: int, arm: str, rate: float, seed: int) -> RunConfig:
    """Of one run of size ``size`` (an index)."""
    layers, dim, heads, steps = scale.sizes[size]
    folder = DataConfig(folder=data, batch=scale.batch)
    config = RunConfig(
        model=ModelConfig(context=scale.context, dim=dim, num_layers=layers, num_heads=heads, residual=residual(arm)),
        data=folder, optim=OptimConfig(lr=rate, warmup=max(1, steps // 20)), steps=steps, seed=seed,
        precision=scale.precision, compile=scale.compile, eval_every=max(1, steps // 8), eval_sequences=512 // scale.batch * 8,
        checkpoint_every=max(1, steps // 3), keep_checkpoints=1, log_every=max(1, steps // 200),
    )  # type: ignore[arg-type]  # fmt: skip
    vocab_size = Manifest.load(data_folder(config)).vocab_size
    return replace(config, model=replace(config.model, vocab_size=vocab_size))


def best_rate(rates: list[float], losses: list[float]) -> float:
    """The lowest point of the parabola through the best rate and its neighbours, over log rate; the best at an end itself."""
    at = int(np.argmin(losses))
    if at in (0, len(rates) - 1):
        return rates[at]
    a, b, _ = np.polyfit(np.log(rates[at - 1 : at + 2]), losses[at - 1 : at + 2], 2)
    return float(np.exp(-b / (2 * a)))


def carried_rate(first: float, second: float, compute: tuple[float, float], to: float) -> float:
    """The rate at compute ``to``: a power of compute through the two tuned ones, its exponent held between -0.25 and 0.

    Two optima are noisy: unheld, their line could send the largest size's rate anywhere. The paper's own rates fall like C^-0.19.
    """
    exponent = math.log(second / first) / math.log(compute[1] / compute[0])
    exponent = min(0.0, max(-0.25, exponent))
    middle = math.sqrt(first * second)
    return middle * (to / math.sqrt(compute[0] * compute[1])) ** exponent


def rates(out: Path, scale: Scale, data: str) -> list[Planned]:
    return [
        Planned(f"s{size + 1}-lr{rate:.4g}", f"s{size + 1}-lr{rate:.4g}", "prenorm", 0,
                run_config(scale, data, size, "prenorm", rate, 0))
        for size in (0, 1) for rate in scale.rates
    ]  # fmt: skip


def tuned(out: Path, scale: Scale, data: str) -> list[float]:
    """The rate of every size, from the finished stage ``rates``."""
    losses = {
        end.planned.name: end.val_loss if end.val_loss is not None else math.inf
        for end in outcomes(read_sweep(out / "rates"))
    }
    best = [
        best_rate(list(scale.rates), [losses[f"s{size + 1}-lr{rate:.4g}"] for rate in scale.rates]) for size in (0, 1)
    ]
    cost = [training_flops(run_config(scale, data, size, "prenorm", 1e-3, 0)) for size in range(len(scale.sizes))]
    return [float(f"{carried_rate(*best, (cost[0], cost[1]), each):.3g}") for each in cost]


def sizes(out: Path, scale: Scale, data: str) -> list[Planned]:
    found = tuned(out, scale, data)
    return [
        Planned(f"s{size + 1}-{arm}-seed{seed}", f"s{size + 1}", arm, seed,
                run_config(scale, data, size, rule, found[size], seed))
        for seed in scale.seeds for size in range(len(scale.sizes)) for arm, rule in ARMS.items()
    ]  # fmt: skip


def rows(out: Path, scale: Scale, data: str) -> list[Planned]:
    rate, model = tuned(out, scale, data)[1], scale.sizes[1]
    planned = []
    for seed in scale.seeds:
        for arm, rule in ((name, ABLATIONS[name]) for name in scale.rows):
            if "heads=" in rule:  # sixteen heads in the paper, of which each is as wide as a head of attention
                arm, rule = f"block-s4-heads{model[2]}", f"block:block_size=4,heads={model[2]}"
            planned.append(Planned(f"{arm}-seed{seed}", "s2", arm, seed, run_config(scale, data, 1, rule, rate, seed)))
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
    "rates": rates, "sizes": sizes, "rows": rows, "shapes": depth_width
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
    cost = [training_flops(run_config(size, data, at, "prenorm", 1e-3, 0)) for at in range(len(size.sizes))]
    seeds = len(size.seeds)
    counts = {
        "rates": (2 * len(size.rates), len(size.rates) * (cost[0] + cost[1])),
        "sizes": (seeds * len(ARMS) * len(cost), seeds * len(ARMS) * sum(cost)),
        "rows": (seeds * len(size.rows), seeds * len(size.rows) * cost[1]),
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
        if left(sweep) > len(failed) or (failed and name == "rates"):
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
