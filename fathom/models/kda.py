"""Kimi Delta Attention: a gated delta rule whose decay is per channel (arXiv 2510.26692, section 3).

Every head keeps a matrix S of [K, V], its memory. A token decays its rows, corrects what S holds for its key, and reads:

    S' = Diag(α_t) S_{t-1}          S_t = S' + β_t k_t (v_t - S'ᵀ k_t)ᵀ          o_t = S_tᵀ q_t / √K

with α_t = exp(g_t) in (0, 1]^K and β_t in (0, 1). ``recurrent`` is this equation, token by token. ``chunked`` is the same in
pieces of C tokens: with G the running sum of g inside a piece, the corrections u_t = v_t - S'ᵀ k_t of a piece solve

    (I + A) u = v - (k ⊙ e^G) S_0         A_ij = β_j Σ_c k_ic k_jc e^{G_ic - G_jc}  for j < i

and then o and the piece's last S are matrix products. Every exponent is a difference G_i - G_j with j <= i: it is never
positive, so nothing overflows, however fast a channel decays. On a GPU fla-core's kernels compute the same (extra ``kimi``);
``FATHOM_KDA=chunked`` in the environment keeps to the PyTorch path there.
"""

import os
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from fathom.errors import UserError
from fathom.models.kimi_config import KimiConfig
from fathom.models.layers import Context, RMSNorm, document_cuts

CHUNK = 16
"""Tokens of a piece; pairwise decays of a piece are [C, C, K]."""

L2_EPS = 1e-6
"""What the length of queries and keys is kept away from zero by, as in the released model."""


def recurrent(
    query: Float[Tensor, "B T H K"],
    key: Float[Tensor, "B T H K"],
    value: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H K"],
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H K V"] | None = None,
    documents: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """The equation, token by token: outputs, and the state after the last token.

    Args:
        state: before the first token; zero if not given.
        documents: numbers that rise; where one begins, what was remembered is forgotten. ``state`` is of the first token's.
    """
    memory = _empty(key, value) if state is None else state
    outputs = []
    for t in range(query.shape[1]):
        if documents is not None and t:
            memory = memory * (documents[:, t] == documents[:, t - 1])[:, None, None, None]
        memory = memory * log_decay[:, t].exp().unsqueeze(-1)
        found = torch.einsum("bhkv,bhk->bhv", memory, key[:, t])
        change = beta[:, t].unsqueeze(-1) * (value[:, t] - found)
        memory = memory + torch.einsum("bhk,bhv->bhkv", key[:, t], change)
        outputs.append(torch.einsum("bhkv,bhk->bhv", memory, query[:, t]) * key.shape[-1] ** -0.5)
    return torch.stack(outputs, dim=1), memory


def chunked(
    query: Float[Tensor, "B T H K"],
    key: Float[Tensor, "B T H K"],
    value: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H K"],
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H K V"] | None = None,
    documents: Int[Tensor, "B T"] | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """``recurrent`` in pieces of ``chunk`` tokens; same arguments and results."""
    memory = _empty(key, value) if state is None else state
    outputs = []
    for start in range(0, query.shape[1], chunk):
        at = slice(start, start + chunk)
        q, k, v, g, b = (rearrange(x[:, at], "B C H ... -> B H C ...") for x in (query, key, value, log_decay, beta))
        q = q * key.shape[-1] ** -0.5
        total = g.cumsum(2)
        count = k.shape[2]
        # [B, 1, i, j]: j is not after i, and in its document.
        sees = torch.ones(count, count, dtype=torch.bool, device=k.device).tril().expand(len(k), 1, -1, -1)
        from_state, to_state = total.exp(), (total[:, :, -1:] - total).exp()
        kept = from_state[:, :, -1]
        if documents is not None:
            numbers = documents[:, at]
            before = documents[:, max(0, start - 1), None]
            sees = sees & (numbers.unsqueeze(-1) == numbers.unsqueeze(-2)).unsqueeze(1)
            from_state = from_state * (numbers == before)[:, None, :, None]
            to_state = to_state * (numbers == numbers[:, -1:])[:, None, :, None]
            kept = kept * (numbers[:, -1:] == before)[:, None]
        apart = total.unsqueeze(3) - total.unsqueeze(2)
        decay = apart.masked_fill(~sees.unsqueeze(-1), -torch.inf).exp()
        read, overlap = torch.einsum("nbhik,bhijk->nbhij", torch.stack((q, k)), k.unsqueeze(2) * decay)
        overlap = overlap * b.unsqueeze(2)
        system = overlap.tril(-1)  # its unit diagonal is implied
        change = torch.linalg.solve_triangular(
            system, v - (k * from_state) @ memory, upper=False, unitriangular=True
        ) * b.unsqueeze(-1)  # fmt: skip
        outputs.append((q * from_state) @ memory + read @ change)
        memory = memory * kept.unsqueeze(-1) + (k * to_state).mT @ change
    return rearrange(torch.cat(outputs, dim=2), "B H T V -> B T H V"), memory


def _empty(key: Tensor, value: Tensor) -> Tensor:
    return key.new_zeros(key.shape[0], key.shape[2], key.shape[3], value.shape[3])


@cache
def _fla() -> Any:
    """fla-core's KDA, which needs a GPU."""
    try:
        from fla.ops import kda
    except ImportError as error:
        raise UserError(f"KDA on a GPU needs fla-core ({error}): pip install 'fathom-attnres[kimi]'") from None
    return kda


def backend_for(device: torch.device, dtype: torch.dtype) -> str:
    """``fla`` or ``chunked``: what sequences on ``device`` are computed with, unless ``FATHOM_KDA`` says otherwise."""
    asked = os.environ.get("FATHOM_KDA", "auto")
    if asked not in ("auto", "fla", "chunked"):
        raise UserError(f"FATHOM_KDA is {asked!r}: it must be auto, fla or chunked")
    return "fla" if asked != "chunked" and device.type == "cuda" and dtype != torch.float64 else "chunked"


def delta_rule(
    query: Float[Tensor, "B T H K"],
    key: Float[Tensor, "B T H K"],
    value: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H K"],
    beta: Float[Tensor, "B T H"],
    state: Float[Tensor, "B H K V"] | None = None,
    documents: Int[Tensor, "B T"] | None = None,
    cuts: Int[Tensor, " N1"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"] | None]:
    """``recurrent`` by what is fastest here: fla-core on a GPU, otherwise ``chunked``, or the equation for a single token.

    In float32 at least, except in fla-core's kernels, where only sums and the state are; the output has the query's dtype.
    Those return no last state if they were given none. ``cuts`` are ``documents``' own, if they are known.
    """
    if query.shape[1] == 1:
        documents = None
    if backend_for(query.device, query.dtype) == "fla" and (documents is None or state is None):
        cuts = document_cuts(documents) if documents is not None and cuts is None else cuts
        return _on_gpu(query, key, value, log_decay, beta, state, None if documents is None else cuts)
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v, g, b = (x.to(wide) for x in (query, key, value, log_decay, beta))
    memory = None if state is None else state.to(wide)
    with torch.autocast(query.device.type, enabled=False):
        if query.shape[1] == 1:
            output, memory = recurrent(q, k, v, g, b, memory)
        else:
            output, memory = chunked(q, k, v, g, b, memory, documents)
    return output.to(query.dtype), memory


def _on_gpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor | None,
    cuts: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    inputs = {"q": query, "k": key, "v": value.to(query.dtype), "g": log_decay.float(), "beta": beta.to(query.dtype)}
    if cuts is None:
        kernel = _fla().fused_recurrent_kda if query.shape[1] == 1 and not torch.is_grad_enabled() else _fla().chunk_kda
        return kernel(**inputs, initial_state=state, output_final_state=state is not None)
    flat = {name: x.flatten(0, 1).unsqueeze(0) for name, x in inputs.items()}
    output, _ = _fla().chunk_kda(**flat, output_final_state=False, cu_seqlens=cuts)
    return output.view_as(value), None


def short_convolution(
    x: Float[Tensor, "B T C"],
    weight: Float[Tensor, "C 1 S"],
    before: Float[Tensor, "B S1 C"],
    documents: Int[Tensor, "B S1T"] | None = None,
) -> Float[Tensor, "B T C"]:
    """Each channel's own causal convolution over S tokens, inside a document; the last tap is the token itself.

    ``before`` and ``documents`` begin with the S - 1 tokens before the first of ``x``.
    """
    taps, length = weight.shape[-1], x.shape[1]
    padded = torch.cat((before.to(x.dtype), x), dim=1)
    low = weight[:, 0].to(x.dtype)
    out = x * low[:, -1]
    for tap in range(taps - 1):
        earlier = padded[:, tap : tap + length]
        if documents is not None:
            earlier = earlier * (documents[:, tap : tap + length] == documents[:, taps - 1 :]).unsqueeze(-1)
        out = torch.addcmul(out, earlier, low[:, tap])
    return out


class Memory(NamedTuple):
    """What KDA remembers of a sequence."""

    tail: Float[Tensor, "B S1 C"]
    """The latest S - 1 inputs of the convolutions: queries, keys and values side by side."""
    state: Float[Tensor, "B H K V"]
    """S of every head, float32 at least."""


class KDA(nn.Module):
    """A KDA sublayer; ``layer`` is its place in a cache.

    Queries, keys and values pass a short convolution and SiLU; queries and keys are of unit length. The decay is
    ``g = -exp(A) softplus(f(x) + b)``, or with a floor (Kimi K3) ``g = floor · σ(exp(A) (f(x) + b))``; the output, normalised
    head by head, is gated by ``σ(gate(x))``.
    """

    def __init__(self, config: KimiConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.num_heads, self.head_width = layer, config.num_heads, config.head_width
        self.decay_floor = config.decay_floor
        dim, width = config.dim, config.head_width
        inner = config.num_heads * width
        self.norm = RMSNorm(dim, config.norm_eps)
        self.query = nn.Linear(dim, inner, bias=False)
        self.key = nn.Linear(dim, inner, bias=False)
        self.value = nn.Linear(dim, inner, bias=False)
        # [C, 1, S], so that no optimizer takes taps for a matrix.
        self.taps = nn.Parameter(torch.zeros(3 * inner, 1, config.conv_size))
        self.beta = nn.Linear(dim, config.num_heads, bias=False)
        self.decay_in = nn.Linear(dim, width, bias=False)
        self.decay_out = nn.Linear(width, inner, bias=False)
        self.decay_bias = nn.Parameter(torch.zeros(inner))
        self.log_rate = nn.Parameter(torch.zeros(config.num_heads))
        if config.full_rank_gate:
            self.gate: nn.Module = nn.Linear(dim, inner, bias=False)
        else:
            self.gate = nn.Sequential(nn.Linear(dim, width, bias=False), nn.Linear(width, inner, bias=False))
        self.head_norm = RMSNorm(width, config.norm_eps)
        self.out = nn.Linear(inner, dim, bias=False)

    delta_rule = staticmethod(delta_rule)

    def head_rows(self) -> dict[str, int]:
        """Rows of one head in each matrix that makes queries, keys or values, by its name here."""
        return dict.fromkeys(("query.weight", "key.weight", "value.weight"), self.head_width)

    def log_decay(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T H K"]:
        """g, in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        raw = self.decay_out(self.decay_in(x)).to(wide) + self.decay_bias.to(wide)
        raw = rearrange(raw, "B T (H K) -> B T H K", K=self.head_width)
        rate = self.log_rate.to(wide).exp().unsqueeze(-1)
        if self.decay_floor is not None:
            return self.decay_floor * torch.sigmoid(rate * raw)
        return -rate * F.softplus(raw)

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        window: Any = context.attend
        projected = torch.cat((self.query(x), self.key(x), self.value(x)), dim=-1)
        documents = context.documents
        if window is None:
            memory, live = None, None
            before = projected.new_zeros(len(x), self.taps.shape[-1] - 1, projected.shape[-1])
            with_before = None if documents is None else F.pad(documents, (before.shape[1], 0), value=-1)
        else:
            memory, live = window.memory(self.layer), window.live
            before, with_before = memory.tail, window.documents_with_tail
            documents = None if with_before is None else with_before[:, -x.shape[1] :]
        mixed = F.silu(short_convolution(projected, self.taps, before, with_before))
        heads = rearrange(mixed, "B T (N H K) -> N B T H K", N=3, H=self.num_heads)
        query, key = (_unit(part) for part in heads[:2])
        log_decay = self.log_decay(x)
        beta = torch.sigmoid(self.beta(x).to(log_decay.dtype))
        if live is not None:  # what pads a row leaves its state as it is
            log_decay, beta = log_decay * live[..., None, None], beta * live.unsqueeze(-1)
        output, state = self.delta_rule(
            query, key, heads[2], log_decay, beta, None if memory is None else memory.state, documents, context.cuts
        )
        if window is not None:
            assert state is not None
            window.remember(self.layer, torch.cat((before.to(projected.dtype), projected), dim=1), state)
        gate = rearrange(self.gate(x), "B T (H K) -> B T H K", H=self.num_heads)
        return self.out(rearrange(self.head_norm(output) * torch.sigmoid(gate), "B T H K -> B T (H K)"))


def _unit(x: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + L2_EPS)).to(x.dtype)
