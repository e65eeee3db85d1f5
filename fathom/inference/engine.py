"""The engine: a model, a key/value cache allocated once, and the two passes that fill it.

    prefill     the tokens of prompts, ragged, in chunks      -> the logits after each prompt
    decode      one more token of every sequence              -> the logits after it

Both run the network's own loop: sites are read by its stream, on [B, T, D] and on [B, 1, D], as in training. A stream's state
lasts for one pass: sources of depth belong to a token, and earlier tokens are seen through attention alone. So what depth
attention adds to serving is time and the bank of one chunk, and nothing to the cache.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor, nn

from fathom.block import BlockAttnRes
from fathom.errors import UserError
from fathom.full import FullAttnRes
from fathom.inference.blocks import FusedBlocks
from fathom.inference.cache import KVCache, Window
from fathom.inference.graphs import DecodeGraphs
from fathom.inference.kimi import KimiCache
from fathom.inference.load import check_tokenizer, load_run
from fathom.inference.prenorm import FusedPreNorm
from fathom.inference.sharded import Shards, shard
from fathom.kernels import backend_for
from fathom.models.kimi_config import KimiConfig
from fathom.models.layers import Attention, Context, RMSNorm
from fathom.models.moe import Experts
from fathom.models.transformer import Observe, Transformer
from fathom.stream import PreNorm, Stream


class Engine:
    """Serves one model.

    Args:
        model: taken over and changed: its weights are cast, and its stream is put into the form that is served.
        tokenizer: needed for prompts and answers that are text.
        slots: sequences at a time; more prompts than these wait for a free slot.
        capacity: tokens that a slot holds; ``model.config.context``, and at most that, if not given.
        chunk: prompts are prefilled in pieces of this many tokens, which bounds the memory of the depth sources; whole if not
            given.
        dtype: of weights, activations and cache; the model's own if not given. What the residual rule itself computes with
            (queries, gains) is never rounded to less than float32.
        cuda_graphs: decode by CUDA graphs, one for each power of two of rows; on a GPU only.
        shards: the ranks that serve together, each with its part of ``model`` (see ``sharded.py``).

    Raises:
        UserError: a setting out of range, or a tokenizer that is not the model's.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None = None,
        *,
        slots: int = 1,
        capacity: int | None = None,
        chunk: int | None = None,
        dtype: torch.dtype | None = None,
        cuda_graphs: bool = False,
        shards: Shards | None = None,
    ) -> None:
        config = model.config
        capacity = config.context if capacity is None else capacity
        for name, value, most in (
            ("slots", slots, 2**31), ("capacity", capacity, config.context), ("chunk", chunk, 2**31),
        ):  # fmt: skip
            if value is not None and not 1 <= value <= most:
                raise UserError(f"{name} is {value}: it must be between 1 and {most:,}")
        if tokenizer is not None:
            check_tokenizer(tokenizer, config.vocab_size, "the tokenizer")
        self.model, self.tokenizer = model.eval(), tokenizer
        self.config, self.end_of_text = config, model.end_of_text
        self.slots, self.capacity, self.chunk = slots, capacity, chunk or capacity
        self.device = model.embedding.weight.device
        self.dtype = model.embedding.weight.dtype if dtype is None else dtype
        prepare(model, self.dtype)
        self.shards = shards
        if shards is not None:
            if isinstance(config, KimiConfig):
                raise UserError("Kimi Linear is served by one rank: leave shards out")
            shard(model, shards)
        self.cache = self._make_cache()
        self.lengths = [0] * slots
        """Tokens that each slot holds."""
        self.turn = 0
        """Counts the generations that have begun; only the latest may go on."""
        self.graphs = DecodeGraphs(self.step, capacity, self.device, self.cache.recurrent) if cuda_graphs else None

    @classmethod
    def load(
        cls, path: str | Path, *, step: int | None = None, device: torch.device | str = "cpu", **settings: Any
    ) -> "Engine":
        """The engine of a run folder or a checkpoint; ``settings`` are those of ``Engine``."""
        model, tokenizer = load_run(Path(path), torch.device(device), step=step)
        return cls(model, tokenizer, **settings)

    def _make_cache(self) -> KVCache | KimiCache:
        if isinstance(self.config, KimiConfig):
            return KimiCache(self.config, self.slots, self.capacity, dtype=self.dtype, device=self.device)
        attention = next(module for module in self.model.modules() if isinstance(module, Attention))
        return KVCache(
            self.config, self.slots, self.capacity, dtype=self.dtype, device=self.device, kv_heads=attention.kv_heads
        )

    def reset(self) -> None:
        """Empty every slot."""
        self.cache.clear()
        self.lengths = [0] * self.slots

    def check_prompt(self, tokens: Sequence[int], name: str = "the prompt") -> list[int]:
        """The tokens to prefill: ``tokens``, or the end-of-text token for an empty prompt, which begins a document.

        Raises:
            UserError: nothing to begin with, more than a slot holds, or a token outside the vocabulary.
        """
        if not len(tokens):
            if self.end_of_text is None:
                raise UserError(f"{name} is empty, and the model has no end-of-text token to begin a document with")
            return [self.end_of_text]
        if len(tokens) > self.capacity:
            raise UserError(f"{name} has {len(tokens):,} tokens: a sequence may have {self.capacity:,} here")
        for token in tokens:
            if not 0 <= token < self.config.vocab_size:
                raise UserError(f"token {token} of {name} is not in the model's vocabulary of {self.config.vocab_size}")
        return list(tokens)

    def prefill(
        self, prompts: Sequence[Sequence[int]], *, first: int = 0, observe: Observe | None = None
    ) -> Float[Tensor, "B V"]:
        """Put prompts into the slots from ``first`` on, whatever was there, and return the logits after each.

        Args:
            prompts: tokens, of any lengths.
            observe: as in ``Transformer.hidden``, called in every chunk.

        Raises:
            UserError: more prompts than slots, or one that ``check_prompt`` refuses.
        """
        if not 0 <= first <= first + len(prompts) <= self.slots or not prompts:
            raise UserError(f"{len(prompts)} prompts from slot {first} on: the engine has {self.slots} slots")
        checked = [self.check_prompt(prompt, f"prompt {index}") for index, prompt in enumerate(prompts)]
        lengths = [len(prompt) for prompt in checked]
        padded = torch.tensor([prompt + [0] * (max(lengths) - len(prompt)) for prompt in checked], device=self.device)
        ragged = torch.tensor(lengths, device=self.device) if min(lengths) < max(lengths) else None
        last: list[Tensor] = [padded] * len(checked)
        for start in range(0, max(lengths), self.chunk):
            tokens = padded[:, start : start + self.chunk]
            positions = torch.arange(start, start + tokens.shape[1], device=self.device).expand_as(tokens)
            end = start + tokens.shape[1]
            window = self.cache.window(first, positions, start, end, self.config.document_mask, ragged)
            hidden = self.forward(tokens, window, observe)
            for row, length in enumerate(lengths):
                if start < length <= end:
                    last[row] = hidden[row, length - 1 - start]
        self.lengths[first : first + len(lengths)] = lengths
        return self.logits(torch.stack(last))

    def decode(self, tokens: Sequence[int], *, rows: Sequence[bool] | None = None) -> Float[Tensor, "B V"]:
        """One more token for each of the first B slots: the logits after it.

        Args:
            tokens: of slots 0 .. B-1.
            rows: which of these slots take part; all if not given. The logits of the others mean nothing, and what they held
                is lost.

        Raises:
            UserError: more tokens than slots, a token outside the vocabulary, or a slot that is empty or full.
        """
        rows = [True] * len(tokens) if rows is None else rows
        if not 1 <= len(tokens) <= self.slots or len(rows) != len(tokens):
            raise UserError(f"{len(tokens)} tokens to decode: the engine has {self.slots} slots")
        for slot, (token, live) in enumerate(zip(tokens, rows, strict=True)):
            if not 0 <= token < self.config.vocab_size:
                raise UserError(f"token {token} is not in the model's vocabulary of {self.config.vocab_size}")
            if live and not 0 < self.lengths[slot] < self.capacity:
                raise UserError(f"slot {slot} holds {self.lengths[slot]} of {self.capacity} tokens: prefill it first")
        self.lengths[: len(rows)] = [
            n + 1 if live else 0 for n, live in zip(self.lengths[: len(rows)], rows, strict=True)
        ]
        positions = [max(0, length - 1) for length in self.lengths[: len(rows)]]
        if self.graphs is not None:
            used = (slot for slot in range(len(rows), self.slots) if self.lengths[slot])
            return self.graphs(tokens, positions, next(used, self.slots))
        at = torch.tensor(positions, device=self.device).unsqueeze(1)
        return self.step(torch.tensor(tokens, device=self.device).unsqueeze(1), at, max(positions) + 1)

    def step(self, tokens: Tensor, positions: Tensor, end: int) -> Float[Tensor, "B V"]:
        """``decode`` on tensors [B, 1] alone, as a CUDA graph captures it; no row is at ``end`` or beyond."""
        window = self.cache.window(0, positions, None, end, self.config.document_mask)
        return self.logits(self.forward(tokens, window)[:, -1])

    @torch.inference_mode()
    def forward(self, tokens: Tensor, window: Window, observe: Observe | None = None) -> Float[Tensor, "B T D"]:
        """The normalised hidden vectors of new tokens, which join the cache."""
        if window.documents:
            assert self.end_of_text is not None
            window.note_documents(tokens, self.end_of_text)
        model = self.model
        if window.start is not None:
            cos, sin = model.cos[window.start : window.end], model.sin[window.start : window.end]
        else:
            cos, sin = model.cos[window.positions].unsqueeze(1), model.sin[window.positions].unsqueeze(1)
        with self._autocast():
            hidden = model.hidden(tokens, observe, Context(cos, sin, None, window))
            return hidden if self.shards is None else self.shards.gather(hidden)

    @torch.inference_mode()
    def logits(self, hidden: Float[Tensor, "B D"]) -> Float[Tensor, "B V"]:
        with self._autocast():
            return self.model.head(hidden)

    def _autocast(self) -> torch.autocast:
        """For the rules whose own parameters stay float32; the weights are cast already."""
        low = self.dtype in (torch.bfloat16, torch.float16)
        return torch.autocast(self.device.type, self.dtype if low else None, enabled=low, cache_enabled=False)


@torch.no_grad()
def prepare(model: Transformer, dtype: torch.dtype) -> None:
    """Cast ``model`` and put its stream into the form that is served; the reads are the same."""
    if dtype in (torch.float32, torch.float64):
        model.to(dtype)
    else:
        for module in _sublayer_modules(model):
            module.to(dtype)
    model.stream = served(model.stream, dtype)


@torch.no_grad()
def served(stream: Stream, dtype: torch.dtype) -> Stream:
    """``stream`` in the form that reads activations of ``dtype`` fastest; any other than these as it is."""
    if type(stream) is PreNorm:
        return FusedPreNorm(stream.num_sublayers, stream.dim)
    if not isinstance(stream, BlockAttnRes | FullAttnRes):
        return stream
    if stream.key_gain is not None:  # once, and not at every block of every step
        stream.query.mul_(stream.key_gain)
        stream.key_gain = None
    # Exact types: an ablation of AttnRes is a subclass whose reads are others.
    if type(stream) is BlockAttnRes and stream.schedule == "two_phase":
        return FusedBlocks(stream)
    if type(stream) is FullAttnRes and backend_for(stream.query.device, dtype) == "triton":
        return FusedBlocks(stream)
    return stream


def _sublayer_modules(model: Transformer) -> Iterator[nn.Module]:
    """The embedding, linear maps and norms of the network, without those of its residual rule."""
    own = set(model.stream.modules())
    return (
        module
        for module in model.modules()
        if module not in own and isinstance(module, nn.Linear | nn.Embedding | RMSNorm | Experts)
    )
