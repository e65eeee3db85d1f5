"""A run's config survives config.json, and what is wrong in one is named in one line."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.errors import UserError
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.train.config import DataConfig, OptimConfig, RunConfig, from_dict, load_config, save_config, to_dict

positive = st.floats(1e-300, 1e300)
share = st.floats(0, 1)
counts = st.integers(1, 10**9)

residuals = st.one_of(
    st.builds(ResidualConfig, rule=st.just("prenorm"), eps=positive),
    st.builds(ResidualConfig, rule=st.just("full"), gain=st.booleans(), eps=positive),
    st.builds(ResidualConfig, rule=st.just("block"), num_blocks=st.none() | counts, schedule=st.just("single_pass")),
    st.builds(ResidualConfig, rule=st.just("block"), block_size=st.none() | counts),
    st.builds(
        ResidualConfig, rule=st.just("full"), activation=st.sampled_from([None, "sigmoid"]), key_norm=st.booleans()
    ),
    st.builds(ResidualConfig, rule=st.just("keel"), alpha=st.none() | positive),
)
models = st.builds(
    ModelConfig, vocab_size=counts, context=counts, dim=counts, num_layers=counts, head_dim=st.just(64),
    mlp_dim=st.none() | counts, qk_norm=st.booleans(), tie_embeddings=st.booleans(), rope_base=positive,
    head_std=positive, residual=residuals,
)  # fmt: skip
optims = st.builds(
    OptimConfig, optimizer=st.sampled_from(["adamw", "muon"]), lr=positive, depth_lr=st.none() | positive,
    beta1=st.floats(0, 1, exclude_max=True), weight_decay=positive, clip=st.just(0.0) | positive,
    schedule=st.sampled_from(["cosine", "wsd"]), warmup=st.integers(0, 10**9), decay_fraction=share, final_lr=share,
)  # fmt: skip
runs = st.builds(
    RunConfig, model=models, data=st.builds(DataConfig, folder=st.text(), batch=counts, micro_batch=st.sampled_from([None, 1])),
    optim=optims, steps=counts, seed=st.integers(0, 2**63 - 1), device=st.text(), precision=st.sampled_from(["float32", "bf16"]),
    deterministic=st.booleans(), track=st.sampled_from(["none", "tensorboard", "trackio"]),
)  # fmt: skip


@given(runs)
def test_a_config_survives_json(config: RunConfig) -> None:
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config)))) == config


def test_every_field_survives_the_file(tmp_path: Path) -> None:
    config = RunConfig(
        model=ModelConfig(dim=30, num_heads=3, residual=ResidualConfig(rule="full", gain=False)), seed=7, steps=3
    )
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved.keys() == {field.name for field in dataclasses.fields(RunConfig)}
    assert saved["model"]["residual"].keys() == {field.name for field in dataclasses.fields(ResidualConfig)}


def test_what_is_left_out_has_its_default() -> None:
    assert from_dict(RunConfig, {}) == RunConfig()
    config = from_dict(RunConfig, {"optim": {"lr": 1}, "model": {"residual": {"rule": "full"}}})
    assert config == RunConfig(optim=OptimConfig(lr=1.0), model=ModelConfig(residual=ResidualConfig(rule="full")))
    assert type(config.optim.lr) is float


WRONG: list[tuple[Any, str]] = [
    # unknown keys
    ({"step": 3}, "step is not a setting of RunConfig; it has checkpoint_every, "),
    ({"optim": {"learning_rate": 1}}, "optim.learning_rate is not a setting of OptimConfig; it has beta1, "),
    ({"model": {"residual": {"blocks": 8}}}, "model.residual.blocks is not a setting of ResidualConfig; it has activation, "),
    # wrong types
    ([], "the config is list: it must be an object"),
    ({"model": 3}, "model is int: it must be an object"),
    ({"model": {"residual": "block"}}, "model.residual is str: it must be an object"),
    ({"steps": 3.5}, "steps is 3.5: it must be of type int"),
    ({"steps": True}, "steps is True: it must be of type int"),
    ({"steps": None}, "steps is None: it must be of type int"),
    ({"deterministic": 1}, "deterministic is 1: it must be of type bool"),
    ({"optim": {"lr": "fast"}}, "optim.lr is 'fast': it must be of type float"),
    ({"optim": {"lr": False}}, "optim.lr is False: it must be of type float"),
    ({"optim": {"depth_lr": "low"}}, "optim.depth_lr is 'low': it must be of type float"),
    ({"model": {"head_dim": 2.0}}, "model.head_dim is 2.0: it must be of type int"),
    ({"data": {"folder": 3}}, "data.folder is 3: it must be of type str"),
    ({"optim": {"schedule": ["wsd"]}}, "optim.schedule is ['wsd']: it must be one of cosine, wsd"),
    # bad values
    ({"optim": {"optimizer": "sgd"}}, "optim.optimizer is 'sgd': it must be one of adamw, muon"),
    ({"model": {"residual": {"rule": "Block"}}}, "model.residual.rule is 'Block': it must be one of "),
    ({"steps": 0}, "steps is 0: it must be at least 1"),
    ({"seed": -1}, "seed is -1: it must be at least 0"),
    ({"eval_every": 0}, "eval_every is 0: it must be at least 1"),
    ({"eval_sequences": 0}, "eval_sequences is 0: it must be at least 1"),
    ({"checkpoint_every": 0}, "checkpoint_every is 0: it must be at least 1"),
    ({"keep_checkpoints": 0}, "keep_checkpoints is 0: it must be at least 1"),
    ({"log_every": 0}, "log_every is 0: it must be at least 1"),
    ({"data": {"batch": 0}}, "data.batch is 0: it must be at least 1"),
    ({"data": {"batch": 8, "micro_batch": 3}}, "data.micro_batch is 3: it must divide data.batch, 8"),
    ({"data": {"micro_batch": 0}}, "data.micro_batch is 0: it must divide data.batch, 8"),
    ({"data": {"batch": 8, "micro_batch": -8}}, "data.micro_batch is -8: it must divide data.batch, 8"),
    ({"optim": {"lr": 0}}, "optim.lr is 0.0: it must be positive"),
    ({"optim": {"lr": float("nan")}}, "optim.lr is nan: it must be positive"),
    ({"optim": {"muon_lr": -1}}, "optim.muon_lr is -1.0: it must be positive"),
    ({"optim": {"depth_lr": 0}}, "optim.depth_lr is 0.0: it must be positive"),
    ({"optim": {"embedding_lr": float("inf")}}, "optim.embedding_lr is inf: it must be positive and finite"),
    ({"optim": {"head_lr": -1}}, "optim.head_lr is -1.0: it must be positive and finite"),
    ({"optim": {"clip": -1}}, "optim.clip is -1.0: it must be at least 0"),
    ({"optim": {"clip": float("nan")}}, "optim.clip is nan: it must be at least 0"),
    ({"optim": {"warmup": -1}}, "optim.warmup is -1: it must be at least 0"),
    ({"optim": {"weight_decay": -0.1}}, "optim.weight_decay is -0.1: it must be at least 0"),
    ({"optim": {"beta2": 1}}, "optim.beta2 is 1.0: it must be in [0, 1)"),
    ({"optim": {"final_lr": 1.5}}, "optim.final_lr is 1.5: it must be in [0, 1]"),
    ({"optim": {"decay_fraction": -0.5}}, "optim.decay_fraction is -0.5: it must be in [0, 1]"),
    ({"model": {"dim": 0}}, "model.dim is 0: it must be at least 1"),
    ({"model": {"dim": 64, "num_heads": 3}}, "model.dim 64 is not a multiple of model.num_heads 3"),
    ({"model": {"tie_embeddings": True}, "optim": {"head_lr": 1e-3}}, "optim.head_lr is of an untied head"),
    (
        {"model": {"tie_embeddings": True}, "parallel": {"recompute": "full"}},
        "parallel.recompute is full: tied embeddings (model.tie_embeddings) do not go with it",
    ),
    (
        {"model": {"residual": {"rule": "full", "window": 3}}, "parallel": {"recompute": "selective"}},
        "parallel.recompute is selective: it goes with prenorm, full and block without switches, not with residual.window",
    ),
    (
        {"model": {"residual": {"rule": "keel"}}, "parallel": {"tp": 2}},
        "parallel.tp is 2: it goes with prenorm, full and block without switches, not with residual.rule keel",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_wrong_is_named_in_one_line(values: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}") as error:
        from_dict(RunConfig, values)
    assert "\n" not in str(error.value)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"^{re.escape(f'{file}: {message}')}"):
        load_config(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"steps": 3,\n "seed"}', "is not valid JSON: line 2: "),
        (b"", "is not valid JSON: line 1: "),
        (b"\xff\xfe\x00", "is not a text file"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "cannot be read: Exceeds the limit"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_file_that_is_no_config_is_named(content: bytes | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{file} {message}")):
        load_config(file)
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
