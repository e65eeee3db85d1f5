"""Every stream against the plain equation, site by site, through sublayers that are anything but linear."""

import pytest
import torch
from torch import Tensor, nn

from fathom.block import BlockAttnRes, block_starts
from fathom.depth_attention import depth_attention
from fathom.errors import UserError
from fathom.full import FullAttnRes
from fathom.models.config import ResidualConfig
from fathom.stream import PreNorm, Stream

L, D = 6, 8


class Sublayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(D, D, dtype=torch.float64) / D**0.5)
        self.norm = nn.RMSNorm(D, eps=0.0, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.matrix)


def network(count: int = L) -> nn.ModuleList:
    torch.manual_seed(1)
    return nn.ModuleList(Sublayer() for _ in range(count))


def run(stream: Stream, sublayers: nn.ModuleList, embedding: Tensor) -> Tensor:
    state = stream.start(embedding)
    for site, sublayer in enumerate(sublayers):
        x, state = stream.read(state, site, sublayer.norm)
        state = stream.write(state, site, sublayer(x))
    return stream.finish(state, lambda h: h)


def with_parameters(stream: Stream, scale: float = 1.0) -> Stream:
    torch.manual_seed(2)
    stream.double()
    for parameter in stream.parameters():
        nn.init.normal_(parameter, std=scale)
    return stream


def full_by_equation(stream: FullAttnRes, sublayers: nn.ModuleList, embedding: Tensor) -> Tensor:
    """Eq. 4, literally."""
    outputs = [embedding]
    for site, sublayer in enumerate(sublayers):
        h = depth_attention(outputs, stream.query[site], stream.key_gain[site], eps=stream.eps)
        outputs.append(sublayer(sublayer.norm(h)))
    return depth_attention(outputs, stream.query[-1], stream.key_gain[-1], eps=stream.eps)


def block_by_equation(stream: BlockAttnRes, sublayers: nn.ModuleList, embedding: Tensor, starts: list[int]) -> Tensor:
    """Eq. 5 and 6, literally: sources rebuilt from all outputs at every site."""
    outputs: list[Tensor] = []
    ends = [*starts[1:], len(sublayers)]

    def sources(site: int) -> list[Tensor]:
        sums = [sum(outputs[a : min(b, site)][1:], outputs[a]) for a, b in zip(starts, ends, strict=True) if a < site]
        return [embedding, *sums]

    for site, sublayer in enumerate(sublayers):
        h = depth_attention(sources(site), stream.query[site], stream.key_gain[site], eps=stream.eps)
        outputs.append(sublayer(sublayer.norm(h)))
    return depth_attention(sources(len(sublayers)), stream.query[-1], stream.key_gain[-1], eps=stream.eps)


def assert_same(first: Tensor, second: Tensor, parameters: list[Tensor], tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance)
    cotangent = torch.linspace(-1, 1, first.numel(), dtype=first.dtype).reshape(first.shape)
    gradients = [torch.autograd.grad(out, parameters, cotangent, allow_unused=True) for out in (first, second)]
    for a, b in zip(*gradients, strict=True):
        zero = torch.zeros(())
        torch.testing.assert_close(
            zero if a is None else a, zero.expand_as(a) if b is None and a is not None else (zero if b is None else b),
            rtol=tolerance, atol=tolerance, check_dtype=False,
        )  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 6, None])
def test_full_equals_the_equation_at_every_chunk(chunk: int | None):
    stream, sublayers = with_parameters(FullAttnRes(L, D, chunk=chunk)), network()
    embedding = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    parameters = [embedding, *stream.parameters(), *sublayers.parameters()]
    assert_same(run(stream, sublayers, embedding), full_by_equation(stream, sublayers, embedding), parameters)


@pytest.mark.parametrize("schedule", ["two_phase", "single_pass"])
@pytest.mark.parametrize(
    ("length", "setting", "starts"),
    [
        (6, {"block_size": 1}, [0, 1, 2, 3, 4, 5]),
        (6, {"block_size": 2}, [0, 2, 4]),
        (6, {"block_size": 3}, [0, 3]),
        (7, {"block_size": 3}, [0, 3, 6]),
        (6, {"num_blocks": 1}, [0]),
        (7, {"num_blocks": 3}, [0, 3, 5]),
        (1, {"num_blocks": 1}, [0]),
    ],
)
def test_block_equals_the_equation(schedule, length: int, setting: dict, starts: list[int]):
    stream = with_parameters(BlockAttnRes(length, D, schedule=schedule, **setting))
    sublayers = network(length)
    embedding = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    parameters = [embedding, *stream.parameters(), *sublayers.parameters()]
    assert_same(run(stream, sublayers, embedding), block_by_equation(stream, sublayers, embedding, starts), parameters)


def test_blocks_of_one_are_full():
    block, full, sublayers = with_parameters(BlockAttnRes(L, D, block_size=1)), FullAttnRes(L, D).double(), network()
    full.load_state_dict(block.state_dict())
    embedding = torch.randn(2, 3, D, dtype=torch.float64)
    torch.testing.assert_close(
        run(block, sublayers, embedding), run(full, sublayers, embedding), rtol=1e-12, atol=1e-12
    )


def test_one_block_is_the_residual_sum_beside_the_embedding():
    """N = 1 in closed form: h = sigmoid(s_sum - s_embedding) picks between the embedding and the sum of all outputs."""
    stream, sublayers = with_parameters(BlockAttnRes(L, D, num_blocks=1)), network()
    embedding = torch.randn(2, 3, D, dtype=torch.float64)

    def score(v: Tensor, site: int) -> Tensor:
        return (v * stream.query[site] * stream.key_gain[site]).sum(-1) / (v.square().mean(-1) + stream.eps).sqrt()

    total = torch.zeros_like(embedding)
    h = embedding
    for site in range(L + 1):
        if site > 0:
            share = torch.sigmoid(score(total, site) - score(embedding, site))[..., None]
            h = (1 - share) * embedding + share * total
        if site < L:
            total = total + sublayers[site](sublayers[site].norm(h))
    torch.testing.assert_close(run(stream, sublayers, embedding), h, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "make",
    [
        lambda: FullAttnRes(L, D, eps=0.0),
        lambda: FullAttnRes(L, D, eps=0.0, chunk=1),
        *(lambda s=s: BlockAttnRes(L, D, block_size=s, eps=0.0) for s in (1, 2, 4, 6)),
        lambda: BlockAttnRes(L, D, block_size=2, eps=0.0, schedule="single_pass"),
    ],
)
def test_zero_queries_are_prenorm_with_epsilon_zero(make):
    """At zero queries every read is the mean of the sources; all that follows is scale invariant (spec: section 5)."""
    stream, prenorm, sublayers = make().double(), PreNorm(L, D), network()
    embedding = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True)
    final = nn.RMSNorm(D, eps=0.0, dtype=torch.float64)

    def loss(s: Stream) -> Tensor:
        return final(run(s, sublayers, embedding)).pow(3).sum()

    parameters = [embedding, *sublayers.parameters()]
    first, second = loss(stream), loss(prenorm)
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(first, parameters), torch.autograd.grad(second, parameters), strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()


def test_source_counts_are_the_papers():
    """The digitised Figure 8: 16 decoder layers, Block with S = 4, and Full."""
    block = BlockAttnRes(32, D, block_size=4)
    counts = [len(block.source_names(site)) for site in range(32)]
    assert counts[0::2] == [1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9]
    assert counts[1::2] == [2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9]
    full = FullAttnRes(32, D)
    counts = [len(full.source_names(site)) for site in range(32)]
    assert counts[0::2] == list(range(1, 33, 2))
    assert counts[1::2] == list(range(2, 33, 2))
    assert len(block.source_names(32)) == 9
    assert len(full.source_names(32)) == 33


@pytest.mark.parametrize("make", [lambda: FullAttnRes(L, D), lambda: BlockAttnRes(L, D, num_blocks=4),
                                  lambda: BlockAttnRes(L, D, num_blocks=2, schedule="single_pass")])  # fmt: skip
def test_weights_explain_every_read(make):
    """Weights times the named sources is what the sublayer reads, and there are as many as names."""
    stream, sublayers = with_parameters(make()), network()
    state = stream.start(torch.randn(2, 3, D, dtype=torch.float64))
    for site, sublayer in enumerate(sublayers):
        before = state
        x, state = stream.read(state, site, lambda h: h)
        weights = stream.weights(before, site)
        assert torch.equal(weights, stream.weights(state, site))
        assert len(weights) == len(stream.source_names(site))
        torch.testing.assert_close(weights.sum(0), torch.ones(2, 3, dtype=torch.float64), rtol=1e-13, atol=0)
        sources = before.sources if isinstance(stream, FullAttnRes) else stream._sources(before)
        mixed = torch.einsum("nbt,nbtd->btd", weights, torch.stack(sources))
        torch.testing.assert_close(x, mixed, rtol=1e-12, atol=1e-12)
        state = stream.write(state, site, sublayer(sublayer.norm(x)))
    assert len(stream.weights(state, L)) == len(stream.source_names(L))


@pytest.mark.parametrize(
    "make", [lambda: PreNorm(L, D), lambda: FullAttnRes(L, D), lambda: BlockAttnRes(L, D, num_blocks=3)]
)
def test_states_are_values(make):
    """No method changes a state: running on from a kept state twice gives the same bits."""
    stream, sublayers = make().double(), network()
    state = stream.start(torch.randn(2, 3, D, dtype=torch.float64))
    x, state = stream.read(state, 0, sublayers[0].norm)
    kept = [tensor.clone() for tensor in state if isinstance(tensor, Tensor)]

    def onwards(state) -> Tensor:
        out = sublayers[0](x)
        for site in range(L):
            y, state = stream.read(state, site, sublayers[site].norm) if site else (x, state)
            state = stream.write(state, site, out if site == 0 else sublayers[site](y))
        return stream.finish(state, lambda h: h)

    assert torch.equal(onwards(state), onwards(state))
    assert all(torch.equal(a, b) for a, b in zip(kept, [t for t in state if isinstance(t, Tensor)], strict=True))


@pytest.mark.parametrize(
    ("length", "setting", "starts"),
    [
        (8, {"block_size": 3}, [0, 3, 6]),
        (8, {"num_blocks": 3}, [0, 3, 6]),
        (10, {"num_blocks": 4}, [0, 3, 6, 8]),
        (5, {"num_blocks": 5}, [0, 1, 2, 3, 4]),
        (186, {"block_size": 24}, [24 * n for n in range(8)]),  # Kimi K3: 93 decoder layers in blocks of 12
    ],
)
def test_block_starts(length: int, setting: dict, starts: list[int]):
    assert block_starts(length, **setting) == starts


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockAttnRes(L, D), "exactly one"),
        (lambda: BlockAttnRes(L, D, num_blocks=2, block_size=3), "exactly one"),
        (lambda: BlockAttnRes(L, D, num_blocks=0), "num_blocks is 0"),
        (lambda: BlockAttnRes(L, D, num_blocks=7), "num_blocks is 7"),
        (lambda: BlockAttnRes(L, D, block_size=0), "block_size is 0"),
        (lambda: BlockAttnRes(L, D, block_size=7), "block_size is 7"),
        (lambda: BlockAttnRes(L, D, block_size=2, schedule="fast"), "schedule is 'fast'"),
        (lambda: FullAttnRes(0, D), "num_sublayers is 0"),
        (lambda: FullAttnRes(L, 0), "dim is 0"),
        (lambda: FullAttnRes(L, D, chunk=0), "chunk is 0"),
        (lambda: PreNorm(L, D).weights(None, 2), "does not attend"),
    ],
)
def test_impossible_settings_are_refused_by_name(make, message: str):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("other", [{"heads": 2}, {"activation": "sigmoid"}, {"schedule": "single_pass"}])
def test_recomputation_goes_with_the_two_phase_schedule_alone(other: dict[str, object]) -> None:
    with pytest.raises(UserError, match=r"residual\.recompute .* does not go with residual"):
        ResidualConfig(rule="block", recompute=True, **other)  # type: ignore[arg-type]
