"""Serving over 2 and 4 ranks is serving in one process, and a rank's bank is N (T/P) D elements."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fathom.errors import UserError
from fathom.inference.sharded import Shards, share
from tests.inference.test_engine import TINY

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", params=[2, 4])
def served(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """What each rank found; of 4 ranks, two get no key/value head."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(request.param),
        "-m", "tests.inference.sharded_worker",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.dist
@pytest.mark.slow
def test_every_rank_decodes_the_forward_pass(served: list[dict[str, Any]]) -> None:
    ranks = len(served)
    for case in served[0]:
        for found in served:
            assert found[case]["difference"] < 1e-10, case
            assert found[case]["tokens"] == found[case]["alone"], case
        # Every key/value head is on one rank.
        heads = TINY["num_kv_heads"]
        whole = 2 * TINY["num_layers"] * 3 * TINY["context"] * heads * 4 * 8
        assert sum(found[case]["cache"] for found in served) == whole
    # Chunks of 4, 4 and 3 tokens of 3 prompts; the bank at the output site is the embedding and 6 blocks of one sublayer.
    for found in served:
        assert found["block"]["bank"] == [7 * -(-3 * tokens // ranks) * TINY["dim"] * 8 for tokens in (4, 4, 3)]


def test_shares_are_even_and_whole() -> None:
    for count in range(9):
        for ranks in range(1, 6):
            shares = [share(count, rank, ranks) for rank in range(ranks)]
            assert [i for first, last in shares for i in range(first, last)] == list(range(count))
            sizes = [last - first for first, last in shares]
            assert max(sizes) - min(sizes) <= 1


def test_sharding_needs_a_process_group() -> None:
    with pytest.raises(UserError, match="needs a process group"):
        Shards()
