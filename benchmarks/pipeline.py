"""What AttnRes costs on two GPUs of one host: in a pipeline, naive and cached, under FSDP2, and where both share each sublayer.

    torchrun --nproc-per-node 2 benchmarks/pipeline.py --out OUT
    torchrun --nproc-per-node 2 benchmarks/pipeline.py --device cpu --tiny --out OUT

P = 2 ranks with V = 4 stages each, about a billion parameters, D = 2048; then FSDP2 over the same two, then both at each sublayer
(tensor and sequence parallelism). An arm is a whole training step (forward, backward, clipping, AdamW) through `fathom train`'s
own classes. All arms are in one process group, and those of a group take turns, A B C A B C, so that what drifts drifts for
all; a ratio is taken between steps of one round. An arm is not timed before its loss is PreNorm's (queries start at zero, where
AttnRes is its equal) and the bytes it sends over hops are the formula's. All files are written again after every round: what was
measured survives what fails later.

    OUT/result.json   medians over rounds, in the schema of benchmarks/results/
    OUT/raw.json      every step, the split, losses, what was left out and why
    OUT/speeds.json   of a stage and of the link, measured, for `fathom bench --pipeline --speeds`
    OUT/README.md     the question, the command, the machine and the table; what it shows is for a person to say
"""

import argparse
import datetime
import gc
import json
import shlex
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pipeline_speeds import build, seconds, speeds
from torch import Tensor
from torch.distributed.tensor import DTensor

from fathom.models.accounting import parameters
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.transformer import Transformer
from fathom.parallel.config import ParallelConfig
from fathom.parallel.plan import describe, make_plan
from fathom.parallel.ranks import Ranks
from fathom.parallel.simulate import Speeds
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
    "tp-prenorm": ParallelConfig(tp=2),
    "tp": ParallelConfig(tp=2),
}
GROUPS = {"p2v4": ("prenorm", "naive", "cached"), "fsdp2": ("fsdp-prenorm", "fsdp"), "tp2": ("tp-prenorm", "tp")}
"""Arms that take turns, by the name of their case; PreNorm is the first of each."""
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
        model=replace(model, residual=rule), data=DataConfig(batch=batch, micro_batch=options.micro_batch),
        optim=OptimConfig(lr=1e-4),  # the batch is always the same random one: at the usual rate its loss may explode
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

    def wrong(self, loss: float, reference: float) -> str | None:
        """What is not as it must be after one step: the first loss is PreNorm's, the bytes are the formula's."""
        if not abs(loss - reference) <= AGREE[self.config.precision] * abs(reference):
            return f"{self.name}: the first loss is {loss}, PreNorm's is {reference}"
        if not isinstance(self.network, PipelinedNetwork):
            return None
        pipeline, model = self.network.pipeline, self.config.model
        size = 2 if self.config.precision == "bf16" else 4
        expected = formula(
            pipeline.plan, pipeline.micro_batch * model.context * model.dim * size, pipeline.num_micro_batches
        )
        wrong = {hop: sent for hop, sent in pipeline.traffic.items() if sent != expected[hop]}
        return f"{self.name}: {wrong} bytes were sent, the formula says {expected}" if wrong else None

    def peak(self, tokens: Tensor, targets: Tensor) -> float:
        """GiB that a step needs at most, on this rank: parameters, AdamW's two moments, and what comes and goes."""
        device = tokens.device
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self.step(tokens, targets)
        parameters = (p for _, p in self.network.named_parameters())
        own = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in parameters)
        return (torch.cuda.max_memory_allocated(device) - before + 3 * own) / 2**30


@dataclass
class Found:
    """What has been measured so far."""

    rounds: list[dict[str, float]] = field(default_factory=list)
    """Seconds of a step by arm; the first rounds of a group have fewer arms."""
    losses: dict[str, float] = field(default_factory=dict)
    """Of the first step."""
    peaks: dict[str, float] = field(default_factory=dict)
    """GiB, of rank 0."""
    left_out: list[str] = field(default_factory=list)
    speeds: Speeds | None = None


def summarize(dim: int, found: Found, tokens: int) -> list[dict[str, Any]]:
    rows = []
    for layout, (base, *others) in GROUPS.items():
        for name in (base, *others):
            # Those with most arms, in turns; fewer where a later arm failed.
            mine = [took for took in found.rounds if name in took]
            most = max(map(len, mine), default=0)
            mine = [took for took in mine if len(took) == most]
            if not mine:
                continue
            rates = [tokens / took[name] for took in mine]
            common = {"case": f"pipeline-{layout}-d{dim}", "arm": name}
            rows.append({
                **common, "metric": "tokens_per_s", "unit": "tokens/s", "median": statistics.median(rates), "low": min(rates),
                "high": max(rates), "n": len(rates), "over_prenorm": statistics.median(t[base] / t[name] for t in mine),
            })  # fmt: skip
            if peak := found.peaks.get(name):
                rows.append({
                    **common, "metric": "peak_gib", "unit": "GiB", "median": peak, "low": peak, "high": peak, "n": 1,
                    "over_prenorm": None,
                })  # fmt: skip
    return rows


def readme(result: dict[str, Any], raw: dict[str, Any]) -> str:
    lines = [
        "# Two GPUs: pipelines with naive transfer and cross-stage caching; FSDP2; shared sublayers", "",
        "**Question.** What does AttnRes cost a training step on two GPUs: in a pipeline without and with cross-stage caching, "
        "under FSDP2, and where both share every sublayer?", "",
        f"**Command.** `{result['command']}`. **Machine.** {result['machine']}, torch {result['versions']['torch']}.",
        f"{raw['parameters']:,} parameters, {raw['tokens']:,} tokens a step in {raw['micro_batches']} micro-batches.", "",
        "| arm | tokens/s (low to high) | over PreNorm |", "| --- | --- | --- |",
    ]  # fmt: skip
    for row in result["rows"]:
        if row["metric"] == "tokens_per_s":
            spread = f"{row['median']:,.0f} ({row['low']:,.0f} to {row['high']:,.0f})"
            lines.append(f"| {row['arm']} | {spread} | {row['over_prenorm']:.4f} |")
    lines += ["", *(f"Left out: {what}." for what in raw["left_out"])]
    return "\n".join(
        [*lines, "**Files.** `result.json`, `raw.json` (every step), `speeds.json` (for the simulator).", ""]
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
    parser.add_argument(
        "--time-budget",
        type=float,
        metavar="SECONDS",
        help="begin no arm and no round after this, counted from the start",
    )
    return parser.parse_args()


def axes(parallel: ParallelConfig) -> tuple[int, int, int]:
    return parallel.pp, parallel.dp, parallel.tp


class Session:
    """A run of this script on one of the two ranks."""

    def __init__(self, options: argparse.Namespace, ranks: dict[tuple[int, int, int], Ranks]) -> None:
        self.options, self.ranks, self.begin = options, ranks, time.perf_counter()
        any_of_them = next(iter(ranks.values()))
        self.device, self.first, self.number = any_of_them.device, any_of_them.first, any_of_them.number
        self.agreed, self.any = any_of_them.agreed, any_of_them.any
        self.found = Found()
        config = run_config(options, "prenorm")
        rows = torch.randint(
            config.model.vocab_size, (config.data.batch, config.model.context + 1),
            generator=torch.Generator().manual_seed(1),
        )  # fmt: skip
        self.tokens, self.targets = (part.contiguous().to(self.device) for part in (rows[:, :-1], rows[:, 1:]))
        self.weights = Transformer(config.model, seed=0)
        self.say("weights drawn")

    def say(self, what: str) -> None:
        if self.first:
            print(f"{time.perf_counter() - self.begin:6.1f} s  {what}", file=sys.stderr, flush=True)

    def over(self, what: str) -> bool:
        """Whether the time is up, on any rank; ``what`` is then left out."""
        spent = time.perf_counter() - self.begin
        if not self.any(spent > (self.options.time_budget or float("inf"))):
            return False
        self.found.left_out.append(f"{what}: the time was up")
        return True

    def begin_arm(self, name: str) -> Arm | None:
        """The arm, warmed up by two steps; None if it is wrong."""
        config = run_config(self.options, name)
        ranks = self.ranks[axes(config.parallel)]
        arm = Arm(name, config, make_network(build(self.weights, config.model), config, ranks))
        loss = self.found.losses[name] = float(arm.step(self.tokens, self.targets))
        if problem := self.agreed(arm.wrong(loss, self.found.losses["prenorm"])):
            self.found.left_out.append(problem)
            self.say(problem)
            return None
        if self.device.type == "cuda":
            self.found.peaks[name] = arm.peak(self.tokens, self.targets)
        else:
            arm.step(self.tokens, self.targets)
        self.say(f"{name}: ready")
        return arm

    def round(self, arms: list[Arm]) -> None:
        took = {arm.name: seconds(partial(arm.step, self.tokens, self.targets), self.device) for arm in arms}
        self.found.rounds.append(took)
        self.say("  ".join(f"{name} {value:.3f} s" for name, value in took.items()))
        self.write()

    def group(self, names: list[str]) -> None:
        arms: list[Arm] = []
        for name in names:
            if self.over(name):
                break
            if arm := self.begin_arm(name):
                arms.append(arm)
                self.round(arms)
        for number in range(1, self.options.rounds) if arms else ():
            if self.over(f"{self.options.rounds - number} rounds of {', '.join(arm.name for arm in arms)}"):
                break
            self.round(arms)

    def write(self) -> None:
        if not self.first:
            return
        options, found = self.options, self.found
        config = run_config(options, "cached")
        words = list(sys.argv[1:])
        words[words.index("--out") + 1] = "OUT"
        versions = environment(self.device)
        result = {
            "name": "pipeline", "date": datetime.date.today().isoformat(),
            "command": f"torchrun --nproc-per-node 2 benchmarks/pipeline.py {shlex.join(words)}",
            "machine": f"2 x {versions['machine']}", "versions": versions,
            "rows": summarize(config.model.dim, found, self.tokens.numel()),
        }  # fmt: skip
        raw = {
            "parameters": sum(parameters(config.model).values()), "tokens": self.tokens.numel(),
            "micro_batches": options.micro_batches, "options": {k: str(v) for k, v in vars(options).items() if k != "out"},
            "split": describe(make_plan(config.model, 2, 4), config.model), "losses": found.losses, "rounds": found.rounds,
            "left_out": found.left_out,
        }  # fmt: skip
        options.out.mkdir(parents=True, exist_ok=True)
        for name, value in (("result", result), ("raw", raw), ("speeds", found.speeds and vars(found.speeds))):
            if value is not None:
                (options.out / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
        (options.out / "README.md").write_text(readme(result, raw))


def main() -> None:
    options = parse()
    device = pick_device(options.device)
    with ExitStack() as stack:
        layouts = {axes(parallel): parallel for parallel in LAYOUTS.values()}
        session = Session(
            options, {key: stack.enter_context(Ranks(parallel, device)) for key, parallel in layouts.items()}
        )
        for base, *others in GROUPS.values():
            chosen = [name for name in others if name in options.arms]
            if chosen or base in options.arms or base == "prenorm":
                session.group([base, *chosen])
            gc.collect()  # an arm's autograd graphs and hooks refer to one another
            if base == "prenorm" and not session.over("speeds"):
                session.found.speeds = speeds(
                    session.weights, run_config(options, "cached"), session.device, session.number
                )
                session.say("speeds measured")
                session.write()
        session.write()
        if session.first:
            print((options.out / "README.md").read_text())


if __name__ == "__main__":
    main()
