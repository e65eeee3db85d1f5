"""What a pipeline costs AttnRes on two GPUs of one host: tokens per second of PreNorm, naive transfer and cross-stage caching.

    torchrun --nproc-per-node 2 benchmarks/pipeline.py --out OUT
    torchrun --nproc-per-node 2 benchmarks/pipeline.py --device cpu --tiny --out OUT

P = 2 ranks with V = 4 stages each, about a billion parameters, D = 2048; then FSDP2 over the same two. An arm is a whole training
step (forward, backward, clipping, AdamW) through `fathom train`'s own classes. All arms are in one process group and take turns,
A B C A B C, so that what drifts drifts for all; a ratio is taken between steps of one round. Nothing is timed before the
losses of the arms agree (queries start at zero, where AttnRes is PreNorm's equal) and the bytes sent are the formula's.

    OUT/result.json   medians over rounds, in the schema of benchmarks/results/
    OUT/raw.json      every step, the split, bytes, losses
    OUT/speeds.json   of a stage and of the link, measured, for `fathom bench --pipeline --speeds`
    OUT/README.md     the question, the command, the machine and the table; what it shows is for a person to say
"""

import argparse
import datetime
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fathom.errors import UserError
from fathom.models.accounting import parameters, source_counts
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.transformer import Transformer
from fathom.parallel.config import ParallelConfig
from fathom.parallel.plan import describe, make_plan, site_costs
from fathom.parallel.ranks import Ranks
from fathom.parallel.simulate import Speeds
from fathom.parallel.stages import Stage
from fathom.parallel.traffic import formula
from fathom.train.config import DataConfig, OptimConfig, RunConfig
from fathom.train.environment import environment, pick_device
from fathom.train.network import Network, make_network
from fathom.train.ranks import PipelinedNetwork

PIPELINE = ParallelConfig(pp=2, virtual=4)
LAYOUTS = {
    "prenorm": PIPELINE,
    "naive": replace(PIPELINE, cache=False),
    "cached": PIPELINE,
    "fsdp-prenorm": ParallelConfig(dp=2),
    "fsdp": ParallelConfig(dp=2),
}
AGREE = {"float32": 1e-5, "bf16": 2e-3}
"""Largest relative difference of a first loss from PreNorm's."""


def run_config(options: argparse.Namespace, name: str) -> RunConfig:
    if options.tiny:
        model = ModelConfig(vocab_size=64, context=16, dim=16, num_layers=6, num_heads=2, head_std=1.0)
    else:
        model = ModelConfig(
            vocab_size=32_000, context=options.length, dim=2048, num_layers=16, num_heads=16, mlp_dim=5632, head_std=1.0
        )
    rule = ResidualConfig(rule="prenorm") if name.endswith("prenorm") else ResidualConfig(rule="block", num_blocks=8)
    batch = options.micro_batch * options.micro_batches
    return RunConfig(
        model=replace(model, residual=rule), data=DataConfig(batch=batch, micro_batch=options.micro_batch), optim=OptimConfig(),
        parallel=replace(LAYOUTS[name], recompute=options.recompute), device=options.device, compile=options.compile,
        precision="bf16" if options.device == "cuda" else "float32",
    )  # fmt: skip


@dataclass
class Arm:
    name: str
    config: RunConfig
    network: Network

    def step(self, tokens: Tensor, targets: Tensor) -> Tensor:
        pieces = self.network.pieces(0)
        losses = [
            self.network.backward(tokens[p.start : p.stop], targets[p.start : p.stop], 1 / len(pieces)) for p in pieces
        ]
        self.network.clip()
        for optimizer in self.network.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return self.network.total(losses)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()


def seconds(part: Callable[[], Any], device: torch.device) -> float:
    """Until all ranks have done ``part``."""
    synchronize(device)
    begin = time.perf_counter()
    part()
    synchronize(device)
    return time.perf_counter() - begin


def check(arm: Arm, loss: float, reference: float) -> None:
    """``UserError`` if the first loss is not PreNorm's, or the bytes of one step not the formula's."""
    limit = AGREE[arm.config.precision]
    if not abs(loss - reference) <= limit * abs(reference):
        raise UserError(f"{arm.name}: the first loss is {loss}, PreNorm's is {reference}: nothing was timed")
    if not isinstance(arm.network, PipelinedNetwork):
        return
    pipeline, model = arm.network.pipeline, arm.config.model
    size = 2 if arm.config.precision == "bf16" else 4
    expected = formula(
        pipeline.plan, pipeline.micro_batch * model.context * model.dim * size, pipeline.num_micro_batches
    )
    for hop, sent in pipeline.traffic.items():
        if sent != expected[hop]:
            raise UserError(f"{arm.name}: {sent} bytes were sent into stage {hop[0]}, the formula says {expected[hop]}")


def link(device: torch.device, number: int) -> tuple[float, float]:
    """Bytes per second from the first rank to the second, and seconds of a hop of next to nothing."""
    times = {}
    for size in (1, 2**26 if device.type == "cuda" else 2**20):
        block = torch.zeros(size, dtype=torch.uint8, device=device)
        send = (lambda block=block: dist.send(block, 1)) if number == 0 else (lambda block=block: dist.recv(block, 0))
        send()
        times[size] = min(seconds(lambda send=send: [send() for _ in range(20)], device) / 20 for _ in range(3))
    small, large = times.values()
    size = max(times)
    return size / large, small


def stage_speeds(config: RunConfig, device: torch.device) -> tuple[float, float, float, float]:
    """FLOP/s of the second stage of PreNorm forward and backward, and what a read of AttnRes costs for a source, in seconds."""
    found: list[tuple[float, float]] = []
    model = config.model
    for arm in (replace(model, residual=ResidualConfig(rule="prenorm")), model):
        plan = make_plan(model, 2, 4)
        plan = plan if arm is model else replace(plan, starts=())
        stage = Stage(Transformer(arm), replace(plan, cache=False), 1).to(device)
        shape = (config.data.micro_batch or 1, model.context, model.dim)
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        count = replace(plan, cache=False).tensors(1)
        received = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(count)]
        tokens = torch.zeros(shape[:2], dtype=torch.int64, device=device)
        best = [float("inf")] * 2
        for _ in range(6):
            outputs: list[Tensor] = []

            def forward(stage=stage, received=received, tokens=tokens, outputs=outputs) -> None:  # type: ignore[no-untyped-def]
                with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                    outputs.extend(stage(*received, tokens=tokens))

            def backward(outputs=outputs) -> None:  # type: ignore[no-untyped-def]
                torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

            best = [min(best[0], seconds(forward, device)), min(best[1], seconds(backward, device))]
        found.append((best[0], best[1]))
    sites = make_plan(model, 2, 4).sites(1)
    prenorm = site_costs(replace(model, residual=ResidualConfig(rule="prenorm")))
    flops = shape[0] * model.context * sum(prenorm[site] for site in sites)
    sources = sum(source_counts(model)[site] for site in sites)
    (f, b), (block_f, block_b) = found
    return flops / f, 2 * flops / b, max(block_f - f, 0.0) / sources, max(block_b - b, 0.0) / sources


def speeds(config: RunConfig, device: torch.device, number: int) -> Speeds:
    forward, backward, read_forward, read_backward = stage_speeds(config, device)
    bandwidth, latency = link(device, number)
    number_bytes = 2 if config.precision == "bf16" else 4
    size = (config.data.micro_batch or 1) * config.model.context * config.model.dim * number_bytes
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    memory = 2 * size / min(seconds(source.clone, device) for _ in range(5))
    return Speeds(
        forward_flops=forward, backward_flops=backward, memory=memory, read_forward=read_forward * memory / size,
        read_backward=read_backward * memory / size, link=bandwidth, network=bandwidth, latency=latency,
        number_bytes=number_bytes, source=f"{environment(device)['machine']}, measured by benchmarks/pipeline.py",
    )  # fmt: skip


def summarize(case: str, times: dict[str, list[float]], tokens: int, peaks: dict[str, float]) -> list[dict[str, Any]]:
    rows = []
    for name, values in times.items():
        base = times["fsdp-prenorm" if name.startswith("fsdp") else "prenorm"]
        ratio = statistics.median(b / v for b, v in zip(base, values, strict=True))
        rates = [tokens / value for value in values]
        common = {"case": case if not name.startswith("fsdp") else case.replace("p2v4", "fsdp2"), "arm": name}
        rows.append({
            **common, "metric": "tokens_per_s", "unit": "tokens/s", "median": statistics.median(rates), "low": min(rates),
            "high": max(rates), "n": len(rates), "over_prenorm": ratio,
        })  # fmt: skip
        if name in peaks:
            peak = peaks[name]
            rows.append({
                **common, "metric": "peak_gib", "unit": "GiB", "median": peak, "low": peak, "high": peak, "n": 1,
                "over_prenorm": None,
            })  # fmt: skip
    return rows


def readme(result: dict[str, Any], raw: dict[str, Any]) -> str:
    lines = [
        "# Pipelines on two GPUs: PreNorm, naive transfer, cross-stage caching; FSDP2", "",
        "**Question.** What does AttnRes cost a pipelined training step, without and with cross-stage caching?", "",
        f"**Command.** `{result['command']}`. **Machine.** {result['machine']}, torch {result['versions']['torch']}.",
        f"{raw['parameters']:,} parameters, {raw['tokens']:,} tokens a step in {raw['micro_batches']} micro-batches.", "",
        "| arm | tokens/s (low to high) | over PreNorm |", "| --- | --- | --- |",
    ]  # fmt: skip
    for row in result["rows"]:
        if row["metric"] == "tokens_per_s":
            spread = f"{row['median']:,.0f} ({row['low']:,.0f} to {row['high']:,.0f})"
            lines.append(f"| {row['arm']} | {spread} | {row['over_prenorm']:.4f} |")
    return "\n".join(
        [*lines, "", "**Files.** `result.json`, `raw.json` (every step), `speeds.json` (for the simulator).", ""]
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a size that a CPU runs in moments")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--micro-batches", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--arms", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS), help="prenorm is always first"
    )
    parser.add_argument("--compile", default="none", choices=["none", "layers"])
    parser.add_argument("--recompute", default="none", choices=["none", "selective", "full"])
    return parser.parse_args()


def main() -> None:
    options = parse()
    device = pick_device(options.device)
    with Ranks(PIPELINE, device) as pipeline_ranks, Ranks(ParallelConfig(dp=2), device) as fsdp_ranks:
        device = pipeline_ranks.device
        ranks = {2: pipeline_ranks, 1: fsdp_ranks}
        names = [name for name in LAYOUTS if name in {"prenorm", *options.arms}]
        if "fsdp" in names and "fsdp-prenorm" not in names:
            names.insert(names.index("fsdp"), "fsdp-prenorm")
        measured = speeds(run_config(options, "cached"), device, pipeline_ranks.number)
        arms, losses, peaks = [], {}, {}
        for name in names:
            config = run_config(options, name)
            generator = torch.Generator().manual_seed(1)
            rows = torch.randint(
                config.model.vocab_size, (config.data.batch, config.model.context + 1), generator=generator
            )
            tokens, targets = rows[:, :-1].contiguous().to(device), rows[:, 1:].contiguous().to(device)
            arm = Arm(name, config, make_network(Transformer(config.model, seed=0), config, ranks[config.parallel.pp]))
            losses[name] = float(arm.step(tokens, targets))
            check(arm, losses[name], losses["prenorm"])
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                arm.step(tokens, targets)
                # Parameters and AdamW's two moments are there before the step, beside those of the other arms.
                own = sum(p.nbytes for _, p in arm.network.named_parameters())
                peaks[name] = (torch.cuda.max_memory_allocated(device) - before + 3 * own) / 2**30
            arms.append(arm)
        times: dict[str, list[float]] = {name: [] for name in names}
        for number in range(options.rounds + 1):
            for arm in arms:
                took = seconds(lambda arm=arm: arm.step(tokens, targets), device)
                if number:
                    times[arm.name].append(took)
        if pipeline_ranks.first:
            write(options, times, tokens.numel(), peaks, losses, measured, device)


def write(
    options: argparse.Namespace,
    times: dict[str, list[float]],
    tokens: int,
    peaks: dict[str, float],
    losses: dict[str, float],
    measured: Speeds,
    device: torch.device,
) -> None:
    config = run_config(options, "cached")
    plan = make_plan(config.model, 2, 4)
    case = f"pipeline-p2v4-d{config.model.dim}"
    flags = "".join(f" --{key} {value}" for key, value in (("device", options.device),) if value != "cuda")
    result = {
        "name": "pipeline", "date": datetime.date.today().isoformat(),
        "command": f"torchrun --nproc-per-node 2 benchmarks/pipeline.py{flags}{' --tiny' if options.tiny else ''} --out OUT",
        "machine": f"2 x {environment(device)['machine']}", "versions": environment(device),
        "rows": summarize(case, times, tokens, peaks),
    }  # fmt: skip
    raw = {
        "parameters": sum(parameters(config.model).values()), "tokens": tokens, "micro_batches": options.micro_batches,
        "options": {key: str(value) for key, value in vars(options).items() if key != "out"},
        "split": describe(plan, config.model), "losses": losses, "seconds": times,
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    for name, value in (("result", result), ("raw", raw), ("speeds", vars(measured))):
        (options.out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
    (options.out / "README.md").write_text(readme(result, raw))
    print((options.out / "README.md").read_text())


if __name__ == "__main__":
    main()
