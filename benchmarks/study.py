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
    checks   what ``rows`` left in doubt: Full without the fused kernels, projected queries again, a window at the third size

The rates are tuned for PreNorm, by means over seeds, and all arms of a size share them, as in the paper: the comparison favours
the baseline. study_stages.py has every stage, and the rule by which rates are carried to the other sizes. Budget: ``BUDGET`` GPU
seconds, wall clock times the GPUs, whatever runs side by side on them. Dear runs begin first, so that all GPUs end together.
Several of these small networks fill a GPU, best under NVIDIA's MPS (`nvidia-cuda-mps-control -d` before `run`, 14 workers a GPU).
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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from study_stages import ARMS, MAKE, SCALES, STAGES, candidates, run_config
from study_summary import summarize

from fathom.errors import UserError
from fathom.lab.plan import PLAN, Sweep, make_sweep, outcomes, read_sweep, training_flops
from fathom.lab.sweep import run_sweep
from fathom.train.config import OptimConfig, read_object
from fathom.train.environment import machine, pick_device
from fathom.train.loop import Interrupted

BUDGET = 7200.0


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
        "checks": (3 * seeds, seeds * (2 * cost[0] + cost[2])),
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
    """Every validation, and at most so many of the training lines, evenly, and the last: it says how far the run came."""
    lines = [(json.loads(line)["kind"] == "train", line) for line in metrics.splitlines()]
    count = sum(train for train, _ in lines)
    every = math.ceil(count / most) or 1
    kept, seen = [], 0
    for train, line in lines:
        seen += train
        if not train or seen % every == 1 % every or seen == count:
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
