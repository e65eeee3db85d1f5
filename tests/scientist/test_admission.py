"""Proposed training runs against the guard, as a launcher asks: exit code 0 admits, and nothing else does."""

import shlex
from pathlib import Path

import pytest

from fathom.cli import main

WORLDS = Path(__file__).parents[2] / "benchmarks" / "results" / "2026-11-22_run-admission"


@pytest.mark.parametrize(
    ("world", "harm", "design", "code"),
    [
        ("spike", "spiked == 1", "lr=0.01 dim=48 batch=4", 0),
        ("spike", "spiked == 1", "lr=0.3 dim=48 batch=4", 4),
        ("spike", "spiked == 1", "lr=0.0001 dim=48 batch=4", 3),
        ("memory", "log_gib > log(0.5)", "lr=0.01 dim=48 batch=4", 0),
        ("memory", "log_gib > log(0.39)", "lr=0.01 dim=48 batch=4", 4),
        ("memory", "log_gib > log(80)", "lr=0.01 dim=1024 batch=256", 3),
        ("minutes", "log_minutes > log(0.2)", "lr=0.01 dim=48 batch=4", 0),
        ("minutes", "log_minutes > log(0.02)", "lr=0.01 dim=48 batch=4", 4),
    ],
)
def test_a_run_is_admitted_refused_or_left_to_a_person(
    world: str, harm: str, design: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    line = f"ask guard {WORLDS}/{world}.yaml {design} --harm '{harm}' --threshold 0.2 --delta 0.1"
    assert main(shlex.split(line)) == code
    assert capsys.readouterr().out.startswith({0: "admit: ", 3: "no answer: extrapolation", 4: "refuse: "}[code])
