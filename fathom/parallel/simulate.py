"""How long a step of a pipeline takes, from the speeds of one device and of the links between them.

Every rank runs its stages in the order of interleaved 1F1B, as ``torch.distributed.pipelining`` does. A pass starts when its
rank is free and its input is there. A hop starts when its pass has ended and the hop before it on the same link has; ranks do
not wait for what they send. What the model leaves out: launches, gathering of parameters, the optimizer, and that a transfer
slows down the arithmetic beside it.
"""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from fathom.models.accounting import source_counts
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.parallel.plan import Plan, make_plan, site_costs

MEASURED = "an H100 (benchmarks/results/2026-11-22_residual-path, model-d2048); the links are data-sheet values"


@dataclass(frozen=True)
class Speeds:
    """Of one rank and its links; the defaults are measured ones where there are any."""

    forward_flops: float = 581e12
    """FLOP/s of the sublayers' forward pass."""
    backward_flops: float = 472e12
    """The same of the backward pass, which has twice the arithmetic."""
    memory: float = 3.03e12
    """Bytes/s that a copy reads and writes together."""
    read_forward: float = 0.76
    """What a read costs for each source, in passes over it at that speed."""
    read_backward: float = 2.28
    """The same of the backward pass."""
    link: float = 450e9
    """Bytes/s from a rank to the next on its host, one way."""
    network: float = 50e9
    """The same between hosts."""
    latency: float = 1e-5
    """Seconds that a hop takes besides."""
    ranks_per_host: int = 8
    number_bytes: int = 2
    """Bytes of a number of the stream."""
    source: str = MEASURED
    """Where these are from."""


class Pass(NamedTuple):
    stage: int
    forward: bool
    micro_batch: int


def order(rank: int, num_ranks: int, num_virtual: int, num_micro_batches: int) -> list[Pass]:
    """What ``rank`` runs in a step of 1F1B, interleaved where V > 1 (arXiv 2104.04473)."""
    a_round = num_micro_batches // max(1, num_micro_batches // num_ranks)
    total = num_micro_batches * num_virtual
    warm_up = 2 * (num_ranks - 1 - rank) + (num_virtual - 1) * a_round if num_virtual > 1 else num_ranks - 1 - rank
    warm_up = min(warm_up, total)
    counts: dict[tuple[int, bool], int] = defaultdict(int)

    def make(number: int, forward: bool) -> Pass:
        virtual = number // a_round % num_virtual if num_virtual > 1 else 0
        stage = rank + num_ranks * (virtual if forward else num_virtual - 1 - virtual)
        counts[stage, forward] += 1
        return Pass(stage, forward, counts[stage, forward] - 1)

    passes = [make(number, True) for number in range(warm_up)]
    for number in range(total - warm_up):
        passes += [make(warm_up + number, True), make(number, False)]
    return passes + [make(number, False) for number in range(total - warm_up, total)]


def _seconds(plan: Plan, config: ModelConfig, tokens: int, speeds: Speeds) -> dict[tuple[int, bool], float]:
    """Of a pass of one micro-batch through each stage, forward and backward."""
    prenorm = replace(config, residual=ResidualConfig(rule="prenorm"))
    matrices, sources = site_costs(prenorm), [0] * config.num_sublayers
    if config.residual.rule != "prenorm":
        counts = source_counts(config)
        sources = [*counts[:-2], counts[-2] + counts[-1]]
    touch = tokens * config.dim * speeds.number_bytes / speeds.memory
    found = {}
    for stage in range(plan.num_stages):
        flops = tokens * sum(matrices[site] for site in plan.sites(stage))
        reads = touch * sum(sources[site] for site in plan.sites(stage))
        found[stage, True] = flops / speeds.forward_flops + reads * speeds.read_forward
        found[stage, False] = 2 * flops / speeds.backward_flops + reads * speeds.read_backward
    return found


def step(
    plan: Plan, config: ModelConfig, *, num_micro_batches: int, micro_batch: int, speeds: Speeds
) -> dict[str, Any]:
    """A simulated step; see ``run``."""
    tokens = micro_batch * config.context
    seconds = _seconds(plan, config, tokens, speeds)
    return run(plan, seconds, tokens * config.dim * speeds.number_bytes, num_micro_batches, speeds)


def run(
    plan: Plan, seconds: dict[tuple[int, bool], float], tensor_bytes: int, num_micro_batches: int, speeds: Speeds
) -> dict[str, Any]:
    """``seconds`` of a step; ``busy``, the share in which the mean rank computes; bytes ``sent`` into each stage, both ways.

    The argument ``seconds`` has those of each stage's passes of one micro-batch, forward (True) and backward.
    """
    p = plan.num_ranks
    waiting = [order(rank, p, plan.num_stages // p, num_micro_batches)[::-1] for rank in range(p)]
    arrival: dict[Pass, float] = {}
    """When a pass has its input; the last stage's backward pass has it from its own forward pass."""
    free, busy, left = [0.0] * p, 0.0, sum(map(len, waiting))
    links: dict[tuple[int, int], float] = defaultdict(float)
    sent: dict[int, int] = defaultdict(int)
    while left:
        before = left
        for rank in range(p):
            while waiting[rank]:
                this = waiting[rank][-1]
                if this not in arrival and (this.stage > 0 or not this.forward):
                    break
                waiting[rank].pop()
                left -= 1
                cost = seconds[this.stage, this.forward]
                free[rank] = max(free[rank], arrival.get(this, 0.0)) + cost
                busy += cost
                following = this.stage + (1 if this.forward else -1)
                if following == plan.num_stages:
                    arrival[this._replace(forward=False)] = free[rank]
                elif following >= 0:
                    hop, to = max(this.stage, following), following % p
                    size = tensor_bytes * plan.tensors(hop)
                    sent[hop] += size
                    same_host = rank // speeds.ranks_per_host == to // speeds.ranks_per_host
                    begin = max(links[rank, to], free[rank])
                    links[rank, to] = begin + size / (speeds.link if same_host else speeds.network)
                    arrival[this._replace(stage=following)] = links[rank, to] + speeds.latency
        assert left < before, "the order of the passes does not fit their inputs"
    return {"seconds": max(free), "busy": busy / p / max(free), "sent": dict(sent)}


def arms(config: ModelConfig, num_ranks: int, num_virtual: int) -> dict[str, tuple[Plan, ModelConfig]]:
    """PreNorm, and the rule of ``config`` with naive transfer and cached, each cut by its own costs."""
    prenorm = replace(config, residual=ResidualConfig(rule="prenorm"))
    plan = make_plan(config, num_ranks, num_virtual)
    return {
        "prenorm": (make_plan(prenorm, num_ranks, num_virtual), prenorm),
        "naive": (replace(plan, cache=False), config),
        "cached": (plan, config),
    }


def table(
    config: ModelConfig,
    num_ranks: int,
    num_virtual: int,
    *,
    micro_batches_per_rank: int,
    micro_batch: int,
    speeds: Speeds,
) -> list[dict[str, Any]]:
    """A row for P = 2, 4, ... up to ``num_ranks``: milliseconds of a step of each arm, and its bubble."""
    rows = []
    sizes = [size for k in range(1, num_ranks.bit_length()) if (size := 2**k) < num_ranks]
    for size in [*sizes, num_ranks]:
        count = micro_batches_per_rank * size
        row: dict[str, Any] = {"ranks": size, "micro_batches": count}
        for name, (plan, arm) in arms(config, size, num_virtual).items():
            found = step(plan, arm, num_micro_batches=count, micro_batch=micro_batch, speeds=speeds)
            row[name] = {"ms": 1e3 * found["seconds"], "busy": found["busy"], "bytes": sum(found["sent"].values())}
        rows.append(row)
    return rows
