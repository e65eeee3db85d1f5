"""A rank dies, or its disk is full: the job ends soon, one line says of what, and the last whole checkpoint loads."""

import re
import signal
import socket
import time
from contextlib import closing
from pathlib import Path

import pytest

from fathom.parallel.config import ParallelConfig
from fathom.train import loop
from fathom.train.checkpoint import checkpoints, read_progress
from tests.parallel import faults
from tests.parallel.conftest import finish, forked

pytestmark = pytest.mark.dist


def accident(moment: str, victim: int, folder: Path, run: Path) -> tuple[list[int | None], list[str], float]:
    """Exit codes, what was said on standard error, and the seconds that it all took."""
    with closing(socket.create_server(("localhost", 0))) as server:
        port = server.getsockname()[1]
    begin = time.monotonic()
    ranks = [forked().Process(target=faults.main, args=(r, victim, moment, port, folder, run)) for r in range(2)]
    for rank in ranks:
        rank.start()
    codes = finish(ranks, 60, hurry=False)
    said = [line for r in range(2) for line in (run.parent / f"{run.name}-{r}.log").read_text().splitlines()]
    split = re.compile(r"stage |\d+ +\d ")
    return codes, [line for line in said if not split.match(line)], time.monotonic() - begin


@pytest.mark.parametrize(
    ("moment", "victim"),
    [("mid-step", 1), ("mid-step", 0), ("mid-hop", 1), ("mid-save", 1), ("before-the-seal", 0)],
)
def test_a_dead_rank_ends_the_job(moment: str, victim: int, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes, said, seconds = accident(moment, victim, folder, run)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1
    assert len(said) == 1 and said[0].startswith(f"fathom: rank {victim} ("), said
    assert said[0].endswith(f" died; the other ranks end; go on with `fathom train --resume {run}`, started alike")
    assert seconds < 60
    whole = {path.name: read_progress(path).step for path in checkpoints(run)}
    assert whole["step-000003"] == 3
    if moment in ("mid-save", "before-the-seal"):
        assert len(whole) == 1 and (run / "checkpoints" / ".step-000006.tmp").exists()
    loop.resume(run, ParallelConfig())
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-000006", "step-000009"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_full_disk_is_one_line(victim: int, folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    codes, said, _ = accident("full-disk", victim, folder, run)
    assert codes == [2, 2] and len(said) == 1, said
    good = run / "checkpoints" / "step-000003"
    assert said[0].startswith(f"fathom: checkpoint {run}/checkpoints/step-000006 could not be written: ")
    assert said[0].endswith(f"; the last good checkpoint is {good}")
    assert list((run / "checkpoints").iterdir()) == [good]
