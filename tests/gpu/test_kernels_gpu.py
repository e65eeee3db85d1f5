"""What only a GPU can show of the kernels: wide rows, very many tokens, graph replay, memory at either level.

`make test-gpu` runs these and `tests/kernels`, whose cases then run compiled, in bfloat16, float16 and float32.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from fathom import kernels
from fathom.block import BlockAttnRes
from fathom.kernels import use_backend
from fathom.stream import PreNorm, Stream
from tests.kernels.cases import DRAWS, DTYPES, assert_as_good_as_plain
from tests.kernels.test_inter import call as inter_call
from tests.kernels.test_inter import make as inter_inputs
from tests.kernels.test_update import call as update_call
from tests.kernels.test_update import make as update_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (4, 8, 2048, 300),
        (9, 6, 2304, 100),
        (16, 2, 768, 100),
        (17, 2, 1000, 100),
        (8, 12, 7168, 40),
        (3, 2, 8192, 33),
        (33, 2, 512, 40),
    ],
    ids=str,
)
def test_wide_reads(shape: tuple[int, int, int, int], dtype: torch.dtype):
    assert_as_good_as_plain(inter_call(shape[0]), *(inter_inputs(*shape, dtype, "cuda") for _ in range(DRAWS[dtype])))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "d"), [(1000, 2048), (700, 2304), (400, 5120), (400, 7168), (330, 8192), (90, 16384)]
)
def test_wide_updates(tokens: int, d: int, dtype: torch.dtype):
    assert_as_good_as_plain(update_call, *(update_inputs(tokens, d, dtype, "cuda") for _ in range(DRAWS[dtype])))


@pytest.mark.parametrize(("tokens", "d"), [(131072, 2048), (131072, 16384)])
def test_very_many_tokens(tokens: int, d: int):
    """Every token stands alone, so a few of them computed alone must agree; offsets here pass 2^31."""
    picked = torch.tensor([0, 1, tokens // 2, tokens - 2, tokens - 1], device="cuda")
    sources = [torch.randn(tokens, d, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
    queries = (torch.randn(2, d, device="cuda") / d**0.5).requires_grad_()
    weight = torch.rand(d, device="cuda")

    def run(sources: list[Tensor], grad: Tensor) -> list[Tensor]:
        out, lse = kernels.inter_block(sources, queries)
        total, x = kernels.update_read(sources[0], sources[1], out[1], lse[1], queries[1], None, weight)
        gradients = torch.autograd.grad([out[0], x], sources, [grad, grad])
        return [out[0].detach(), lse[0].detach(), total.detach(), x.detach(), *gradients]

    grad = torch.randn(tokens, d, device="cuda", dtype=torch.bfloat16)
    with use_backend("triton"):
        found = [t[picked].double() for t in run(sources, grad)]
    few = [s.detach()[picked].double().requires_grad_() for s in sources]
    with use_backend("reference"):
        expected = run(few, grad[picked].double())
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 8e-3 * b.norm()


def scored_bank(first: Tensor, second: Tensor, queries: Tensor) -> Sequence[Tensor]:
    bank, scores = kernels.score_bank([first, second], queries)
    return [*bank, *scores]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("queries", [16, 33, 70])
@pytest.mark.parametrize("call", [kernels.score, scored_bank])
def test_scores_of_many_tokens(call: Callable[..., Sequence[Tensor]], queries: int, dtype: torch.dtype):
    """Every row of a source that all multiprocessors score at once, for as many queries as the widest products take, and more:
    of a sum, and of two sources of a bank."""
    partial, output = (torch.randn(16384, 2048, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    weights = (torch.randn(queries, 2048, device="cuda") / 2048**0.5).to(dtype)
    row, scores = torch.randn_like(output), torch.randn(queries, 16384, device="cuda")

    def run(backend: str) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (partial, output, weights)]
        with use_backend(backend):  # type: ignore[arg-type]
            found = call(*leaves)
        torch.autograd.backward(list(found), [row if each.shape == row.shape else scores for each in found])
        return [t.detach() for t in found] + [leaf.grad for leaf in leaves]  # type: ignore[misc]

    first, second, plain = run("triton"), run("triton"), run("reference")
    for a, b, c in zip(first, second, plain, strict=True):
        assert torch.equal(a, b)
        assert ((a.float() - c.float()).abs().amax() / c.float().square().mean().sqrt()).item() < 0.1


def stack(stream: Stream, embedding: Tensor, norm: torch.nn.Module) -> Tensor:
    state = stream.start(embedding)
    for site in range(stream.num_sublayers):
        x, state = stream.read(state, site, norm)
        state = stream.write(state, site, torch.tanh(x))
    return stream.finish(state, norm)


class Norm(torch.nn.Module):
    plain_rms_norm = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(dim)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), self.eps)


def test_a_captured_graph_replays():
    stream, norm = BlockAttnRes(8, 256, block_size=4).cuda(), Norm(256).cuda()
    torch.nn.init.normal_(stream.query, std=0.2)
    embedding = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16).requires_grad_()

    def step() -> Tensor:
        out = stack(stream, embedding, norm)
        out.float().square().sum().backward()
        return out.detach()  # a graph that is still held would keep the gradients' nodes, and with them their stream

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    embedding.grad = stream.query.grad = stream.key_gain.grad = norm.weight.grad = None  # type: ignore[union-attr]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        out = step()
    with torch.no_grad():
        embedding.copy_(torch.randn_like(embedding))
    for gradient in (embedding.grad, stream.query.grad):
        gradient.zero_()
    graph.replay()
    replayed = [out.clone(), embedding.grad.clone(), stream.query.grad.clone()]
    embedding.grad = stream.query.grad = stream.key_gain.grad = norm.weight.grad = None  # type: ignore[union-attr]
    eager = [step(), embedding.grad, stream.query.grad]
    assert all(torch.equal(a, b) for a, b in zip(replayed, eager, strict=True))


def test_memory_at_either_level():
    """Kept for the backward pass: with recomputation about what PreNorm keeps, without it one tensor more a sublayer."""
    embedding = torch.randn(4096, 1024, device="cuda", dtype=torch.bfloat16).requires_grad_()
    size, norm = embedding.numel() * 2, Norm(1024).cuda()

    def kept(stream: Stream) -> float:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = stack(stream.cuda(), embedding, norm)
        return (torch.cuda.memory_allocated() - before) / size if out.requires_grad else 0.0

    prenorm = kept(PreNorm(16, 1024))
    recomputed = kept(BlockAttnRes(16, 1024, block_size=8, recompute=True))
    whole = kept(BlockAttnRes(16, 1024, block_size=8))
    assert recomputed <= prenorm + 1
    assert whole <= recomputed + 16
