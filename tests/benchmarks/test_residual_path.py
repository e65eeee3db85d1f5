"""The residual-path benchmark's own arithmetic: its gate, its ratios, its byte floors. Its times need a GPU."""

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fathom.block import BlockAttnRes
from fathom.kernels import use_backend
from fathom.models.layers import RMSNorm

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results"
MODULES = ("workloads", "arms", "gate", "peers", "timing", "steps", "summarize", "residual_path", "kernels_alone")


@pytest.fixture(scope="module")
def benchmarks() -> Iterator[SimpleNamespace]:
    """The scripts' modules, imported as they import each other, and forgotten again: their names are common words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        yield SimpleNamespace(**{name: import_module(name) for name in MODULES})
        for name in MODULES:
            del sys.modules[name]


@pytest.fixture(scope="module", params=["stack-d2048", "model-d2304"])
def workload(request: pytest.FixtureRequest, benchmarks: SimpleNamespace) -> object:
    return benchmarks.workloads.make_workload(benchmarks.workloads.CASES[request.param].tiny(), torch.device("cpu"))


@pytest.fixture(scope="module")
def truths(benchmarks: SimpleNamespace, workload: object) -> dict[str, object]:
    return benchmarks.gate.truths(workload)


def errors(gate: ModuleType, arm: object, workload: object, truth: object) -> dict[str, tuple[float, float]]:
    return gate.errors(gate.backward_results(arm, workload), truth.values)


@pytest.mark.parametrize("checkpoint_every", [None, 4])
def test_fathom_passes_the_gate(benchmarks, workload, truths, checkpoint_every) -> None:
    arms, gate = benchmarks.arms, benchmarks.gate
    arm = arms.stream_arm("fathom", workload, arms.fathom_stream(workload), checkpoint_every)
    found = errors(gate, arm, workload, truths["attnres"])
    assert set(found) == {"output", "input_gradient", "query_gradient"}
    gate.gate(found, truths["attnres"].eager, gate.SLACK)


def test_the_peers_stream_is_block_attnres_in_float32(benchmarks, truths, workload) -> None:
    """Two implementations, of one schedule each, agree to float32 rounding: the truth is the truth."""
    arms, gate = benchmarks.arms, benchmarks.gate
    exact = benchmarks.workloads.make_workload(workload.case, torch.device("cpu"))
    exact.network.float()
    exact = benchmarks.workloads.Workload(
        exact.case, exact.network, exact.embedding.detach().float().requires_grad_(), exact.gradient.float(),
        exact.queries.float(), exact.gains.float(),
    )  # fmt: skip
    found = errors(gate, arms.stream_arm("fathom", exact, arms.fathom_stream(exact)), exact, truths["attnres"])
    assert max(worst for _, worst in found.values()) < 1e-4


def wrong_reads(arms: ModuleType) -> dict[str, object]:
    def oldest_dropped(bank, partial, output, query, gain, weight):
        total, _ = arms.plain_read(bank, partial, output, query, gain, weight)
        return total, arms.plain_read(bank[1:], partial, output, query, gain, weight)[1]

    def one_token(bank, partial, output, query, gain, weight):
        total, x = arms.plain_read(bank, partial, output, query, gain, weight)
        return total, torch.cat((x[:, :-1], x[:, -1:].flip(-1)), 1)

    def no_query_gradient(bank, partial, output, query, gain, weight):
        return arms.plain_read(bank, partial, output, query.detach(), gain, weight)

    def unnormalised_keys(bank, partial, output, query, gain, weight):
        total = output if partial is None else partial + output
        values = torch.stack([source.float() for source in (*bank, total)])
        mix = ((values @ query.float()).softmax(0).unsqueeze(-1) * values).sum(0)
        return total, arms.norm(mix.to(total.dtype), weight)

    return {f.__name__: f for f in (oldest_dropped, one_token, no_query_gradient, unnormalised_keys)}


@pytest.mark.parametrize("name", ["oldest_dropped", "one_token", "no_query_gradient", "unnormalised_keys"])
def test_a_wrong_arm_is_refused(benchmarks, workload, truths, name) -> None:
    arms, gate = benchmarks.arms, benchmarks.gate
    stream = arms.ListAttnRes(workload, wrong_reads(arms)[name], compiled_norms=False)
    found = errors(gate, arms.stream_arm(name, workload, stream), workload, truths["attnres"])
    with pytest.raises(gate.Wrong, match="times that of eager bf16"):
        gate.gate(found, truths["attnres"].eager, gate.PEER_SLACK)


def test_a_nan_is_refused(benchmarks) -> None:
    truth = torch.ones(4, 3)
    value = truth.clone()
    value[2, 1] = torch.nan
    with pytest.raises(benchmarks.gate.Wrong):
        benchmarks.gate.gate({"output": benchmarks.gate.error(value, truth)}, {"output": (1.0, 1.0)}, 2.0)


def test_one_wrong_row_among_many_is_refused(benchmarks) -> None:
    gate = benchmarks.gate
    truth = torch.randn(20_000, 64, generator=torch.Generator().manual_seed(0))
    rounded, wrong = truth.bfloat16(), truth.bfloat16()
    wrong[-1] *= 1.1
    eager, found = gate.error(rounded, truth), gate.error(wrong, truth)
    assert found[0] < 1.5 * eager[0], "the mean does not see it"
    with pytest.raises(gate.Wrong, match="worst"):
        gate.gate({"output": found}, {"output": eager}, gate.PEER_SLACK)


def test_depth_queries_are_not_zero(workload) -> None:
    assert workload.queries.float().std().item() == pytest.approx(0.02, rel=0.1)


def test_ratios_are_taken_between_times_of_one_round(benchmarks) -> None:
    """The median of the rounds' ratios is 1 here, the ratio of the medians 4/3."""

    def arm(rounds: list[float], gib: float) -> dict[str, object]:
        times = [[t, 9 * t, t] for t in rounds]
        return {"forward_ms": times, "forward_backward_ms": times, "wall_ms": times, "graph_ms": [], "peak_gib": gib,
                "first_call_s": 3.0}  # fmt: skip

    arms = {"prenorm": arm([1.0, 2.0, 3.0, 4.0, 5.0], 2.0), "fathom": arm([2.0, 2.0, 6.0, 4.0, 5.0], 3.0)}
    raw = {"case": {"name": "c", "dim": 8}, "pass_ms": 0.5, "arms": arms}
    seen: set[tuple[str, int]] = set()
    rows = {(r["arm"], r["metric"]): r for r in benchmarks.residual_path.rows(raw, seen)}
    whole = rows["fathom", "forward_backward_ms"]
    assert (whole["median"], whole["low"], whole["high"], whole["n"], whole["over_prenorm"]) == (4, 2, 6, 5, 1)
    assert rows["fathom", "forward_backward_passes"]["median"] == 8
    assert rows["fathom", "peak_gib"]["over_prenorm"] == 1.5
    assert ("fathom", "first_call_s") in rows
    again = {(r["arm"], r["metric"]) for r in benchmarks.residual_path.rows(raw, seen)}
    assert ("fathom", "first_call_s") not in again, "a later case of that width finds the kernels compiled"


@pytest.mark.parametrize("folder", sorted(RESULTS.glob("*_residual-path*")), ids=lambda folder: folder.name)
def test_committed_rows_follow_from_their_raw_times(benchmarks, folder) -> None:
    """Of each run of the benchmark in its folder; a run by itself says what is a first call."""
    result = json.loads((folder / "result.json").read_text())
    runs = {run["env"]["command"]: run for run in (json.loads(path.read_text()) for path in folder.glob("raw*.json"))}
    rows = []
    for command in result["command"].split(" && "):
        seen: set[tuple[str, int]] = set()
        rows += [row for case in runs.pop(command)["cases"] for row in benchmarks.residual_path.rows(case, seen)]
    assert rows == result["rows"] and not runs
    cases = {row["case"] for row in rows}
    assert result.get("kernels", dict.fromkeys(cases)).keys() == cases, "every case says which commit's kernels ran"


def test_byte_floors_count_each_tensor_once(benchmarks) -> None:
    alone = benchmarks.kernels_alone
    for operation in (
        alone.inter(1, 6),
        alone.inter(4, 8),
        alone.single(8),
        alone.update(first=False),
        alone.scoring(3),
    ):
        inputs = operation.inputs(20, 16, torch.device("cpu"))
        outputs = operation.plain(inputs)
        wide = sum(x.shape == (20, 16) for x in (*inputs, *outputs))
        narrow = sum(x.numel() // 20 for x in (*inputs, *outputs) if x.shape[-1] == 20)
        narrow += operation.name == "score-k3"  # the reciprocal norms, which its kernel keeps
        assert (operation.forward_wide, operation.forward_lses) == (wide, narrow), operation.name
    mixing = alone.mixing(4, 8)
    inputs = mixing.inputs(20, 16, torch.device("cpu"))
    moved = {x.data_ptr() for x in (*inputs, *mixing.plain(inputs)) if x.shape == (20, 16)}  # sources are handed on
    assert (len(inputs), mixing.forward_wide) == (8, len(moved))


def test_the_kernels_operations_agree_with_their_plain_equations(benchmarks) -> None:
    alone = benchmarks.kernels_alone
    operations = (alone.inter(3, 2), alone.mixing(3, 2), alone.scoring(5), alone.single(3), alone.update(first=False))
    for operation in (*operations, alone.update(first=True)):
        alone.check(operation, operation.arms["fathom"](), 256, 20, torch.device("cpu"), 2.0)


class Passes(TorchDispatchMode):
    """Counts the tensors of ``shape`` that Fathom's operations read and write, and those of each addition by autograd."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.name().startswith("fathom::"):
            self.count += sum(isinstance(x, torch.Tensor) and x.shape == self.shape for x in tree_leaves((args, out)))
            # A single source has the whole weight: backward it is not read.
            self.count -= func.name() == "fathom::mix_backward" and len(args[0]) == 1
        elif func is torch.ops.aten.add.Tensor and out.shape == self.shape:
            self.count += 3
        return out


def test_the_stack_moves_the_passes_that_the_page_counts() -> None:
    tokens, dim, sublayers = 3, 16, 32
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stream = BlockAttnRes(sublayers, dim, block_size=8).to(device)
    norm = RMSNorm(dim, 1e-6).to(device)
    embedding = torch.randn(tokens, dim, device=device, requires_grad=True)
    with use_backend("triton"):
        with Passes((tokens, dim)) as forward:
            state = stream.start(embedding)
            for site in range(sublayers):
                x, state = stream.read(state, site, norm)
                state = stream.write(state, site, -x)
            out = stream.finish(state, norm)
        with Passes((tokens, dim)) as backward:
            out.backward(torch.ones_like(out))
    page = (BENCHMARKS.parent / "docs/kernels.md").read_text()
    assert f"that is {forward.count} passes forward" in page and f"and {backward.count} backward" in page


def test_every_arm_waits_for_the_slowest_launches(benchmarks) -> None:
    steps = benchmarks.steps
    quick, slow = (steps.Measured({}, 0.0, launch_ms=milliseconds) for milliseconds in (10.0, 50.0))
    assert steps.ahead([quick, slow]) == 61
    assert steps.ahead([quick]) == 13 and steps.ahead([]) == 1
    assert steps.ahead([steps.Measured({}, 0.0, launch_ms=1e3)]) == steps.MAX_AHEAD_MS
