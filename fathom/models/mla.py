"""Multi-head latent attention without positions (arXiv 2405.04434, section 2.1; NoPE as in arXiv 2510.26692).

Keys and values of all heads are linear maps of one narrow latent c per token, and every head's key ends in a part s that all
heads share. A cache holds c and s alone:

    [c | s] = latent(x)      k_h = [K_h norm(c) | s]      v_h = V_h norm(c)      o_h = softmax(q_h · k_h / √W) v_h

In the *absorbed* form K_h moves to the query and V_h to the output, so that a decode step attends over latents and no key or
value is ever formed: q_h · k_h = [K_hᵀ q_h' | q_h''] · [norm(c) | s]. It is multi-query attention whose one head is the latent.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from fathom.models.kimi_config import KimiConfig
from fathom.models.layers import Context, RMSNorm

LATENT_EPS = 1e-6
"""Epsilon of the norms inside the compression: the released model's, whatever the other norms' is."""


class MLA(nn.Module):
    """An MLA sublayer; ``layer`` is its place in a cache. A head's own key and its value have width ``head_dim``."""

    def __init__(self, config: KimiConfig, layer: int = 0) -> None:
        super().__init__()
        self.layer, self.num_heads, self.width = layer, config.num_heads, config.head_width
        self.rank, self.shared = config.kv_rank, config.shared_key_dim
        heads, dim = config.num_heads, config.dim
        keys = heads * (self.width + self.shared)
        self.norm = RMSNorm(dim, config.norm_eps)
        self.query: nn.Module = nn.Linear(dim, keys, bias=False)
        if config.query_rank is not None:
            self.query = nn.Sequential(
                nn.Linear(dim, config.query_rank, bias=False),
                RMSNorm(config.query_rank, LATENT_EPS),
                nn.Linear(config.query_rank, keys, bias=False),
            )
        self.latent = nn.Linear(dim, self.rank + self.shared, bias=False)
        self.latent_norm = RMSNorm(self.rank, LATENT_EPS)
        self.expand = nn.Linear(self.rank, heads * 2 * self.width, bias=False)
        self.gate = nn.Linear(dim, heads * self.width, bias=False) if config.mla_gate else None
        self.out = nn.Linear(heads * self.width, dim, bias=False)

    def head_rows(self) -> dict[str, int]:
        """Rows of one head in each matrix that makes queries, keys or values, by its name here: a head's own key, its value."""
        query = "query.weight" if isinstance(self.query, nn.Linear) else "query.2.weight"
        return {query: self.width + self.shared, "expand.weight": self.width}

    def compress(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T RS"]:
        """What a cache holds of each token: the normalised latent, and the shared part of its keys."""
        latent, shared = self.latent(x).split((self.rank, self.shared), dim=-1)
        return torch.cat((self.latent_norm(latent), shared), dim=-1)

    def expanded(
        self, query: Float[Tensor, "B H T W"], latents: Float[Tensor, "B N RS"], mask: Tensor | None
    ) -> Float[Tensor, "B H T V"]:
        """Attention over keys and values, formed from ``latents``; causal over the same tokens if there is no ``mask``."""
        latent, shared = latents.split((self.rank, self.shared), dim=-1)
        own, value = rearrange(self.expand(latent), "B N (H W) -> B H N W", H=self.num_heads).chunk(2, dim=-1)
        key = torch.cat((own, shared.unsqueeze(1).expand(-1, self.num_heads, -1, -1)), dim=-1)
        return self.attend(query, key, value, mask)

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Float[Tensor, "B H T V"]:
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None)

    def absorbed(
        self, query: Float[Tensor, "B H T W"], latents: Float[Tensor, "B N RS"], mask: Tensor | None
    ) -> Float[Tensor, "B H T V"]:
        """The same without forming keys and values; without a ``mask`` every query sees every latent."""
        weight = rearrange(self.expand.weight.to(query.dtype), "(H W) R -> H W R", H=self.num_heads)
        to_key, to_value = weight.chunk(2, dim=1)
        own, shared = query.split((self.width, self.shared), dim=-1)
        lifted = torch.cat((torch.einsum("bhtw,hwr->bhtr", own, to_key), shared), dim=-1)
        length = query.shape[2]
        # All heads read the same latents: as rows of one head they need no copies of them.
        rows = lifted.flatten(1, 2).unsqueeze(1)
        if mask is not None:
            mask = mask.expand(-1, self.num_heads, -1, -1).flatten(1, 2).unsqueeze(1) if length > 1 else mask
        key = latents.unsqueeze(1)
        mixed = F.scaled_dot_product_attention(
            rows, key, key[..., : self.rank], mask, scale=(self.width + self.shared) ** -0.5
        )  # fmt: skip
        mixed = mixed.squeeze(1).unflatten(1, (self.num_heads, length))
        return torch.einsum("bhtr,hvr->bhtv", mixed, to_value)

    def forward(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B T D"]:
        window: Any = context.attend
        query = rearrange(self.query(x), "B T (H W) -> B H T W", H=self.num_heads)
        new = self.compress(x)
        if window is None:
            mixed = self.expanded(query, new, context.mask)
        else:
            latents = window.latents(self.layer, new)
            mixed = self.expanded(query, new, None) if window.alone else self.absorbed(query, latents, window.mask)
        mixed = rearrange(mixed, "B H T V -> B T (H V)")
        if self.gate is not None:
            mixed = mixed * torch.sigmoid(self.gate(x))
        return self.out(mixed)
