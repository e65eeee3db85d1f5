"""Prefill and decode of PreNorm and AttnRes engines over the same weights, in turns, in one process.

    python benchmarks/inference.py --out OUT
    python benchmarks/inference.py --device cpu --tiny --out OUT        a try, whose numbers mean nothing

prenorm        the engine of a PreNorm model, add and norm in one kernel
block          the engine of Block AttnRes, two-phase
full           the engine of Full AttnRes
single-pass    Block AttnRes, one fused read over all sources at every site
naive          Block AttnRes, one site at a time by the equations in plain PyTorch
fla            Block AttnRes, one site at a time by flash-linear-attention's fused read (see peers.py)

All arms share one network and one key/value cache, in bf16, and differ in the stream alone; the depth queries are random
(std 0.02). Nothing is timed before the logits of every arm, after a prefill and a decode step, are no further from those of the
same rule in float32 than twice its plain equations in bf16. Decode runs as a CUDA graph; times hold its launch and the copy of
tokens to the GPU, not sampling. A round is every arm once; `over_prenorm` is the median over rounds of the ratio to PreNorm in
the same round. Launches are the kernels of one decode step without a graph, counted by the profiler. OUT/result.json is written
anew after every case. Kernels are compiled first, by as many processes as there are cores, into Triton's cache on disk.
"""

import argparse
import copy
import datetime
import json
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peers
import torch
from inference_arms import ARMS, Shape, compiling, engines, network, plain_streams, shapes, streams
from summarize import row
from timing import Clock, command
from torch import Tensor

from fathom.inference.engine import Engine
from fathom.kernels import backend_for
from fathom.models.transformer import Transformer
from fathom.stream import Stream
from fathom.train.environment import machine, pick_device


def gate(base: Transformer, found: dict[str, Stream], shape: Shape, tiny: bool) -> dict[str, dict[str, float]]:
    """Every arm's relative distance to the float32 logits of its rule, beside that of the plain equations in bf16.

    An arm of other people's that fails is taken out of ``found``; any other that fails, or is too far off, ends the benchmark.
    """
    device, vocab_size = base.embedding.weight.device, shape.config.vocab_size
    rows, longest = (4, 64) if tiny else (16, 512)
    generator = torch.Generator().manual_seed(1)
    lengths = [longest - 5 * row for row in range(rows)]
    prompts = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in lengths]

    def logits(engine: Engine) -> Tensor:
        return torch.cat((engine.prefill(prompts), engine.decode(list(range(rows))))).float()

    plain = {rule: stream for rule, stream in plain_streams(shape, device).items() if rule in found or rule == "block"}
    rounded = {name: logits(engine) for name, engine in engines(base, plain, rows, longest + 16).items()}
    # After the engines above have rounded the weights.
    exact_base = copy.deepcopy(base).float()
    exact = {
        name: logits(engine) for name, engine in engines(exact_base, plain, rows, longest + 16, torch.float32).items()
    }
    del exact_base
    distances: dict[str, dict[str, float]] = {}
    for name, engine in engines(base, found, rows, longest + 16).items():
        rule = name if name in exact else "block"
        try:
            got = logits(engine)
        except Exception as error:
            if name != "fla":
                raise
            print(f"{name}: left out: {type(error).__name__}: {error}")
            del found[name]
            continue
        distances[name] = {
            key: float((each - exact[rule]).norm() / exact[rule].norm())
            for key, each in (("arm", got), ("plain", rounded[rule]))
        }
        print(
            f"{shape.name}: {name} is {distances[name]['arm']:.2g} from float32, plain bf16 {distances[name]['plain']:.2g}"
        )
        if not distances[name]["arm"] <= 2 * distances[name]["plain"]:  # nor NaN
            raise SystemExit(f"{name} is wrong, and nothing was timed: {distances[name]}")
    return distances


def decode_steps(engine: Engine, batch: int, context: int, steps: int) -> None:
    engine.lengths[:batch] = [context] * batch
    for _ in range(steps):
        engine.decode([1] * batch)


def launches(engine: Engine, batch: int, context: int) -> int:
    """Kernels of one decode step."""
    from torch.profiler import ProfilerActivity, profile

    tokens = torch.ones(batch, 1, dtype=torch.int64, device=engine.device)
    positions = torch.full((batch, 1), context, device=engine.device)
    engine.step(tokens, positions, engine.capacity)
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        engine.step(tokens, positions, engine.capacity)
        torch.cuda.synchronize()
    return sum(event.count for event in record.key_averages() if event.self_device_time_total > 0)


def timed(clock: Clock, arms: dict[str, Engine], part: Any, divisor: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of ``part(engine)`` over ``divisor``, each round every arm once, after a round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        order = list(arms) if turn % 2 else list(reversed(arms))
        for name in order:
            milliseconds = clock.wall(lambda name=name: part(arms[name])) / divisor
            if turn:
                times[name].append(milliseconds)
    return times


def rows_of(case: str, metric: str, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    found = []
    for arm, values in times.items():
        ratio = statistics.median(a / b for a, b in zip(values, times["prenorm"], strict=True))
        found.append(row(case, arm, metric, "ms", values, over_prenorm=None if arm == "prenorm" else ratio))
        print(f"{case:<24} {arm:<12} {statistics.median(values):9.4f} ms  x{ratio:.4f}", flush=True)
    return found


def measure(
    shape: Shape, base: Transformer, found: dict[str, Stream], clock: Clock, options: argparse.Namespace, scale: int
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each case, one case after the other."""
    for batch, length in ((1, 8192 // scale), (8, 2048 // scale)):
        arms = engines(base, found, batch, length)
        prompts = [[1] * length] * batch
        times = timed(clock, arms, lambda engine, p=prompts: engine.prefill(p), 1, options.rounds)
        del arms
        yield rows_of(f"prefill-{batch}x{length}-{shape.name}", "prefill_ms", times)
    context = 2048 // scale
    for batch in (1, 16, 64):
        arms = engines(base, found, batch, context + options.steps)
        case = f"decode-b{batch}-{shape.name}"
        times = timed(
            clock, arms, lambda engine, b=batch: decode_steps(engine, b, context, options.steps), options.steps, options.rounds
        )  # fmt: skip
        rows = rows_of(case, "decode_ms", times)
        if clock.cuda and batch == 1:
            rows += launch_rows(case, {name: launches(engine, batch, context) for name, engine in arms.items()})
        del arms
        yield rows


def launch_rows(case: str, counts: dict[str, int]) -> list[dict[str, Any]]:
    if not counts["prenorm"]:
        print(f"{case}: the profiler saw no kernels, so that launches are not counted")
        return []
    more = counts.get("block", counts["prenorm"]) - counts["prenorm"]
    print(f"{case}: a decode step of block has {more} more launches than one of prenorm: {counts}")
    return [
        row(case, name, "launches", "kernels", [count], over_prenorm=None if name == "prenorm" else count / counts["prenorm"])
        for name, count in counts.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="shapes and lengths that a CPU runs in moments")
    parser.add_argument("--shapes", nargs="+", default=["d2048", "d2304"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=32, help="decode steps of one turn")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case later than this")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    device = pick_device(options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "name": "inference", "date": str(datetime.date.today()), "command": command("inference.py"),
        "machine": machine(device),
        "versions": {"torch": torch.__version__, "backend": backend_for(device), **peers.versions()},
        "gate": {}, "rows": [],
    }  # fmt: skip
    chosen = [shape for shape in shapes(options.tiny) if shape.name.removesuffix("-tiny") in options.shapes]
    names = [name for name in ARMS if name in options.arms or name == "prenorm"]
    with compiling(names, chosen, device), ThreadPoolExecutor() as pool:
        networks = list(pool.map(network, chosen))
    clock = Clock(device)
    for shape in chosen:
        base, found = networks.pop(0).to(device), streams(names, shape, device)
        result["gate"][shape.name] = gate(base, found, shape, options.tiny)
        for rows in measure(shape, base, found, clock, options, 64 if options.tiny else 1):
            result["rows"] += rows
            (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
            if time.monotonic() > end:
                print(f"no more cases: {options.minutes:g} minutes are over", file=sys.stderr)
                return
        del base, found


if __name__ == "__main__":
    main()
