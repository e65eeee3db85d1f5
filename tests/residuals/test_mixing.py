"""A rule's matrix times its outputs is what its sublayers read; ranks; Table 5 and Figure 9 as the paper has them."""

from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from torch import Tensor

from fathom.errors import UserError
from fathom.lab.figures_mixing import NOTATION, figure_9, mixing_figure
from fathom.lab.table_5 import SETTINGS, figure_9_matrices, random_mixing, random_stream, table_5
from fathom.models.config import ModelConfig
from fathom.models.layers import AttentionInput
from fathom.models.transformer import Transformer
from fathom.residuals.mixing import _parts, mixing, mixing_matrix, rank, semiseparable_rank
from fathom.residuals.rule import Rule
from tests.residuals.zoo import CASES, config

GROUPS = {
    "layerscale": 16, "highway": 16, "deepnorm": 16, "keel": 16, "siamesenorm": 16, "mrla": 16, "mrla heads": 16,
    "mhar": 4, "mhar block": 2, "full heads": 4, "block heads": 2,
}  # fmt: skip
"""Rules whose weights differ between channels or heads; in post-norm rules by the gains of norms inside the stream."""
TURNING = ("laurel", "ddl", "ddl one")
"""Rules that turn vectors, which no weights on whole vectors or channels can say."""
TOKENS = torch.randint(37, (2, 5), generator=torch.Generator().manual_seed(3))


def moved(case: str) -> Transformer:
    """A float64 decoder of the case, the rule's parameters and the norms' gains away from their start."""
    shape = ModelConfig(vocab_size=37, context=12, dim=16, num_layers=3, num_heads=2, residual=config(case))
    model = Transformer(shape).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("stream.") or "norm" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def inputs_and_outputs(model: Transformer) -> tuple[list[Any], list[Tensor]]:
    """What each sublayer was given and what it returned, seen from outside; the final norm's input last."""
    given: list[Any] = []
    returned: list[Tensor] = []

    def see(module: Any, arguments: tuple[Any, ...], output: Any) -> None:
        given.append(arguments[0])
        returned.append(output if isinstance(output, Tensor) else output[0])

    handles = [sublayer.register_forward_hook(see) for sublayer in model.sublayers]
    final = model.hidden(TOKENS)
    for handle in handles:
        handle.remove()
    return [*given, final], returned


@pytest.mark.parametrize("case", [case for case in CASES if case not in TURNING])
def test_matrix_times_outputs_is_what_the_sublayers_read(case: str) -> None:
    """Seen from outside the rule: the norm of M's row times the outputs is the input that the sublayer got."""
    model = moved(case)
    with torch.no_grad():
        given, returned = inputs_and_outputs(model)
        found = mixing(model, TOKENS, groups=GROUPS.get(case, 1))
        assert found.remainder < 1e-12
        sources = torch.stack([model.embedding(TOKENS), *returned])
        groups = sources.unflatten(-1, (GROUPS.get(case, 1), -1))
        reads = torch.einsum("libtg,ibtgc->lbtgc", found.matrix, groups).flatten(-2)
        norms = [*(sublayer.norm for sublayer in model.sublayers), model.final_norm]
        for site, (norm, x) in enumerate(zip(norms, given, strict=True)):
            x = x.query if isinstance(x, AttentionInput) else x
            read = reads[site] if case == "siamesenorm" else norm(reads[site])
            if case == "siamesenorm" and site == len(norms) - 1:
                continue  # its output is a sum of two norms, read in full below
            torch.testing.assert_close(read, x, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(reads, found.reads, rtol=1e-9, atol=1e-9)
    assert torch.equal(
        found.matrix.triu(1) if found.matrix.ndim == 2 else found.matrix[0, 1:], torch.zeros_like(found.matrix[0, 1:])
    )


@pytest.mark.parametrize("way", [0, 1, 2])
def test_each_way_of_muddformer_has_its_matrix(way: int) -> None:
    model = moved("muddformer")
    with torch.no_grad():
        given, _ = inputs_and_outputs(model)
        found = mixing(model, TOKENS, way=way)
    told = torch.einsum("libt,ibtd->lbtd", found.matrix[..., 0], found.sources)
    for site in (2, 4):
        torch.testing.assert_close(model.sublayers[site].norm(told[site]), given[site][way])
    assert not torch.allclose(found.matrix[2], mixing(model, TOKENS, way=(way + 1) % 3).matrix[2])


@pytest.mark.parametrize("case", TURNING)
def test_rules_that_turn_vectors_say_so(case: str) -> None:
    """Parts still sum to the read, exactly; M alone does not tell it."""
    found = mixing(moved(case), TOKENS)
    assert found.remainder > 1e-3
    with torch.no_grad():
        model = moved(case)
        given, _ = inputs_and_outputs(model)
        for site, sublayer in enumerate(model.sublayers):
            torch.testing.assert_close(sublayer.norm(found.reads[site]), given[site], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ["laurel", "ddl", "keel", "siamesenorm", "mhc", "muddformer"])
def test_parts_sum_to_the_read(case: str) -> None:
    stream = random_stream(case)
    embedding, *outputs = torch.randn(stream.num_sublayers + 1, 1, 2, stream.dim, dtype=torch.float64)
    norms = [torch.nn.RMSNorm(stream.dim, dtype=torch.float64)] * (stream.num_sublayers + 1)
    with torch.no_grad():
        for site, (read, parts) in enumerate(_parts(stream, embedding, outputs, norms, 0)):
            torch.testing.assert_close(parts.sum(0), read, rtol=1e-10, atol=1e-10)
            assert not parts[site + 1 :].any()  # no read holds what is not yet written
    assert isinstance(stream, Rule) and stream.tape is None


def test_known_matrices() -> None:
    ones = random_mixing(random_stream("prenorm")).mean()
    assert torch.equal(ones, torch.ones(9, 9, dtype=torch.float64).tril())
    full = random_stream("full")
    matrix = random_mixing(full).matrix[..., 0, 0, 0]
    torch.testing.assert_close(matrix.sum(1), torch.ones(9, dtype=torch.float64))

    # The scalar highway's stick (section 6): M[l, i] = g_i prod_{j > i} (1 - g_j), read off the last row.
    highway = random_mixing(random_stream("highway")).matrix[..., 0, 0, 0]
    torch.testing.assert_close(highway.sum(1), torch.ones(9, dtype=torch.float64))
    gates = highway.diagonal()[1:]
    for row in range(9):
        stick = torch.cat((torch.ones(1, dtype=torch.float64), gates[:row]))
        rest = torch.cat(((1 - gates[:row]).flip(0).cumprod(0).flip(0), torch.ones(1, dtype=torch.float64)))
        torch.testing.assert_close(highway[row, : row + 1], stick * rest)

    # A block's outputs share its weight.
    block = random_mixing(random_stream("block")).matrix[..., 0, 0, 0]
    for row in range(2, 9):
        for first in range(1, row, 2):
            if first + 1 <= row:
                assert block[row, first].item() == pytest.approx(block[row, first + 1].item(), rel=1e-12)


def test_mean_over_tokens_and_the_papers_square() -> None:
    model = moved("delta")
    found = mixing(model, TOKENS)
    matrix = mixing_matrix(model, TOKENS)
    assert matrix.shape == (7, 7)
    torch.testing.assert_close(matrix, found.matrix[..., 0].mean((2, 3)))
    assert found.matrix[..., 0].std((2, 3)).max() > 1e-3


def test_ranks() -> None:
    assert (rank(torch.zeros(3, 3)), rank(torch.eye(3)), rank(torch.ones(3, 3))) == (0, 3, 1)
    assert semiseparable_rank(torch.ones(6, 6).tril()) == 1 and semiseparable_rank(torch.eye(6)) == 1
    torch.manual_seed(1)
    for r in (1, 2, 3):
        assert semiseparable_rank((torch.randn(8, r).double() @ torch.randn(r, 8).double()).tril()) == r
    assert semiseparable_rank(torch.randn(7, 7).tril()) == 4 and rank(torch.randn(7, 7).tril()) == 7


@pytest.mark.parametrize(("streams", "expected"), [(1, 1), (2, 2), (3, 3)])
@pytest.mark.parametrize("case", ["hyper_connections", "mhc", "mhc_lite"])
def test_n_streams_are_n_semiseparable(case: str, streams: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SETTINGS, case, {"num_streams": streams})
    matrix = random_mixing(random_stream(case)).matrix[:-1, :-1, 0, 0, 0]
    assert semiseparable_rank(matrix) == expected


def test_table_5_is_the_papers() -> None:
    """The paper's column Weight, found out by code, and its statements on rank (section 6)."""
    rows = {row.rule: row for row in table_5()}
    assert rows.keys() >= {"prenorm", "ddl"} and len(rows) == 21
    paper = {
        "Fixed": ["prenorm", "deepnorm", "keel", "siamesenorm"],
        "Static": ["rezero", "layerscale", "denseformer"],
        "Dynamic": ["highway", "hyper_connections", "mhc", "ddl", "mrla", "full", "block"],
    }
    for weight, rules in paper.items():
        assert {rows[rule].weight for rule in rules} == {weight}
    assert all(rows[rule].semiseparable == 1 for rule in ("prenorm", "rezero", "highway", "deepnorm", "keel"))
    assert rows["mhc"].semiseparable == rows["hyper_connections"].semiseparable == 2
    assert rows["full"].rank == 8  # dense, rank L
    assert 1 < rows["block"].semiseparable < rows["full"].semiseparable  # type: ignore[operator]
    one_vector = {"prenorm", "rezero", "layerscale", "highway", "deepnorm", "keel", "laurel", "value_residual"}
    assert {rule for rule, row in rows.items() if row.vectors == 1} == one_vector


def test_figure_9_shows_the_papers_structure() -> None:
    """Equal symbols are equal numbers, different ones differ, and the weights of a read of AttnRes sum to one."""
    matrices = figure_9_matrices()
    for name, words in NOTATION.items():
        matrix = matrices[name]
        for row, line in enumerate(words):
            values: dict[str, float] = {}
            for column, word in enumerate(line):
                assert values.setdefault(word, float(matrix[row, column])) == pytest.approx(float(matrix[row, column]))
            if name != "Residual":
                assert len({round(v, 6) for v in values.values()}) == len(values)
                assert sum(values.values()) == pytest.approx(1)  # a block's one weight, of each of its outputs
    figure = figure_9()
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts.count("φ(w4,k1+k2)") == 2 and texts.count("1") == 10
    drawn = mixing_figure(mixing_matrix(moved("full"), TOKENS), "full")
    assert len(drawn.axes[0].texts) == 7 * 8 // 2
    plt.close("all")


def test_groups_must_divide_the_width() -> None:
    with pytest.raises(UserError, match="groups is 3: it must divide the width, 16"):
        mixing(moved("prenorm"), TOKENS, groups=3)
