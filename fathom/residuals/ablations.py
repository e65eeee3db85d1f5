"""Attention Residuals with their parts exchanged: the switches of the paper's ablations (arXiv 2603.15031, Table 4 and Fig. 6).

    h = Σ_i α_i v_i          α_i = activation(q · key(v_i)), for each head of D / H channels

| switch              | default    | other                                                                                 |
|---------------------|------------|---------------------------------------------------------------------------------------|
| ``query``           | learned    | input: q = W_l RMSNorm(h') / D, h' the read before (W_l is D x D, zero at first)       |
|                     |            | none: no query and key, the scores are learned constants (input-independent mixing)  |
| ``activation``      | softmax    | sigmoid of each score, not normalised                                                 |
| ``key_norm``        | True       | False: the key is the source itself                                                   |
| ``heads`` H         | 1          | each head scores and mixes its own channels; the key norm is over all of them          |
| ``window`` W        | all        | the embedding and the latest W outputs (Full)                                          |
| ``isolate_embedding`` | True     | False: the embedding is the first term of the first block's sum                       |
| block size          | 1: Full    | S: Block                                                                              |

The paper names these and gives losses, no equations: what they leave open is fixed here as the table says. Reads are computed
one by one from the plain equation; with every switch at its default this equals ``FullAttnRes`` and ``BlockAttnRes``. At the
initial zeros every read is a mean (or half a sum) of its sources, so the network is PreNorm, except with a window shorter than L.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fathom.block import block_starts
from fathom.depth_attention import EPS, compute_dtype
from fathom.errors import UserError
from fathom.residuals.rule import Rule, product, weighted_sum
from fathom.stream import Norm

Query = Literal["learned", "input", "none"]
Activation = Literal["softmax", "sigmoid"]


class DepthState(NamedTuple):
    bank: tuple[Tensor, ...]
    """The embedding (if it stands alone) and every finished block's sum, each [..., D]."""
    partial: Tensor | None
    """The running sum of the current block; None at its start."""
    latest: Tensor | None
    """The read before (the embedding at first), where queries are projected from it."""
    keys: tuple[Tensor, ...] = ()
    """Keys of the bank, for a rule that projects them."""


class SwitchedAttnRes(Rule):
    """Parameters: ``key_gain`` [L+1, D] and ``query`` [L+1, D], or ``query_gate`` [L+1, D, D]; or ``score``, one per source."""

    query: nn.Parameter
    query_gate: nn.Parameter
    key_gain: nn.Parameter
    score: nn.ParameterList

    def __init__(
        self,
        num_sublayers: int,
        dim: int,
        *,
        num_blocks: int | None = None,
        block_size: int | None = None,
        gain: bool = True,
        eps: float = EPS,
        query: Query = "learned",
        activation: Activation = "softmax",
        key_norm: bool = True,
        heads: int = 1,
        window: int | None = None,
        isolate_embedding: bool = True,
    ) -> None:
        super().__init__(num_sublayers, dim, eps=eps)
        if num_blocks is None and block_size is None:
            block_size = 1
        if heads < 1 or dim % heads:
            raise UserError(f"heads is {heads}: it must divide the width, {dim}")
        if window is not None and window < 1:
            raise UserError(f"window is {window}: it must be at least 1")
        self.starts = block_starts(num_sublayers, num_blocks=num_blocks, block_size=block_size)
        self.kind, self.activation, self.key_norm, self.heads = query, activation, key_norm, heads
        self.window, self.isolate_embedding = window, isolate_embedding
        self.has_gain = gain and key_norm and query != "none"
        self.create()

    def initial(self, generator: torch.Generator) -> dict[str, Tensor | list[Tensor]]:
        sites = self.num_sublayers + 1
        values: dict[str, Tensor | list[Tensor]] = {}
        if self.kind == "none":
            values["score"] = [torch.zeros(len(self._names(site))) for site in range(sites)]
        elif self.kind == "input":
            values["query_gate"] = torch.zeros(sites, self.dim, self.dim)
        else:
            values["query"] = torch.zeros(sites, self.dim)
        return values | ({"key_gain": torch.ones(sites, self.dim)} if self.has_gain else {})

    def scores(self, sources: list[Tensor], state: DepthState, site: int) -> Tensor:
        """[N, ..., H]."""
        if self.kind == "none":
            return torch.stack([s.expand(*sources[0].shape[:-1], 1) for s in self.score[site]])
        if self.kind == "learned":
            query = self.query[site]
        else:
            assert state.latest is not None
            # A step of Adam moves a score by at most the rate times D then, as with a learned query: the rate is the same.
            query = product(self.normalised(state.latest), self.query_gate[site]) / self.dim
        query = query * self.key_gain[site] if self.has_gain else query
        keys = [self.normalised(s) if self.key_norm else s.to(compute_dtype(s)) for s in sources]
        return torch.stack([(query * key).unflatten(-1, (self.heads, -1)).sum(-1) for key in keys])

    def _sources(self, state: DepthState, site: int) -> list[Tensor]:
        sources = [*state.bank] if state.partial is None else [*state.bank, state.partial]
        return sources if self.window is None else [sources[0], *sources[1:][-self.window :]]

    def _weights(self, state: DepthState, site: int) -> Tensor:
        scores = self.scores(self._sources(state, site), state, site)
        return scores.softmax(0) if self.activation == "softmax" else scores.sigmoid()

    def _mix(self, state: DepthState, site: int) -> Tensor:
        weights = self.coefficient(self._weights(state, site))
        heads = [source.unflatten(-1, (self.heads, -1)) for source in self._sources(state, site)]
        return weighted_sum(weights, heads).flatten(-2)

    def start(self, embedding: Tensor) -> DepthState:
        latest = embedding if self.kind == "input" else None
        return DepthState((embedding,), None, latest) if self.isolate_embedding else DepthState((), embedding, latest)

    def read(self, state: DepthState, site: int, norm: Norm) -> tuple[Tensor, DepthState]:
        mixed = self._mix(state, site)
        return norm(mixed), state._replace(latest=mixed) if self.kind == "input" else state

    def write(self, state: DepthState, site: int, output: Tensor) -> DepthState:
        total = output if state.partial is None else state.partial + output
        if site + 1 in self.starts or site + 1 == self.num_sublayers:
            return state._replace(bank=(*state.bank, total), partial=None)
        return state._replace(partial=total)

    def finish(self, state: DepthState, norm: Norm) -> Tensor:
        return norm(self._mix(state, self.num_sublayers))

    def running_sum(self, state: DepthState) -> Tensor:
        return state.bank[-1] if state.partial is None else state.partial

    def _names(self, site: int) -> list[str]:
        finished = sum(start < site for start in self.starts)
        # The last block is finished at the output; any other when the next one starts.
        inside = 0 < site < self.num_sublayers and site not in self.starts
        kind = "output" if len(self.starts) == self.num_sublayers else "block"
        names = ["embedding"] if self.isolate_embedding else []
        names += [f"{kind} {n + 1}" for n in range(finished - inside)]
        # Without isolation the embedding alone is the first block's partial sum.
        names += ["partial"] if inside or (site == 0 and not self.isolate_embedding) else []
        return names if self.window is None else [names[0], *names[1:][-self.window :]]

    def source_names(self, site: int) -> list[str]:
        # Depth maps and entropies are of weights that sum to one.
        return self._names(site) if self.activation == "softmax" else []

    def weights(self, state: DepthState, site: int) -> Tensor:
        """Weights [N, ...] of ``site``, mean over heads."""
        if self.activation != "softmax":
            return super().weights(state, site)
        return self._weights(state, site).mean(-1)

    def entropy(self, state: DepthState, site: int) -> Tensor:
        return torch.special.entr(self._weights(state, site).double()).sum(0).mean(-1)

    def flops(self) -> float:
        sources = sum(len(self._names(site)) for site in range(self.num_sublayers + 1))
        projections = 2 * self.dim**2 * (self.num_sublayers + 1) if self.kind == "input" else 0
        return sources * self.dim * (2 if self.kind == "none" else 6) + projections
