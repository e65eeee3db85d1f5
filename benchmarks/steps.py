"""One arm's training step, and what is measured of it; residual_path.py says in which order."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from arms import Arm
from gate import Errors, Truth, backward_results, errors, gate
from timing import Clock
from torch import Tensor
from workloads import Workload

MAX_AHEAD_MS = 150.0
"""The GPU waits no longer than this for the CPU's launches."""


@dataclass
class Measured:
    """What one arm of one case gave."""

    errors: Errors = field(default_factory=dict)
    first_call_s: float = math.nan
    peak_gib: float | None = None
    launch_ms: float = math.nan
    """Time in which the CPU launches a step."""
    wall_ms: list[list[float]] = field(default_factory=list)
    """By round, by step, as the next three."""
    forward_ms: list[list[float]] = field(default_factory=list)
    forward_backward_ms: list[list[float]] = field(default_factory=list)
    graph_ms: list[list[float]] = field(default_factory=list)
    """Forward and backward replayed from a CUDA graph (--graph)."""
    kernels: list[tuple[str, int, float]] = field(default_factory=list)
    """Of one step (--profile): name, calls, milliseconds."""


class Stepper:
    """One arm's step in its two halves."""

    def __init__(self, arm: Arm, workload: Workload) -> None:
        self.arm, self.workload = arm, workload
        self.output: Tensor | None = None

    def clear(self) -> None:
        """Drop all gradients, so that the next step writes them instead of adding to them."""
        self.output = None
        self.workload.clear()
        for parameter in self.arm.parameters:
            parameter.grad = None

    def forward(self) -> None:
        self.output = self.arm.run(self.workload.embedding)

    def backward(self) -> None:
        assert self.output is not None
        self.output.backward(self.workload.gradient)

    def step(self) -> None:
        self.clear()
        self.forward()
        self.backward()


def first_call(stepper: Stepper, clock: Clock, truth: Truth, slack: float) -> Measured:
    """Run the arm for the first time and hold it to the gate (``Wrong``)."""
    arm, workload = stepper.arm, stepper.workload
    results: dict[str, Tensor] = {}
    milliseconds = clock.wall(lambda: results.update(backward_results(arm, workload)))
    measured = Measured(errors(results, truth.values), milliseconds / 1e3)
    stepper.clear()
    gate(measured.errors, truth.eager, slack)
    return measured


def prepare(stepper: Stepper, clock: Clock, measured: Measured) -> None:
    """A warm step, the step's memory and the time in which the CPU launches it."""
    stepper.step()
    stepper.clear()
    clock.reset_peak()
    stepper.step()
    clock.synchronize()
    measured.peak_gib = clock.peak_gib()
    stepper.clear()
    measured.launch_ms = clock.launch(stepper.step)
    stepper.clear()


def capture(stepper: Stepper, pool: Any) -> torch.cuda.CUDAGraph:
    """The arm's step as a CUDA graph. Graphs share ``pool``: they are replayed one at a time, and nothing reads their results."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        stepper.step()
        stepper.clear()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        stepper.step()
        stepper.clear()
    return graph


def profile(stepper: Stepper, measured: Measured) -> None:
    """Record the kernels of one step, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        stepper.step()
        torch.cuda.synchronize()
    stepper.clear()
    kernels = [event for event in trace.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    rows = [(event.key, event.count, event.self_device_time_total / 1e3) for event in kernels]
    measured.kernels = sorted(rows, key=lambda row: -row[2])


def ahead(arms: Iterable[Measured]) -> float:
    """How long the GPU waits before each timed step, in milliseconds: as the slowest to launch needs, for every arm alike.

    A GPU that has rested longer may run faster for a while; none of them shall gain by it.
    """
    return min(1.2 * max((each.launch_ms for each in arms), default=0.0) + 1, MAX_AHEAD_MS)


def turn(
    stepper: Stepper, clock: Clock, measured: Measured, steps: int, graph: torch.cuda.CUDAGraph | None, ahead_ms: float
) -> None:
    """One arm's turn of a round: an untimed step, then ``steps`` timed on the GPU after ``ahead_ms`` and one by the wall."""
    stepper.step()
    pairs = []
    for _ in range(steps):
        stepper.clear()
        pairs.append(clock.parts((stepper.forward, stepper.backward), ahead_ms))
    measured.forward_ms.append([pair[0] for pair in pairs])
    measured.forward_backward_ms.append([pair[1] for pair in pairs])
    stepper.clear()
    measured.wall_ms.append([clock.wall(stepper.step)])
    stepper.clear()
    if graph is not None:
        graph.replay()
        measured.graph_ms.append([clock.parts((graph.replay,), ahead_ms)[0] for _ in range(steps)])
