"""Against the ``kimi_linear`` classes of Transformers, which know nothing of AttnRes."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
kimi = pytest.importorskip("transformers.models.kimi_linear")

from safetensors.torch import load_file  # noqa: E402

from fathom.errors import UserError  # noqa: E402
from fathom.hf.kimi import config_from_release, load_release, release_config, to_release, write_release  # noqa: E402
from fathom.inference.engine import Engine  # noqa: E402
from fathom.models.config import ResidualConfig  # noqa: E402
from fathom.models.kimi_config import KimiConfig  # noqa: E402
from fathom.models.kimi_linear import build  # noqa: E402
from fathom.models.sizes import kimi_k3, kimi_linear_48b  # noqa: E402

CONFIG = KimiConfig(
    vocab_size=43, context=128, dim=24, num_layers=5, num_heads=3, head_dim=8, mlp_dim=20, kv_rank=12, shared_key_dim=4,
    num_experts=6, active_experts=2, expert_dim=12, norm_eps=1e-5, routed_scaling=2.446, residual=ResidualConfig(rule="prenorm"),
)  # fmt: skip


def released(folder: Path, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model of Transformers by their released names."""
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    # Transformers writes the dense layer's MLP under the name of the experts'.
    return {name.replace("layers.0.block_sparse_moe.", "layers.0.mlp."): tensor for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    torch.manual_seed(0)
    transformers.logging.disable_progress_bar()
    model = kimi.KimiLinearForCausalLM(kimi.KimiLinearConfig(**release_config(CONFIG), pad_token_id=None))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "A_log" not in name and "dt_bias" not in name:
            torch.nn.init.normal_(tensor, std=0.3)
    return model.eval()


@pytest.fixture
def ours(theirs: torch.nn.Module, tmp_path: Path) -> torch.nn.Module:
    model = build(CONFIG)
    load_release(model, released(tmp_path, theirs))
    return model.eval()


def test_logits_and_gradients_are_those_of_transformers(theirs, ours, tmp_path: Path):
    tokens = torch.randint(43, (2, 75), generator=torch.Generator().manual_seed(1))
    expected = theirs(tokens, labels=tokens)
    expected.loss.backward()
    logits = ours(tokens)
    assert (logits - expected.logits).abs().max() < 1e-4
    ours.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    gradients = build(CONFIG)
    twin = kimi.KimiLinearForCausalLM(theirs.config)
    with torch.no_grad():
        for target, source in zip(twin.parameters(), theirs.parameters(), strict=True):
            target.copy_(source.grad)
    load_release(gradients, released(tmp_path / "gradients", twin))
    for (name, parameter), (_, gradient) in zip(ours.named_parameters(), gradients.named_parameters(), strict=True):
        if parameter.requires_grad:
            assert (parameter.grad - gradient).abs().max() < 1e-4 * max(1, gradient.abs().max()), name
    theirs.zero_grad()


def test_decode_is_that_of_transformers_cache(theirs, ours):
    """A prompt in two pieces, then token by token, each library with its own cache."""
    tokens = torch.randint(43, (2, 76), generator=torch.Generator().manual_seed(2))
    engine = Engine(copy.deepcopy(ours), slots=2, chunk=40)
    with torch.no_grad():
        first = theirs(tokens[:, :40], use_cache=True)
        second = theirs(tokens[:, 40:70], past_key_values=first.past_key_values, use_cache=True)
        found = engine.prefill(tokens[:, :70].tolist())
        assert (found - second.logits[:, -1]).abs().max() < 1e-4
        for at in range(70, 76):
            step = theirs(tokens[:, at : at + 1], past_key_values=second.past_key_values, use_cache=True)
            found = engine.decode(tokens[:, at].tolist())
            assert (found - step.logits[:, -1]).abs().max() < 1e-4


def test_released_tensors_go_out_as_they_came(theirs, ours, tmp_path: Path):
    expected, found = released(tmp_path / "theirs", theirs), to_release(ours)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    folder = tmp_path / "ours"
    folder.mkdir()
    write_release(ours, folder)
    again = kimi.KimiLinearForCausalLM.from_pretrained(folder)
    for (name, a), b in zip(theirs.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_weights_of_reads_go_with_them(ours):
    block = replace(CONFIG, residual=ResidualConfig(rule="block", block_size=4))
    model = build(block)
    torch.nn.init.normal_(model.stream.query)
    torch.nn.init.normal_(model.stream.key_gain)
    tensors = to_release(model)
    assert tensors["model.layers.2.self_attention_res_proj.weight"].shape == (1, 24)
    again = build(block, seed=1)
    load_release(again, tensors)
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(UserError, match=r"residual.rule must be full or block"):
        load_release(build(CONFIG), tensors)
    load_release(again, to_release(ours))
    assert torch.equal(again.stream.query, model.stream.query)


def test_a_served_model_goes_out_too():
    """With its gain in the queries, and the same reads."""
    model = build(replace(CONFIG, residual=ResidualConfig(rule="block", block_size=4)))
    torch.nn.init.normal_(model.stream.query)
    torch.nn.init.normal_(model.stream.key_gain)
    before = to_release(model)
    after = to_release(Engine(model).model)
    assert after.keys() == before.keys()
    for name in (name for name in before if name.endswith("res_proj.weight")):
        folded = before[name] * before[name.replace("proj", "norm")]
        assert torch.equal(after[name] * after[name.replace("proj", "norm")], folded)


def test_damaged_weights_are_named(ours):
    tensors = to_release(ours)
    for change, message in (
        ({"model.norm.weight": None}, "model.norm.weight is missing"),
        ({"model.layers.1.block_sparse_moe.experts.3.w1.weight": torch.zeros(2, 2)}, "experts.3.w1.weight has shape"),
        ({"model.layers.9.self_attn.q_proj.weight": torch.zeros(1)}, "layers.9.self_attn.q_proj.weight is no weight"),
    ):
        broken = {name: value for name, value in {**tensors, **change}.items() if value is not None}
        with pytest.raises(UserError, match=message):
            load_release(build(CONFIG), broken)


@pytest.mark.parametrize("size", [kimi_linear_48b, kimi_k3])
def test_published_configs_go_out_and_back(size):
    config = size()
    values = release_config(config)
    again = config_from_release(values)
    assert replace(again, balance=config.balance, residual=config.residual) == config
    assert again.residual.block_size == config.residual.block_size


def test_configs_that_are_not_built_are_refused():
    values = release_config(CONFIG)
    for change, message in (
        ({"num_expert_group": 8}, "num_expert_group is 8"),
        ({"v_head_dim": 16}, "heads of different number or width"),
        ({"linear_attn_config": values["linear_attn_config"] | {"full_attn_layers": [2, 5]}}, "full_attn_layers"),
    ):
        with pytest.raises(UserError, match=message):
            config_from_release(values | change)
