"""Timing on a GPU, and enough of it on a CPU to try the benchmarks there.

GPU times are between CUDA events. Before the first event the GPU spins for as long as the CPU needs to launch what follows,
so that an interval holds no wait for the CPU: Python's launches must not decide which arm is fast. The wall time of a step,
launches included, is measured apart.
"""

import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

COPY_BYTES = {"cuda": 2**30, "cpu": 2**26}
FLUSH_FLOATS = 2**26
"""Read before each timing of a single kernel: several times the 50 MB level-two cache of an H100. Read and not written, or the
kernel would pay for writing them back."""

Part = Callable[[], object]


class Clock:
    """The times of one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._spins_per_ms = self._calibrate() if self.cuda else 0.0

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def _spin(self, spins: int) -> None:
        torch.cuda._sleep(spins)

    def _calibrate(self) -> float:
        spins = 20_000_000
        self._spin(spins)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        self._spin(spins)
        end.record()
        end.synchronize()
        return spins / begin.elapsed_time(end)

    def wall(self, part: Part) -> float:
        """Milliseconds until ``part`` is done, launches included."""
        self.synchronize()
        begin = time.perf_counter()
        part()
        self.synchronize()
        return (time.perf_counter() - begin) * 1e3

    def launch(self, part: Part) -> float:
        """Milliseconds until the CPU has launched ``part``."""
        self.synchronize()
        begin = time.perf_counter()
        part()
        milliseconds = (time.perf_counter() - begin) * 1e3
        self.synchronize()
        return milliseconds

    def parts(self, parts: Sequence[Part], ahead_ms: float) -> list[float]:
        """Milliseconds from the start to the end of each of ``parts``, run in a row; the GPU waits ``ahead_ms`` first."""
        if not self.cuda:
            begin, ends = time.perf_counter(), []
            for part in parts:
                part()
                ends.append((time.perf_counter() - begin) * 1e3)
            return ends
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(parts) + 1)]
        torch.cuda.synchronize(self.device)
        self._spin(int(ahead_ms * self._spins_per_ms))
        events[0].record()
        for part, event in zip(parts, events[1:], strict=True):
            part()
            event.record()
        events[-1].synchronize()
        return [events[0].elapsed_time(event) for event in events[1:]]

    def kernel(self, part: Part, repeats: int = 20) -> list[float]:
        """Milliseconds of ``part`` alone, each time from a cold level-two cache."""
        part()
        launch = self.launch(part)
        if not self.cuda:
            return [self.wall(part) for _ in range(repeats)]
        flush = torch.zeros(FLUSH_FLOATS, device=self.device)
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        self._spin(int((2 * launch * repeats + 1) * self._spins_per_ms))
        for begin, end in pairs:
            flush.sum()
            begin.record()
            part()
            end.record()
        self.synchronize()
        return [begin.elapsed_time(end) for begin, end in pairs]

    def copy_bandwidth(self) -> float:
        """Bytes per second, read and written together, of a large device-to-device copy."""
        source = torch.ones(COPY_BYTES[self.device.type], dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        milliseconds = statistics.median(self.kernel(lambda: target.copy_(source)))
        return 2 * source.nbytes / (milliseconds / 1e3)

    def reset_peak(self) -> None:
        """Start a new peak, from memory that nothing unused holds."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float | None:
        """Most memory that tensors held since ``reset_peak``; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) / 2**30 if self.cuda else None


def command(script: str) -> str:
    """The command line as a reader would type it: its output folder is called OUT."""
    words = list(sys.argv[1:])
    if "--out" in words[:-1]:
        words[words.index("--out") + 1] = "OUT"
    return shlex.join(["python", f"benchmarks/{script}", *words])
