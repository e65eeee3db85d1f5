"""Decode steps as CUDA graphs: one launch from the CPU for all the kernels of a step.

A graph has fixed shapes: there is one for each power of two of rows, attention spans the whole cache under its mask, and
tokens and positions are copied into the tensors that the graph reads.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fathom.errors import UserError

Step = Callable[[Tensor, Tensor, int], Tensor]
WARM_UP = 3


class DecodeGraphs:
    """``step(tokens [B, 1], positions [B, 1], capacity)`` as graphs, captured where a number of rows first comes."""

    def __init__(self, step: Step, slots: int, capacity: int, device: torch.device) -> None:
        if device.type != "cuda":
            raise UserError(f"CUDA graphs are asked for on {device.type}: they need a GPU")
        self._step, self._slots, self._capacity, self._device = step, slots, capacity, device
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]] = {}

    def __call__(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """The logits [B, V] of B rows. Rows that fill up a graph write to the first position of slots that are empty."""
        rows = bucket(len(tokens), self._slots)
        padding = [0] * (rows - len(tokens))
        given = torch.tensor([[*tokens, *padding], [*positions, *padding]]).unsqueeze(-1).pin_memory()
        if rows not in self._graphs:
            self._graphs[rows] = self._capture(given.to(self._device))
        graph, both, _, logits = self._graphs[rows]
        both.copy_(given, non_blocking=True)
        graph.replay()
        return logits[: len(tokens)].clone()

    def _capture(self, both: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor, Tensor]:
        # Warming up with the step's own tokens writes to the cache what the step writes: running it again changes nothing.
        tokens, positions = both.unbind(0)
        side = torch.cuda.Stream(self._device)
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                self._step(tokens, positions, self._capacity)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._step(tokens, positions, self._capacity)
        return graph, both, tokens, logits


def bucket(rows: int, slots: int) -> int:
    """The rows of the graph that serves ``rows``: the next power of two, and ``slots`` at most."""
    return min(slots, 1 << (rows - 1).bit_length())
