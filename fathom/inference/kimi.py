"""The cache of a Kimi Linear decoder: KDA's states, MLA's latents, and documents, in one object beside the KVCache's.

A state is no list of tokens: what pads a row of a ragged batch must leave it alone, a new sequence in a slot starts from zero,
and so does a new document. The bank of AttnRes is not here: it lasts for one pass, as in the engine of every decoder.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fathom.inference.cache import Window
from fathom.inference.memory import available, check
from fathom.models.kda import Memory
from fathom.models.kimi_config import KimiConfig
from fathom.models.kimi_counts import cache_bytes


class KimiCache:
    """What decoding keeps of ``slots`` sequences of ``capacity`` tokens; ``UserError`` if there is no memory for it."""

    def __init__(
        self, config: KimiConfig, slots: int, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        layers = range(config.num_layers)
        bytes_of = cache_bytes(config, capacity, dtype.itemsize)
        check({name: slots * count for name, count in bytes_of.items()}, available(device))
        self.mla = {layer: place for place, layer in enumerate(filter(config.is_mla, layers))}
        self.kda = {layer: place for place, layer in enumerate(n for n in layers if not config.is_mla(n))}
        heads, width = config.num_heads, config.head_width

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.latents = zeros(len(self.mla), slots, capacity, config.kv_rank + config.shared_key_dim)
        self.tails = zeros(len(self.kda), slots, config.conv_size - 1, 3 * heads * width)
        state = torch.promote_types(dtype, torch.float32)
        self.states = zeros(len(self.kda), slots, heads, width, width, dtype=state)
        self.documents = zeros(slots, capacity, dtype=torch.int32)
        """As in ``KVCache``."""

    @property
    def recurrent(self) -> tuple[Tensor, ...]:
        """As in ``KVCache``."""
        return self.tails, self.states

    @property
    def nbytes(self) -> int:
        """Bytes of states, tails and latents."""
        return self.latents.nbytes + self.tails.nbytes + self.states.nbytes

    def clear(self) -> None:
        """Forget everything. Stale numbers are harmless, NaN is not: a masked one still spoils its row."""
        for tensor in (self.latents, self.tails, self.states, self.documents):
            tensor.zero_()

    def window(
        self, first: int, positions: Int[Tensor, "B T"], start: int | None, end: int, documents: bool,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> "KimiWindow":  # fmt: skip
        """What one forward pass sees; ``lengths`` are those of the rows, where some are padded."""
        live = None if lengths is None else positions < lengths.unsqueeze(1)
        return KimiWindow(self, first, positions, start, end, documents, live)


@dataclass(frozen=True)
class KimiWindow(Window):
    """A ``Window`` for sublayers that ask for memories and latents."""

    cache: KimiCache  # type: ignore[assignment]
    live: Bool[Tensor, "B T"] | None = None
    """False for what pads a row; None if nothing does."""

    @property
    def alone(self) -> bool:
        """Whether the new tokens see one another and no others."""
        return self.start == 0 and not self.documents

    @property
    def mask(self) -> Tensor:
        return self._mask

    def latents(self, layer: int, new: Float[Tensor, "B T R"]) -> Float[Tensor, "B end R"]:
        """The latents of the cached tokens and of the new ones, which join them."""
        kept = self.cache.latents[self.cache.mla[layer], self.rows]
        self._place(kept, new.to(kept.dtype))
        return kept[:, : self.end]

    @cached_property
    def _numbers(self) -> Int[Tensor, "B T"]:
        """Document numbers of the new tokens; what pads a row belongs to the row's last document."""
        numbers = (self.cache.documents[self.rows] // 2).gather(1, self.positions)
        if self.live is None:
            return numbers
        return numbers.minimum(numbers.gather(1, (self.live.sum(1, keepdim=True) - 1).clamp(min=0)))

    @cached_property
    def documents_with_tail(self) -> Int[Tensor, "B S1T"] | None:
        """Document numbers of the tokens that KDA's convolutions see; -1 before a sequence."""
        if not self.documents:
            return None
        taps = self.cache.tails.shape[2]
        before = self.positions[:, :1] + torch.arange(-taps, 0, device=self.positions.device)
        numbers = (self.cache.documents[self.rows] // 2).gather(1, before.clamp(min=0))
        return torch.cat((numbers.masked_fill(before < 0, -1), self._numbers), dim=1)

    @cached_property
    def _goes_on(self) -> Bool[Tensor, " B"]:
        """Whether a row's first new token remembers what came before it."""
        goes_on = self.positions[:, 0] > 0
        numbers = self.documents_with_tail
        if numbers is None:
            return goes_on
        taps = self.cache.tails.shape[2]
        same = numbers[:, taps - 1] == numbers[:, taps]
        return goes_on & (same if self.live is None else same | ~self.live[:, 0])

    def memory(self, layer: int) -> Memory:
        """What KDA layer ``layer`` remembers before the new tokens."""
        place = self.cache.kda[layer]
        tail, state = self.cache.tails[place, self.rows], self.cache.states[place, self.rows]
        fresh = self.positions[:, 0] == 0
        return Memory(
            tail.masked_fill(fresh[:, None, None], 0), state.masked_fill(~self._goes_on[:, None, None, None], 0)
        )  # fmt: skip

    def remember(self, layer: int, inputs: Float[Tensor, "B S1T C"], state: Float[Tensor, "B H K V"]) -> None:
        """Keep the state after the new tokens, and the latest of ``inputs``, which begin with the tail before them."""
        place = self.cache.kda[layer]
        self.cache.states[place, self.rows] = state.to(self.cache.states.dtype)
        tails = self.cache.tails[place, self.rows]
        taps = tails.shape[1]
        if self.live is None:
            tails.copy_(inputs[:, inputs.shape[1] - taps :])
            return
        at = self.live.sum(1, keepdim=True) + torch.arange(taps, device=inputs.device)
        tails.copy_(inputs.gather(1, at.unsqueeze(-1).expand(-1, -1, inputs.shape[2])))
