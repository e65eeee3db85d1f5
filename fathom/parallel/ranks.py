"""The processes of a training job: which one this is, what they agree on, and what happens when one of them dies.

`torchrun` starts them and says by environment variables who is who. With one process every method does the obvious thing.
"""

import datetime
import os
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fathom.errors import UserError
from fathom.parallel.config import ParallelConfig
from fathom.parallel.watch import Watch

Result = TypeVar("Result")
TIMEOUT = datetime.timedelta(minutes=10)
"""Of a process that is there and does not answer."""


def _axes(device: str, parallel: ParallelConfig) -> dict[str, DeviceMesh]:
    """The axes of the mesh by name."""
    pp, tp = parallel.pp, parallel.tp
    if parallel.ep == 1:
        mesh = init_device_mesh(device, (parallel.dp, pp, tp), mesh_dim_names=("dp", "pp", "tp"))
        return {name: mesh[name] for name in ("dp", "pp", "tp")}
    shape = (parallel.dp // parallel.ep, parallel.ep, pp, tp)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("replicas", "ep", "pp", "tp"))
    axes = {name: mesh[name] for name in ("replicas", "ep", "pp", "tp")}
    return axes | {"dp": mesh["replicas", "ep"]._flatten("dp")}


class Ranks:
    """The processes of ``parallel``, found or, with several, connected: every one of them makes this, and ends it.

    A context manager: leaving it with an error ends the other processes. Raises ``UserError`` if another number of processes
    was started.

    Args:
        parallel: how many there must be.
        device: what they compute on; each takes the GPU of its own number.
    """

    def __init__(self, parallel: ParallelConfig, device: torch.device) -> None:
        self.size, self.number, self.device = parallel.size, int(os.environ.get("RANK", 0)), device
        started = int(os.environ.get("WORLD_SIZE", 1))
        if started != self.size:
            counts = f"parallel.pp {parallel.pp} x dp {parallel.dp} x tp {parallel.tp}"
            many = "process was" if started == 1 else "processes were"
            raise UserError(
                f"{counts} needs {self.size} processes, but {started} {many} started: "
                f"use `torchrun --nproc-per-node {self.size} -m fathom.cli train ...`"
            )
        self.axes: dict[str, DeviceMesh] = {}
        if self.size == 1:
            return
        backend = "gloo"
        if device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
            backend = "cpu:gloo,cuda:nccl"
        self._made = not dist.is_initialized()
        if self._made:
            dist.init_process_group(backend, timeout=TIMEOUT)
        self.control = dist.new_group(backend="gloo", timeout=TIMEOUT)
        """For what processes tell each other; ``background`` for what a thread of theirs does beside the training."""
        self.background = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self.watch = Watch(self.number, self.size, os.environ.get("MASTER_ADDR", "localhost"), self._from_first)
        self.axes = _axes(device.type, parallel)

    @property
    def first(self) -> bool:
        """Whether this process writes the run's files and speaks."""
        return self.number == 0

    def axis(self, name: str) -> DeviceMesh | None:
        """The mesh axis, if it has more than one rank: ``dp``, ``pp``, ``tp``, or the two that ``dp`` is made of where there
        are experts to share: ``ep``, whose ranks share them, and ``replicas``, whose ranks have the same ones."""
        axis = self.axes.get(name)
        return None if axis is None or axis.size() == 1 else axis

    def _from_first(self, value: Any) -> Any:
        said = [value]
        dist.broadcast_object_list(said, src=0, group=self.control)
        return said[0]

    def once(self, work: Callable[[], Result]) -> Result:
        """Do ``work`` on the first process; what it returns, or the ``UserError`` that it raises, is that of all."""
        if self.size == 1:
            return work()
        result, problem = None, None
        if self.first:
            try:
                result = work()
            except UserError as error:
                problem = str(error)
        result, problem = self._from_first((result, problem))
        if problem is not None:
            raise UserError(problem)
        return cast(Result, result)

    def any(self, found: bool) -> bool:
        """Whether ``found`` is true on any process."""
        if self.size == 1:
            return found
        flag = torch.tensor(float(found))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.control)
        return bool(flag)

    def agreed(self, problem: str | None) -> str | None:
        """The ``problem`` of the first process that has one."""
        if self.size == 1:
            return problem
        problems: list[str | None] = [None] * self.size
        dist.all_gather_object(problems, problem, group=self.control)
        return next((problem for problem in problems if problem is not None), None)

    def say_on_death(self, advice: str) -> None:
        """How the line that names a dead process is to end."""
        if self.size > 1:
            self.watch.advice = advice

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.size == 1:
            return
        if error is None:
            dist.barrier(group=self.control)
            self.watch.leave()
            if self._made:
                dist.destroy_process_group()
        elif isinstance(error, KeyboardInterrupt):
            self.watch.leave()
        else:
            # What a collective raises when its peer is gone; errors with a class of their own are no such thing.
            lost = type(error) is RuntimeError or isinstance(error, dist.DistError)
            kind_said = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self.watch.fail(f"{kind_said}{error}".replace("\n", " "), perhaps=lost)
