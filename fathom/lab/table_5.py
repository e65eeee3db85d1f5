"""Table 5 and Figure 9 of arXiv 2603.15031 made by code: what each residual rule is as a matrix over depth.

Rules are built at L = 8 sublayers with random parameters, and their matrices are those of random outputs, so a rank is that of
the rule and not of a lucky case. *Weight* is found out, not quoted: dynamic if the rule multiplies by anything it computed from
the tokens (norms apart), static if by something learned, else fixed. *Vectors* of width D are those in the state after all L.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fathom.models.config import ResidualConfig
from fathom.residuals import make_stream
from fathom.residuals.catalogue import CATALOGUE
from fathom.residuals.mixing import Mixing, mix, rank, semiseparable_rank
from fathom.residuals.rule import Rule
from fathom.stream import Stream

L, D = 8, 24

SETTINGS: dict[str, dict[str, Any]] = {
    "block": {"block_size": 2}, "highway": {"gate": "scalar"}, "hyper_connections": {"num_streams": 2},
    "mhc": {"num_streams": 2}, "mhc_lite": {"num_streams": 2}, "ddl": {"num_streams": 2}, "mrla": {"heads": 1},
}  # fmt: skip
"""Where the default would hide a structure at L = 8: blocks of 2, 2 streams, the scalar gate of the paper's section 6."""


class Row(NamedTuple):
    rule: str
    method: str
    update: str
    weight: str
    vectors: int
    rank: int
    semiseparable: int | None
    """None where one number per source does not tell the read: weights per channel, or maps that turn vectors."""


def random_stream(rule: str, num_sublayers: int = L, dim: int = D) -> Stream:
    """The rule in float64, its parameters (but no gain of a norm) moved from where they start by normal numbers."""
    settings: dict[str, Any] = {"schedule": "single_pass"} if rule in ("full", "block") else {}
    config = ResidualConfig(rule=rule, **settings, **SETTINGS.get(rule, {}))  # type: ignore[arg-type]
    stream = make_stream(config, num_sublayers, dim).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in stream.named_parameters():
            if not name.endswith("_norm"):
                parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype), alpha=0.2)
    return stream


def random_mixing(stream: Stream, *, tokens: int = 1) -> Mixing:
    """The mixing of outputs that are normal numbers."""
    generator = torch.Generator().manual_seed(2)
    shape = (stream.num_sublayers + 1, 1, tokens, stream.dim)
    embedding, *outputs = torch.randn(shape, generator=generator, dtype=torch.float64)
    norms = [nn.RMSNorm(stream.dim, eps=0.0, dtype=torch.float64) for _ in range(stream.num_sublayers + 1)]
    return mix(stream, embedding, outputs, list(norms))


def weight_kind(stream: Stream) -> str:
    """``Dynamic``, ``Static`` or ``Fixed``."""
    own = [name for name, _ in stream.named_parameters() if not name.endswith("_norm")]
    if not own:
        return "Fixed"
    if not isinstance(stream, Rule):
        return "Dynamic"
    seen: list[Tensor] = []
    stream.tape = lambda value: seen.append(value) or value  # type: ignore[func-returns-value]
    try:
        state = stream.start(torch.randn(1, 2, stream.dim, dtype=torch.float64))
        for site in range(stream.num_sublayers):
            _, state = stream.read(state, site, lambda h: h)
            state = stream.write(state, site, torch.randn(1, 2, stream.dim, dtype=torch.float64))
    finally:
        stream.tape = None
    # A coefficient without the token's dims is a parameter.
    return "Dynamic" if any(value.requires_grad and 2 in value.shape[:-1] for value in seen) else "Static"


@torch.no_grad()
def _vectors(stream: Stream) -> int:
    embedding = torch.zeros(1, 1, stream.dim, dtype=torch.float64)
    state = stream.start(embedding)
    for site in range(stream.num_sublayers):
        _, state = stream.read(state, site, lambda h: h)
        state = stream.write(state, site, embedding.clone())
    kept = {id(leaf): leaf.numel() for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)}
    return round(sum(kept.values()) / stream.dim)


def table_5() -> list[Row]:
    """Every rule of the catalogue; ``rank`` and ``semiseparable`` are of the paper's L x L matrix, L = 8."""
    rows = []
    for rule, entry in CATALOGUE.items():
        stream = random_stream(rule)
        found = random_mixing(stream)
        matrix = found.matrix[:-1, :-1, 0, 0, 0]
        told = semiseparable_rank(matrix) if found.remainder < 1e-9 else None
        rows.append(Row(rule, entry.name, entry.equation, weight_kind(stream), _vectors(stream), rank(matrix), told))
    return rows


def figure_9_matrices() -> dict[str, Tensor]:
    """The L x L matrices of Figure 9: L = 4, and S = 2 for Block; keyed by what the paper draws."""
    rules = {
        "Residual": "prenorm",
        "Highway": "highway",
        "mHC": "mhc",
        "AttnRes Full": "full",
        "AttnRes Block": "block",
    }
    streams = {name: random_stream(rule, num_sublayers=4) for name, rule in rules.items()}
    return {name: random_mixing(stream).matrix[:-1, :-1, 0, 0, 0] for name, stream in streams.items()}
