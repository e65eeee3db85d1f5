import os
import signal

import jaxtyping
import pytest
import torch

# Without a GPU the kernels run in Triton's interpreter, which must be chosen before Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Shapes in signatures are checked here and only here: annotations cost nothing in use.
jaxtyping.install_import_hook(
    ["fathom.depth_attention", "fathom.two_phase", "fathom.models.layers", "fathom.models.transformer"],
    "beartype.beartype",
)


# A shell that starts a suite in the background has it ignore Ctrl-C, as would every process that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The tests' tensors are too small for two threads to help, and waiting for each other costs more than the work.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
