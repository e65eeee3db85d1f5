"""A block's end and the next one's reads in one launch, against the float64 equation; and the stream that is served by it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fathom import kernels
from fathom.block import BlockAttnRes
from fathom.errors import UserError
from fathom.full import FullAttnRes
from fathom.inference.blocks import FusedBlocks
from fathom.kernels import mixes, scores, turns, update, use_backend
from fathom.models.layers import RMSNorm
from tests.kernels.cases import DRAWS, DTYPES, ROUNDINGS, error


def turned(backend: str, leaves: list[Tensor], n: int, reads: int, *, partial: bool, norm: bool) -> list[Tensor]:
    queries, weight, output, first, *rest = leaves
    with use_backend(backend), torch.no_grad():  # type: ignore[arg-type]
        source, own, outs, lses = kernels.turn(
            first if partial else None, output, rest[:n], rest[n:], queries, reads, eps=1e-5,
            norm_weight=weight if norm else None, norm_eps=1e-4,
        )  # fmt: skip
    return [source, own, *outs, *lses]


def make(n: int, reads: int, later: int, d: int, tokens: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    rows = [torch.randn(tokens, d).to(device, dtype) for _ in range(2 + n)]
    scores = [(torch.randn(reads + later, tokens) * 3).to(device, wide) for _ in range(n)]
    queries = (torch.randn(reads + later, d) * 2 / d**0.5).to(device, wide)
    return [queries, torch.rand(d).to(device, wide), *rows, *scores]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
    ("n", "reads", "later", "d", "tokens", "dtype"),
    [(0, 3, 4, 24, 5, DTYPES[0]), (1, 1, 0, 96, 1, DTYPES[0]), (7, 4, 9, 1000, 2, DTYPES[0]), (20, 2, 1, 40, 3, DTYPES[0]),
     (3, 2, 5, 2048, 1, DTYPES[1]), (9, 3, 2, 24, 4, DTYPES[2]), (2, 2, 2, 9000, 1, DTYPES[0])],
)  # fmt: skip
def test_equals_the_equation(
    n: int, reads: int, later: int, d: int, tokens: int, partial: bool, norm: bool, dtype: torch.dtype, device: str
):
    pairs = []
    for _ in range(DRAWS[dtype]):
        leaves = make(n, reads, later, d, tokens, dtype, device)
        truth = turned("reference", [leaf.double() for leaf in leaves], n, reads, partial=partial, norm=norm)
        found = (turned(backend, leaves, n, reads, partial=partial, norm=norm) for backend in ("triton", "reference"))
        pairs.append([[error(x, t) for x, t in zip(each, truth, strict=True)] for each in found])
    for index, (kernel, plain) in enumerate(zip(*torch.tensor(pairs).mean(0).tolist(), strict=True)):
        assert kernel <= max(2 * plain, ROUNDINGS[dtype]), (index, kernel, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_cancels_is_normalised_as_well(dtype: torch.dtype, device: str):
    """Where a read is a thousandth of what it is made of, its norm is not that of rounding errors."""
    wide, (tokens, d) = torch.promote_types(dtype, torch.float32), (3, 1024)
    value = torch.randn(tokens, d)
    rows = [each.to(device, dtype) for each in (value, 1e-3 * torch.randn(tokens, d) - value)]
    scores, weight = torch.zeros(2, tokens, device=device, dtype=wide), torch.rand(d).to(device, wide)

    def normalised(backend: str, wider: Callable[[Tensor], Tensor] = lambda x: x) -> list[Tensor]:
        a, b, s, w = map(wider, (*rows, scores, weight))
        with use_backend(backend), torch.no_grad():  # type: ignore[arg-type]
            turned = kernels.turn(None, b, [a], [s], torch.zeros_like(a[:2], dtype=s.dtype), 1, norm_weight=w)[2][0]
            return [turned, kernels.update_read(None, b, a, s[0], torch.zeros_like(w), norm_weight=w)[1]]

    found = zip(normalised("triton"), normalised("reference"), normalised("reference", Tensor.double), strict=True)
    for kernel, plain, truth in found:
        assert error(kernel, truth) <= max(2 * error(plain, truth), ROUNDINGS[dtype])


@pytest.mark.parametrize("stream", [
    BlockAttnRes(6, 16, block_size=4), BlockAttnRes(6, 16, num_blocks=3), BlockAttnRes(3, 16, num_blocks=1, gain=False),
    FullAttnRes(5, 16),
], ids=["4+2", "2+2+2", "one block", "full"])  # fmt: skip
@pytest.mark.parametrize("norm", [RMSNorm(16, 1e-6), torch.tanh], ids=["norm", "any function"])
def test_the_served_stream_is_the_trained_one(stream: BlockAttnRes | FullAttnRes, norm, device: str, monkeypatch):
    """Sum, maps and every read; and a site is one launch, whether a block ends there or not."""
    launched = []
    for module, name in ((turns, "_turn"), (update, "_forward"), (scores, "_scores"), (mixes, "_mix")):
        kernel = getattr(module, name)
        monkeypatch.setattr(module, name, Counted(kernel, launched))
    stream = stream.double().to(device)
    torch.nn.init.normal_(stream.query)
    found = []
    for each, backend in ((stream, "reference"), (FusedBlocks(stream), "triton")):
        with torch.no_grad(), use_backend(backend):  # type: ignore[arg-type]
            state = each.start(torch.arange(32.0, dtype=torch.float64, device=device).view(2, 1, 16) / 16)
            for site in range(stream.num_sublayers):
                assert each.source_names(site) == stream.source_names(site)
                found.append(each.weights(state, site))
                x, state = each.read(state, site, norm.to(device).double() if isinstance(norm, RMSNorm) else norm)
                found.append(x)
                state = each.write(state, site, x * torch.arange(16, device=device) + site)
            found += [
                each.running_sum(state),
                each.weights(state, stream.num_sublayers),
                each.finish(state, torch.tanh),
            ]
    half = len(found) // 2
    for value, expected in zip(found[half:], found[:half], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-11)
    assert len(launched) == stream.num_sublayers + 1


class Counted:
    """A kernel whose launches are counted."""

    def __init__(self, kernel, launched: list) -> None:
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        self.launched.append(self.kernel)
        return self.kernel[grid]


def test_with_gradients_or_many_tokens_it_is_score_and_mix(device: str):
    leaves = make(2, 2, 3, 16, 300, torch.float32, device)
    few = [
        leaf[..., :200, :] if leaf.shape[0] == 300 else leaf[..., :200] if leaf.shape[-1] == 300 else leaf
        for leaf in leaves
    ]
    for inputs in (leaves, few):
        expected = turned("reference", inputs, 2, 2, partial=True, norm=True)
        for value, other in zip(turned("triton", inputs, 2, 2, partial=True, norm=True), expected, strict=True):
            torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-4)
    queries = few[0].clone().requires_grad_()
    with use_backend("triton"):
        _, own, outs, _ = kernels.turn(few[3], few[2], few[4:6], few[6:], queries, 2)
    (own.sum() + outs[1].sum()).backward()
    assert queries.grad is not None and queries.grad.isfinite().all()


def test_strided_inputs_give_the_same(device: str):
    plain = make(2, 2, 1, 24, 3, torch.float32, device)
    strided = [torch.stack((leaf, leaf), -1)[..., 0] for leaf in plain]
    assert not any(leaf.is_contiguous() for leaf in strided)
    expected = turned("triton", plain, 2, 2, partial=True, norm=True)
    for value, other in zip(turned("triton", strided, 2, 2, partial=True, norm=True), expected, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_what_does_not_fit_is_named(backend: str, device: str):
    """A kernel would read beyond it, or read it as another dtype."""
    queries, weight, output, partial, *rest = make(2, 2, 1, 24, 3, torch.float32, device)
    given = {
        "partial": partial,
        "output": output,
        "bank": rest[:2],
        "scores": rest[2:],
        "queries": queries,
        "num_reads": 2,
    }
    wrong = {
        r"sources\[1\] is torch.float16": {"bank": [rest[0].half(), rest[1]]},
        r"sources\[2\] has shape \(2, 24\)": {"bank": [rest[0], rest[1][:2]]},
        r"partial has shape": {"partial": partial[:, :8]},
        r"scores\[0\] has shape \(2, 3\)": {"scores": [each[:2] for each in rest[2:]]},
        r"there are 1 scores for 2 sources": {"scores": rest[2:3]},
        r"queries has shape \(3, 8\)": {"queries": queries[:, :8]},
        r"num_reads is 4": {"num_reads": 4},
        r"norm_weight has shape": {"norm_weight": weight[:8]},
    }
    with use_backend(backend), torch.no_grad():  # type: ignore[arg-type]
        for message, change in wrong.items():
            with pytest.raises(UserError, match=message):
                kernels.turn(**{**given, **change})


def test_scores_may_be_rounded(device: str):
    _, _, _, _, *rest = make(2, 2, 1, 24, 3, torch.float32, device)
    rounded = [each.half() for each in rest[2:]]
    with use_backend("triton"), torch.no_grad():
        for each in (
            lambda scores: kernels.mix(rest[:2], scores)[0],
            lambda scores: kernels.turn(None, rest[0], rest[:2], scores, torch.ones(3, 24, device=device), 2)[2],
        ):
            pairs = zip(each(rounded), each([score.float() for score in rounded]), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
