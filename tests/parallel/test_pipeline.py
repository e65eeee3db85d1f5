"""Pipelines on gloo: every case of cases.py in real processes, against one process on the same global batch, in float64."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fathom.models.transformer import Transformer
from fathom.parallel.plan import Plan, make_plan
from fathom.parallel.plan import whole as whole_network
from fathom.parallel.stages import Stage
from tests.parallel.cases import CASES, LENGTH, MICRO_BATCH, MICRO_BATCHES, Case, batch, network
from tests.parallel.conftest import Ranks
from tests.parallel.worker import kept

pytestmark = pytest.mark.dist
TOLERANCE = 1e-10
TENSOR = MICRO_BATCH * LENGTH * 8 * 8
"""Bytes of one source of one micro-batch: D = 8 in float64."""


def plan_of(case: Case) -> Plan:
    return make_plan(case.config(), case.pp, case.virtual, cache=case.cache, firsts=case.firsts)


def control(case: Case) -> tuple[Tensor, Transformer]:
    model = network(case)
    loss = model.loss(*batch(case))
    loss.backward()
    return loss.detach(), model


def pipeline_ranks(case: Case, ranks: Ranks) -> Ranks:
    """One of each stage, of the first pipeline."""
    return ranks[: case.pp * case.tp : case.tp]


def whole(plan: Plan, ranks: Ranks, step: int) -> dict[str, Tensor]:
    """The gradients of all stages under the whole model's names; the stream's rows are put together again."""
    found: dict[str, Tensor] = {}
    rows: dict[str, dict[int, Tensor]] = {}
    for rank in ranks:
        for (stage, name), gradient in rank["steps"][step][1].items():
            assert gradient is not None, f"stage {stage}: {name} has no gradient"
            if name.startswith("stream."):
                rows.setdefault(name, {})[stage] = gradient
            else:
                assert name not in found, f"{name} is on two stages"
                found[name] = gradient
    return found | {name: torch.cat([by[s] for s in range(plan.num_stages)]) for name, by in rows.items()}


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name: str, results: Callable[[str], Ranks]) -> None:
    case, ranks = CASES[name], results(name)
    loss, model = control(case)
    names = {key for key, _ in model.named_parameters()}
    for step in range(2):  # a second step, because the first must leave nothing behind
        for rank in ranks:
            assert abs(rank["steps"][step][0] - loss) <= TOLERANCE * abs(loss)
        for first, second in pairwise(ranks[: case.tp]):
            assert all(
                torch.equal(gradient, second["steps"][step][1][key])
                for key, gradient in first["steps"][step][1].items()
            )
        if case.pp == 1:
            gradients = {key: gradient for (_, key), gradient in ranks[0]["steps"][step][1].items()}
        else:
            gradients = whole(plan_of(case), pipeline_ranks(case, ranks), step)
        assert gradients.keys() == names
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None
            error = (gradients[key] - parameter.grad).norm()
            assert error <= TOLERANCE * parameter.grad.norm().clamp(min=1e-3), f"{key}: {error}"


def hops(case: Case) -> dict[int, int]:
    """How many tensors the hop into each stage carries, found by walking over the stages with a set of sources for each rank."""
    plan = plan_of(case)
    seen: list[set[int]] = [set() for _ in range(case.pp)]
    ends = [*plan.starts[1:], plan.num_sublayers]
    bank = {0} if plan.starts else set()
    counts = {}
    for stage in range(plan.num_stages):
        holder = seen[stage % case.pp] if case.cache else set()
        if stage:
            counts[stage] = len(bank - holder) + (plan.firsts[stage] not in plan.starts)
        bank = bank | {n + 1 for n, end in enumerate(ends) if plan.starts and end - 1 in plan.sites(stage)}
        holder |= bank
    return counts


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].pp > 1])
def test_bytes_sent(name: str, results: Callable[[str], Ranks]) -> None:
    case, plan = CASES[name], plan_of(CASES[name])
    expected = hops(case)
    assert expected == {stage: plan.tensors(stage) for stage in expected}
    ranks = pipeline_ranks(case, results(name))
    sent = {key: size for rank in ranks for key, size in rank["traffic"].items()}
    assert sum(len(rank["traffic"]) for rank in ranks) == len(sent)
    unit = 2 * MICRO_BATCHES // case.dp * TENSOR // case.tp  # two steps
    assert sent == {(stage, way): count * unit for stage, count in expected.items() for way in ("forward", "backward")}


@pytest.mark.parametrize("name", ["2-tp-prenorm", "2-tp-block", "2-tp-full", "2-tp-recompute"])
def test_bytes_of_shared_sublayers(name: str, results: Callable[[str], Ranks]) -> None:
    """Each gathers its input and scatters its output, once a way, whatever the rule: a read needs nothing of another rank."""
    case, count = CASES[name], CASES[name].config().num_sublayers
    tensor = MICRO_BATCHES * TENSOR
    # Computed again, a decoder layer ends with its last input: nothing waits for its last output.
    gathers, scatters = (3 * count, 2 * count + count // 2) if case.recompute == "full" else (2 * count, 2 * count)
    for rank in results(name):
        assert rank["collectives"] == {
            "all_gather_into_tensor": [tensor] * gathers,
            "reduce_scatter_tensor": [tensor] * scatters,
        }


def test_memory_of_shared_sublayers(results: Callable[[str], Ranks]) -> None:
    """Recomputed, a rank keeps its tokens of each layer's partial sum and of the bank; else what AttnRes adds is a P-th."""
    tokens, alone = batch(CASES["2-tp-block"])[0], {}
    for name in ("2-tp-recompute", "2-tp-block", "2-tp-prenorm"):
        case = CASES[name]
        stage = Stage(network(case), whole_network(case.config()), 0, recompute=case.recompute)
        alone[name] = kept(stage, tokens)
    for rank in range(2):
        shared = {name: results(name)[rank]["kept"] for name in alone}
        own_tokens = shared["2-tp-recompute"] - alone["2-tp-recompute"] // 2
        assert 0 <= own_tokens <= tokens.nbytes
        more, more_alone = (found["2-tp-block"] - found["2-tp-prenorm"] for found in (shared, alone))
        assert 2 * more == pytest.approx(more_alone, rel=0.02)  # but for folded queries
        assert more > 0


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_is_on_one_rank(name: str, results: Callable[[str], Ranks]) -> None:
    """But for what all ranks of ``tp`` have: all but the matrices of sublayers."""
    case, model = CASES[name], network(CASES[name])
    split = sum(p.numel() for part in model.sublayers for key, p in part.named_parameters() if "norm" not in key)
    all_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert sum(rank["local"] for rank in results(name)) == all_parameters + (case.tp - 1) * (all_parameters - split)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].virtual > 1])
def test_memory(name: str, results: Callable[[str], Ranks]) -> None:
    """With the cache a rank has one copy of each source; nothing stays when the micro-batches have ended."""
    case, plan = CASES[name], plan_of(CASES[name])
    tensor = TENSOR // case.tp
    for number, rank in enumerate(results(name)):
        index = number // case.tp % case.pp
        assert rank["left"] == 0
        if case.cache:
            assert rank["copies"] == 1
            kept = [plan.finished(s + 1) for s in range(index, plan.num_stages, case.pp) if plan.keeps(s)]
            assert rank["most"] <= MICRO_BATCHES * kept[-1] * tensor if kept else rank["most"] == 0
        else:
            assert rank["most"] == 0
