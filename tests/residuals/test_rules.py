"""What holds for every rule of the zoo: gradients, counts, initialisation, groups, dtypes, causality, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fathom.errors import UserError
from fathom.models.accounting import assert_parameters, flops_per_token, parameters, state_bytes
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.transformer import Transformer, initialize
from fathom.residuals import make_stream
from fathom.residuals.rule import Rule
from fathom.train.config import OptimConfig
from fathom.train.optimizers import make_optimizers, parameter_groups
from tests.residuals.zoo import CASES, RULES, D, L, config, network, run, stream_of

MODEL = {"vocab_size": 37, "context": 12, "dim": 16, "num_layers": 3, "num_heads": 2, "head_std": 1.0}


def build(case: str, seed: int = 0, **settings: Any) -> Transformer:
    return Transformer(ModelConfig(**{**MODEL, **settings}, residual=config(case)), seed=seed)


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case: str) -> None:
    """Of the output with respect to the embedding and every parameter of the rule, through sublayers that are not linear."""
    stream, sublayers = stream_of(case, random=0.3, length=4), network(4)
    embedding = torch.randn(1, 2, D, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in stream.named_parameters()]

    def output(embedding: Tensor, *values: Tensor) -> Tensor:
        with torch.nn.utils.stateless._reparametrize_module(stream, dict(zip(names, values, strict=True))):
            return run(stream, sublayers, embedding)

    inputs = (embedding, *(p.detach().clone().requires_grad_() for p in stream.parameters()))
    assert torch.autograd.gradcheck(output, inputs, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("case", [case for case in CASES if list(stream_of(case).parameters())])
def test_every_parameter_takes_part(case: str) -> None:
    """Away from its start, each parameter has a gradient somewhere; a site's row that has none is one that cannot matter."""
    stream, sublayers = stream_of(case, random=0.3), network()
    out = run(stream, sublayers, torch.randn(2, 3, D, dtype=torch.float64))
    gradients = torch.autograd.grad(out.pow(3).sum(), list(stream.parameters()))
    for (name, _), gradient in zip(stream.named_parameters(), gradients, strict=True):
        alone = name.startswith("score.") and gradient.numel() == 1  # the weight of one source is one
        assert gradient.count_nonzero() > 0 or alone, name
        assert gradient.isfinite().all(), name


def expected_count(rule: str, length: int, dim: int) -> int:
    """Parameters that each rule adds, in closed form, at its defaults."""
    sites, layers, n = length + 1, length // 2, 4
    rank, key, width = min(32, dim), min(64, dim), {8: 3, 64: 3, 256: 5}[dim]
    mudd = sum(c * i * (dim + c * i) + c * i for i in range(2, layers + 2) for c in [4 if i <= layers else 1])
    return {
        "prenorm": 0, "full": 2 * sites * dim, "block": 2 * sites * dim, "rezero": length, "layerscale": length * dim,
        "highway": length * dim * (dim + 1), "deepnorm": 0, "keel": length * dim, "siamesenorm": sites * dim,
        "denseformer": layers * (layers + 3) // 2, "laurel": length * (2 + 2 * rank * dim), "value_residual": 2 * (layers - 1),
        "muddformer": mudd, "hyper_connections": length * (2 * n + n * n + dim * (n + 2) + 2),
        "mhc": length * ((n * dim + 1) * (2 * n + n * n) + 3), "mhc_lite": length * ((n * dim + 1) * (2 * n + 24) + 3),
        "ddl": sites * n + length * (dim + 1 + n * dim), "mrla": sites * (2 * width + dim), "delta": 2 * length * dim,
        "lr_attnres": sites * key + sites * dim * key, "mhar": 2 * sites * dim,
    }[rule]  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("length", "dim"), [(6, 8), (8, 64), (4, 256)])
def test_parameters_are_those_of_the_formula(rule: str, length: int, dim: int) -> None:
    stream = make_stream(ResidualConfig(rule=rule), length, dim)
    assert sum(p.numel() for p in stream.parameters()) == expected_count(rule, length, dim)


@pytest.mark.parametrize("case", CASES)
def test_counts_agree_with_what_is_built(case: str) -> None:
    model = build(case)
    assert_parameters(model)
    assert parameters(model.config)["residual rule"] == sum(p.numel() for p in model.stream.parameters())
    flops = flops_per_token(model.config, 8)["residual rule"]
    assert flops == 0 if case == "prenorm" else flops > 0


@pytest.mark.parametrize(
    ("rule", "vectors"),
    [
        ("prenorm", 1), ("rezero", 1), ("highway", 1), ("deepnorm", 1), ("keel", 1), ("laurel", 1), ("siamesenorm", 2),
        ("value_residual", 2), ("hyper_connections", 4), ("mhc", 4), ("mhc_lite", 4), ("ddl", 4), ("full", 21), ("mhar", 21),
        ("delta", 22), ("denseformer", 12), ("block", 9),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dim", [32, 1024])
def test_state_is_counted_in_vectors(rule: str, vectors: int, dim: int) -> None:
    """20 sublayers, 10 decoder layers. DenseFormer's 11 hidden states and their mean; Delta's 21 sources and their sum."""
    shape = ModelConfig(dim=dim, num_layers=10, num_heads=1, residual=ResidualConfig(rule=rule))
    assert state_bytes(shape) == 2 * dim * vectors


@pytest.mark.parametrize("case", CASES)
def test_twins_share_weights_and_a_seed_decides_the_rest(case: str) -> None:
    model, twin = build(case), build("prenorm")
    weights = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    again = build(case)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with torch.no_grad():
        for parameter in again.stream.parameters():
            parameter += 1
    initialize(again, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("case", ["ddl", "lr_attnres", "muddformer"])
def test_random_parameters_follow_the_seed(case: str) -> None:
    drawn = {"ddl": "value_gate", "lr_attnres": "key_map", "muddformer": "hidden_gate.1"}[case]
    first, second = (build(case, seed=s, dim=64).stream.get_parameter(drawn) for s in (0, 1))
    assert not torch.equal(first, second)
    expected = 0.5 / 8 if case == "ddl" else 1 / 8
    assert first.std().item() == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_only_linear_maps_are_decayed(case: str, optimizer: str) -> None:
    model = build(case)
    groups = parameter_groups(model)
    kinds = {name: group for group, members in groups.items() for name, _ in members}
    assert kinds.keys() == {name for name, _ in model.named_parameters()}
    own = {name.split(".")[1]: group for name, group in kinds.items() if name.startswith("stream.")}
    assert {"down_map", "up_map", "key_map"} >= {name for name, group in own.items() if group == "map"}
    read_out = {
        "query",
        "key_gain",
        "query_gate",
        "gate",
        "transform_gate",
        "beta_gate",
        "value_gate",
        "hidden_gate",
        "weight_gate",
    }
    assert {name for name, group in own.items() if group == "depth"} == own.keys() & read_out
    optimizers = make_optimizers(model, OptimConfig(optimizer=optimizer, weight_decay=0.3, lr=0.5))  # type: ignore[arg-type]
    assert sum(len(g["params"]) for o in optimizers for g in o.param_groups) == len(kinds)
    group_of = {id(p): (o, g) for o in optimizers for g in o.param_groups for p in g["params"]}
    for name, parameter in model.stream.named_parameters():
        owner, group = group_of[id(parameter)]
        assert isinstance(owner, torch.optim.AdamW)
        assert group["weight_decay"] == (0.3 if name.split(".")[0].endswith("map") else 0)
        assert group["peak_lr"] == (0.128 / 16 if name.split(".")[0] in read_out else 0.5), name


@pytest.mark.parametrize("case", CASES)
def test_no_token_sees_its_future(case: str) -> None:
    model = build(case).double()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.stream.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    tokens = torch.randint(37, (2, 12), generator=generator)
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 37
    torch.testing.assert_close(model(changed)[:, :7], model(tokens)[:, :7], rtol=1e-11, atol=1e-11)
    assert not torch.allclose(model(changed)[:, 7:], model(tokens)[:, 7:])


@pytest.mark.parametrize("case", CASES)
def test_autocast_keeps_a_bf16_stream_near_the_exact_one(case: str) -> None:
    model, tokens, dtypes = build(case), torch.randint(37, (1, 6)), set()
    with torch.no_grad():
        exact = model.loss(tokens, tokens)
        with torch.autocast("cpu", torch.bfloat16):
            model.hidden(tokens, lambda site, state, output: dtypes.add(model.stream.running_sum(state).dtype))
            rough = model.loss(tokens, tokens)
    assert dtypes == {torch.bfloat16}
    assert abs(rough - exact) < 0.05 * exact


@pytest.mark.parametrize("case", CASES)
def test_states_are_values(case: str) -> None:
    """Running on twice from a kept state gives the same bits: no method changes one."""
    stream, sublayers = stream_of(case, random=0.3), network()
    state = stream.start(torch.randn(2, 3, D, dtype=torch.float64))
    for site in range(2):
        x, state = stream.read(state, site, sublayers[site].norm)
        state = stream.write(state, site, sublayers[site](x))

    def onwards(state: Any) -> Tensor:
        for site in range(2, L):
            x, state = stream.read(state, site, sublayers[site].norm)
            state = stream.write(state, site, sublayers[site](x))
        return stream.finish(state, lambda h: h)

    assert torch.equal(onwards(state), onwards(state))


@pytest.mark.parametrize("case", CASES)
def test_names_and_weights_agree_where_there_is_depth_attention(case: str) -> None:
    model, tokens = build(case), torch.randint(37, (2, 5))
    stream = model.stream
    counts = [len(stream.source_names(site)) for site in range(stream.num_sublayers + 1)]

    def check(site: int, state: Any, output: Any) -> None:
        if counts[site]:
            weights = stream.weights(state, site)
            assert weights.shape == (counts[site], 2, 5)
            torch.testing.assert_close(weights.sum(0), torch.ones(2, 5))
        else:
            with pytest.raises(UserError, match="does not attend over depth"):
                stream.weights(state, site)

    model.hidden(tokens, check)
    assert (max(counts) > 1) == (
        CASES[case]["rule"] in ("full", "block", "delta", "lr_attnres", "mhar") and "sigmoid" not in case
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "full", "num_blocks": 4}, "residual.num_blocks belongs to rule block, delta, lr_attnres or mhar, but"),
        ({"rule": "block", "window": 4}, "residual.window belongs to rule full, but residual.rule is block"),
        ({"rule": "full", "isolate_embedding": False}, "residual.isolate_embedding belongs to rule block"),
        ({"rule": "mhc", "dynamic": False}, "residual.dynamic belongs to rule hyper_connections"),
        ({"rule": "rezero", "alpha": 2.0}, "residual.alpha belongs to rule deepnorm or keel"),
        ({"rule": "prenorm", "num_streams": 4}, "residual.num_streams belongs to rule hyper_connections, mhc, "),
        ({"rule": "mhar", "key_norm": False}, "residual.key_norm belongs to rule full or block"),
        ({"rule": "full", "query": "none", "key_norm": False}, "residual.key_norm is given, but residual.query none"),
        ({"rule": "full", "query": "none", "heads": 2}, "residual.heads is given, but residual.query none has no query"),
        ({"rule": "delta", "num_blocks": 2, "block_size": 2}, "both given"),
        ({"rule": "keel", "alpha": float("nan")}, "residual.alpha is nan: it must be positive"),
        ({"rule": "mhar", "heads": 0}, "residual.heads is 0: it must be positive"),
        ({"rule": "mhc", "gain": False}, "residual.gain is of full, block, delta or mhar, but residual.rule is mhc"),
        ({"rule": "rezero", "schedule": "single_pass"}, "residual.schedule is of full or block"),
        ({"rule": "densenet"}, "residual.rule is 'densenet': it must be one of prenorm, full"),
    ],
)  # fmt: skip
def test_wrong_combinations_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ResidualConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "mhar", "heads": 3}, "heads is 3: it must divide the width, 8"),
        ({"rule": "mrla", "heads": 3}, "heads is 3: it must divide the width, 8"),
        ({"rule": "full", "heads": 16}, "heads is 16"),
        ({"rule": "laurel", "rank": 9}, "rank is 9: it must be between 1 and the width, 8"),
        ({"rule": "lr_attnres", "key_dim": 9}, "key_dim is 9"),
        (
            {"rule": "mhc_lite", "num_streams": 6},
            "num_streams is 6: mhc_lite mixes n! permutations and takes at most 5",
        ),
        ({"rule": "delta", "num_blocks": 7}, "num_blocks is 7"),
        ({"rule": "mhar", "block_size": 7}, "block_size is 7"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_stream(ResidualConfig(**settings), L, D)


def test_mrlas_heads_divide_any_width() -> None:
    heads = {dim: make_stream(ResidualConfig(rule="mrla"), L, dim).heads for dim in (8, 30, 64, 1000, 1024)}
    assert heads == {8: 1, 30: 1, 64: 2, 1000: 25, 1024: 32}


def test_value_residual_needs_pairs_of_sublayers() -> None:
    with pytest.raises(UserError, match="num_sublayers is 5: value residual needs pairs"):
        make_stream(ResidualConfig(rule="value_residual"), 5, D)


def test_every_rule_keeps_its_settings() -> None:
    """What the config says reaches the stream."""
    given = {
        "deepnorm": {"alpha": 3.0}, "keel": {"alpha": 5.0}, "layerscale": {"init": 0.25}, "laurel": {"rank": 2},
        "lr_attnres": {"key_dim": 5}, "mhc": {"num_streams": 3}, "mrla": {"heads": 4},
    }  # fmt: skip
    for rule, options in given.items():
        stream = make_stream(ResidualConfig(rule=rule, eps=1e-3, **options), L, D)  # type: ignore[arg-type]
        assert isinstance(stream, Rule) and stream.eps == 1e-3
        for name, value in options.items():
            assert getattr(stream, name) == value
    assert make_stream(ResidualConfig(rule="mhar", gain=False), L, D).source_names(1) == ["embedding", "output 1"]
    assert not hasattr(make_stream(ResidualConfig(rule="mhar", gain=False), L, D), "key_gain")
