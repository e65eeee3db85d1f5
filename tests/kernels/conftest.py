from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """Every allocation starts as NaN (PyTorch does so in deterministic mode), so that a row nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def device() -> str:
    """The GPU if there is one; else the CPU, in Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"
