"""Every rule trains, and with the losses of its golden file."""

import json

import pytest

from tests.residuals.make_golden import GOLDEN, losses, path
from tests.residuals.zoo import CASES


@pytest.mark.parametrize("case", CASES)
def test_sixty_steps_learn_and_are_the_golden_ones(case: str) -> None:
    """A change that is no change leaves these alone; one that means to change them runs make_golden.py."""
    found, expected = losses(case), json.loads(path(case).read_text())
    # Rounding differs between CPUs, and sixty steps multiply it.
    assert found[:30] == pytest.approx(expected[:30], rel=1e-9, abs=0)
    assert found == pytest.approx(expected, rel=1e-6, abs=0)
    assert sum(found[-10:]) / 10 < found[0] - 0.3


def test_no_golden_file_is_left_over() -> None:
    assert {file.name for file in GOLDEN.glob("zoo-*.json")} == {path(case).name for case in CASES}
