"""The key/value cache, allocated once, and attention over it.

Each *slot* holds one sequence. A forward pass works on neighbouring slots, and a ``Window`` says which, where their new tokens
stand, and how far back they may look. Rows of a batch may differ in length: what lies beyond a row's newest token is masked,
and overwritten when its turn comes.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from fathom.inference.memory import available, check
from fathom.models.config import ModelConfig


class KVCache:
    """Keys and values of every decoder layer.

    Args:
        config: the model.
        slots: sequences at a time.
        capacity: tokens of each.
        kv_heads: heads kept here; all of the model's if not given.

    Raises:
        UserError: more than there is memory for.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        capacity: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        kv_heads: int | None = None,
    ) -> None:
        kv_heads = config.kv_heads if kv_heads is None else kv_heads
        shape = (config.num_layers, slots, capacity, kv_heads, config.head_width)
        check({"kv_cache": 2 * math.prod(shape) * dtype.itemsize}, available(device))
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.documents = torch.zeros(slots, capacity, dtype=torch.int32, device=device)
        """2 n for a token of a sequence's document n, 2 n + 1 for the one that ends it; zero if documents do not matter."""

    @property
    def recurrent(self) -> tuple[Tensor, ...]:
        """What a step computes from its own earlier value, so that running the step again changes it: nothing here."""
        return ()

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def window(
        self, first: int, positions: Int[Tensor, "B T"], start: int | None, end: int, documents: bool,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> "Window":  # fmt: skip
        """What one forward pass sees. What pads a row is masked, so ``lengths`` do not matter here."""
        return Window(self, first, positions, start, end, documents)

    def clear(self) -> None:
        """Forget everything. Stale numbers are harmless, NaN is not: a masked one still spoils its row."""
        for tensor in (self.keys, self.values, self.documents):
            tensor.zero_()


@dataclass(frozen=True)
class Window:
    """What one forward pass over T new tokens of B neighbouring slots sees of a cache; an ``Attend``."""

    cache: KVCache
    first: int
    """The first of the B slots."""
    positions: Int[Tensor, "B T"]
    """Where the new tokens stand in their sequences."""
    start: int | None
    """The position of every row's first new token, where it is one and the same."""
    end: int
    """No row looks at this position or beyond."""
    documents: bool = False
    """Whether attention stays inside a document."""

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.positions.shape[0])

    def note_documents(self, tokens: Int[Tensor, "B T"], end_of_text: int) -> None:
        """Number the documents of the new tokens; an end-of-text token belongs to the document that it ends."""
        ends = (tokens == end_of_text).int()
        numbers = self.cache.documents[self.rows]
        before = numbers.gather(1, (self.positions[:, :1] - 1).clamp(min=0))
        before = torch.where(self.positions[:, :1] > 0, before // 2 + before % 2, 0)
        number = before + ends.cumsum(-1, dtype=torch.int32) - ends
        self._place(numbers, (2 * number + ends).int())

    def _place(self, target: Tensor, new: Tensor) -> None:
        target.index_put_((self._row_numbers, self.positions), new)

    @cached_property
    def _row_numbers(self) -> Tensor:
        return torch.arange(len(self.positions), device=self.positions.device).unsqueeze(1)

    @cached_property
    def _mask(self) -> Tensor:
        """[B, 1, T, end], True where attention may look."""
        mask = torch.arange(self.end, device=self.positions.device) <= self.positions.unsqueeze(-1)
        if self.documents:
            numbers = self.cache.documents[self.rows] // 2
            mask &= numbers[:, None, : self.end] == numbers.gather(1, self.positions).unsqueeze(-1)
        return mask.unsqueeze(1)

    def __call__(
        self,
        layer: int,
        query: Float[Tensor, "B H T W"],
        key: Float[Tensor, "B K T W"],
        value: Float[Tensor, "B K T W"],
    ) -> Float[Tensor, "B H T W"]:
        if not key.shape[1]:  # a rank that got no heads
            return query
        keys, values = self.cache.keys[layer, self.rows], self.cache.values[layer, self.rows]
        self._place(keys, key.transpose(1, 2).to(keys.dtype))
        self._place(values, value.transpose(1, 2).to(values.dtype))
        grouped = query.shape[1] != key.shape[1]
        if self.start == 0 and not self.documents:
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        key, value = keys[:, : self.end].transpose(1, 2), values[:, : self.end].transpose(1, 2)
        if query.shape[2] == 1:
            # The heads of a group read the same keys: as the rows of one head they need no copies of them.
            rows = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
            return F.scaled_dot_product_attention(rows, key, value, self._mask).reshape(query.shape)
        if self.start is not None and not self.documents:
            mask = causal_lower_right(query.shape[2], self.end)
            return F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=grouped)
        return F.scaled_dot_product_attention(query, key, value, self._mask, enable_gqa=grouped)
