from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fathom.errors import UserError
from fathom.models.accounting import (
    activation_bytes,
    assert_parameters,
    flops_per_token,
    parameters,
    source_counts,
    state_bytes,
)
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.layers import document_mask, rotary_table, rotate
from fathom.models.transformer import Transformer, initialize

SMALL = {"vocab_size": 53, "context": 16, "dim": 24, "num_layers": 3, "num_heads": 4}
RULES = {
    "prenorm": ResidualConfig(rule="prenorm"),
    "full": ResidualConfig(rule="full"),
    "full single": ResidualConfig(rule="full", schedule="single_pass"),
    "block": ResidualConfig(rule="block", num_blocks=2),
    "block odd": ResidualConfig(rule="block", block_size=5),
    "block single": ResidualConfig(rule="block", num_blocks=3, schedule="single_pass", gain=False),
}


def build(residual: ResidualConfig, **options) -> Transformer:
    return Transformer(ModelConfig(**{**SMALL, **options}, residual=residual), end_of_text=0).double()


def loss_and_gradients(model: Transformer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    tokens = torch.randint(SMALL["vocab_size"], (2, 17), generator=torch.Generator().manual_seed(3))
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if not name.startswith("stream.")}
    return loss.detach(), gradients


@pytest.mark.parametrize("rule", [name for name in RULES if name != "prenorm"])
@pytest.mark.parametrize(("eps", "bound"), [(0.0, 1e-12), (1e-6, 2e-4)])
def test_zero_queries_are_prenorm(rule: str, eps: float, bound: float):
    """Loss and every gradient; with the real epsilon the mean's smaller RMS lets it bite a little sooner."""
    options = {"norm_eps": eps, "head_std": 1.0}
    residual = RULES[rule]
    residual = ResidualConfig(**{**vars(residual), "eps": eps})
    expected_loss, expected = loss_and_gradients(build(RULES["prenorm"], **options))
    loss, gradients = loss_and_gradients(build(residual, **options))
    assert abs(loss - expected_loss) <= bound
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= bound * gradient.norm(), name


@pytest.mark.parametrize("rule", RULES)
def test_nonzero_queries_change_the_network_and_schedules_do_not(rule: str):
    torch.manual_seed(5)
    model = build(RULES[rule], head_std=1.0)
    loss, _ = loss_and_gradients(model)
    if rule == "prenorm":
        return
    with torch.no_grad():
        model.stream.query.normal_()
    moved, gradients = loss_and_gradients(model)
    assert abs(moved - loss) > 1e-4
    other = "two_phase" if RULES[rule].schedule == "single_pass" else "single_pass"
    twin = build(ResidualConfig(**{**vars(RULES[rule]), "schedule": other}), head_std=1.0)
    twin.load_state_dict(model.state_dict())
    model.zero_grad()
    loss, gradients = loss_and_gradients(model)
    same, found = loss_and_gradients(twin)
    torch.testing.assert_close(same, loss, rtol=1e-12, atol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", ["prenorm", "full", "block"])
@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2}, {"qk_norm": False, "head_dim": 8, "mlp_dim": 40}])
def test_parameters_are_counted_exactly(rule: str, tie: bool, options: dict):
    model = build(RULES[rule], tie_embeddings=tie, **options)
    assert assert_parameters(model) == sum(p.numel() for p in model.parameters())
    depth = parameters(model.config)["residual rule"]
    assert depth == (0 if rule == "prenorm" else 2 * (2 * SMALL["num_layers"] + 1) * SMALL["dim"])


def test_flops_are_those_that_run():
    """Matrix products by torch's own counter: the score matrices there are whole squares, here the causal half."""
    config = ModelConfig(**SMALL, residual=RULES["prenorm"])
    # The counter knows the plain attention's products and not the CPU's fused kernel.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        Transformer(config)(torch.zeros(1, 16, dtype=torch.int64))
    rows = flops_per_token(config, 16)
    squares = rows["attention scores"] * 16 / ((16 + 1) / 2)
    assert counter.get_total_flops() == 16 * (sum(rows.values()) - rows["attention scores"] + squares)


def test_depth_attention_flops_follow_the_sources():
    config = ModelConfig(**SMALL, residual=ResidualConfig(rule="block", block_size=2))
    assert source_counts(config) == [1, 2, 2, 3, 3, 4, 4]
    assert flops_per_token(config, 16)["residual rule"] == 6 * 24 * 19
    assert flops_per_token(ModelConfig(**SMALL, residual=RULES["prenorm"]), 16)["residual rule"] == 0


@pytest.mark.parametrize("settings", [{"recompute": True}, {"schedule": "single_pass"}])
def test_how_reads_are_computed_changes_no_count(settings: dict):
    plain = ModelConfig(**SMALL, residual=RULES["block"])
    other = replace(plain, residual=replace(plain.residual, **settings))
    for count in (parameters, source_counts, state_bytes, lambda config: flops_per_token(config, 16)):
        assert count(other) == count(plain)


@pytest.mark.parametrize("rule", ["prenorm", "full", "block"])
def test_activation_bytes_are_what_autograd_saves(rule: str):
    config = ModelConfig(**SMALL, residual=RULES[rule])
    model = Transformer(config)
    tokens = torch.zeros(2, 16, dtype=torch.int64)
    parameter_storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in parameter_storages and tensor.numel():
            saved[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model.loss(tokens, tokens)
    rows = activation_bytes(config, 2, 16)
    # The rotary table is a buffer that both count; views of one storage count once.
    assert sum(rows.values()) == sum(t.untyped_storage().nbytes() for t in saved.values())
    del loss


def test_twins_share_every_weight():
    prenorm, block = build(RULES["prenorm"]), build(RULES["block"])
    mine = dict(block.named_parameters())
    for name, parameter in prenorm.named_parameters():
        assert torch.equal(parameter, mine[name]), name
    initialize(block, seed=1)
    assert not torch.equal(block.embedding.weight, prenorm.embedding.weight)


def test_the_initialisation_table_holds():
    config = ModelConfig(vocab_size=4096, dim=256, num_layers=8, num_heads=4, head_std=2.0, embedding_std=0.5)
    for name, parameter in Transformer(config).named_parameters():
        std = parameter.float().std().item()
        expected = {"embedding": 0.5, "head": 2 / 16, "qkv": 1 / 16, "gate_up": 1 / 16, "out": 1 / (16 * 4)}
        kind = name.split(".")[-2]
        if kind in expected:
            assert std == pytest.approx(expected[kind], rel=0.02), name
        elif kind == "down":
            assert std == pytest.approx((parameter.shape[1] * 16) ** -0.5, rel=0.02), name
        elif name == "stream.query":
            assert parameter.count_nonzero() == 0
        else:
            assert (parameter == 1).all(), name


def test_attention_is_causal_and_rotation_is_relative():
    model = build(RULES["block"], head_std=1.0).eval()
    tokens = torch.randint(SMALL["vocab_size"], (1, 16))
    logits = model(tokens)
    changed = tokens.clone()
    changed[0, 10:] = (changed[0, 10:] + 1) % SMALL["vocab_size"]
    torch.testing.assert_close(model(changed)[0, :10], logits[0, :10], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(model(changed)[0, 10:], logits[0, 10:])
    cos, sin = (table.double() for table in rotary_table(ModelConfig(context=64, dim=32, num_heads=2)))
    query, key = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    scores = [
        (rotate(query, cos[t : t + 1], sin[t : t + 1]) * rotate(key, cos[t - 5 : t - 4], sin[t - 5 : t - 4])).sum()
        for t in (5, 20, 60)
    ]
    torch.testing.assert_close(scores[0].expand(2), torch.stack(scores[1:]), rtol=1e-6, atol=1e-6)


def test_grouped_queries_are_repeated_keys():
    config = ModelConfig(**{**SMALL, "num_kv_heads": 2}, residual=RULES["prenorm"])
    model = Transformer(config, end_of_text=0).double()
    attention = model.sublayers[0]
    x, context = torch.randn(2, 16, 24, dtype=torch.float64), model._context(torch.zeros(2, 16, dtype=torch.int64))
    heads = attention.qkv(x).unflatten(-1, (8, 6)).transpose(1, 2)
    query, key, value = heads.split((4, 2, 2), dim=1)
    query = rotate(attention.query_norm(query), context.cos, context.sin)
    key = rotate(attention.key_norm(key), context.cos, context.sin)
    mixed = F.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), is_causal=True
    )
    expected = attention.out(mixed.transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, context), expected, rtol=1e-12, atol=1e-12)


def test_documents_do_not_see_each_other():
    # Token 0 ends a document and belongs to it.
    tokens = torch.tensor([[5, 6, 0, 7, 8, 0, 9]])
    document = [0, 0, 0, 1, 1, 1, 2]
    mask = document_mask(tokens, 0)[0, 0]
    for t in range(7):
        for s in range(7):
            assert mask[t, s] == (s <= t and document[s] == document[t])
    model = build(RULES["block"], document_mask=True, head_std=1.0)
    alone = model(tokens[:, 3:6])
    torch.testing.assert_close(model(tokens)[:, 3:6], alone, rtol=1e-6, atol=1e-6)


def test_depth_weights_are_returned_for_every_site():
    tokens = torch.randint(SMALL["vocab_size"], (2, 16))
    model = build(RULES["block"])
    weights = model.depth_weights(tokens)
    assert [len(w) for w in weights] == source_counts(model.config)
    for w in weights:
        torch.testing.assert_close(w, torch.full_like(w, 1 / len(w)), rtol=1e-12, atol=0)
    with pytest.raises(UserError, match="PreNorm does not attend"):
        build(RULES["prenorm"]).depth_weights(tokens)


def test_bf16_autocast_carries_a_bf16_stream():
    model = Transformer(ModelConfig(**SMALL, residual=RULES["block"]))
    dtypes = set()

    def observe(site, state, output):
        dtypes.add(model.stream.running_sum(state).dtype)

    with torch.autocast("cpu", torch.bfloat16):
        out = model.hidden(torch.zeros(1, 4, dtype=torch.int64), observe=observe)
        loss = model.loss(torch.zeros(1, 4, dtype=torch.int64), torch.ones(1, 4, dtype=torch.int64))
    assert dtypes == {torch.bfloat16}
    assert out.dtype == torch.bfloat16
    assert loss.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "model.dim is 0"),
        ({"num_layers": -1}, "model.num_layers is -1"),
        ({"dim": 25}, "not a multiple of model.num_heads"),
        ({"num_kv_heads": 3}, "not a multiple of model.num_kv_heads"),
        ({"num_kv_heads": 0}, "model.num_kv_heads is 0"),
        ({"head_dim": 3}, "head width is 3"),
        ({"norm_eps": -1e-6}, "model.norm_eps"),
        ({"rope_base": 0.0}, "model.rope_base"),
    ],
)
def test_impossible_models_are_refused_by_name(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        ModelConfig(**{**SMALL, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "densenet"}, "residual.rule is 'densenet'"),
        ({"rule": "full", "num_blocks": 4}, "residual.num_blocks belongs to rule block"),
        ({"rule": "prenorm", "block_size": 4}, "residual.block_size belongs to rule block"),
        ({"num_blocks": 4, "block_size": 4}, "both given"),
        ({"eps": -1.0}, "residual.eps"),
    ],
)
def test_impossible_residuals_are_refused_by_name(options: dict, message: str):
    with pytest.raises(UserError, match=message):
        ResidualConfig(**options)


def test_too_many_blocks_and_too_long_a_sequence_are_refused():
    with pytest.raises(UserError, match="num_blocks is 7"):
        build(ResidualConfig(rule="block", num_blocks=7))
    with pytest.raises(UserError, match="longer than model"):
        build(RULES["block"])(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(UserError, match="end_of_text"):
        Transformer(ModelConfig(**SMALL, document_mask=True))
