"""Serving over P ranks: tensor-parallel sublayers, and depth sources sharded along the tokens (arXiv 2603.15031, section 4.2).

    x, local tokens  --all-gather-->  x, all tokens  --sublayer, this rank's heads or channels-->  partial output, all tokens
                                                                            |
    stream.write, stream.read on local tokens  <--reduce-scatter, sum--------

A tensor-parallel sublayer ends in an all-reduce, which is a reduce-scatter and an all-gather: the stream's work is done between
the two, where every rank holds T/P of the tokens. So a rank's bank is N (T/P) D elements, and no read is computed twice. Tokens
are those of the whole batch, row after row, padded to a multiple of P. Heads and channels are shared out as evenly as they
go: a rank may get none. Embedding, norms, head and the residual rule's parameters are on every rank.

Ranks run one program on the same prompts and seeds, and hold the same logits.
"""

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fathom.errors import UserError
from fathom.models.layers import Attention, AttentionInput, AttentionOutput, Context, RMSNorm, SwiGLU
from fathom.models.transformer import Transformer


class Shards:
    """The tokens of one forward pass over the ranks of ``group``, all ranks if not given.

    Raises:
        UserError: no process group, as ``torchrun`` and ``torch.distributed.init_process_group`` make one.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_initialized():
            raise UserError("serving over ranks needs a process group: start it with torchrun and init_process_group")
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.batch = self.length = 0

    @property
    def local(self) -> int:
        """Tokens of a rank."""
        return -(-self.batch * self.length // self.ranks)

    def _padded(self, x: Tensor) -> Tensor:
        """[B, T, ...] as [P · local, ...]."""
        flat = x.flatten(0, 1)
        missing = self.ranks * self.local - len(flat)
        return flat if not missing else torch.cat((flat, flat.new_zeros(missing, *flat.shape[1:])))

    def split(self, tokens: Tensor) -> Tensor:
        """This rank's tokens [1, local] of [B, T]."""
        self.batch, self.length = tokens.shape
        return self._padded(tokens)[self.rank * self.local :][None, : self.local]

    def gather(self, x: Tensor) -> Tensor:
        """[1, local, D] of every rank as [B, T, D]."""
        whole = x.new_empty(self.ranks * self.local, x.shape[-1])
        dist.all_gather(list(whole.chunk(self.ranks)), x[0].contiguous(), group=self.group)
        return whole[: self.batch * self.length].view(self.batch, self.length, -1)

    def reduce(self, x: Tensor) -> Tensor:
        """This rank's tokens [1, local, D] of the sum over ranks of [B, T, D]."""
        local = x.new_empty(self.local, x.shape[-1])
        dist.reduce_scatter(local, list(self._padded(x).chunk(self.ranks)), group=self.group)
        return local.unsqueeze(0)


class ShardedEmbedding(nn.Module):
    """The embedding of this rank's tokens."""

    def __init__(self, embedding: nn.Embedding, shards: Shards) -> None:
        super().__init__()
        self.embedding, self.shards = embedding, shards

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(self.shards.split(tokens))


class ShardedSublayer(nn.Module):
    """A sublayer of this rank's heads or channels, from local tokens to local tokens."""

    def __init__(self, sublayer: nn.Module, shards: Shards) -> None:
        super().__init__()
        self.sublayer, self.norm, self.shards = sublayer, cast(RMSNorm, sublayer.norm), shards

    def forward(self, x: Tensor | AttentionInput, context: Context) -> Tensor | AttentionOutput:
        gather = self.shards.gather
        if isinstance(x, Tensor):
            return self.shards.reduce(self.sublayer(gather(x), context))
        whole = x._replace(query=gather(x.query), key=gather(x.key), value=gather(x.value))
        output = self.sublayer(whole, context)
        if isinstance(output, AttentionOutput):
            return output._replace(hidden=self.shards.reduce(output.hidden))
        return self.shards.reduce(output)


@torch.no_grad()
def shard(model: Transformer, shards: Shards) -> None:
    """Turn ``model``, the same on every rank, into this rank's part of it. Its ``hidden`` then returns local tokens."""
    for index, sublayer in enumerate(model.sublayers):
        if isinstance(sublayer, Attention):
            _keep_heads(sublayer, shards)
        else:
            _keep_channels(cast(SwiGLU, sublayer), shards)
        model.sublayers[index] = ShardedSublayer(sublayer, shards)
    model.embedding = ShardedEmbedding(model.embedding, shards)  # type: ignore[assignment]


def share(count: int, rank: int, ranks: int) -> tuple[int, int]:
    """What rank ``rank`` gets of ``count`` things, as (first, last + 1); shares differ by one at most."""
    return rank * count // ranks, (rank + 1) * count // ranks


def _keep_heads(attention: Attention, shards: Shards) -> None:
    """The key/value heads of this rank's share, with the query heads that read them."""
    width, groups = attention.head_width, attention.num_heads // attention.kv_heads
    first, last = share(attention.kv_heads, shards.rank, shards.ranks)
    query, key, value = attention.qkv.weight.split(
        [heads * width for heads in (attention.num_heads, attention.kv_heads, attention.kv_heads)]
    )
    heads = slice(first * groups * width, last * groups * width)
    kept = slice(first * width, last * width)
    attention.qkv.weight = nn.Parameter(torch.cat((query[heads], key[kept], value[kept])))
    attention.out.weight = nn.Parameter(attention.out.weight[:, heads].clone())
    attention.num_heads, attention.kv_heads = (last - first) * groups, last - first


def _keep_channels(mlp: SwiGLU, shards: Shards) -> None:
    gate, up = mlp.gate_up.weight.chunk(2)
    first, last = share(len(gate), shards.rank, shards.ranks)
    mlp.gate_up.weight = nn.Parameter(torch.cat((gate[first:last], up[first:last])))
    mlp.down.weight = nn.Parameter(mlp.down.weight[:, first:last].clone())
