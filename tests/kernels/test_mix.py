"""Scores of finished sources and the mixes made from them, against the float64 equation: every output and every gradient."""

import pytest
import torch
from torch import Tensor

from fathom import kernels
from fathom.kernels import mix_gradients, use_backend
from tests.kernels.cases import DRAWS, DTYPES, assert_as_good_as_plain, run


def make_score(tokens: int, d: int, k: int, dtype: torch.dtype, device: str, *, partial: bool) -> list[Tensor | None]:
    wide = torch.promote_types(dtype, torch.float32)
    rows = [torch.randn(tokens, d).to(device, dtype) for _ in range(2)]
    return [rows[0], rows[1] if partial else None, (torch.randn(k, d) * 2 / d**0.5).to(device, wide)]


def call_score(leaves):
    output, partial, queries = leaves
    source, scores = kernels.score(partial, output, queries, eps=1e-5)
    return [scores] if partial is None else [source, scores]


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize(
    ("tokens", "d", "k", "dtype"),
    [
        *((*shape, DTYPES[0]) for shape in [(1, 2, 1), (7, 96, 5), (70, 40, 33), (2, 1000, 2)]),
        *((3, 24, 70, dtype) for dtype in DTYPES),
    ],
)
def test_scores_equal_the_equation(tokens: int, d: int, k: int, partial: bool, dtype: torch.dtype, device: str):
    draws = (make_score(tokens, d, k, dtype, device, partial=partial) for _ in range(DRAWS[dtype]))
    assert_as_good_as_plain(call_score, *draws)


def make_bank(n: int, tokens: int, d: int, k: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """N sources, as a token-major bank, and K queries."""
    wide = torch.promote_types(dtype, torch.float32)
    return [torch.randn(tokens, n, d).to(device, dtype), (torch.randn(k, d) * 2 / d**0.5).to(device, wide)]


def call_bank(leaves):
    """The sources as they are passed on, their scores, and a source that is used as it was, too."""
    sources = leaves[0].unbind(1)
    bank, scores = kernels.score_bank(sources, leaves[1], eps=1e-5)
    return [*bank, *scores, sources[0] * 2]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((9, 70, 24, 70), DTYPES[0]), ((1, 3, 16, 2), DTYPES[0]), *(((3, 7, 40, 5), dtype) for dtype in DTYPES)],
    ids=str,
)
def test_scores_of_a_bank_equal_the_equation(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str):
    assert_as_good_as_plain(call_bank, *(make_bank(*shape, dtype, device) for _ in range(DRAWS[dtype])))


@pytest.mark.parametrize("used", [(), (0,), (1,), (0, 4), (3, 4)], ids=str)
def test_what_is_unused_of_a_bank_adds_no_gradient(used: tuple[int, ...], device: str):
    """Of three sources and their scores only some are used, and the last source needs no gradient."""
    inputs = [torch.randn(3, 16).to(device) for _ in range(3)] + [torch.randn(20, 16).to(device)]
    gradients = []
    for backend in ("triton", "reference"):
        leaves = [t.clone().requires_grad_(index != 2) for index, t in enumerate(inputs)]
        with use_backend(backend):  # type: ignore[arg-type]
            bank, scores = kernels.score_bank(leaves[:3], leaves[3])
            found = [*bank, *scores]
            sum((found[index].square().sum() for index in used), leaves[0].sum()).backward()
        assert leaves[2].grad is None
        assert (leaves[3].grad is None) == (not any(index >= 3 for index in used))  # then no kernel runs
        gradients.append([torch.zeros_like(t) if t.grad is None else t.grad for t in leaves])
    for a, b in zip(*gradients, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def make_mix(n: int, s: int, d: int, tokens: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Sources, then their scores, some of them far apart."""
    wide = torch.promote_types(dtype, torch.float32)
    sources = [torch.randn(tokens, d).to(device, dtype) for _ in range(n)]
    return [*sources, *((torch.randn(s, tokens) * 3).to(device, wide) for _ in range(n))]


def call_mix(n: int):
    """The reads, their lse, and a second mix of the sources as they are passed on, whose gradient the first one takes up."""

    def inner(leaves):
        sources, scores = leaves[:n], leaves[n:]
        outs, lse, passed = kernels.mix(sources, scores)
        others, _, last = kernels.mix(passed, [each * 0.5 for each in scores])
        return [*outs, *lse, *others, *last]

    return inner


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *(
            (shape, DTYPES[0])
            for shape in [(1, 3, 16, 3), (5, 1, 1, 4), (3, 13, 24, 1), (9, 2, 40, 3), (2, 17, 2050, 2)]
        ),
        *(((2, 3, 96, 5), dtype) for dtype in DTYPES),
    ],
    ids=str,
)
def test_mixes_equal_the_equation(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str):
    assert_as_good_as_plain(call_mix(shape[0]), *(make_mix(*shape, dtype, device) for _ in range(DRAWS[dtype])))


@pytest.mark.parametrize("n", [1, 3, 9])
def test_a_shift_of_all_scores_changes_no_bit(n: int, device: str):
    """Both passes weigh by how far a score is from the largest; by lse, which is rounded at its own size, neither does."""
    inputs = make_mix(n, 4, 40, 5, torch.float32, device)
    scores = [(16 * each).round() / 16 for each in inputs[n:]]

    def call(leaves):
        outs, lse, passed = kernels.mix(leaves[:n], leaves[n:])
        return [*lse, *outs, *passed]

    found, shifted = (run(call, [*inputs[:n], *(each + by for each in scores)], "triton") for by in (0, 512))
    assert all(torch.equal(a, b) for a, b in zip(found[4:], shifted[4:], strict=True))


@pytest.mark.parametrize("n", [1, 3])
def test_the_first_read_comes_normalised(n: int, device: str):
    dtype = DTYPES[0]
    wide = torch.promote_types(dtype, torch.float32)

    def normalised(leaves):
        *outs, last = kernels.mix(leaves[:n], leaves[n:-1], norm_weight=leaves[-1], norm_eps=1e-4)
        return [*outs[0], *outs[1], *last]

    draws = [
        [*make_mix(n, 4, 1100, 3, dtype, device), (0.5 + torch.rand(1100)).to(device, wide)]
        for _ in range(DRAWS[dtype])
    ]
    assert_as_good_as_plain(normalised, *draws)


@pytest.mark.parametrize("used", [0, 1, 2])
@pytest.mark.parametrize("n", [1, 2])
def test_what_is_unused_adds_no_gradient(n: int, used: int, device: str):
    """Of a mix only the reads, only their lse, or only the sources that are passed on."""
    gradients = []
    for backend in ("triton", "reference"):
        leaves = [t.requires_grad_() for t in make_mix(n, 2, 16, 3, torch.float32, device)]
        torch.manual_seed(0)
        for leaf in leaves:
            torch.nn.init.normal_(leaf)
        with use_backend(backend):  # type: ignore[arg-type]
            outs, lse, passed = kernels.mix(leaves[:n], leaves[n:])
            (outs[1].sum() if used == 0 else lse[1].sum() if used == 1 else passed[0].sum()).backward()
        gradients.append([torch.zeros_like(t) if t.grad is None else t.grad for t in leaves])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_single_source_is_its_own_read(device: str):
    source, scores = torch.randn(3, 16).to(device), torch.randn(4, 3).to(device)
    with use_backend("triton"):
        outs, lse, passed = kernels.mix([source], [scores])
    assert all(t.data_ptr() == source.data_ptr() for t in (*outs, *passed))
    assert all(torch.equal(a, b) for a, b in zip(lse, scores, strict=True))


LAYOUTS = {
    "batches": lambda rows: rows.view(2, 3, 24),
    "a dim of one with a stride of its own": lambda rows: rows.view(1, 6, 24).transpose(0, 1),
    "columns of a wider tensor": lambda rows: torch.cat([rows, rows], 1)[:, :24].view(2, 3, 24),
    "columns of a still wider one": lambda rows: torch.cat([rows, rows, rows], 1)[:, :24].view(2, 3, 24),
}


@pytest.mark.parametrize("layouts", [*((name, name) for name in LAYOUTS), ("columns of a wider tensor", "batches")])
def test_layouts_change_nothing(layouts: tuple[str, str], device: str):
    """The first source has the one, the others have the other: outputs and gradients are those of [tokens, D]."""
    draws = [[torch.randn(6, 24).to(device) for _ in range(4)] for _ in range(DRAWS[torch.float32])]
    queries, weight = torch.randn(3, 24).to(device), torch.rand(24).to(device)
    shaped = [[LAYOUTS[layouts[index > 0]](each) for index, each in enumerate(rows)] for rows in draws]

    def everything(leaves):
        *sources, output = leaves
        wide = [each.to(output.dtype) for each in (queries, weight)]
        bank, scores = kernels.score_bank(sources, wide[0])
        last, own = kernels.score(bank[0], output, wide[0])
        reads, lse, passed = kernels.mix([*bank, last], [*scores, own])
        unscored, their_lse = kernels.inter_block(passed, wide[0])
        x = kernels.update_read(passed[0], last, reads[1], lse[1], wide[0][1], None, wide[1])[1]
        assert all(each.shape == sources[0].shape for each in (last, x, *reads, *unscored))
        assert all(each.shape == (3, *sources[0].shape[:-1]) for each in (*scores, own))
        return [x, *reads, *lse, *unscored, *their_lse]

    # Rows that are all a multiple of 16 elements apart are loaded in wider pieces on a GPU, which adds them up in another order.
    if device == "cpu" or layouts != ("columns of a wider tensor",) * 2:
        for a, b in zip(run(everything, draws[0], "triton"), run(everything, shaped[0], "triton"), strict=True):
            assert torch.equal(a.flatten(), b.flatten())
    assert_as_good_as_plain(everything, *shaped)


def test_repeats_have_the_same_bits(device: str):
    dtype = DTYPES[1]
    for call, inputs in (
        (call_mix(3), make_mix(3, 4, 40, 9, dtype, device)),
        (call_score, make_score(70, 40, 5, dtype, device, partial=True)),
        (call_bank, make_bank(3, 70, 40, 5, dtype, device)),
    ):
        first, second = run(call, inputs, "triton"), run(call, inputs, "triton")
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


ROW, READS = torch.zeros(3, 8), torch.zeros(2, 3)
BAD = [
    (lambda: kernels.score(None, torch.zeros(3, 8, dtype=torch.long), torch.zeros(2, 8)), r"sources\[0\]"),
    (lambda: kernels.score(torch.zeros(3, 9), ROW, torch.zeros(2, 8)), "partial has shape"),
    (lambda: kernels.score(None, ROW, torch.zeros(0, 8)), "queries has shape"),
    (lambda: kernels.score(None, ROW, torch.zeros(2, 9)), "queries has shape"),
    (lambda: kernels.score_bank([], torch.zeros(2, 8)), "sources is empty"),
    (lambda: kernels.score_bank([ROW, torch.zeros(3, 9)], torch.zeros(2, 8)), r"sources\[1\] has shape"),
    (lambda: kernels.mix([], []), "sources is empty"),
    (lambda: kernels.mix([ROW, ROW], [READS]), "1 scores for 2 sources"),
    (lambda: kernels.mix([ROW, ROW], [READS, torch.zeros(1, 3)]), r"scores\[1\] has shape"),
    (lambda: kernels.mix([ROW], [READS], norm_weight=torch.zeros(9)), "norm_weight has shape"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_a_wrong_argument_is_named(wrong, message: str):
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.parametrize("shape", [(2, 5, 40, 7), (17, 6, 40, 3)], ids=str)
def test_more_reads_than_a_tile_takes(shape: tuple[int, int, int, int], device: str, monkeypatch: pytest.MonkeyPatch):
    """As hundreds of reads: fewer columns for each than a tile has at least, more parts of dp than are taken for a token."""
    monkeypatch.setattr(mix_gradients, "BACKWARD_ELEMENTS", 32)
    monkeypatch.setattr(mix_gradients, "SCORE_ELEMENTS", 16)
    draws = (make_mix(*shape, DTYPES[0], device) for _ in range(DRAWS[DTYPES[0]]))
    assert_as_good_as_plain(call_mix(shape[0]), *draws)
