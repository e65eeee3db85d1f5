"""Any residual rule read as one matrix over depth (arXiv 2603.15031, section 6).

    h_l = Σ_{i<l} M[l, i] v_i          v_0 = embedding, v_i = output i; h_l is what site l's norm is given

Every rule is linear in the v_i once its coefficients (gates, attention weights) are those of a given run on given tokens. So the
run is recorded, coefficients and outputs; then the rule is replayed with the v_i apart, each in a slot of its own: what a read
holds of slot i is the *part* of v_i in it, and the parts of a read sum to it, exactly, for every rule. The matrix is the parts'
coefficients on their sources, <part_i, v_i> / <v_i, v_i>. For a rule that mixes whole vectors (all of section 6) nothing is lost:
matrix times outputs is the read. For one with weights per channel or head it is so with ``groups`` of as many channels; for
LAuReL and DDL, which also turn vectors, M is the best scalar and ``Mixing.remainder`` says what it leaves out.
Where a rule hands the sublayer no norm of a single vector (SiameseNorm), h_l is the sublayer's input itself.

M here has a row more than the paper's L x L, the output's, and a column more, for output L: it is [L+1, L+1], lower triangular.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fathom.block import BlockAttnRes
from fathom.errors import UserError
from fathom.full import FullAttnRes
from fathom.models.layers import AttentionInput, AttentionOutput
from fathom.models.transformer import Transformer
from fathom.residuals.rule import Rule
from fathom.stream import Norm, Stream


class Mixing(NamedTuple):
    """What every site of one run reads, and of whom."""

    matrix: Float[Tensor, "L1 L1 *batch G"]
    """M for each token and group of channels."""
    sources: Float[Tensor, "L1 *batch D"]
    reads: Float[Tensor, "L1 *batch D"]
    remainder: float
    """|reads - M sources| / |reads|: zero, to rounding, where M says all."""

    def mean(self) -> Float[Tensor, "L1 L1"]:
        """The mean of M over tokens and groups."""
        return self.matrix.flatten(2).mean(2)


def _reads(
    stream: Stream, embedding: Tensor, outputs: Sequence[Any], norms: Sequence[Norm], way: int
) -> Iterator[tuple[Tensor, Any]]:
    """h_l and the state before it of every site, the output's last."""
    state = stream.start(embedding)
    for site, norm in enumerate(norms):
        given: list[tuple[Tensor, Tensor]] = []

        def watched(h: Tensor, norm: Norm = norm, given: list[tuple[Tensor, Tensor]] = given) -> Tensor:
            given.append((h, norm(h)))
            return given[-1][1]

        before = state
        if site == len(outputs):
            x: Any = stream.finish(state, watched)
        else:
            x, state = stream.read(state, site, watched)
        if isinstance(x, AttentionInput):
            x = x[way]
        yield next((h for h, normed in given if normed is x), x), before
        if site < len(outputs):
            state = stream.write(state, site, outputs[site])


def _attention_parts(stream: FullAttnRes | BlockAttnRes, state: Any, site: int, sources: Tensor) -> Tensor:
    """Full and Block have their weights; a block's weight is that of each of its outputs."""
    weights = stream.weights(state, site)
    if isinstance(stream, BlockAttnRes):
        starts = [1 + start for start in stream.starts if start < site]
        members = zip([0, *starts], [*starts, site + 1], strict=True)
        weights = torch.cat([w.expand(end - start, *w.shape) for w, (start, end) in zip(weights, members, strict=True)])
    parts = torch.zeros_like(sources)
    parts[: site + 1] = weights.unsqueeze(-1) * sources[: site + 1]
    return parts


def _parts(
    stream: Stream, embedding: Tensor, outputs: list[Tensor | AttentionOutput], norms: list[Norm], way: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Each read [..., D], and its parts [L+1, ..., D]."""
    hidden = [output.hidden if isinstance(output, AttentionOutput) else output for output in outputs]
    sources = torch.stack([embedding, *hidden])
    if isinstance(stream, FullAttnRes | BlockAttnRes):
        for site, (_, state) in enumerate(_reads(stream, embedding, outputs, norms, way)):
            parts = _attention_parts(stream, state, site, sources)
            yield parts.sum(0), parts
        return
    tape: list[Tensor] = []
    ratios: list[Tensor] = []

    def record(value: Tensor) -> Tensor:
        tape.append(value)
        return value

    def recorded_norm(norm: Norm) -> Norm:
        def apply(h: Tensor) -> Tensor:
            normed = norm(h)
            ratios.append(torch.where(h == 0, 0, normed / h))
            return normed

        return apply

    def slot(index: int) -> Tensor:
        mask = torch.zeros(len(sources), *([1] * (sources.ndim - 1)), dtype=sources.dtype, device=sources.device)
        mask[index] = 1
        return mask * sources[index]

    def with_tape(make: Callable[[], list[Tensor]], use: Callable[[Tensor], Tensor]) -> list[Tensor]:
        if not isinstance(stream, Rule):
            return make()
        stream.tape = use
        try:
            return make()
        finally:
            stream.tape = None

    reads = with_tape(
        lambda: [h for h, _ in _reads(stream, embedding, outputs, [recorded_norm(n) for n in norms], way)], record
    )
    kept, scales = iter(tape), iter(ratios)
    slots: list[Any] = [slot(index) for index in range(len(sources))]
    apart = [
        output._replace(hidden=slots[i + 1]) if isinstance(output, AttentionOutput) else slots[i + 1]
        for i, output in enumerate(outputs)
    ]
    frozen: list[Norm] = [lambda h: h * next(scales)] * len(norms)
    parts_of = with_tape(lambda: [h for h, _ in _reads(stream, slots[0], apart, frozen, way)], lambda _: next(kept))
    yield from zip(reads, parts_of, strict=True)


@torch.no_grad()
def mix(
    stream: Stream,
    embedding: Float[Tensor, "*batch D"],
    outputs: list[Any],
    norms: list[Norm],
    *,
    groups: int = 1,
    way: int = 0,
) -> Mixing:
    """The mixing of ``stream`` in a run with this embedding, these L outputs and these L + 1 norms (the final one last).

    ``groups`` divides the channels; each group has a matrix. ``way`` picks the query's (0), key's or value's read where a rule
    tells them apart (MUDDFormer). ``UserError`` for groups that do not divide D.
    """
    if groups < 1 or embedding.shape[-1] % groups:
        raise UserError(f"groups is {groups}: it must divide the width, {embedding.shape[-1]}")
    hidden = [output.hidden if isinstance(output, AttentionOutput) else output for output in outputs]
    sources = torch.stack([embedding, *hidden])
    grouped = sources.unflatten(-1, (groups, -1))
    squares = grouped.square().sum(-1)
    rows, reads = [], []
    for read, parts in _parts(stream, embedding, outputs, norms, way):
        products = (parts.unflatten(-1, (groups, -1)) * grouped).sum(-1)
        rows.append(torch.where(squares == 0, 0, products / squares))
        reads.append(read)
    matrix, read = torch.stack(rows), torch.stack(reads)
    told = torch.einsum("li...g,i...gc->l...gc", matrix, grouped).flatten(-2)
    return Mixing(matrix, sources, read, float((read - told).norm() / read.norm()))


@torch.no_grad()
def mixing(model: Transformer, tokens: Int[Tensor, "B T"], *, groups: int = 1, way: int = 0) -> Mixing:
    """The mixing of ``model`` on ``tokens``, computed in the parameters' dtype."""
    outputs: list[Any] = []

    def observe(site: int, state: Any, output: Any) -> None:
        outputs.append(output)

    model.hidden(tokens, observe)
    norms = [cast(Norm, sublayer.norm) for sublayer in model.sublayers] + [model.final_norm]
    return mix(model.stream, model.embedding(tokens), outputs[:-1], norms, groups=groups, way=way)


def mixing_matrix(model: Transformer, tokens: Int[Tensor, "B T"], *, way: int = 0) -> Float[Tensor, "L1 L1"]:
    """M of ``model``, mean over ``tokens``; ``[:-1, :-1]`` is the paper's L x L matrix."""
    return mixing(model, tokens, way=way).mean()


def rank(matrix: Float[Tensor, "N M"], *, tolerance: float = 1e-9) -> int:
    """Singular values above ``tolerance`` times the largest."""
    values = torch.linalg.svdvals(matrix.double())
    return int((values > tolerance * values.max()).sum()) if values.numel() and values.max() > 0 else 0


def semiseparable_rank(matrix: Float[Tensor, "N N"], *, tolerance: float = 1e-9) -> int:
    """The largest rank of a block that lies in the lower triangle, diagonal included: ``max_l rank(M[l:, :l+1])``.

    It is the number of vectors that a recurrence over depth must carry to compute M (1 for a residual stream, n for n streams).
    ``tolerance`` is relative to the largest singular value of all of M, so that what is zero but for rounding has no rank.
    """
    scale = torch.linalg.svdvals(matrix.double()).max()
    blocks = (matrix[site:, : site + 1].double() for site in range(len(matrix)))
    return max(int((torch.linalg.svdvals(block) > tolerance * scale).sum()) for block in blocks)
