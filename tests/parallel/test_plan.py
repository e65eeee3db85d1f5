"""Plans: cuts by cost, what hops carry, the paper's counts, and what is refused."""

from dataclasses import replace
from itertools import combinations, pairwise

import pytest

from fathom.errors import UserError
from fathom.models.accounting import flops_per_token
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.parallel.config import check_schedule
from fathom.parallel.plan import SLACK, Plan, describe, make_plan, site_costs, split


def even(ranks: int, virtual: int, per_stage: int, *, cache: bool = True) -> Plan:
    """Blocks of one sublayer, ``per_stage`` of them in each stage: N_p of Eq. 7-8."""
    sites = ranks * virtual * per_stage
    return Plan(sites, tuple(range(sites)), tuple(range(0, sites, per_stage)), ranks, cache)


def total(plan: Plan) -> int:
    """Sources in all hops, the embedding not counted, as the paper does not."""
    return sum(len([n for n in plan.carried(stage) if n]) for stage in range(plan.num_stages))


@pytest.mark.parametrize(("p", "v", "n"), [(2, 1, 1), (2, 2, 3), (4, 2, 1), (4, 3, 2), (8, 4, 1)])
def test_equations_7_and_8(p: int, v: int, n: int) -> None:
    c = p * v
    assert total(even(p, v, n, cache=False)) == c * (c - 1) // 2 * n
    paper = p * (p - 1) // 2 * n + (v - 1) * p**2 * n
    own = (
        (v - 1) * p * n
    )  # each hop of Eq. 8 into a later virtual stage sends the rank the n blocks that it made itself
    assert total(even(p, v, n)) == paper - own
    assert max(len(even(p, v, n).carried(s)) for s in range(c)) == 1 + (p - 1) * n


def test_figure_3() -> None:
    plan = Plan(8, (0, 2, 4, 6), tuple(range(8)), 4)
    carried = [list(plan.carried(stage)) for stage in range(8)]
    # The figure sends b1 to rank 1 and b2 to rank 3 once more, who made them.
    assert carried == [[], [0], [0, 1], [0, 1], [1, 2], [2], [2, 3], [3]]
    assert [plan.inside(stage) for stage in range(8)] == [False, True] * 4
    naive = Plan(8, (0, 2, 4, 6), tuple(range(8)), 4, cache=False)
    assert sum(len(naive.carried(stage)) for stage in range(4, 8)) == 14


def test_one_virtual_stage_has_nothing_to_cache() -> None:
    assert [even(4, 1, 2).carried(s) for s in range(4)] == [even(4, 1, 2, cache=False).carried(s) for s in range(4)]


@pytest.mark.parametrize("costs", [[1.0] * 7, [1.0, 2.0, 1.0, 5.0, 1.0, 1.0, 4.0, 2.0], [9.0, 1.0, 1.0, 1.0]])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_split_is_the_best_there_is(costs: list[float], stages: int) -> None:
    def dearest(firsts: tuple[int, ...]) -> float:
        return max(sum(costs[a:b]) for a, b in pairwise((*firsts, len(costs))))

    every = [(0, *cut) for cut in combinations(range(1, len(costs)), stages - 1)]
    least = min(dearest(firsts) for firsts in every)
    assert dearest(split(costs, stages)) == least
    starts = (0, 2, 4)
    near = [firsts for firsts in every if dearest(firsts) <= (1 + SLACK) * least]
    beside = {firsts: sum(first not in starts for first in firsts) for firsts in near}
    assert beside[split(costs, stages, starts)] == min(beside.values()), "cuts at blocks where they cost nothing"


def test_split_of_equal_costs_is_even() -> None:
    sizes = [b - a for a, b in pairwise((*split([1.0] * 10, 4), 10))]
    assert sorted(sizes) == [2, 2, 3, 3]


def test_costs_are_the_flops_of_the_accounting() -> None:
    config = ModelConfig(dim=32, num_layers=6)
    assert sum(site_costs(config)) == pytest.approx(sum(flops_per_token(config, config.context).values()))


def test_the_head_is_weighed() -> None:
    config = ModelConfig(vocab_size=50_000, dim=64, num_layers=8)
    plan = make_plan(config, 2, 2)
    assert len(plan.sites(3)) == 2, "a whole block: a sublayer more than PreNorm's"
    assert len(make_plan(replace(config, residual=ResidualConfig(rule="prenorm")), 2, 2).sites(3)) == 1
    rows = describe(plan, config)
    assert len(rows) == 5 and rows[1][-1] == "tokens"


def test_refused() -> None:
    config = ModelConfig(num_layers=3)
    with pytest.raises(UserError, match="8 stages cannot be cut from 6 sublayers"):
        make_plan(config, 4, 2)
    with pytest.raises(UserError, match="at least two ranks"):
        make_plan(config, 1, 2)
    with pytest.raises(UserError, match="virtual is 0"):
        make_plan(config, 2, 0)
    with pytest.raises(UserError, match="do not lie evenly on 2 ranks"):
        make_plan(config, 2, 1, firsts=(0, 2, 3))
    with pytest.raises(UserError, match="must rise from 0"):
        make_plan(config, 2, 1, firsts=(0, 6))
    with pytest.raises(UserError, match="delta has no pipeline"):
        make_plan(ModelConfig(residual=ResidualConfig(rule="delta")), 2, 1)


@pytest.mark.parametrize("schedule", ["interleaved_zero_bubble", "zbv", "dualpipev"])
def test_schedules_with_a_split_backward_pass_are_refused(schedule: str) -> None:
    with pytest.raises(UserError, match="cannot be cached: it puts off"):
        check_schedule(schedule, 2)


def test_schedules_by_name() -> None:
    with pytest.raises(UserError, match="must be one of 1f1b, gpipe, looped_bfs"):
        check_schedule("zigzag", 1)
    with pytest.raises(UserError, match="runs one stage a rank"):
        check_schedule("gpipe", 2)
    check_schedule("1f1b", 3)
