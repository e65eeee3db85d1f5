"""Starts worker.py as the ranks of one world."""

import os
import subprocess
import sys
from pathlib import Path

from tests.parallel import worker


def spawn(size: int, folder: Path, *arguments: Path) -> Path:
    """Run ``size`` ranks to their end in ``folder``, which it returns; the test fails with what they said if one does."""
    script = Path(worker.__file__)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.parents[2])}
    ranks = []
    for rank in range(size):
        with (folder / f"{rank}.log").open("w") as log:
            command = [sys.executable, str(script), str(size), str(rank), str(folder), *map(str, arguments)]
            ranks.append(subprocess.Popen(command, env=environment, stderr=log))
    try:
        codes = [rank.wait(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert codes == [0] * size, "\n".join(log.read_text() for log in folder.glob("*.log"))
    return folder
