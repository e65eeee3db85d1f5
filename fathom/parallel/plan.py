"""How a pipeline cuts a network into stages, and which tensors each hop between two stages carries.

C = P V stages lie on P ranks in a loop: stage s on rank s mod P. A stage runs a range of sites. Cuts fall where the costs
balance, between any two sublayers, so an AttnRes block may *straddle* stages. What a stage needs is the state of the stream:
the sources finished so far, and the partial sum if its first site is inside a block. With the cache a rank keeps every source
that it was given or made for a micro-batch, until the micro-batch ends, and the hop into stage s carries what its rank lacks:

    hop(s) = m_s - m_{s-P+1} + p_s   tensors    m_s: sources finished before stage s    p_s: 1 inside a block, else 0

with m_{s-P+1} = 0 for s < P, where the rank has run no stage yet. m_{s-P+1} is what the rank's previous stage, s - P, *ended*
with: what the rank made itself is never sent back to it. Without the cache the hop carries m_s + p_s. docs/parallel.md
derives Eq. 7 and 8 of arXiv 2603.15031 from this.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from fathom.block import block_starts
from fathom.errors import UserError
from fathom.models.accounting import flops_per_token, source_counts
from fathom.models.config import ModelConfig
from fathom.models.kimi_config import KimiConfig
from fathom.models.kimi_counts import site_flops
from fathom.residuals import RECOMMENDED_BLOCKS

SLACK = 0.02
"""By how much the dearest stage may cost more where a cut at the start of a block is then to be had."""


def site_costs(config: ModelConfig) -> list[float]:
    """Forward FLOPs per token of each sublayer with its read; the last one's includes the output read and the head."""
    flops = flops_per_token(config, config.context)
    if isinstance(config, KimiConfig):
        sublayers = site_flops(config, config.context)
    else:
        attention = flops["attention matrices"] + flops["attention scores"]
        sublayers = [attention / config.num_layers, flops["mlp"] / config.num_layers] * config.num_layers
    reads = [0.0 if config.residual.rule == "prenorm" else 6.0 * config.dim * n for n in source_counts(config)]
    costs = [sublayer + read for sublayer, read in zip(sublayers, reads[:-1], strict=True)]
    costs[-1] += reads[-1] + flops["head"]
    return costs


def split(costs: Sequence[float], num_stages: int, starts: Collection[int] = ()) -> tuple[int, ...]:
    """The first site of each of ``num_stages`` stages: the dearest is as cheap as can be, give or take ``SLACK``.

    Of such splits the one with the fewest cuts beside ``starts``, if there are any: a cut inside a block sends a partial sum and
    sweeps the bank once more. Then the one whose costs' sum of squares is least.
    """
    count = len(costs)
    if not 1 <= num_stages <= count:
        raise UserError(f"{num_stages} stages cannot be cut from {count} sublayers: a stage needs at least one")
    total = [0.0, *accumulate(costs)]
    dearest = total[1:]
    for stage in range(1, num_stages):
        dearest = [
            min((max(dearest[first - 1], total[end] - total[first]) for first in range(stage, end)), default=math.inf)
            for end in range(1, count + 1)
        ]
    most = dearest[-1] * (1 + SLACK if starts else 1 + 1e-12)
    # best[end]: (cuts inside blocks, sum of squares, firsts) of the stages so far when they end before site `end`.
    worst: tuple[int, float, tuple[int, ...]] = (count, math.inf, ())
    best = [worst] + [(0, total[end] ** 2, (0,)) if total[end] <= most else worst for end in range(1, count + 1)]
    for stage in range(1, num_stages):
        longer = [worst] * (count + 1)
        for end in range(stage + 1, count + 1):
            for first in range(stage, end):
                cost = total[end] - total[first]
                if cost <= most and best[first] != worst:
                    inside, squares, firsts = best[first]
                    inside += bool(starts) and first not in starts
                    longer[end] = min(longer[end], (inside, squares + cost**2, (*firsts, first)))
        best = longer
    return best[count][2]


def stream_starts(config: ModelConfig) -> tuple[int, ...]:
    """The first site of each block; empty for PreNorm, whose state is one sum. Full AttnRes has blocks of one sublayer."""
    residual = config.residual
    if residual.rule == "prenorm":
        return ()
    if residual.rule == "full":
        return tuple(range(config.num_sublayers))
    if residual.rule != "block":
        raise UserError(f"residual.rule {residual.rule} has no pipeline: prenorm, full and block have one")
    count, size = residual.num_blocks, residual.block_size
    if count is None and size is None:
        count = min(RECOMMENDED_BLOCKS, config.num_sublayers)
    return tuple(block_starts(config.num_sublayers, num_blocks=count, block_size=size))


@dataclass(frozen=True)
class Plan:
    """Which sites every stage runs, and what every hop carries."""

    num_sublayers: int
    """L."""
    starts: tuple[int, ...]
    """The first site of each block; empty where the stream is one sum."""
    firsts: tuple[int, ...]
    """The first site of each stage."""
    num_ranks: int
    """P."""
    cache: bool = True
    """Keep sources on the ranks that have seen them."""

    def __post_init__(self) -> None:
        if len(self.firsts) % self.num_ranks:
            raise UserError(f"{len(self.firsts)} stages do not lie evenly on {self.num_ranks} ranks")
        bounds = (*self.firsts, self.num_sublayers)
        if bounds[0] != 0 or any(a >= b for a, b in pairwise(bounds)):
            raise UserError(
                f"stages begin at sites {list(self.firsts)}: they must rise from 0 to below {self.num_sublayers}"
            )

    @property
    def num_stages(self) -> int:
        """C = P V."""
        return len(self.firsts)

    def sites(self, stage: int) -> range:
        """The sites that ``stage`` runs."""
        return range(self.firsts[stage], (*self.firsts, self.num_sublayers)[stage + 1])

    def finished(self, stage: int) -> int:
        """m_s: the sources finished before ``stage``, the embedding with them; ``num_stages`` asks after the last."""
        if not self.starts or stage == 0:
            return 0
        site = self.num_sublayers if stage == self.num_stages else self.firsts[stage]
        return 1 + sum(end <= site for end in (*self.starts[1:], self.num_sublayers))

    def inside(self, stage: int) -> bool:
        """p_s: whether a partial sum is handed to ``stage``."""
        return stage > 0 and self.firsts[stage] not in self.starts

    def held(self, stage: int) -> int:
        """The sources that the rank of ``stage`` holds when the hop into it comes: always the oldest ones."""
        return self.finished(stage - self.num_ranks + 1) if self.cache and stage >= self.num_ranks else 0

    def carried(self, stage: int) -> range:
        """The sources that the hop into ``stage`` carries, a partial sum not counted."""
        return range(self.held(stage), self.finished(stage))

    def tensors(self, stage: int) -> int:
        """How many tensors the hop into ``stage`` carries; as many gradients go back."""
        return len(self.carried(stage)) + self.inside(stage)

    def keeps(self, stage: int) -> bool:
        """Whether a later stage of the same rank will want the sources of ``stage``."""
        return self.cache and bool(self.starts) and stage + self.num_ranks < self.num_stages


def make_plan(
    config: ModelConfig, num_ranks: int, num_virtual: int, *, cache: bool = True, firsts: Sequence[int] | None = None
) -> Plan:
    """The plan of ``config`` on P ranks with V stages each; ``firsts`` instead of the cuts that balance the costs."""
    if num_ranks < 2:
        raise UserError(f"pp is {num_ranks}: a pipeline needs at least two ranks")
    if num_virtual < 1:
        raise UserError(f"virtual is {num_virtual}: a rank needs at least one stage")
    starts = stream_starts(config)
    cuts = tuple(firsts) if firsts is not None else split(site_costs(config), num_ranks * num_virtual, starts)
    return Plan(config.num_sublayers, starts, cuts, num_ranks, cache)


def whole(config: ModelConfig) -> Plan:
    """No cut: one stage on one rank."""
    return Plan(config.num_sublayers, stream_starts(config), (0,), 1)


def describe(plan: Plan, config: ModelConfig) -> list[list[str]]:
    """The split as a table, header first: a row a stage."""
    costs = site_costs(config)
    mean = sum(costs) / plan.num_stages
    rows = [["stage", "rank", "sublayers", "cost / mean", "starts inside a block", "receives"]]
    for stage in range(plan.num_stages):
        sites = plan.sites(stage)
        new = [f"b{n}" for n in plan.carried(stage)] + (["partial sum"] if plan.inside(stage) else [])
        rows.append([
            str(stage), str(stage % plan.num_ranks), f"{sites.start}-{sites.stop - 1}",
            f"{sum(costs[site] for site in sites) / mean:.2f}", "yes" if plan.inside(stage) and plan.starts else "no",
            " ".join(new) or ("tokens" if stage == 0 else "-"),
        ])  # fmt: skip
    return rows
