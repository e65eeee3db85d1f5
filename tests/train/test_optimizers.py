"""Which parameter moves how: groups, decay, Muon's matrices, and the schedules at their corners."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.kimi_config import KimiConfig
from fathom.models.kimi_linear import build
from fathom.models.transformer import Transformer
from fathom.train import muon
from fathom.train.config import OptimConfig
from fathom.train.optimizers import each_group, head_rows, lr_share, make_optimizers, parameter_groups, set_lr

RULES = ("prenorm", "full", "block")


def model(rule: str = "block", **settings) -> Transformer:
    residual = ResidualConfig(rule=rule, **({"num_blocks": 2} if rule == "block" else {}))
    return Transformer(ModelConfig(vocab_size=40, context=8, dim=16, num_layers=2, residual=residual, **settings))


def kind_of(name: str) -> str:
    """The table of optimizers.py, read off a parameter's name."""
    if name in ("embedding.weight", "head.weight"):
        return name.split(".")[0]
    if name in ("stream.query", "stream.key_gain"):
        return "depth"
    return "matrix" if name.split(".")[-2] in ("qkv", "out", "gate_up", "down") else "vector"


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("settings", [{}, {"tie_embeddings": True}, {"qk_norm": False}, {"num_kv_heads": 1}])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_parameter_moves_exactly_once_and_as_its_kind_should(rule: str, settings: dict, optimizer: str) -> None:
    network = model(rule, **settings)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    by_kind = {kind: {name for name, _ in members} for kind, members in parameter_groups(network).items()}
    assert by_kind == {
        k: {n for n in names.values() if kind_of(n) == k}
        for k in ("matrix", "embedding", "head", "vector", "depth", "map")
    }
    optimizers = make_optimizers(network, OptimConfig(optimizer=optimizer, weight_decay=0.3, lr=0.5, muon_lr=0.25))  # type: ignore[arg-type]
    moved = [names[id(p)] for group in each_group(optimizers) for p in group["params"]]
    assert sorted(moved) == sorted(names.values())
    for group in each_group(optimizers):
        kinds = {kind_of(names[id(p)]) for p in group["params"]}
        assert len(kinds) == 1 and group["weight_decay"] == (0.3 if kinds & {"matrix", "embedding", "head"} else 0)
        of_muon = optimizer == "muon" and kinds == {"matrix"}
        assert group["peak_lr"] == (0.25 if of_muon else 0.128 / 16 if kinds == {"depth"} else 0.5)
    if optimizer == "muon":
        muon, adamw = optimizers
        assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
        assert {names[id(p)] for group in muon.param_groups for p in group["params"]} == by_kind["matrix"]
    else:
        assert [type(o) for o in optimizers] == [torch.optim.AdamW]


@pytest.mark.parametrize("at_once", [1, 300, 2**25])
def test_muon_in_batches_is_torch_s(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits here, the same state; a parameter without a gradient stays."""
    monkeypatch.setattr(muon, "AT_ONCE", at_once)
    torch.manual_seed(0)
    shapes = [(12, 8), (8, 12), (12, 8), (12, 8), (3, 3)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.3, "adjust_lr_fn": "match_rms_adamw"}
    batched, single = muon.Muon(ours, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(3):
        for a, b in zip(ours[:-1], theirs, strict=False):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        batched.step()
        single.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b) and batched.state[a].keys() == single.state[b].keys()
    single.load_state_dict(batched.state_dict())


def test_muon_takes_heads_for_themselves_if_asked(head_models: list[tuple[Transformer, dict[str, int]]]) -> None:
    """Each head's block steps as torch's Muon would step it alone; every other matrix as without the option."""
    for network, rows in head_models:
        config = OptimConfig(optimizer="muon", weight_decay=0.3, muon_lr=0.1, muon_per_head=True)
        before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
        generator = torch.Generator().manual_seed(5)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        for each in make_optimizers(network, config):
            each.step()
        assert {n for n, p in network.named_parameters() if p in head_rows(network)} == rows.keys()
        for name, parameter in network.named_parameters():
            if parameter.grad is None or parameter.ndim != 2 or kind_of(name) in ("embedding", "head", "depth"):
                continue
            size = rows.get(name, len(parameter))
            blocks = [torch.nn.Parameter(block.clone()) for block in before[name].split(size)]
            for block, grad in zip(blocks, parameter.grad.split(size), strict=True):
                block.grad = grad.clone()
            torch.optim.Muon(blocks, lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw").step()
            # Newton-Schulz is in bf16, batched products round otherwise.
            moved, expected = parameter.detach() - before[name], torch.cat([b.detach() for b in blocks]) - before[name]
            assert (moved - expected).norm() < 0.02 * expected.norm(), name
            if len(blocks) > 1:  # as one matrix it would have moved elsewhere
                whole = torch.nn.Parameter(before[name].clone())
                whole.grad = parameter.grad.clone()
                torch.optim.Muon([whole], lr=0.1, weight_decay=0.3, adjust_lr_fn="match_rms_adamw").step()
                assert (whole.detach() - before[name] - expected).norm() > 0.1 * expected.norm(), name


@pytest.fixture
def head_models() -> list[tuple[Transformer, dict[str, int]]]:
    """Networks, and the rows of a head in each of their matrices that have heads."""
    kimi = KimiConfig(
        vocab_size=40, context=8, dim=16, num_layers=3, num_heads=2, head_dim=8, mlp_dim=16, mla_every=2, kv_rank=6,
        shared_key_dim=4, expert_dim=8,
    )  # fmt: skip
    latent = replace(kimi, num_layers=1, query_rank=6)
    kda = {f"sublayers.0.{part}.weight": 8 for part in ("query", "key", "value")}
    mla = {f"sublayers.{site}.{part}.weight": rows for site in (2, 4) for part, rows in (("query", 12), ("expand", 8))}
    return [
        (model(num_heads=4, num_kv_heads=2), {f"sublayers.{site}.qkv.weight": 4 for site in (0, 2)}),
        (build(kimi), kda | mla),
        (build(latent), {"sublayers.0.query.2.weight": 12, "sublayers.0.expand.weight": 8}),
    ]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_without_gradient_decays_matrices_and_tables_only(optimizer: str) -> None:
    network = model(head_std=1.0)
    torch.nn.init.normal_(network.stream.query)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    optimizers = make_optimizers(network, OptimConfig(optimizer=optimizer, weight_decay=0.5, lr=0.1, muon_lr=0.1))  # type: ignore[arg-type]
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for each in optimizers:
        each.step()
    for name, parameter in network.named_parameters():
        share = 1 - 0.1 * 0.5 if kind_of(name) in ("matrix", "embedding", "head") else 1
        torch.testing.assert_close(parameter.detach(), before[name] * share, rtol=1e-6, atol=0)


def test_muon_orthogonalises_the_matrices_and_adam_signs_the_rest() -> None:
    network = model()
    config = OptimConfig(optimizer="muon", weight_decay=0, lr=0.1, muon_lr=0.1)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.randn_like(parameter)
    for each in make_optimizers(network, config):
        each.step()
    for name, parameter in network.named_parameters():
        change = parameter.detach() - before[name]
        if kind_of(name) == "matrix":
            singular = torch.linalg.svdvals(change) / (0.1 * 0.2 * max(change.shape) ** 0.5)
            assert singular.min() > 0.5 and singular.max() < 1.5, name
        else:
            rate = 0.128 / 16 if kind_of(name) == "depth" else 0.1
            torch.testing.assert_close(change, -rate * parameter.grad.sign(), rtol=1e-3, atol=1e-6)


def test_rates_of_groups_can_be_given() -> None:
    network = model()
    names = {id(parameter): kind_of(name) for name, parameter in network.named_parameters()}
    optimizers = make_optimizers(network, OptimConfig(lr=0.5, depth_lr=0.125, embedding_lr=0.25, head_lr=0.0625))
    found = {names[id(group["params"][0])]: group["peak_lr"] for group in each_group(optimizers)}
    assert found == {"matrix": 0.5, "embedding": 0.25, "head": 0.0625, "vector": 0.5, "depth": 0.125}
    decayed = {names[id(g["params"][0])]: g["peak_lr"] * g["weight_decay"] for g in each_group(optimizers)}
    assert decayed == {"matrix": 0.05, "embedding": 0.05, "head": 0.05, "vector": 0, "depth": 0}


def test_betas_are_those_of_the_config() -> None:
    (adamw,) = make_optimizers(model(), OptimConfig(beta1=0.7, beta2=0.8))
    assert all(group["betas"] == (0.7, 0.8) for group in adamw.param_groups)


def test_all_rates_follow_the_schedule_from_their_own_peak() -> None:
    optimizers = make_optimizers(model(), OptimConfig(optimizer="muon", lr=0.5, muon_lr=0.25))
    for share in (0.5, 0.1, 1.0):
        set_lr(optimizers, share)
        assert [group["lr"] for group in each_group(optimizers)] == [
            pytest.approx(share * peak) for peak in (0.25, 0.5, 0.5, 0.5, 0.128 / 16)
        ]


def shares(steps: int, **settings) -> list[float]:
    return [lr_share(OptimConfig(**settings), step, steps) for step in range(steps)]


def test_warm_up_rises_linearly_from_its_first_step_to_the_peak() -> None:
    for schedule in ("cosine", "wsd"):
        rates = shares(100, schedule=schedule, warmup=4)
        assert rates[:5] == [0.25, 0.5, 0.75, 1, 1] and max(rates) == 1


def test_no_warm_up_starts_at_the_peak() -> None:
    for schedule in ("cosine", "wsd"):
        assert shares(100, schedule=schedule, warmup=0)[0] == 1


def test_cosine_falls_to_the_final_rate_in_the_last_step() -> None:
    rates = shares(101, schedule="cosine", warmup=0, final_lr=0.1)
    assert rates[-1] == pytest.approx(0.1, abs=1e-15) and rates[50] == pytest.approx(0.55, abs=1e-12)
    assert rates[25] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + 0.5**0.5), abs=1e-12)
    assert all(a > b for a, b in pairwise(rates))
    assert shares(60, schedule="cosine", warmup=10, final_lr=0)[-1] == pytest.approx(0, abs=1e-15)


def test_wsd_stays_and_falls_linearly_to_the_final_rate_in_the_last_step() -> None:
    rates = shares(100, schedule="wsd", warmup=10, decay_fraction=0.2, final_lr=0.1)
    assert rates[9:80] == [1] * 71
    assert rates[80:] == pytest.approx([1 - 0.9 * i / 20 for i in range(1, 21)], abs=1e-12)
    assert shares(100, schedule="wsd", warmup=0, decay_fraction=1, final_lr=0) == pytest.approx(
        [1 - (i + 1) / 100 for i in range(100)], abs=1e-12
    )


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_run_no_longer_than_its_warm_up_only_warms_up(schedule: str, steps: int) -> None:
    assert shares(steps, schedule=schedule, warmup=5) == pytest.approx([(i + 1) / 5 for i in range(steps)])


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 2, 3])
@pytest.mark.parametrize("decay_fraction", [0, 0.5, 1])
def test_no_corner_leaves_the_range(schedule: str, warmup: int, decay_fraction: float) -> None:
    for steps in (1, 2, 3, 4):
        rates = shares(steps, schedule=schedule, warmup=warmup, decay_fraction=decay_fraction, final_lr=0.25)
        assert all(0.25 <= rate <= 1 for rate in rates), rates
