import importlib.util
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fathom.errors import UserError
from fathom.models import kda
from fathom.models.kda import KDA, chunked, delta_rule, recurrent, short_convolution
from fathom.models.kimi_config import KimiConfig
from fathom.models.layers import Context, document_cuts

NAIVE = Path(__file__).parents[2] / ".peers" / "fla" / "ops" / "kda" / "naive.py"


def inputs(length: int, *, fast: float = 1.0, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Query, key, value, log-decay, beta and a state, all with gradients; ``fast`` multiplies the log-decay."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    query, key = (torch.nn.functional.normalize(normal(2, length, 3, 5), dim=-1) for _ in range(2))
    value, beta = normal(2, length, 3, 4), torch.sigmoid(normal(2, length, 3))
    log_decay, state = -fast * torch.nn.functional.softplus(normal(2, length, 3, 5)), normal(2, 3, 5, 4)
    return [x.requires_grad_() for x in (query, key, value, log_decay, beta, state)]


def gradients(output: torch.Tensor, state: torch.Tensor, given: list[torch.Tensor]) -> list[torch.Tensor]:
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2), dtype=output.dtype)
    return list(torch.autograd.grad((output * weight).sum() + state.sin().sum(), given))


@pytest.mark.parametrize("documents", [None, [[0] * 5 + [1] * 2 + [2] * 12, [3] * 8 + [4] * 11]])
@pytest.mark.parametrize("fast", [1.0, 400.0])
def test_chunks_are_the_recurrence_with_all_gradients(documents: list[list[int]] | None, fast: float):
    """Also where a channel forgets within a token: a quotient of exponentials would overflow."""
    given = inputs(19, fast=fast)
    numbers = None if documents is None else torch.tensor(documents)
    expected = recurrent(*given, documents=numbers)
    found = chunked(*given, documents=numbers, chunk=8)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients(*expected, given), gradients(*found, given), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-11)


def test_a_new_document_starts_with_an_empty_memory():
    given = inputs(12)
    output, state = chunked(*given, documents=torch.tensor([[0] * 5 + [1] * 7] * 2), chunk=4)
    alone, last = recurrent(*(x[:, 5:] for x in given[:5]))
    torch.testing.assert_close(output[:, 5:], alone)
    torch.testing.assert_close(state, last)


def test_a_piece_at_a_time_goes_on_from_the_state():
    given = inputs(11)
    whole, last = recurrent(*given)
    state, parts = given[5], []
    for a, b in ((0, 6), (6, 7), (7, 11)):
        part, state = delta_rule(*(x[:, a:b] for x in given[:5]), state)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.skipif(
    not NAIVE.is_file(), reason="fla-core's source is not there (benchmarks/peers.py says how to get it)"
)
def test_equals_the_naive_kda_of_fla():
    spec = importlib.util.spec_from_file_location("fla_naive_kda", NAIVE)
    assert spec is not None and spec.loader is not None
    naive = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(naive)
    given = inputs(16, dtype=torch.float32)
    expected = naive.naive_recurrent_kda(*given[:5], initial_state=given[5], output_final_state=True)
    expected_gradients = gradients(*expected, given)
    for found in (recurrent(*given), chunked(*given, chunk=8)):
        for a, b in zip(expected, found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
        for a, b in zip(expected_gradients, gradients(*found, given), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)


def test_the_short_convolution_is_torch_s_and_stays_in_its_document():
    x, weight = torch.randn(2, 9, 6).double(), torch.randn(6, 1, 4).double()
    before = torch.randn(2, 3, 6).double()
    padded = torch.cat((before, x), dim=1).mT
    expected = torch.nn.functional.conv1d(padded, weight, groups=6).mT
    torch.testing.assert_close(short_convolution(x, weight, before), expected)
    documents = torch.tensor([[7] * 3 + [7] * 4 + [8] * 5] * 2)
    cut = short_convolution(x, weight, before, documents)
    torch.testing.assert_close(cut[:, :4], expected[:, :4])
    torch.testing.assert_close(cut[:, 4:], short_convolution(x[:, 4:], weight, torch.zeros(2, 3, 6).double()))


@pytest.mark.parametrize("options", [{}, {"full_rank_gate": True, "decay_floor": -5.0}])
def test_the_sublayer_masks_documents_and_looks_back_alone(options: dict):
    torch.manual_seed(0)
    layer = KDA(KimiConfig(dim=12, num_heads=2, head_dim=4, **options)).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, 10, 12).double()
    documents = torch.tensor([[0] * 4 + [1] * 6])
    empty = torch.empty(0)
    output = layer(x, Context(empty, empty, None, documents=documents))
    torch.testing.assert_close(output[:, 4:], layer(x[:, 4:], Context(empty, empty, None)))
    torch.testing.assert_close(output[:, :4], layer(x, Context(empty, empty, None))[:, :4])
    decay = layer.log_decay(x)
    assert (decay < 0).all()
    if "decay_floor" in options:
        assert (decay > -5).all()


def test_a_gpu_without_fla_core_says_which_extra(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "fla.ops", None)
    kda._fla.cache_clear()
    with pytest.raises(UserError, match=r"fathom-attnres\[kimi\]"):
        kda._fla()


def test_a_gpu_s_kernel_is_given_documents_as_sequences_of_their_own(monkeypatch: pytest.MonkeyPatch):
    """The kernel's place is taken by the recurrence, run from cut to cut: what is tested is how it is called."""

    def chunk_kda(q, k, v, g, beta, initial_state=None, output_final_state=False, cu_seqlens=None):
        if cu_seqlens is None:
            return recurrent(q, k, v, g, beta, initial_state)
        parts = [recurrent(*(x[:, a:b] for x in (q, k, v, g, beta)))[0] for a, b in pairwise(cu_seqlens.tolist())]
        return torch.cat(parts, dim=1), None

    monkeypatch.setattr(kda, "_fla", lambda: SimpleNamespace(chunk_kda=chunk_kda))
    given = inputs(9, dtype=torch.float32)
    documents = torch.tensor([[0, 0, 1, 1, 1, 2, 2, 2, 2], [2, 2, 2, 2, 2, 2, 3, 4, 4]])
    found, _ = kda._on_gpu(*given[:5], None, document_cuts(documents))
    torch.testing.assert_close(found, recurrent(*given[:5], documents=documents)[0])
    found, state = kda._on_gpu(*given, None)
    expected, last = recurrent(*given)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(state, last)


def test_which_kernels_a_gpu_takes_can_be_said(monkeypatch: pytest.MonkeyPatch):
    gpu = torch.device("cuda")
    assert kda.backend_for(gpu, torch.bfloat16) == "fla"
    assert kda.backend_for(gpu, torch.float64) == kda.backend_for(torch.device("cpu"), torch.float32) == "chunked"
    monkeypatch.setenv("FATHOM_KDA", "chunked")
    assert kda.backend_for(gpu, torch.bfloat16) == "chunked"
    monkeypatch.setenv("FATHOM_KDA", "triton")
    with pytest.raises(UserError, match="FATHOM_KDA is 'triton'"):
        kda.backend_for(gpu, torch.bfloat16)
