"""Decode steps as CUDA graphs: one launch from the CPU for all the kernels of a step.

A graph has fixed shapes: there is one for each power of two of rows, attention spans the whole cache under its mask, and
tokens and positions are copied into the tensors that the graph reads. The graphs of one engine share their memory: what a
replay computes is copied out before the next one.
"""

import gc
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fathom.errors import UserError

Step = Callable[[Tensor, Tensor, int], Tensor]
WARM_UP = 3


class DecodeGraphs:
    """``step(tokens [B, 1], positions [B, 1], capacity)`` as graphs, captured where a number of rows first comes.

    ``recurrent`` are the tensors that a step would change otherwise if it ran again: a capture leaves them as they were.
    """

    def __init__(self, step: Step, capacity: int, device: torch.device, recurrent: Sequence[Tensor]) -> None:
        if device.type != "cuda":
            raise UserError(f"CUDA graphs are asked for on {device.type}: they need a GPU")
        self._step, self._capacity, self._device, self._recurrent = step, capacity, device, recurrent
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, tokens: Sequence[int], positions: Sequence[int], free: int) -> Tensor:
        """The logits [B, V] of B rows.

        ``free``: of how many slots from the first on none beyond B is in use. Rows that fill up a graph write to those.
        """
        rows = bucket(len(tokens), free)
        padding = [0] * (rows - len(tokens))
        given = torch.tensor([[*tokens, *padding], [*positions, *padding]]).unsqueeze(-1).pin_memory()
        if rows not in self._graphs:
            self._graphs[rows] = self._capture(given.to(self._device))
        graph, both, logits = self._graphs[rows]
        both.copy_(given, non_blocking=True)
        graph.replay()
        return logits[: len(tokens)].clone()

    def _capture(self, both: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        # Keys and values are written where the step's own tokens stand, so that running it again changes nothing of theirs.
        tokens, positions = both.unbind(0)
        before = [state.clone() for state in self._recurrent]
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._step(tokens, positions, self._capacity)
        torch.cuda.current_stream(self._device).wait_stream(side)
        for state, kept in zip(self._recurrent, before, strict=True):
            state.copy_(kept)
        gc.collect()  # garbage that holds GPU memory would spoil the capture if it were freed in the middle of it
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = self._step(tokens, positions, self._capacity)
        return graph, both, logits


def bucket(rows: int, free: int) -> int:
    """The rows of the graph that serves ``rows``: the next power of two, and ``free`` at most."""
    return min(free, 1 << (rows - 1).bit_length())
