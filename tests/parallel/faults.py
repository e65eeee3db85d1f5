"""One rank of a job that meets with an accident: `fathom train` as it is, but once this rank dies, or its disk is full."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from fathom import cli, sealed
from fathom.parallel import checkpoint
from fathom.parallel.pipeline import CachedStage
from fathom.train.ranks import PipelinedNetwork

MOMENTS: dict[str, tuple[Any, str, int]] = {
    "mid-step": (PipelinedNetwork, "clip", 8),
    "mid-hop": (CachedStage, "get_bwd_send_ops", 30),
    "mid-save": (FileSystemWriter, "write_data", 2),
    "before-the-seal": (sealed, "_flush", 8),
    "full-disk": (checkpoint, "Saving", 2),
}
"""Which call of what the accident comes before: in step 8, or in the save after step 6, which waited for that after step 3."""


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def no_room() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))


def before(owner: Any, name: str, number: int, accident: Callable[[], None]) -> None:
    real, calls = getattr(owner, name), 0

    def called(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            accident()
        return real(*arguments, **keywords)

    setattr(owner, name, called)


def main(rank: int, victim: int, moment: str, port: int, folder: Path, run: Path) -> None:
    log = (run.parent / f"{run.name}-{rank}.log").open("w")
    os.dup2(log.fileno(), 2)
    sys.stderr = log
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    if rank == victim:
        before(*MOMENTS[moment], no_room if moment == "full-disk" else die)
    flags = f"""--parallel.pp 2 --parallel.virtual 2 --steps 9 --checkpoint-every 3 --device cpu --data.batch 4 --eval-sequences 1
        --model.dim 8 --model.num-layers 3 --model.context 16 --optim.warmup 2 --data.folder {folder}/corpus --out {run}"""
    sys.exit(cli.main(["train", "quick", *flags.split()]))
