import jaxtyping
import pytest
import torch

# Shapes in signatures are checked here and only here: annotations cost nothing in use.
jaxtyping.install_import_hook(
    ["fathom.depth_attention", "fathom.two_phase", "fathom.models.layers", "fathom.models.transformer"],
    "beartype.beartype",
)


# The tests' tensors are too small for two threads to help, and waiting for each other costs more than the work.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
