import jaxtyping
import pytest
import torch

# Shapes in signatures are checked here and only here: annotations cost nothing in use.
jaxtyping.install_import_hook(
    ["fathom.depth_attention", "fathom.two_phase", "fathom.models.layers", "fathom.models.transformer"],
    "beartype.beartype",
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
