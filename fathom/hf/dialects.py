"""The public dialects of AttnRes as presets of one read, and the names that checkpoints give its weights.

All read the same sources: the embedding, the finished blocks' sums, the running one. What differs is declared here:

    h_m = [Σ v_i] + Σ_i softmax_i(c · q_m · (γ ⊙ k_i)) u_i        k_i = v_i / rms(v_i)        u_i = v_i or k_i

c is 1 or D^-0.5, γ is learned or absent, u is normalised in Inkling-2 alone, and Delta alone keeps the plain sum Σ v_i. A dialect
is data; ``read`` hands it to the kernels' ``inter_block``, whose arguments express all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fathom.block import BlockAttnRes
from fathom.depth_attention import EPS
from fathom.errors import UserError
from fathom.kernels import inter_block


@dataclass(frozen=True)
class Dialect:
    """One way to read, and how the models that use it are cut into blocks."""

    users: str
    layers_per_block: int | None
    """Decoder layers of a block as published (two sublayers each, the last block may be shorter); None where it is a setting."""
    gain: bool = True
    """The key norm has a learned weight."""
    scale: Literal["one", "rsqrt_dim"] = "one"
    normalize_values: bool = False
    additive: bool = False
    """The read is added to the sum of all sources, the plain residual stream."""
    attention_queries: int = 1
    """Reads of a full-attention layer: 3 are separate inputs of its query, key and value projections."""
    shared_queries: bool = False
    """All layers share one query for attention and one for the MLP."""
    eps: float = EPS

    def read(
        self,
        sources: Sequence[Float[Tensor, "*batch D"]],
        queries: Float[Tensor, "M D"],
        gain: Float[Tensor, "M D"] | None = None,
    ) -> list[Float[Tensor, "*batch D"]]:
        """M reads of the same sources; ``UserError`` for a gain that the dialect does not have."""
        if gain is not None and not self.gain:
            raise UserError(f"gain is given, but the key norm of {self.users} has no weight")
        scale = queries.shape[-1] ** -0.5 if self.scale == "rsqrt_dim" else 1.0
        out, _ = inter_block(
            sources, queries, gain, eps=self.eps, scale=scale, normalize_values=self.normalize_values
        )  # fmt: skip
        if not self.additive:
            return list(out)
        total = torch.stack(list(sources)).sum(0)
        return [total + each for each in out]

    def schedule(self, num_layers: int, layers_per_block: int | None = None) -> list[list[str]]:
        """The sources of every site of ``num_layers`` decoder layers: attention, MLP, attention ... and the output last."""
        size = layers_per_block or self.layers_per_block
        if size is None:
            raise UserError("layers_per_block is a setting of this dialect: give it")
        stream = BlockAttnRes(2 * num_layers, 1, block_size=min(2 * size, 2 * num_layers))
        return [stream.source_names(site) for site in range(2 * num_layers + 1)]


DIALECTS: dict[str, Dialect] = {
    "paper": Dialect("the paper (arXiv 2603.15031)", None, gain=False),
    "fla": Dialect("flash-linear-attention's models", None),
    "kimi_k3": Dialect("Kimi K3", 12, eps=1e-5),
    "alice_ai": Dialect("AliceAI", 4),
    "sana_video": Dialect("SANA-Video 2.0", 8, gain=False, shared_queries=True),
    "inkling2": Dialect(
        "Inkling-2", 6, gain=False, scale="rsqrt_dim", normalize_values=True, attention_queries=3
    ),
    "delta": Dialect("Delta Attention Residuals", None, additive=True),
}  # fmt: skip


def k3_names(num_layers: int, prefix: str = "model.") -> list[tuple[str, str]]:
    """Names of a Kimi-K3-style checkpoint's query [1, D] and key gain [D] at every site, the output's last."""
    sites = [
        f"{prefix}layers.{layer}.{sublayer}_res"
        for layer in range(num_layers)
        for sublayer in ("self_attention", "mlp")
    ]
    return [(f"{site}_proj.weight", f"{site}_norm.weight") for site in (*sites, f"{prefix}output_attn_res")]


def from_k3(tensors: Mapping[str, Tensor], num_layers: int, prefix: str = "model.") -> dict[str, Tensor]:
    """``query`` and ``key_gain`` [L+1, D] of a stream from a checkpoint's tensors; ``UserError`` naming one that is missing."""
    rows: dict[str, list[Tensor]] = {"query": [], "key_gain": []}
    for names in k3_names(num_layers, prefix):
        for name, parameter in zip(names, rows, strict=True):
            if name not in tensors:
                raise UserError(f"{name} is missing: these are not the weights of {num_layers} AttnRes layers")
            rows[parameter].append(tensors[name].flatten())
    return {parameter: torch.stack(values) for parameter, values in rows.items()}


def to_k3(query: Float[Tensor, "L1 D"], key_gain: Float[Tensor, "L1 D"], prefix: str = "model.") -> dict[str, Tensor]:
    """The inverse of ``from_k3``."""
    names = k3_names((len(query) - 1) // 2, prefix)
    tensors: dict[str, Tensor] = {}
    for (proj, norm), q, g in zip(names, query, key_gain, strict=True):
        tensors |= {proj: q[None].clone(), norm: g.clone()}
    return tensors
