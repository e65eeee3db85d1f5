"""The simulator runs torch's schedule, sends what processes sent, and takes the time that closed forms say."""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fathom.cli import main
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.parallel.plan import Plan, make_plan
from fathom.parallel.simulate import Speeds, order, run, step
from tests.parallel.cases import CASES, MICRO_BATCH, MICRO_BATCHES
from tests.parallel.conftest import Ranks

FREE = Speeds(link=float("inf"), network=float("inf"), latency=0.0)


def even(ranks: int, virtual: int) -> Plan:
    return Plan(ranks * virtual, (), tuple(range(ranks * virtual)), ranks)


@pytest.mark.dist
@pytest.mark.parametrize("name", ["2-aligned-v2-cached", "4-aligned-v2-cached", "4-straddling-v3-cached"])
def test_the_order_is_the_engines(name: str, results: Callable[[str], Ranks]) -> None:
    case = CASES[name]
    for rank, seen in enumerate(results(name)):
        assert seen["order"] == [tuple(p) for p in order(rank, case.pp, case.virtual, MICRO_BATCHES)]


@pytest.mark.dist
@pytest.mark.parametrize(
    "name", [n for n, c in CASES.items() if c.pp > 1 and c.dp == c.tp == 1 and c.schedule == "1f1b"]
)
def test_the_bytes_are_those_that_processes_sent(name: str, results: Callable[[str], Ranks]) -> None:
    case = CASES[name]
    counted: dict[int, int] = defaultdict(int)
    for rank in results(name):
        for (stage, _), size in rank["traffic"].items():
            counted[stage] += size
    plan = make_plan(case.config(), case.pp, case.virtual, cache=case.cache, firsts=case.firsts)
    speeds = replace(FREE, number_bytes=8)
    found = step(plan, case.config(), num_micro_batches=MICRO_BATCHES, micro_batch=MICRO_BATCH, speeds=speeds)
    assert {stage: 2 * size for stage, size in found["sent"].items()} == counted  # the worlds ran two steps


@pytest.mark.parametrize(("p", "v", "m"), [(2, 1, 4), (4, 1, 8), (4, 2, 8), (4, 3, 4), (8, 4, 16)])
def test_without_transfers_the_bubble_is_the_known_one(p: int, v: int, m: int) -> None:
    seconds = {(stage, forward): 1.0 if forward else 2.0 for stage in range(p * v) for forward in (True, False)}
    found = run(even(p, v), seconds, 1, m, FREE)
    assert found["seconds"] == pytest.approx(3 * (m * v + p - 1))
    assert found["busy"] == pytest.approx(m * v / (m * v + p - 1))


def test_a_hop_takes_its_bytes_over_the_link_and_its_latency() -> None:
    seconds = dict.fromkeys([(0, True), (1, True), (1, False), (0, False)], 1.0)
    alone = replace(FREE, link=10.0, latency=0.25)
    assert run(even(2, 1), seconds, 5, 1, alone)["seconds"] == pytest.approx(4 + 2 * (0.5 + 0.25))
    apart = replace(alone, network=1.0, ranks_per_host=1)
    assert run(even(2, 1), seconds, 5, 1, apart)["seconds"] == pytest.approx(4 + 2 * (5 + 0.25))
    # Two hops one after the other on one link: the second waits for the first.
    crowded = run(even(2, 1), seconds, 50, 2, alone)
    assert crowded["seconds"] == pytest.approx(1 + 5.25 + 5 + 1 + 1 + 5.25 + 1)


def test_the_command_takes_speeds_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "speeds.json"
    command = ["bench", "--pipeline", "--ranks", "9", "--model.num-layers", "9", "--model.dim", "8", "--batch", "1"]
    ratios = []
    for link in (1e6, 1e12):
        file.write_text(json.dumps({"link": link, "network": link, "source": "a guess"}))
        assert main([*command, "--speeds", str(file), "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["simulated"]["rows"]
        assert [(row["ranks"], row["micro_batches"]) for row in rows] == [(2, 4), (4, 8), (8, 16), (9, 18)]
        ratios.append(rows[-1]["naive"]["ms"] / rows[-1]["cached"]["ms"])
    assert ratios[0] > 1.2 > 1.1 > ratios[1] >= 1
    file.write_text('{"linc": 1}')
    assert main([*command, "--speeds", str(file)]) == 2
    assert "linc is not a setting" in capsys.readouterr().err


def test_figure_3(capsys: pytest.CaptureFixture[str]) -> None:
    """4 ranks x 2 stages, blocks over two stages each: hop by hop, without the two that their maker gets again in the paper."""
    config = ModelConfig(num_layers=4, residual=ResidualConfig(rule="block", block_size=2))
    plan = make_plan(config, 4, 2)
    assert [list(plan.carried(stage)) for stage in range(8)] == [[], [0], [0, 1], [0, 1], [1, 2], [2], [2, 3], [3]]
