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
(std 0.02). Nothing is timed before the logits of all Block arms agree. Decode runs as a CUDA graph; times hold its launch and
the copy of tokens to the GPU, not sampling. A round is every arm once; `over_prenorm` is the median over rounds of the ratio
to PreNorm in the same round. Launches are the kernels of one decode step without a graph, counted by the profiler.
"""

import argparse
import copy
import datetime
import json
import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import peers
import torch
from arms import ListAttnRes, Unavailable, plain_read
from summarize import row
from timing import Clock, command
from torch import Tensor

from fathom.inference.cache import KVCache
from fathom.inference.engine import Engine
from fathom.kernels import backend_for
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.transformer import Transformer
from fathom.residuals import make_stream
from fathom.stream import Stream
from fathom.train.environment import machine, pick_device

QUERY_STD = 0.02
AGREEMENT = 0.05
"""Largest relative distance between two arms' logits: several times that of bf16 rounding at other places, far below a
wrong term's."""


@dataclass(frozen=True)
class Shape:
    name: str
    config: ModelConfig
    block_size: int


def shapes(tiny: bool) -> list[Shape]:
    common: dict[str, Any] = {"context": 8192, "vocab_size": 32768, "head_std": 1.0}
    found = [
        # 0.97 B parameters, N = 8.
        Shape("d2048", ModelConfig(dim=2048, num_layers=16, num_heads=16, mlp_dim=5632, **common), 4),
        # The shape of Kimi Linear 48B's dense part: 27 decoder layers, S = 6.
        Shape("d2304", ModelConfig(dim=2304, num_layers=27, num_heads=18, mlp_dim=6336, **common), 6),
    ]
    if not tiny:
        return found
    small = {"dim": 64, "num_layers": 5, "num_heads": 2, "mlp_dim": 96, "context": 128, "vocab_size": 256}
    return [Shape(f"{shape.name}-tiny", replace(shape.config, **small), shape.block_size) for shape in found]


def network(shape: Shape, device: torch.device) -> Transformer:
    return Transformer(replace(shape.config, residual=ResidualConfig(rule="prenorm"))).to(device)


def streams(shape: Shape, device: torch.device) -> dict[str, Stream]:
    """The stream of every arm that can run here."""
    config, blocks = shape.config, ResidualConfig(rule="block", block_size=shape.block_size)
    residuals = {
        "prenorm": ResidualConfig(rule="prenorm"),
        "block": blocks,
        "full": ResidualConfig(rule="full"),
        "single-pass": replace(blocks, schedule="single_pass"),
    }
    found = {name: make_stream(r, config.num_sublayers, config.dim).to(device) for name, r in residuals.items()}
    generator = torch.Generator().manual_seed(0)
    queries = QUERY_STD * torch.randn(config.num_sublayers + 1, config.dim, generator=generator)
    with torch.no_grad():
        for name in ("block", "full", "single-pass"):
            cast(Tensor, found[name].query).copy_(queries)
    case = SimpleNamespace(num_sublayers=config.num_sublayers, dim=config.dim, block_size=shape.block_size)
    workload = SimpleNamespace(case=case, queries=queries.to(device), gains=torch.ones_like(queries).to(device))
    found["naive"] = ListAttnRes(cast(Any, workload), plain_read, compiled_norms=False)
    try:
        found["fla"] = fla_stream(workload, device)
    except Unavailable as reason:
        print(f"fla: left out: {reason}")
    return found


def fla_stream(workload: SimpleNamespace, device: torch.device) -> ListAttnRes:
    if device.type != "cuda":
        raise Unavailable("its kernels need a GPU")
    fused_attnres = peers.load("fla.ops.attnres").fused_attnres

    def read(
        bank: tuple[Tensor, ...], partial: Tensor | None, output: Tensor, query: Tensor, gain: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        total = peers.add(partial, output)
        return total, fused_attnres(query, (*bank, total), gain, output_rms_weight=weight, rms_eps=1e-6)

    return ListAttnRes(cast(Any, workload), read, compiled_norms=False)


def engines(
    base: Transformer, found: dict[str, Stream], slots: int, capacity: int, device: torch.device
) -> dict[str, Engine]:
    """An engine of every arm, all on one network and one cache."""
    made: dict[str, Engine] = {}
    shared: KVCache | None = None
    for name, stream in found.items():
        model = copy.copy(base)
        model._modules = dict(base._modules)
        model.stream = stream
        engine = Engine(model, slots=slots, capacity=capacity, dtype=torch.bfloat16, cuda_graphs=device.type == "cuda")
        shared = engine.cache = engine.cache if shared is None else shared
        made[name] = engine
    return made


def gate(arms: dict[str, Engine], vocab_size: int) -> dict[str, float]:
    """The relative distance of every Block arm's logits, after prefill and decode, to the naive arm's."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in (29, 64)]
    logits = {}
    for name, engine in arms.items():
        if name not in ("prenorm", "full"):
            logits[name] = torch.cat((engine.prefill(prompts), engine.decode([1, 2]))).float()
    found = {name: float((got - logits["naive"]).norm() / logits["naive"].norm()) for name, got in logits.items()}
    for name, distance in found.items():
        if not distance < AGREEMENT:  # nor NaN
            raise SystemExit(f"{name} differs from naive by {distance:.2g}: it is wrong, and nothing was timed")
    return found


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="shapes and lengths that a CPU runs in moments")
    parser.add_argument("--shapes", nargs="+", default=["d2048", "d2304"])
    parser.add_argument("--arms", nargs="+", help="these beside prenorm and naive; all if not given")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=32, help="decode steps of one turn")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = pick_device(options.device)
    clock, scale = Clock(device), 64 if options.tiny else 1
    rows: list[dict[str, Any]] = []
    gates: dict[str, Any] = {}
    for shape in shapes(options.tiny):
        if shape.name.removesuffix("-tiny") not in options.shapes:
            continue
        base, found = network(shape, device), streams(shape, device)
        kept = {*(options.arms or found), "prenorm", "naive"}
        found = {name: stream for name, stream in found.items() if name in kept}
        gates[shape.name] = gate(engines(base, found, 2, 96, device), shape.config.vocab_size)
        for batch, length in ((1, 8192 // scale), (8, 2048 // scale)):
            arms = engines(base, found, batch, length, device)
            prompts = [[1] * length] * batch
            times = timed(clock, arms, lambda engine, p=prompts: engine.prefill(p), 1, options.rounds)
            rows += rows_of(f"prefill-{batch}x{length}-{shape.name}", "prefill_ms", times)
        context = 2048 // scale
        for batch in (1, 16, 64):
            arms = engines(base, found, batch, context + options.steps, device)
            case = f"decode-b{batch}-{shape.name}"
            times = timed(
                clock, arms, lambda engine, b=batch, c=context: decode_steps(engine, b, c, options.steps),
                options.steps, options.rounds,
            )  # fmt: skip
            rows += rows_of(case, "decode_ms", times)
            if device.type == "cuda" and batch == 1:
                counts = {name: launches(engine, batch, context) for name, engine in arms.items()}
                for name, count in counts.items():
                    rows.append(row(case, name, "launches", "kernels", [count], over_prenorm=count / counts["prenorm"]))
                more = counts.get("block", counts["prenorm"]) - counts["prenorm"]
                print(f"{case}: a decode step of block has {more} more launches than one of prenorm: {counts}")
            del arms
    options.out.mkdir(parents=True, exist_ok=True)
    result = {
        "name": "inference", "date": str(datetime.date.today()), "command": command("inference.py"),
        "machine": machine(device),
        "versions": {"torch": torch.__version__, "backend": backend_for(device), **peers.versions()},
        "gate": gates, "rows": rows,
    }  # fmt: skip
    (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
