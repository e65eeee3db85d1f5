from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from fathom.errors import UserError
from fathom.models.accounting import activation_bytes, assert_parameters, flops_per_token, parameters
from fathom.models.config import ResidualConfig
from fathom.models.kimi_config import KimiConfig
from fathom.models.kimi_linear import KimiLinear, build
from fathom.models.transformer import Transformer

SMALL = KimiConfig(
    vocab_size=41, context=16, dim=24, num_layers=4, num_heads=2, head_dim=8, mlp_dim=20, kv_rank=12, shared_key_dim=4,
    mla_every=2, num_experts=4, expert_dim=10, head_std=1.0,
)  # fmt: skip
K3_OPTIONS = {
    "full_rank_gate": True, "decay_floor": -5.0, "query_rank": 10, "mla_gate": True, "shared_experts": 2, "latent_dim": 12,
    "mlp_activation": "situ", "balance": "quantile", "routed_scaling": 1.0,
}  # fmt: skip


def tokens(config: KimiConfig = SMALL, seed: int = 3) -> torch.Tensor:
    return torch.randint(1, config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(model: Transformer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    batch = tokens()
    loss = model.loss(batch[:, :-1], batch[:, 1:])
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("options", [{}, K3_OPTIONS])
@pytest.mark.parametrize(
    "residual", [ResidualConfig(rule="full", eps=0.0), ResidualConfig(rule="block", block_size=3, eps=0.0)]
)
def test_zero_queries_are_prenorm(residual: ResidualConfig, options: dict):
    config = replace(SMALL, norm_eps=0.0, **options)
    twin = build(replace(config, residual=ResidualConfig(rule="prenorm"))).double()
    expected_loss, expected = loss_and_gradients(twin)
    loss, gradients = loss_and_gradients(build(replace(config, residual=residual)).double())
    assert abs(loss - expected_loss) <= 1e-12
    assert gradients.keys() - expected.keys() == {"stream.query", "stream.key_gain"}
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (gradients[name] - gradient).norm() <= 1e-11 * gradient.norm(), name


def test_a_decoder_layer_is_as_the_config_says():
    model = build(replace(SMALL, num_layers=7, mla_every=3, dense_layers=2))
    assert isinstance(model, KimiLinear)
    kinds = [type(sublayer).__name__ for sublayer in model.sublayers]
    assert kinds[0::2] == ["KDA", "KDA", "MLA", "KDA", "KDA", "MLA", "MLA"]
    assert kinds[1::2] == ["Dense"] * 2 + ["MoE"] * 5


@pytest.mark.parametrize("options", [{}, K3_OPTIONS])
def test_counts_are_those_of_the_built_model(options: dict):
    config = replace(SMALL, residual=ResidualConfig(rule="block", num_blocks=3), **options)
    assert assert_parameters(build(config)) == sum(parameters(config).values())
    flops = flops_per_token(config, 16)
    assert flops["mlp"] == 2 * sum(
        parameters(config)[name] * (0.5 if name == "routed experts" else 1)
        for name in ("dense mlp", "routed experts", "shared experts", "router", "latent")
    )


def test_activation_bytes_are_what_autograd_saves():
    """Counted on fake tensors, whose experts have even loads: as many bytes as any loads take."""
    model, config, batch = build(SMALL), SMALL, torch.zeros(2, 16, dtype=torch.int64)
    parameter_storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in parameter_storages and tensor.numel():
            saved[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model.loss(batch, batch)
    assert sum(activation_bytes(config, 2, 16).values()) == sum(t.untyped_storage().nbytes() for t in saved.values())
    del loss


class LikeCuda(TorchFunctionMode):
    """Of CUDA's autocast what a CPU's does not do: sums come in float32 unless they are told otherwise."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        is_sum = getattr(function, "__name__", "") == "sum" and "dtype" not in (kwargs or {})
        return result.float() if is_sum and torch.is_autocast_enabled("cpu") else result


@pytest.mark.parametrize("options", [{}, K3_OPTIONS])
def test_what_a_sublayer_writes_has_the_stream_s_dtype(options: dict):
    """Kernels of the residual path refuse another."""
    config = replace(SMALL, document_mask=True, residual=ResidualConfig(rule="block", num_blocks=3), **options)
    model, found = build(config, end_of_text=0), []
    for sublayer in model.sublayers:
        sublayer.register_forward_hook(lambda module, _, output: found.append((type(module).__name__, output.dtype)))
    with torch.autocast("cpu", torch.bfloat16), LikeCuda():
        model(tokens()[:, :-1])
    assert len(found) == 8 and {dtype for _, dtype in found} == {torch.bfloat16}, found


def test_documents_do_not_see_each_other():
    model = build(replace(SMALL, document_mask=True), end_of_text=0).double()
    batch = tokens()[:, :12]
    batch[:, 4] = 0
    alone = model(batch[:, 5:])
    together = model(batch)
    torch.testing.assert_close(together[:, 5:], alone)
    batch[:, 1] = 7
    torch.testing.assert_close(model(batch)[:, 5:], alone)


def test_no_token_sees_a_later_one():
    model, batch = build(SMALL).double(), tokens()
    before = model(batch[:, :-1])
    batch[:, 9] = (batch[:, 9] + 5) % 41
    after = model(batch[:, :-1])
    torch.testing.assert_close(after[:, :9], before[:, :9])
    assert not torch.allclose(after[:, 9:], before[:, 9:])


def test_the_first_decays_are_as_published_with_and_without_a_floor():
    for floor in (None, -5.0):
        model = build(replace(SMALL, dim=64, num_heads=8, decay_floor=floor))
        decay = model.sublayers[0].log_decay(torch.zeros(1, 1, 64))
        assert decay.max() < -0.9e-3 and decay.min() > -1.61
        assert decay.min() < -0.3 and decay.max() > -0.02


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"active_experts": 5}, "model.active_experts is 5: there are 4 model.num_experts"),
        ({"dim": 25, "head_dim": None}, "model.dim 25 is not a multiple of model.num_heads 2"),
        ({"num_kv_heads": 1}, "model.num_kv_heads"),
        ({"rope_base": 5.0}, "model.rope_base"),
        ({"num_experts": 0}, "model.num_experts"),
        ({"kv_rank": 0}, "model.kv_rank"),
        ({"conv_size": 1}, "model.conv_size"),
        ({"latent_dim": 0}, "model.latent_dim"),
        ({"shared_experts": -1}, "model.shared_experts"),
        ({"dense_layers": 9}, "model.dense_layers"),
        ({"decay_floor": 1.0}, "model.decay_floor"),
        ({"routed_scaling": float("nan")}, "model.routed_scaling"),
        ({"balance": "quantile", "active_experts": 4}, "model.balance quantile"),
        ({"balance": "even"}, "model.balance is 'even'"),
        ({"mlp_activation": "gelu"}, "model.mlp_activation is 'gelu'"),
        ({"residual": ResidualConfig(rule="value_residual")}, "residual.rule value_residual"),
    ],
)
def test_bad_settings_are_one_line_that_names_the_field(options: dict, field: str):
    with pytest.raises(UserError) as refused:
        replace(SMALL, **options)
    assert field in str(refused.value) and "\n" not in str(refused.value)
