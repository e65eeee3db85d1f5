"""What a residual rule costs in training: every arm's forward and backward pass over the same sublayers, against PreNorm.

    PYTHONPATH=. python benchmarks/residual_path.py --out OUT
    PYTHONPATH=. python benchmarks/residual_path.py --cases model-d2048 --slow-arms --out OUT
    PYTHONPATH=. python benchmarks/residual_path.py --device cpu --tiny --arms prenorm eager fathom --out OUT

One process and one GPU. The workloads are in workloads.py, the arms in arms.py and peers.py, how time is taken in timing.py.
An arm is timed only after gate.py has passed it at the shape that is timed. Then the arms take turns, A B C A B C, so that
a drifting clock drifts for all; a ratio is taken between times of one round. An arm that cannot run (not installed, out of
memory, a gate not passed, no time left) is left out with a note. Results are written after every case:

    OUT/result.json   medians over rounds, in the schema of benchmarks/results/
    OUT/raw.json      every single timing, errors of the gate, notes, environment

A *pass* is the time in which a copy moves one [tokens, D] tensor, half the time of copying it: copy bandwidth is measured
beside each case. The loss is the dot product of the normalised output with a fixed gradient: no head, no vocabulary.
"""

import argparse
import datetime
import gc
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"
)  # arms of different shapes share one memory

import peers
import torch
from arms import OWN, Unavailable
from gate import PEER_SLACK, SLACK, Wrong, truths
from steps import Measured, Stepper, ahead, capture, first_call, prepare, profile, turn
from summarize import row
from timing import Clock, command
from workloads import CASES, Case, make_workload

from fathom.errors import UserError
from fathom.kernels import backend_for
from fathom.train.environment import environment, pick_device

ARMS = OWN | peers.PEERS
DEFAULT_ARMS = ("prenorm", "fathom", "fathom-recompute", "fla", "liger", "compile", "eager")
SLOW_ARMS = ("prenorm-checkpoint", "fathom-checkpoint", "fast-attnres", "flash-attn-res")
"""The peers whose first call tunes for minutes, last, and what flash-attn-res, which recomputes, is to be compared with."""


def run_case(case: Case, options: argparse.Namespace, device: torch.device, deadline: float) -> dict[str, Any]:
    """Gate, then time, every arm of ``case``; the raw record. An arm's failure costs the others nothing but its time."""
    clock = Clock(device)
    bandwidth = clock.copy_bandwidth()
    workload = make_workload(case, device)
    notes: dict[str, str] = {}
    steppers: dict[str, Stepper] = {}
    found: dict[str, Measured] = {}
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    pool = torch.cuda.graph_pool_handle() if options.graph else None

    def attempt(name: str, part: Callable[[], None]) -> bool:
        """Whether ``part`` went well; if not, the arm is left out with a note."""
        try:
            part()
            return True
        except Unavailable as reason:
            notes[name] = f"not available: {reason}"
        except Wrong as reason:
            notes[name] = f"GATE FAILED, not timed: {reason}"
        except torch.OutOfMemoryError:
            notes[name] = "out of memory"
        except Exception as reason:
            traceback.print_exc(limit=-4)
            notes[name] = f"FAILED: {type(reason).__name__}: {str(reason).strip()[:300]}"
        steppers.pop(name, None)
        found.pop(name, None)
        workload.clear()
        return False

    def admit(name: str) -> None:
        rule = "prenorm" if name.startswith("prenorm") else "attnres"
        stepper = Stepper(ARMS[name](workload), workload)
        found[name] = first_call(stepper, clock, exact[rule], PEER_SLACK if name in peers.PEERS else SLACK)
        steppers[name] = stepper

    def add_graph(name: str) -> None:
        try:
            graphs[name] = capture(steppers[name], pool)
        except RuntimeError as reason:
            notes[name] = f"no CUDA graph: {str(reason).splitlines()[0]}"
            workload.clear()

    begin = time.monotonic()
    exact = truths(workload)
    gc.collect()
    print(f"\n{case.name}: {case.description}: truth found in {time.monotonic() - begin:.0f} s", flush=True)
    for name in options.arms:
        if time.monotonic() > deadline:
            notes[name] = "not run: the time budget was spent"
        elif attempt(name, partial(admit, name)):
            print(f"  {name}: first call {found[name].first_call_s:.1f} s", flush=True)
        if name in notes:
            print(f"  {name}: {notes[name]}", flush=True)
    eager_errors = {name: truth.eager for name, truth in exact.items()}
    exact.clear()
    gc.collect()
    for name in list(steppers):
        if attempt(name, partial(prepare, steppers[name], clock, found[name])):
            if options.profile:
                attempt(name, partial(profile, steppers[name], found[name]))
            if options.graph and name in steppers:
                add_graph(name)
    wait = ahead(found[name] for name in steppers)
    for _ in range(options.rounds):
        for name in list(steppers):
            attempt(name, partial(turn, steppers[name], clock, found[name], options.steps, graphs.get(name), wait))
    return {
        "case": asdict(case),
        "description": case.description,
        "copy_bytes_per_second": bandwidth,
        "pass_ms": case.tokens * case.dim * 2 / bandwidth * 1e3,
        "eager_errors": eager_errors,
        "arms": {name: asdict(measured) for name, measured in found.items()},
        "notes": notes,
    }


def rows(raw: dict[str, Any], seen: set[tuple[str, int]]) -> list[dict[str, Any]]:
    """The case's rows of result.json. A first call counts once for an arm and a width: later ones find its kernels compiled."""
    case, pass_ms = raw["case"]["name"], raw["pass_ms"]
    by_arm = {
        name: {
            metric: [statistics.median(steps) for steps in arm[metric]]
            for metric in ("forward_ms", "forward_backward_ms", "graph_ms", "wall_ms")
            if arm[metric]
        }
        for name, arm in raw["arms"].items()
    }
    found = []
    for name, metrics in by_arm.items():
        arm = raw["arms"][name]
        for metric, values in metrics.items():
            base = by_arm.get("prenorm", {}).get(metric)
            ratio = statistics.median(a / b for a, b in zip(values, base, strict=True)) if base else None
            found.append(row(case, name, metric, "ms", values, over_prenorm=ratio))
            if metric in ("forward_ms", "forward_backward_ms"):
                passes = [value / pass_ms for value in values]
                found.append(row(case, name, metric.replace("_ms", "_passes"), "passes", passes, over_prenorm=ratio))
        if arm["peak_gib"] is not None:
            base_gib = raw["arms"].get("prenorm", {}).get("peak_gib")
            ratio = arm["peak_gib"] / base_gib if base_gib else None
            found.append(row(case, name, "peak_gib", "GiB", [arm["peak_gib"]], over_prenorm=ratio))
        if (name, raw["case"]["dim"]) not in seen:
            seen.add((name, raw["case"]["dim"]))
            found.append(row(case, name, "first_call_s", "s", [arm["first_call_s"]]))
    return found


def report(raw: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """The case as a table for the terminal."""
    values = {(r["arm"], r["metric"]): r for r in found if r["case"] == raw["case"]["name"]}
    lines = [
        f"\n{raw['case']['name']}: {raw['description']}",
        f"copy {raw['copy_bytes_per_second'] / 1e12:.2f} TB/s; one pass of [tokens, D] {raw['pass_ms'] * 1e3:.1f} us",
        f"{'arm':19s} {'fwd ms':>8s} {'x':>6s} {'fwd+bwd ms (low to high)':>28s} {'x':>6s} {'passes':>7s} {'extra':>6s}"
        f" {'graph':>7s} {'wall':>7s} {'GiB':>6s} {'first s':>7s}   mean error over eager's (output, dx, dq)",
    ]
    base = values.get(("prenorm", "forward_backward_passes"), {}).get("median", math.nan)

    def show(name: str, metric: str, key: str = "median", form: str = ".2f") -> str:
        value = values.get((name, metric), {}).get(key)
        return "-" if value is None else format(value, form)

    for name, arm in raw["arms"].items():
        whole = values[name, "forward_backward_ms"]
        eager = raw["eager_errors"]["prenorm" if name.startswith("prenorm") else "attnres"]
        ratios = " ".join(f"{pair[0] / eager[key][0]:.2f}" for key, pair in arm["errors"].items())
        times = f"{whole['median']:.2f} ({whole['low']:.2f} to {whole['high']:.2f})"
        lines.append(
            f"{name:19s} {show(name, 'forward_ms'):>8s} {show(name, 'forward_ms', 'over_prenorm', '.3f'):>6s} {times:>28s}"
            f" {show(name, 'forward_backward_ms', 'over_prenorm', '.3f'):>6s}"
            f" {show(name, 'forward_backward_passes', form='.0f'):>7s}"
            f" {values[name, 'forward_backward_passes']['median'] - base:6.0f} {show(name, 'graph_ms'):>7s}"
            f" {show(name, 'wall_ms'):>7s} {show(name, 'peak_gib', form='.1f'):>6s}"
            f" {show(name, 'first_call_s', form='.1f'):>7s}   {ratios}"
        )
        lines += [f"    {ms:8.3f} ms  {count:4d} x  {kernel[:100]}" for kernel, count, ms in arm["kernels"][:12]]
    return "\n".join([*lines, *(f"{name}: {note}" for name, note in raw["notes"].items())])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--arms", nargs="+", choices=ARMS, default=list(DEFAULT_ARMS), help="in the order of their turns"
    )
    parser.add_argument("--slow-arms", action="store_true", help=f"also {', '.join(SLOW_ARMS)}")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every arm; at least 5")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of one turn")
    parser.add_argument(
        "--time-budget", type=float, default=math.inf, help="seconds after which no arm and no case begins"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see it run; its times mean nothing")
    parser.add_argument("--graph", action="store_true", help="time each arm's step from a CUDA graph too")
    parser.add_argument("--profile", action="store_true", help="record the GPU kernels of one step of each arm")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.rounds < 5:
        parser.error("--rounds must be at least 5")
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    if options.slow_arms:
        options.arms += [name for name in SLOW_ARMS if name not in options.arms]
    return options


def main() -> int:
    options = parse()
    try:
        device = pick_device(options.device)
        if device.type == "cpu" and (options.graph or options.profile):
            raise UserError("--graph and --profile need a GPU")
    except UserError as reason:
        print(reason, file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("highest")
    # One graph per number of sources and width: more than the default limit, past which fullgraph compilation fails.
    torch._dynamo.config.recompile_limit = 256
    deadline = time.monotonic() + options.time_budget
    env = environment(device) | {"backend": backend_for(device), "command": command("residual_path.py")}
    result: dict[str, Any] = {
        "name": "residual-path",
        "date": datetime.date.today().isoformat(),
        "command": env["command"],
        "machine": env["machine"],
        "versions": {key: env[key] for key in ("python", "torch", "cuda", "backend")},
        "rows": [],
    }
    raws: list[dict[str, Any]] = []
    seen: set[tuple[str, int]] = set()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.cases:
        if time.monotonic() > deadline:
            print(f"{name}: not run: the time budget was spent", flush=True)
            continue
        case = CASES[name].tiny() if options.tiny else CASES[name]
        raws.append(run_case(case, options, device, deadline))
        result["rows"] += rows(raws[-1], seen)
        result["versions"] |= peers.versions()
        print(report(raws[-1], result["rows"]), flush=True)
        (options.out / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        (options.out / "raw.json").write_text(json.dumps({"env": env, "cases": raws}) + "\n")
    return 1 if any("FAILED" in note for raw in raws for note in raw["notes"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
