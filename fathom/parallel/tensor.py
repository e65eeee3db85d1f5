"""Tensor and sequence parallelism: P ranks share every sublayer by its heads and MLP columns, and the stream by its tokens.

    stream [B, T/P, D] --read, norm--> [B, T/P, D] --all-gather--> [B, T, D] --this rank's heads or columns--> a term of the
    output [B, T, D] --reduce-scatter--> output [B, T/P, D] --> stream

So bank, partial sums, reads and norms are of T/P tokens on each rank, and no source is ever sent. The gather's backward pass is
the scatter and the other way round. Matrices inside sublayers are cut; the rest (embedding, head, norms, queries, key gains) is
whole on every rank, which sees its own tokens or heads only: ``sum_gradients`` adds up what the ranks found.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

from fathom.models.layers import Attention, SwiGLU
from fathom.models.transformer import Transformer


def gather(x: Float[Tensor, "B t D"], mesh: DeviceMesh) -> Float[Tensor, "B T D"]:
    """The tokens of all ranks; the gradient is summed over the ranks and cut."""
    return DTensor.from_local(x, mesh, [Shard(1)], run_check=False).full_tensor(grad_placements=[Partial()])


def scatter(x: Float[Tensor, "B T D"], mesh: DeviceMesh) -> Float[Tensor, "B t D"]:
    """This rank's tokens of the sum over the ranks; the gradient is gathered."""
    return DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(placements=[Shard(1)]).to_local()


class Pieces(Tensor):
    """Rectangles of a matrix of the whole network, as torch.distributed.checkpoint saves and loads it: by where they lie.

    A tensor, because it asks for one; there are no numbers but those of ``parts``: the row and column of a rectangle's first
    number, and the rectangle, which shares memory with a parameter.
    """

    parts: list[tuple[torch.Size, Tensor]]

    @staticmethod
    def __new__(cls, size: Sequence[int], parts: list[tuple[torch.Size, Tensor]], like: Tensor) -> "Pieces":
        made = Tensor._make_wrapper_subclass(cls, size, dtype=like.dtype, device=like.device)
        made.parts = parts
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> "Pieces":  # type: ignore[override]
        # The start of the copy that a save works with; attributes are copied after it.
        assert function is torch.ops.aten.new_empty.default, f"{function} of pieces"
        return Pieces(args[1], [], args[0])

    def fill_from(self, whole: Tensor) -> None:
        """Copy from ``whole`` what lies in it here."""
        for (row, column), part in self.parts:
            part.copy_(whole[row : row + part.shape[0], column : column + part.shape[1]])

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=first, sizes=part.size()) for first, part in self.parts]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(name, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(part for first, part in self.parts if first == index.offset)


class SplitLinear(nn.Linear):
    """A rank's part of a linear map without bias, which is cut along one dim of its weight, fused pieces each for itself.

    Args:
        whole: the map; its weight is copied.
        dim: 0 cuts outputs, 1 inputs.
        sizes: of the pieces that lie one after the other along ``dim``, as query, key and value do.
        number, count: this rank, of how many; ``count`` divides every size.
    """

    def __init__(self, whole: nn.Linear, dim: int, sizes: Sequence[int], number: int, count: int) -> None:
        shape = list(whole.weight.shape)
        shape[dim] //= count
        super().__init__(shape[1], shape[0], bias=False, device="meta")
        self.dim, self.sizes, self.number, self.count = dim, tuple(sizes), number, count
        pieces = whole.weight.detach().split(self.sizes, dim)
        self.weight = nn.Parameter(torch.cat([piece.chunk(count, dim)[number] for piece in pieces], dim))

    def pieces(self, tensor: Tensor) -> Pieces:
        """Where ``tensor``, as large as the weight, lies in the whole: the weight, or what an optimizer keeps of it.

        It may be sharded by FSDP2 as well: then those of this rank's shard.
        """
        dim, at, size = self.dim, [0, 0], list(tensor.shape)
        size[dim] *= self.count
        if isinstance(tensor, DTensor):
            at = list(tensor.__create_chunk_list__()[0].offsets)
            tensor = tensor.to_local()
        parts = []
        for before, piece in zip(accumulate(self.sizes, initial=0), self.sizes, strict=False):
            begin, length = before // self.count, piece // self.count  # of the piece, on this rank
            low, high = max(begin, at[dim]), min(begin + length, at[dim] + tensor.shape[dim])
            if low < high and tensor.numel():
                first = list(at)
                first[dim] = before + self.number * length + low - begin
                parts.append((torch.Size(first), tensor.narrow(dim, low - at[dim], high - low)))
        return Pieces(size, parts, tensor)


def own_tokens(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The tokens of this rank: [B, T, ...] to [B, T/P, ...]."""
    return x.chunk(mesh.size(), dim=1)[mesh.get_local_rank()]


def split_sublayers(model: Transformer, mesh: DeviceMesh) -> None:
    """Leave this rank its part of every sublayer of ``model``, in place, and its tokens of the stream.

    ``model`` is the same on all ranks of the one-dimensional ``mesh``, and so are the tokens [B, T] that it is called with; what
    comes out is of this rank's tokens (``own_tokens``). Heads, MLP columns and T are divisible by P (config.py sees to it).
    """
    number, count = mesh.get_local_rank(), mesh.size()
    for sublayer in model.sublayers:
        if isinstance(sublayer, Attention):
            inner, kv = (heads * sublayer.head_width for heads in (sublayer.num_heads, sublayer.kv_heads))
            sublayer.qkv = SplitLinear(sublayer.qkv, 0, (inner, kv, kv), number, count)
            sublayer.out = SplitLinear(sublayer.out, 1, (inner,), number, count)
            sublayer.num_heads //= count
            sublayer.kv_heads //= count
        else:
            assert isinstance(sublayer, SwiGLU)
            width = sublayer.down.in_features
            sublayer.gate_up = SplitLinear(sublayer.gate_up, 0, (width, width), number, count)
            sublayer.down = SplitLinear(sublayer.down, 1, (width,), number, count)
        sublayer.register_forward_pre_hook(lambda _, arguments: (gather(arguments[0], mesh), *arguments[1:]))
        sublayer.register_forward_hook(lambda _, arguments, output: scatter(output, mesh))
    model.embedding.register_forward_pre_hook(lambda _, arguments: own_tokens(arguments[0], mesh))


def split_parameters(parts: Iterable[nn.Module]) -> set[Tensor]:
    """Those of which each rank has another part."""
    linears = (module for part in parts for module in part.modules() if isinstance(module, SplitLinear))
    return {linear.weight for linear in linears}


@torch.no_grad()
def sum_gradients(parts: Sequence[nn.Module], mesh: DeviceMesh) -> None:
    """Add up the gradients of the parameters that every rank has whole, over the ranks; once a step."""
    split = split_parameters(parts)
    for part in parts:
        for parameter in part.parameters():
            gradient = parameter.grad
            if gradient is None or parameter in split:
                continue
            local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            if local.numel():
                dist.all_reduce(local, group=mesh.get_group())
