"""What serving a model takes, in bytes, before anything is allocated; and what it took, measured.

    weights     this rank's: attention and MLP are cut over the ranks, embedding, norms, rule and head are on every one
    KV cache    2 · layers · slots · capacity · heads · W, this rank's heads; of Kimi Linear, MLA's latents
    KDA state   of Kimi Linear: a float32 matrix for each head and slot, and the convolutions' latest inputs
    bank        N (T/P) D: N sources of the T tokens of one pass, cut over P ranks (arXiv 2603.15031, section 4.2);
                for a rule without depth attention, what its state carries
    reads       what phase 1 of a block keeps for its later reads, (S - 1) (T/P) D, with a float32 denominator each;
                the last block's has one more, the output's

T is the most tokens of one pass: slots times the chunk. Activations inside a sublayer, and logits, come on top.
"""

import os
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fathom.block import BlockState, block_starts
from fathom.errors import UserError
from fathom.full import default_chunk
from fathom.inference.prenorm import PendingState
from fathom.inference.sharded import share
from fathom.kernels import backend_for
from fathom.models import kimi_counts
from fathom.models.accounting import parameters, source_counts, state_bytes
from fathom.models.config import SWITCHES, ModelConfig
from fathom.models.kimi_config import KimiConfig
from fathom.residuals import RECOMMENDED_BLOCKS

if TYPE_CHECKING:
    from fathom.inference.engine import Engine

Bytes = dict[str, int]


def bank_bytes(num_sources: int, tokens: int, dim: int, itemsize: int, ranks: int = 1) -> int:
    """``N (T/P) D`` elements, T rounded up to a multiple of P."""
    return num_sources * -(-tokens // ranks) * dim * itemsize


def predict(
    config: ModelConfig,
    *,
    slots: int,
    capacity: int,
    chunk: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    ranks: int = 1,
    rank: int = 0,
    device: torch.device | str = "cpu",
) -> Bytes:
    """Bytes of ``weights``, ``kv_cache``, ``bank`` and ``reads`` on one rank, for an ``Engine`` of these settings.

    Of Kimi Linear, which one rank serves, ``kda_state`` as well.
    """
    low, high = dtype.itemsize, max(dtype.itemsize, 4)
    counts = parameters(config)
    # The rule's own parameters are never rounded to less than float32, and the key gain is folded into the query.
    wide = counts["residual rule"] // (2 if _attends(config) and config.residual.gain else 1)
    plain = counts["embedding"] + counts["norms"] + counts["head"]
    if isinstance(config, KimiConfig):
        if ranks > 1:
            raise UserError(f"ranks is {ranks}: Kimi Linear is served by one rank")
        sublayers, kept = sum(kimi_counts.parameters(config).values()), kimi_counts.float32_parameters(config)
        plain, wide = plain + sublayers - kept, wide + kept
        one = kimi_counts.cache_bytes(config, capacity, low)
        state = slots * (one["kda_state"] * high // 4 + one["kda_tails"])
        cache = {"kv_cache": slots * one["mla_cache"], "kda_state": state}
    else:
        kv = _share(config.kv_heads, rank, ranks)
        heads = kv * (2 * config.num_heads // config.kv_heads + 2)
        plain += config.num_layers * config.dim * config.head_width * heads
        plain += config.num_layers * 3 * config.dim * _share(config.mlp_width, rank, ranks)
        cache = {"kv_cache": 2 * config.num_layers * slots * capacity * kv * config.head_width * low}
    tokens = slots * min(chunk or capacity, capacity)
    local = -(-tokens // ranks)
    if _attends(config):
        bank = bank_bytes(max(source_counts(config)), tokens, config.dim, low, ranks)
    else:
        bank = state_bytes(config) * low // 2 * local
    return {
        "weights": plain * low + wide * high,
        **cache,
        "bank": bank,
        "reads": _kept_reads(config, device, dtype) * local * (config.dim * low + high),
    }


def _attends(config: ModelConfig) -> bool:
    """Whether the rule is Full or Block AttnRes itself."""
    return config.residual.rule in ("full", "block") and not config.residual.options().keys() & set(SWITCHES)


def _kept_reads(config: ModelConfig, device: torch.device | str, dtype: torch.dtype) -> int:
    residual, length = config.residual, config.num_sublayers
    if not _attends(config):
        return 0
    if residual.rule == "full" and backend_for(device, dtype) == "triton":
        return 1  # served as blocks of one (``FusedBlocks``): the output's
    if residual.schedule != "two_phase":
        return 0
    if residual.rule == "full":
        chunk = default_chunk(length)
        return chunk if chunk > 1 else 0
    blocks = residual.num_blocks or min(RECOMMENDED_BLOCKS, length)
    given: dict[str, Any] = {"block_size": residual.block_size} if residual.block_size else {"num_blocks": blocks}
    sizes = [last - first for first, last in pairwise([*block_starts(length, **given), length])]
    return max(max(sizes) - 1, sizes[-1])


def _share(count: int, rank: int, ranks: int) -> int:
    first, last = share(count, rank, ranks)
    return last - first


def available(device: torch.device) -> int:
    """Bytes that can be allocated on ``device`` now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check(predicted: Bytes, free: int) -> None:
    """Raise ``UserError``, with the numbers, if ``predicted`` does not fit into ``free`` bytes."""
    total = sum(predicted.values())
    if total > free:
        parts = ", ".join(f"{name.replace('_', ' ')} {size(value)}" for name, value in predicted.items())
        raise UserError(
            f"this needs {size(total)} ({parts}), and {size(free)} are free: "
            "give fewer slots, a smaller capacity or chunk, or more ranks"
        )


def size(count: int) -> str:
    """``1.88 GB``; decimal units, as the paper's figures are."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


def measure(engine: "Engine") -> Bytes:
    """The bytes of ``engine``, of the same names: of its tensors, and of the states of a prefill that fills every slot."""
    weights = {p.data_ptr(): p.nbytes for p in engine.model.parameters() if p.numel()}
    most: Bytes = {"bank": 0, "reads": 0}

    def observe(site: int, state: Any, output: Tensor | None) -> None:
        kept = {id(leaf): leaf.nbytes for leaf in pytree.tree_leaves(_sources(state)) if isinstance(leaf, Tensor)}
        most["bank"] = max(most["bank"], sum(kept.values()))
        reads = [*getattr(state, "out", ()), *getattr(state, "lse", ())]
        most["reads"] = max(most["reads"], sum(leaf.nbytes for leaf in reads))

    engine.prefill([[1 % engine.config.vocab_size] * engine.capacity] * engine.slots, observe=observe)
    engine.reset()
    state = sum(tensor.nbytes for tensor in engine.cache.recurrent)
    cache = {"kv_cache": engine.cache.nbytes - state} | ({"kda_state": state} if state else {})
    return {"weights": sum(weights.values()), **cache, **most}


def _sources(state: Any) -> Any:
    """What a state carries of depth: the bank or the sources, or all of it where a rule has none."""
    if isinstance(state, PendingState):
        return state.hidden
    if isinstance(state, BlockState) and state.ahead is not None and state.pending is not None:
        of_output = len(state.ahead.queries) == 0
        if len(state.out) == of_output:  # a block that has ended: it joins the bank, or is read beside it by the output
            return (*state.bank, state.pending)
    return getattr(state, "bank", getattr(state, "sources", state))
