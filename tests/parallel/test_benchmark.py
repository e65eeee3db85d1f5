"""benchmarks/pipeline.py on two gloo processes, at a tiny size: it checks, times, and writes its result folder."""

import json
from pathlib import Path

import pytest

from fathom.parallel.simulate import Speeds
from fathom.train.config import from_dict, read_json
from tests.parallel.conftest import Ranks

pytestmark = pytest.mark.dist


def test_it_writes_its_result(world2: Ranks, folder: Path) -> None:
    out = folder / "benchmark"
    result, raw = (json.loads((out / f"{name}.json").read_text()) for name in ("result", "raw"))
    assert result["command"].startswith("torchrun --nproc-per-node 2 benchmarks/pipeline.py")
    cases = {(row["case"], row["arm"], row["metric"], row["n"]) for row in result["rows"]}
    pipeline = {("pipeline-p2v4-d16", arm, "tokens_per_s", 2) for arm in ("prenorm", "naive", "cached")}
    assert cases == pipeline | {
        (f"pipeline-{layout}2-d16", arm, "tokens_per_s", 2)
        for layout in ("fsdp", "tp")
        for arm in (f"{layout}-prenorm", layout)
    }
    for row in result["rows"]:
        assert 0 < row["low"] <= row["median"] <= row["high"]
        assert (row["over_prenorm"] == 1) == row["arm"].endswith("prenorm")
    assert raw["losses"]["naive"] == pytest.approx(raw["losses"]["cached"], rel=1e-6)
    assert len(raw["split"]) == 9 and "| cached |" in (out / "README.md").read_text()
    speeds = from_dict(Speeds, read_json(out / "speeds.json"))
    assert min(speeds.forward_flops, speeds.backward_flops, speeds.memory, speeds.link, speeds.latency) > 0
