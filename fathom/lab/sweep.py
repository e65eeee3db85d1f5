"""Running a sweep: each run in a process of its own, several side by side, one death never the others'.

The folder is locked, so that two sweeps cannot share it. What is done is read from the run folders: a sweep that was killed
continues where its runs' checkpoints are, with the bits of one that was not (on a CPU; a run's threads are in the plan).
Where there are several GPUs the runs are spread over them, each run on one.
A run that diverged stays so; a run that failed is reported, the rest go on, and the next call tries it again.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from fathom.errors import UserError
from fathom.lab.plan import Outcome, Planned, Sweep, locked, outcomes
from fathom.lab.sweep_table import Active, Table
from fathom.models.accounting import activation_bytes, parameters
from fathom.train.config import RunConfig
from fathom.train.environment import pick_device
from fathom.train.loop import Interrupted, stop_on_signal
from fathom.train.metrics import writing

POLL_SECONDS = 0.2


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def memory_bytes(config: RunConfig) -> float:
    """What a run may need on a GPU: float32 weights, gradients and two moments, activations, and what CUDA itself takes."""
    micro = config.data.micro_batch or config.data.batch
    kept = activation_bytes(config.model, micro, config.model.context, autocast=config.precision == "bf16")
    logits = 3 * 4 * micro * config.model.context * config.model.vocab_size
    return 16 * sum(parameters(config.model).values()) + 1.3 * (sum(kept.values()) + logits) + 2e9


def default_workers(runs: list[Planned], threads: int) -> int:
    """Runs at a time: one a core (or ``threads`` cores) on a CPU; on each GPU as many, up to four, as its free memory holds."""
    device = pick_device(runs[0].config.device)
    if device.type == "cpu":
        return max(1, cores() // threads)
    import torch

    free = torch.cuda.mem_get_info(device)[0]
    largest = max({run.config.model: memory_bytes(run.config) for run in runs}.values())
    return max(1, min(4, int(0.9 * free / largest))) * max(1, len(gpus(runs)))


def gpus(runs: list[Planned]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls the GPUs that ``runs`` are spread over; ``[]`` if they name their device or use the CPU."""
    if any(run.config.device not in ("auto", "cuda") for run in runs) or pick_device("auto").type == "cpu":
        return []
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    # CUDA sees none of those after a wrong one, -1 say: a run that was given it would train on the CPU.
    return [name.strip() for name in named.split(",")][:count] if named else [str(index) for index in range(count)]


def least_used(gpus: list[str], taken: list[str | None]) -> str | None:
    """The first of ``gpus`` that the fewest of the runs under way have ``taken``; None if there are no GPUs."""
    return min(gpus, key=taken.count, default=None)


@dataclass
class Process:
    """A run under way."""

    planned: Planned
    handle: subprocess.Popen[bytes]
    gpu: str | None
    begin: float = field(default_factory=time.monotonic)


def _start(sweep: Sweep, planned: Planned, gpu: str | None) -> Process:
    log = sweep.log(planned)
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(sweep.threads), "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    if gpu is not None:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    with writing(log):
        log.parent.mkdir(exist_ok=True)
        output = log.open("ab")
    with output:
        # A session of its own: Ctrl-C reaches the sweep alone, which then asks each run, once, to save and stop.
        handle = subprocess.Popen(
            [sys.executable, "-m", "fathom.lab.sweep_run", str(sweep.folder), planned.name],
            stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment, start_new_session=True,
        )  # fmt: skip
    return Process(planned, handle, gpu)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return lines[-1].strip() if lines else "it wrote nothing"


def run_sweep(sweep: Sweep, *, workers: int | None = None) -> tuple[list[Outcome], dict[str, str]]:
    """Run what is left of ``sweep``; returns every outcome, and why each failed run failed, by name.

    Raises:
        UserError: another process runs this sweep, or ``workers`` is not positive.
        Interrupted: after Ctrl-C or SIGTERM, once every run under way has saved.
    """
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}: it must be at least 1")
    with locked(sweep.folder), stop_on_signal() as stop:
        left = [found.planned for found in outcomes(sweep) if found.state not in ("done", "diverged")]
        if left and workers is None:
            workers = default_workers(left, sweep.threads)
        devices = gpus(left) if left else []
        active: list[Process] = []
        failed: dict[str, str] = {}
        with Table(sweep) as table:
            try:
                while left or active:
                    while left and not stop and len(active) < (workers or 1):
                        gpu = least_used(devices, [process.gpu for process in active])
                        active.append(_start(sweep, left.pop(0), gpu))
                    for process in [p for p in active if p.handle.poll() is not None]:
                        active.remove(process)
                        _close(process)
                        planned, code = process.planned, process.handle.returncode
                        # 130 is a stop that this sweep did not ask for: it saved, and the next call goes on.
                        if code and not (code == 1 and _diverged(sweep, planned)):
                            why = f"killed by signal {-code}" if code < 0 else _last_line(sweep.log(planned))
                            failed[planned.name] = why
                        table.ended(planned, failed.get(planned.name))
                    if stop and active:
                        for process in active:
                            process.handle.terminate()
                        table.note("stopping: each run finishes its step and saves; Ctrl-C again ends them at once")
                        for process in active:
                            process.handle.wait()
                        break
                    if stop:
                        break
                    table.show([Active(p.planned, p.begin) for p in active], failed)
                    time.sleep(POLL_SECONDS)
            finally:
                for process in active:
                    process.handle.kill()
                    process.handle.wait()
                    _close(process)
        if stop:
            raise Interrupted(f"the sweep is stopped; go on with `fathom sweep {sweep.folder}`")
        return outcomes(sweep), failed


def _diverged(sweep: Sweep, planned: Planned) -> bool:
    return (sweep.run_folder(planned) / "diverged.json").is_file()


def _close(process: Process) -> None:
    if process.handle.stdin is not None:
        process.handle.stdin.close()
