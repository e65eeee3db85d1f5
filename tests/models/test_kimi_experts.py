import socket
from pathlib import Path

import pytest
import torch
from torch.multiprocessing import spawn

from fathom.models.moe import Router, balance
from tests.models import experts_worker


@pytest.mark.dist
def test_two_and_four_ranks_are_one_process(tmp_path: Path):
    """Loss, every gradient, loads and the moved bias; one spawn for both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "found.pt"
    spawn(experts_worker.run, (port, out), nprocs=4)
    found = torch.load(out, weights_only=False)
    assert found["refused"] == "model.num_experts is 6: 4 ranks must divide it"
    model = experts_worker.network()
    loss = experts_worker.step(model, experts_worker.batch())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    load = balance(model)
    for ranks in ("2", "4"):
        torch.testing.assert_close(found[ranks]["loss"], loss)
        assert found[ranks]["gradients"].keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[ranks]["gradients"][name], gradient, rtol=1e-9, atol=1e-13, msg=name)
        torch.testing.assert_close(found[ranks]["load"], load)
        for name, module in model.named_modules():
            if isinstance(module, Router):
                assert module.bias.any() and torch.equal(found[ranks]["bias"][name], module.bias)
