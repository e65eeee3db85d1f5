"""Small worlds, and how a test writes one to a file and reads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fathom.scientist.build import read
from fathom.scientist.world import World

Document = dict[str, Any]


@pytest.fixture
def line() -> Document:
    """A straight line against a constant, and six points on a line."""
    points = [(0.0, 0.1), (0.5, 0.7), (1.0, 0.9), (1.5, 1.8), (2.0, 2.1), (2.5, 2.4)]
    return {
        "world": "line",
        "outcome": {"name": "y", "center": 0.0, "spread": 3.0, "noise": 0.3},
        "designs": {"x": {"low": 0.0, "high": 4.0}},
        "theories": [
            {"id": "line", "params": {"a": "normal(0, 2)", "b": "normal(0, 2)", "s": "halfnormal(0.3)"},
             "mean": "a + b*x", "noise": "normal(s)", "quantities": {"slope": "b"}, "bits": 0},
            {"id": "flat", "role": "null", "params": {"a": "normal(0, 2)", "s": "halfnormal(0.3)"},
             "mean": "a", "noise": "normal(s)", "quantities": {"slope": "0"}, "bits": 0},
        ],
        "evidence": [{"kind": "measured", "source": "by hand", "data": [{"x": x, "y": y} for x, y in points]}],
    }  # fmt: skip


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    def to_file(document: Any, name: str = "world.yaml") -> Path:
        path = tmp_path / name
        path.write_text(document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False))
        return path

    return to_file


@pytest.fixture
def made(write: Callable[[Any], Path]) -> Callable[[Any], World]:
    """Writes a world file and reads it."""
    return lambda document: read(write(document))
