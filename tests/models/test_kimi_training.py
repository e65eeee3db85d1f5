"""Kimi Linear trains, learns, resumes and steps by Muon, through the Trainer of every other decoder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fathom.errors import UserError
from fathom.models.kimi_config import KimiConfig
from fathom.models.kimi_linear import build
from fathom.train.checkpoint import checkpoints
from fathom.train.config import OptimConfig, RunConfig, from_dict, load_config, to_dict
from fathom.train.loop import resume, train
from fathom.train.metrics import read_metrics
from fathom.train.muon import StackedMuon
from fathom.train.optimizers import make_optimizers, parameter_groups
from fathom.train.recipes import RECIPES

UNIGRAM = 5.95
"""What single tokens' frequencies give on the validation text, nats per token: a model that sees no context gets no further."""


def tiny(**options) -> RunConfig:
    config = RECIPES["kimi-micro"]()
    model = replace(config.model, context=32, num_layers=2, dim=32, head_dim=16, mlp_dim=48, expert_dim=16)
    data = replace(config.data, batch=2)
    return replace(config, model=model, data=data, eval_sequences=2, eval_every=100, **options)


def test_micro_learns(tmp_path: Path):
    """Far below what single tokens' frequencies give, in 40 steps, its experts evened out."""
    config = RECIPES["kimi-micro"]()
    optim = replace(config.optim, warmup=8)
    config = replace(config, optim=optim, steps=40, eval_every=40, eval_sequences=8)
    summary = train(config, tmp_path / "run")
    assert summary["val_loss"] < 5.5 < UNIGRAM
    rows = [row for row in read_metrics(tmp_path / "run") if row["kind"] == "train"]
    assert rows[0]["loss"] > 6.9
    loads = [row["expert_load"] for row in rows]
    assert sum(loads[-5:]) / 5 < 2 < max(loads)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_the_unbroken_one(optimizer: str, tmp_path: Path):
    optim = OptimConfig(optimizer=optimizer, lr=1e-2, warmup=2)  # type: ignore[arg-type]
    config = tiny(optim=optim, steps=6, checkpoint_every=3, keep_checkpoints=3)
    train(config, tmp_path / "whole")
    broken = tmp_path / "broken"
    train(config, broken)
    for path in checkpoints(broken)[1:]:
        path.rename(tmp_path / path.name)
    resume(broken)
    assert isinstance(load_config(broken / "config.json").model, KimiConfig)
    whole, again = (load_file(checkpoints(run)[-1] / "model.safetensors") for run in (tmp_path / "whole", broken))
    assert whole["sublayers.3.router.bias"].any()
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name


def test_groups_leave_no_trained_parameter_out_and_the_router_s_bias_to_balance():
    model = build(tiny(steps=1).model)
    groups = {kind: [name for name, _ in members] for kind, members in parameter_groups(model).items()}
    assert sorted(name for names in groups.values() for name in names) == sorted(
        name for name, p in model.named_parameters() if not name.endswith("router.bias")
    )
    assert groups["expert"] == ["sublayers.3.experts.gate_up", "sublayers.3.experts.down"]
    assert {"sublayers.0.taps", "sublayers.0.decay_bias", "sublayers.0.log_rate"} <= set(groups["vector"])
    assert groups["depth"] == ["stream.query", "stream.key_gain"]
    muon, stacked, adamw = make_optimizers(model, OptimConfig(optimizer="muon"))
    assert isinstance(stacked, StackedMuon) and stacked.param_groups[0]["peak_lr"] == 0.02
    by_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in by_muon}
    assert "sublayers.0.query.weight" in names and not any("stream" in name or "norm" in name for name in names)
    assert all(p.ndim != 3 or "taps" in n for n, p in model.named_parameters() for g in adamw.param_groups
               for q in g["params"] if p is q)  # fmt: skip


def test_stacked_muon_is_torch_s_on_every_expert():
    torch.manual_seed(0)
    stack = torch.nn.Parameter(torch.randn(3, 6, 10))
    single = [torch.nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    ours = StackedMuon([stack], lr=0.02, weight_decay=0.1)
    theirs = torch.optim.Muon(single, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        stack.grad = torch.randn(3, 6, 10)
        for parameter, gradient in zip(single, stack.grad, strict=True):
            parameter.grad = gradient.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in single]), rtol=0, atol=1e-3)


def test_a_config_goes_through_json_as_itself():
    config = tiny(steps=1)
    assert from_dict(RunConfig, to_dict(config)) == config
    with pytest.raises(UserError, match=r"model.experts is not a setting of KimiConfig"):
        from_dict(RunConfig, {"model": {"architecture": "kimi_linear", "experts": 3}})


def test_an_option_of_muon_is_refused_under_adamw():
    with pytest.raises(UserError, match=r"optim\.muon_per_head is of muon, but optim\.optimizer is adamw"):
        tiny(steps=1, optim=OptimConfig(muon_per_head=True))
