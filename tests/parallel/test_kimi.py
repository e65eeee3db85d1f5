"""Kimi Linear on four gloo processes: FSDP2, a pipeline, and experts over ranks, against one process in float64."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fathom.errors import UserError
from fathom.models.accounting import flops_per_token, source_counts
from fathom.models.config import ModelConfig
from fathom.models.sizes import kimi_linear_48b
from fathom.parallel.config import ParallelConfig
from fathom.parallel.plan import site_costs, split
from fathom.train import loop
from fathom.train.network import Network
from tests.parallel import kimi_worker
from tests.parallel.conftest import finish, forked
from tests.parallel.kimi_worker import LAYOUTS, STEPS, TRAINED, config, network
from tests.parallel.runs import cut_short, in_float64
from tests.train.conftest import write_corpus

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the four leave: RANK.pt, and the runs of ``TRAINED``."""
    folder = tmp_path_factory.mktemp("kimi")
    write_corpus(folder / "corpus", 0)
    ranks = [forked().Process(target=kimi_worker.main, args=(rank, folder)) for rank in range(4)]
    for rank in ranks:
        rank.start()
    codes = finish(ranks, 120)
    assert codes == [0] * 4, "\n".join(path.read_text() for path in sorted(folder.glob("*.log")))
    return folder


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    found: dict[str, Any] = {}

    def one() -> dict[str, Any]:
        found.update(kimi_worker.step(Network(network(), config(), torch.device("cpu"))))
        return {}

    in_float64(one)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_one_process(name: str, kimi: Path, alone: dict[str, Any]) -> None:
    """Loss, every gradient and their norm, loads, moved biases (of all ranks), held-out loss."""
    ranks = [torch.load(kimi / f"{rank}.pt")[name] for rank in range(4)]
    gradients: dict[str, torch.Tensor] = {}
    parallel = LAYOUTS[name]
    for rank in ranks:
        for key in ("loss", "norm", "load", "held out"):
            torch.testing.assert_close(rank[key], alone[key], rtol=1e-9, atol=0, msg=key)
        for key, bias in rank["biases"].items():
            assert bias.any() and torch.equal(bias, alone["biases"][key]), key
        gradients |= rank["gradients"]
    assert gradients.keys() == alone["gradients"].keys()
    for key, gradient in alone["gradients"].items():
        torch.testing.assert_close(gradients[key], gradient, rtol=1e-9, atol=1e-12, msg=key)
    # Each expert lies on as few ranks as it can, and is there once.
    assert sum(rank["experts"] for rank in ranks) == alone["experts"]
    if parallel.pp == 1:
        assert {rank["experts"] for rank in ranks} == {alone["experts"] // 4}


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_of_several_goes_on_in_one_process(name: str, kimi: Path, tmp_path: Path) -> None:
    """The checkpoint has all experts and the moved biases, whoever had them."""
    run = cut_short(kimi / name, tmp_path / name)
    shutil.copytree(kimi / "corpus", tmp_path / "corpus")
    in_float64(lambda: loop.resume(run, ParallelConfig()))
    lines = [
        [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (run, kimi / name)
    ]
    assert len(lines[0]) == len(lines[1]) == STEPS + 2
    for mine, theirs in zip(*lines, strict=True):
        for key in {"loss", "grad_norm", "expert_load"} & theirs.keys():
            assert mine[key] == pytest.approx(theirs[key], rel=1e-9), (key, mine["step"])


def test_muon_steps_alike_on_what_lies_on_several(kimi: Path) -> None:
    for rank in range(4):
        for name, error in torch.load(kimi / f"{rank}.pt")["muon"].items():
            assert error < 0.01, name


def test_a_pipeline_is_cut_by_what_kda_mla_and_experts_cost() -> None:
    size = kimi_linear_48b()
    costs = site_costs(size)
    flops = flops_per_token(size, size.context)
    reads = 6.0 * size.dim * sum(source_counts(size))
    assert sum(costs) == pytest.approx(sum(flops.values()) - flops["residual rule"] + reads)
    assert costs[0] < costs[6]  # KDA, MLA
    assert costs[1] > 1.01 * costs[3] - reads  # a dense MLP, experts
    bounds = [*split(costs, 4), len(costs)]
    parts = [sum(costs[a:b]) for a, b in pairwise(bounds)]
    assert max(parts) < 1.1 * sum(parts) / 4


def test_refused() -> None:
    with pytest.raises(UserError, match=r"parallel\.ep is 3: it must divide parallel\.dp, 4"):
        ParallelConfig(dp=4, ep=3)
    with pytest.raises(UserError, match=r"parallel\.ep is 4: it must divide model\.num_experts, 6"):
        config(model=replace(config().model, num_experts=6), parallel=ParallelConfig(dp=4, ep=4))
    with pytest.raises(UserError, match=r"parallel\.dp / parallel\.ep is 4: .*model\.latent_dim is 10"):
        config(model=replace(config().model, latent_dim=10), parallel=ParallelConfig(dp=8, ep=2))
    with pytest.raises(UserError, match=r"parallel\.ep is 2: the model has no experts"):
        config(model=ModelConfig(), parallel=ParallelConfig(dp=2, ep=2))
    with pytest.raises(UserError, match=r"parallel\.tp is 2: KDA, MLA and experts are not cut"):
        config(parallel=ParallelConfig(tp=2))
