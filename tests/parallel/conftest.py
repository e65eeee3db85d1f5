"""Worlds of gloo processes: each is started once, runs all its cases, and every test reads what its ranks saw."""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from fathom.train import loop
from tests.parallel import worker
from tests.parallel.cases import CASES
from tests.parallel.runs import config, in_float64
from tests.train.conftest import write_corpus

Ranks = list[dict[str, Any]]


def forked() -> multiprocessing.context.ForkServerContext:
    """Processes that find torch imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["fathom.train.loop", "torch._dynamo", "tests.parallel.worker", "tests.parallel.faults"]
    )
    return context


def finish(ranks: Sequence[BaseProcess], seconds: float, *, hurry: bool = True) -> list[int | None]:
    """Exit codes when all have ended, or time is up, or, in a ``hurry``, one has failed; none is left running."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(rank.exitcode is None for rank in ranks):
        if hurry and any(rank.exitcode for rank in ranks):
            break
        time.sleep(0.02)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
        rank.join()
    return codes


def run_world(size: int, folder: Path) -> Ranks:
    ranks = [forked().Process(target=worker.main, args=(size, rank, folder)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    codes = finish(ranks, 120)
    said = "\n".join(path.read_text() for path in sorted(folder.glob(f"{size}-*.log")))
    assert codes == [0] * size, f"exit codes {codes}\n{said}"
    return [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)]


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> None:
    """Start it, for all tests of the session: its processes have one thread each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        forked()
        forkserver.ensure_running()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the worlds find, ``corpus`` and the run ``alone`` of one process, and what they leave: runs and checkpoints."""
    made = tmp_path_factory.mktemp("worlds")
    write_corpus(made / "corpus", 0)
    in_float64(lambda: loop.train(config(made / "corpus"), made / "alone"))
    return made


@pytest.fixture(scope="session")
def corpus(folder: Path) -> Path:
    return folder / "corpus"


@pytest.fixture(scope="session")
def world4(folder: Path) -> Ranks:
    return run_world(4, folder)


@pytest.fixture(scope="session")
def world2(world4: Ranks, folder: Path) -> Ranks:
    return run_world(2, folder)


@pytest.fixture
def results(request: pytest.FixtureRequest) -> Callable[[str], Ranks]:
    """What each rank saw of a case."""

    def of(name: str) -> Ranks:
        ranks = request.getfixturevalue(f"world{CASES[name].world}")
        return [rank[name] for rank in ranks]

    return of
