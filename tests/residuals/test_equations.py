"""Each rule against its equation, written out literally, and against what it is at its published initialisation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fathom.block import BlockAttnRes
from fathom.full import FullAttnRes
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.layers import AttentionInput
from fathom.models.transformer import Transformer
from fathom.residuals.mhc import sinkhorn
from fathom.stream import PreNorm
from tests.residuals.zoo import CASES, D, L, config, network, run, stream_of

EMBEDDING = torch.randn(2, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
MODEL = {"vocab_size": 37, "context": 12, "dim": 16, "num_layers": 3, "num_heads": 2, "head_std": 1.0, "norm_eps": 0.0}


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def check(stream: Any, expected: Tensor) -> None:
    torch.testing.assert_close(run(stream, network(), EMBEDDING), expected, rtol=1e-11, atol=1e-11)


def f(site: int, x: Tensor) -> Tensor:
    """Sublayer ``site``, its norm included."""
    sublayer = network()[site]
    return sublayer(sublayer.norm(x))


# What the network is before training ---------------------------------------------------------------------------------

PRENORM_AT_FIRST = [
    "full input query", "full no query", "full sigmoid", "full no key norm", "full heads", "block heads", "block sigmoid",
    "block no key norm", "block embedding inside", "block embedding inside, no query", "denseformer", "laurel", "muddformer",
    "hyper_connections", "hyper_connections static", "mrla", "mrla heads", "delta", "delta block", "lr_attnres",
    "lr_attnres sliced", "mhar", "mhar block",
]  # fmt: skip


def loss_and_gradients(residual: ResidualConfig, change: Any = None) -> tuple[Tensor, dict[str, Tensor]]:
    model = Transformer(ModelConfig(**MODEL, residual=residual)).double()
    if change is not None:
        with torch.no_grad():
            change(model.stream)
    tokens = torch.randint(37, (2, 13), generator=torch.Generator().manual_seed(3))
    loss = model.loss(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if not n.startswith("stream.")}  # type: ignore[misc]


def assert_prenorm(residual: ResidualConfig, change: Any = None) -> None:
    expected_loss, expected = loss_and_gradients(ResidualConfig(rule="prenorm"))
    loss, gradients = loss_and_gradients(residual, change)
    assert abs(loss - expected_loss) < 1e-12
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-11 * gradient.norm(), name


@pytest.mark.parametrize("case", PRENORM_AT_FIRST)
def test_is_prenorm_at_first(case: str) -> None:
    """Loss and every gradient of the decoder, exactly so with epsilons of zero: means and sums differ by a factor."""
    assert_prenorm(config(case, eps=0.0))


@pytest.mark.parametrize(
    "case", [case for case in CASES if case not in [*PRENORM_AT_FIRST, "prenorm", "full", "block"]]
)
def test_all_others_are_not(case: str) -> None:
    loss, _ = loss_and_gradients(config(case, eps=0.0))
    assert abs(loss - loss_and_gradients(ResidualConfig(rule="prenorm"))[0]) > 1e-3


def test_rezero_is_the_identity_at_first() -> None:
    check(stream_of("rezero"), EMBEDDING)
    assert_prenorm(config("rezero"), lambda stream: stream.alpha.fill_(1))


def test_layerscale_starts_small_by_depth() -> None:
    assert [stream_of("layerscale", length=n).scale[0, 0].item() for n in (36, 38, 48, 50)] == pytest.approx(
        [0.1, 1e-5, 1e-5, 1e-6]
    )
    assert_prenorm(ResidualConfig(rule="layerscale", init=1.0))


def test_value_residual_starts_at_halves_and_own_values_alone_are_prenorm() -> None:
    assert (stream_of("value_residual").value_mix == 0.5).all()

    def own(stream: Any) -> None:
        stream.value_mix[:, 0], stream.value_mix[:, 1] = 0, 1

    assert_prenorm(config("value_residual"), own)


@pytest.mark.parametrize("case", ["mhc", "mhc_lite"])
def test_mhc_with_equal_biases_is_prenorm(case: str) -> None:
    """Equal streams stay equal under any doubly stochastic mix."""

    def even(stream: Any) -> None:
        n = stream.num_streams
        stream.bias[:, : 2 * n] = 0
        stream.bias[:, 2 * n :] = torch.randn(stream.bias[:, 2 * n :].shape)

    assert_prenorm(config(case, eps=0.0), even)


def test_embedding_inside_one_block_is_prenorm_whatever_the_queries() -> None:
    stream = stream_of("block embedding inside", random=1.0, block_size=L)
    check(stream, run(PreNorm(L, D), network(), EMBEDDING))


# Equations -----------------------------------------------------------------------------------------------------------


def test_simple_rules_by_hand() -> None:
    streams = {rule: stream_of(rule, random=0.3) for rule in ("rezero", "layerscale", "laurel")}
    expected = dict.fromkeys(streams, EMBEDDING)
    for site in range(L):
        outputs = {rule: f(site, h) for rule, h in expected.items()}
        alpha, beta = streams["laurel"].weight[site]
        h = expected["laurel"]
        low_rank = h @ streams["laurel"].down_map[site] @ streams["laurel"].up_map[site]
        expected = {
            "rezero": expected["rezero"] + streams["rezero"].alpha[site] * outputs["rezero"],
            "layerscale": expected["layerscale"] + outputs["layerscale"] @ streams["layerscale"].scale[site].diag(),
            "laurel": alpha * outputs["laurel"] + beta * (h + low_rank),
        }
    for rule, stream in streams.items():
        check(stream, expected[rule])


def test_laurel_starts_with_orthonormal_columns() -> None:
    down = stream_of("laurel", rank=3).down_map[0]
    torch.testing.assert_close(down.T @ down, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("case", ["highway", "highway scalar"])
def test_highway_by_hand(case: str) -> None:
    stream, h = stream_of(case, random=0.3), EMBEDDING
    for site in range(L):
        gate = 1 / (1 + torch.exp(-(h @ stream.transform_gate[site] + stream.bias[site])))
        h = (1 - gate) * h + gate * f(site, h)
    check(stream, h)
    assert torch.sigmoid(stream_of(case).bias).max() < 0.12


def test_post_norm_rules_by_hand() -> None:
    """The sublayer's own norms are the norms after; DeepNorm's output reaches the final norm un-normed."""
    sublayers, alpha = network(), (2 * (L / 2)) ** 0.25
    total = EMBEDDING
    for sublayer in sublayers:
        h = sublayer.norm(total)
        total = alpha * h + sublayer(h)
    check(stream_of("deepnorm"), total)

    keel, h = stream_of("keel", random=0.3), EMBEDDING
    for site in range(L):
        h = rms(L * h + f(site, h)) * keel.post_norm[site]
    check(keel, h)

    siamese, post, pre = stream_of("siamesenorm", random=0.3), EMBEDDING, EMBEDDING
    for site, sublayer in enumerate(sublayers):
        u = rms(post) * siamese.post_norm[site]
        y = sublayer(u + sublayer.norm(pre))
        post, pre = u + y / (2 * [1, 1, 2, 2, 3, 3][site]) ** 0.5, pre + y
    check(siamese, rms(post) * siamese.post_norm[L] + pre)


def test_denseformer_by_hand() -> None:
    stream = stream_of("denseformer", random=0.3)
    rows = [stream.mix[0:2], stream.mix[2:5], stream.mix[5:9]]
    states, y = [EMBEDDING], EMBEDDING
    for layer, row in enumerate(rows):
        y = y + f(2 * layer, y)
        states.append(y + f(2 * layer + 1, y))
        y = sum(weight * state for weight, state in zip(row, states, strict=True))  # type: ignore[assignment]
    check(stream, y)


def test_value_residual_by_hand() -> None:
    """Each decoder layer's own weights, the first layer's values, and PreNorm for all else."""
    stream, sublayers, h = stream_of("value_residual", random=0.3), network(), EMBEDDING
    first = sublayers[0].norm(h) @ sublayers[0].matrix
    for site, sublayer in enumerate(sublayers):
        x = sublayer.norm(h)
        output = torch.tanh(x @ sublayer.matrix)
        if site in (2, 4):
            mine, own = stream.value_mix[site // 2 - 1]
            output = torch.tanh(mine * first + own * (x @ sublayer.matrix))
        h = h + output
    check(stream, h)


def test_muddformer_by_hand() -> None:
    stream, sublayers = stream_of("muddformer", random=0.3), network()
    states = [EMBEDDING]
    query = key = value = residual = EMBEDDING
    for layer in range(3):
        attention, mlp = sublayers[2 * layer], sublayers[2 * layer + 1]
        x = AttentionInput(attention.norm(query), attention.norm(key), attention.norm(value))
        hidden = residual + (attention(x) if layer else attention(attention.norm(residual)))
        hidden = hidden + mlp(mlp.norm(hidden))
        states.append(hidden)
        scores = F.gelu(rms(hidden) @ stream.hidden_gate[layer]) @ stream.weight_gate[layer]
        ways = []
        for way, constant in enumerate(stream.constant[layer]):
            weights = [scores[..., way * len(constant) + j] + constant[j] for j in range(len(constant))]
            ways.append(sum(w[..., None] * s for w, s in zip(weights, states, strict=True)))
        query, key, value, residual = ways if len(ways) == 4 else (None, None, None, ways[0])  # type: ignore[assignment]
    check(stream, residual)


def test_hyper_connections_by_hand() -> None:
    """Token by token, with the matrices of the paper: A_m, A_r, B."""
    stream = stream_of("hyper_connections", random=0.3)
    out = run(stream, network(), EMBEDDING)
    for b, t in [(0, 0), (1, 2)]:
        H = EMBEDDING[b, t].repeat(4, 1)
        for site in range(L):
            dynamic = torch.tanh(rms(H) @ stream.gate[site])
            a_m = stream.read_weight[site] + stream.scale[site, 0] * dynamic[:, 0]
            a_r = stream.mix[site] + stream.scale[site, 0] * dynamic[:, 2:]
            beta = stream.weight[site] + stream.scale[site, 1] * dynamic[:, 1]
            H = a_r.T @ H + torch.outer(beta, f(site, a_m @ H))
        torch.testing.assert_close(out[b, t], H.sum(0), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", ["mhc", "mhc_lite"])
def test_mhc_by_hand_and_doubly_stochastic(case: str) -> None:
    stream = stream_of(case, random=0.3, num_streams=3)
    out, n = run(stream, network(), EMBEDDING), 3
    b, t = 1, 1
    H = EMBEDDING[b, t].repeat(n, 1)
    for site in range(L):
        scores = rms(H.flatten()) @ stream.gate[site]
        pre, post, mix = scores.split((n, n, len(scores) - 2 * n))
        bias_pre, bias_post, bias_mix = stream.bias[site].split((n, n, len(scores) - 2 * n))
        s = stream.scale[site]
        read, write = torch.sigmoid(s[0] * pre + bias_pre), 2 * torch.sigmoid(s[1] * post + bias_post)
        logits = s[2] * mix + bias_mix
        if case == "mhc":
            matrix = logits.view(n, n).exp()
            for _ in range(20):
                matrix = matrix / matrix.sum(0, keepdim=True)
                matrix = matrix / matrix.sum(1, keepdim=True)
        else:
            matrix = torch.zeros(n, n, dtype=torch.float64)
            orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
            for weight, order in zip(logits.softmax(0), orders, strict=True):
                for row, column in enumerate(order):
                    matrix[row, column] += weight
        torch.testing.assert_close(matrix.sum(1), torch.ones(n, dtype=torch.float64))
        nearly = 1e-2 if case == "mhc" else 1e-12  # 20 rounds end on the rows; lite is exact
        torch.testing.assert_close(matrix.sum(0), torch.ones(n, dtype=torch.float64), rtol=nearly, atol=nearly)
        H = matrix @ H + torch.outer(write, f(site, read @ H))
    torch.testing.assert_close(out[b, t], H.sum(0), rtol=1e-10, atol=1e-10)


def test_sinkhorn_of_extremes() -> None:
    identity = sinkhorn(-800 * (1 - torch.eye(4)))
    torch.testing.assert_close(identity, torch.eye(4))
    torch.testing.assert_close(sinkhorn(torch.zeros(3, 3)), torch.full((3, 3), 1 / 3))


@pytest.mark.parametrize("case", ["ddl", "ddl one"])
def test_ddl_by_hand(case: str) -> None:
    stream = stream_of(case, random=0.3)
    out, n = run(stream, network(), EMBEDDING), stream.num_streams
    b, t = 0, 2
    X = EMBEDDING[b, t].repeat(n, 1).T  # [D, n]
    for site in range(L):
        norm = network()[site].norm
        x = X @ stream.read_weight[site]
        beta = 2 * torch.sigmoid(norm(x) @ stream.beta_gate[site, :, 0] + stream.bias[site, 0])
        value = 4 * torch.sigmoid(x @ stream.value_gate[site])
        output = f(site, x)
        k = output / output.norm()
        X = (torch.eye(D, dtype=torch.float64) - beta * torch.outer(k, k)) @ X + beta * torch.outer(k, value)
    torch.testing.assert_close(out[b, t], X @ stream.read_weight[L], rtol=1e-11, atol=1e-11)


def test_mrla_by_hand() -> None:
    stream, heads = stream_of("mrla heads", random=0.3), 2

    def describe(source: Tensor, kernel: Tensor) -> Tensor:
        padded = F.pad(source, (1, 1))
        convolved = sum(kernel[i] * padded[..., i : i + D] for i in range(3))
        return torch.sigmoid(convolved).unflatten(-1, (heads, -1))  # type: ignore[union-attr]

    sources = [EMBEDDING]
    for site in range(L + 1):
        query, h = describe(sources[-1], stream.query_kernel[site]), torch.zeros_like(EMBEDDING)
        for i, source in enumerate(sources):
            weight = (query * describe(source, stream.key_kernel[i])).mean(-1, keepdim=True)
            h = h + (weight * (stream.scale[i] * source).unflatten(-1, (heads, -1))).flatten(-2)
        if site < L:
            sources.append(f(site, h))
    check(stream, h)


@pytest.mark.parametrize("case", ["delta", "delta block"])
def test_delta_by_hand(case: str) -> None:
    stream, size = stream_of(case, random=0.5), 1 if case == "delta" else 2
    outputs: list[Tensor] = []
    for site in range(L):
        sums = [sum(outputs[a : min(a + size, site)][1:], outputs[a]) for a in range(0, site, size)]
        sources = [EMBEDDING, *sums]
        query = stream.query[site] * (stream.key_gain[site] if case == "delta" else 1)
        weights = torch.stack([rms(s) @ query for s in sources]).softmax(0)
        h = (
            EMBEDDING
            + sum(outputs, torch.zeros(()))
            + sum(w[..., None] * s for w, s in zip(weights, sources, strict=True))
        )
        outputs.append(f(site, h))
    check(stream, EMBEDDING + sum(outputs, torch.zeros(())))


@pytest.mark.parametrize("case", ["lr_attnres", "lr_attnres sliced", "lr_attnres block"])
def test_lr_attnres_by_hand(case: str) -> None:
    stream, outputs, size = stream_of(case, random=0.5), [], 2 if case.endswith("block") else 1
    r = stream.key_dim
    for site in range(L + 1):
        groups = [outputs[a : min(a + size, site)] for a in range(0, site, size)]
        sources = [EMBEDDING, *(torch.stack(group).mean(0) for group in groups)]
        if case.endswith("sliced"):
            keys = [rms(s[..., -r:]) for s in sources]
        else:
            # A key is of the block's sum; epsilon apart, that is the key of its mean.
            sums = [EMBEDDING, *(torch.stack(group).sum(0) for group in groups)]
            keys = [rms(s) @ stream.key_map[n] for n, s in enumerate(sums)]
        weights = torch.stack([key @ stream.query[site] / r**0.5 for key in keys]).softmax(0)
        h = sum(w[..., None] * s for w, s in zip(weights, sources, strict=True))
        if site < L:
            outputs.append(f(site, h))  # type: ignore[arg-type]
    check(stream, h)  # type: ignore[arg-type]


# The switches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_switches_at_their_defaults_are_full_and_block(block_size: int) -> None:
    switched = stream_of("block heads", random=0.7, heads=1, block_size=block_size)
    plain = (FullAttnRes(L, D) if block_size == 1 else BlockAttnRes(L, D, block_size=block_size)).double()
    plain.load_state_dict(switched.state_dict())
    check(switched, run(plain, network(), EMBEDDING))
    for site in range(L + 1):
        assert switched.source_names(site) == plain.source_names(site)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("full ")])
def test_full_switches_by_hand(case: str) -> None:
    stream = stream_of(case, random=0.5)
    sources, latest = [EMBEDDING], EMBEDDING
    for site in range(L + 1):
        seen = sources if "window" not in case else [sources[0], *sources[1:][-2:]]
        heads = 4 if "heads" in case else 1
        if "no query" in case:
            scores = torch.stack([s.expand(2, 3)[..., None] for s in stream.score[site]])
        else:
            query = rms(latest) @ stream.query_gate[site] / stream.dim if "input" in case else stream.query[site]
            keys = seen if "no key norm" in case else [rms(s) * stream.key_gain[site] for s in seen]
            scores = torch.stack([(query * key).unflatten(-1, (heads, -1)).sum(-1) for key in keys])
        weights = torch.sigmoid(scores) if "sigmoid" in case else scores.softmax(0)
        latest = sum(
            (w[..., None] * s.unflatten(-1, (heads, -1))).flatten(-2) for w, s in zip(weights, seen, strict=True)
        )
        if site < L:
            sources.append(f(site, latest))
    check(stream, latest)


def test_embedding_inside_the_first_block_by_hand() -> None:
    stream, outputs = stream_of("block embedding inside", random=0.5), []
    for site in range(L + 1):
        terms = [EMBEDDING, *outputs]
        sources = [sum(terms[1:3], terms[0])] + [sum(terms[a + 1 : a + 3][1:], terms[a + 1]) for a in range(2, site, 2)]
        query = stream.query[site] * stream.key_gain[site]
        weights = torch.stack([rms(s) @ query for s in sources]).softmax(0)
        h = sum(w[..., None] * s for w, s in zip(weights, sources, strict=True))
        assert len(stream.source_names(site)) == len(sources)
        if site < L:
            outputs.append(f(site, h))
    check(stream, h)


def test_mhar_is_full_with_four_heads() -> None:
    mhar, switched = stream_of("mhar", random=0.7), stream_of("full heads", random=0.7)
    check(mhar, run(switched, network(), EMBEDDING))


def test_a_window_that_holds_all_is_full() -> None:
    wide = stream_of("full window", random=0.5, window=L)
    full = FullAttnRes(L, D).double()
    full.load_state_dict(wide.state_dict())
    check(wide, run(full, network(), EMBEDDING))


# The attention's side ------------------------------------------------------------------------------------------------


def test_attention_takes_three_inputs_and_the_first_values() -> None:
    model = Transformer(ModelConfig(**{**MODEL, "num_kv_heads": 1})).double()
    attention, context = model.sublayers[0], model._context(torch.zeros(1, 5, dtype=torch.int64))
    query, key, value = torch.randn(3, 1, 5, 16, dtype=torch.float64)
    together = attention(query, context)
    torch.testing.assert_close(attention(AttentionInput(query, query, query), context), together, rtol=0, atol=0)
    torch.testing.assert_close(attention(AttentionInput(query, query.clone(), query), context), together)
    apart = attention(AttentionInput(query, key, value), context)
    w_query, w_key, w_value = attention.qkv.weight.split((16, 8, 8))
    projected = torch.cat((query @ w_query.T, key @ w_key.T, value @ w_value.T), dim=-1)
    attention.qkv.forward = lambda x: projected
    torch.testing.assert_close(apart, attention(query, context))


def test_value_residual_mixes_the_first_layers_values() -> None:
    model = Transformer(ModelConfig(**MODEL, residual=config("value_residual"))).double()
    attention, context = model.sublayers[0], model._context(torch.zeros(1, 5, dtype=torch.int64))
    x, first = torch.randn(1, 5, 16, dtype=torch.float64), torch.randn(1, 2, 5, 8, dtype=torch.float64)
    output, own = attention(AttentionInput(x, x, x, hand_over=True), context)
    mixed = attention(AttentionInput(x, x, x, first=first, mix=torch.tensor([0.3, 0.6])), context)
    alone = attention(AttentionInput(x, x, x, first=first, mix=torch.tensor([1.0, 0.0])), context)
    torch.testing.assert_close(mixed, 0.3 * alone + 0.6 * output)  # attention is linear in its values
    assert own.shape == first.shape
    seen = []
    model.hidden(torch.zeros(1, 5, dtype=torch.int64), lambda site, state, out: seen.append(state.values))
    assert seen[0] is None and all(torch.equal(values, seen[1]) for values in seen[1:])
