"""Gradients of cached sources, on the kernels, all stages of a pipeline in one process: what they are, and what they cost."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fathom.kernels import use_backend
from fathom.models.transformer import next_token_loss
from fathom.parallel.pipeline import SourceCache
from fathom.parallel.plan import Plan, make_plan
from fathom.parallel.stages import Stage
from tests.parallel.cases import Case, _block, batch, network

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")


class Additions(TorchDispatchMode):
    """Counts additions of two tensors as large as a source."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.size, self.count = shape.numel(), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
            self.count += all(isinstance(tensor, Tensor) and tensor.numel() == self.size for tensor in args[:2])
        return function(*args, **(kwargs or {}))


def step(case: Case, plan: Plan) -> tuple[dict[tuple[int, str], Tensor], int]:
    """The gradients of one micro-batch by stage and name, and the additions in its backward pass."""
    model = network(case)
    caches = [SourceCache(plan) for _ in range(plan.num_ranks)]
    tokens, targets = (rows[:1] for rows in batch(case))
    stages = [Stage(model, plan, index) for index in range(plan.num_stages)]
    hops: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]] = []
    received: tuple[Tensor, ...] = ()
    for stage, cache in zip(stages, caches * (plan.num_stages // plan.num_ranks), strict=True):
        stage.bank, stage.keep = cache.bank, cache.keep
        sent: Any = stage(*received, tokens=tokens)
        if not stage.is_last:
            received = tuple(tensor.detach().requires_grad_() for tensor in sent)
            hops.append((sent, received))
    loss = next_token_loss(sent, targets)
    with Additions(received[0].shape) as additions:
        loss.backward()
        for sent, received in reversed(hops):
            torch.autograd.backward(sent, [tensor.grad for tensor in received])
    return {
        (stage.index, name): parameter.grad
        for stage in stages
        for name, parameter in stage.named_parameters()
        if parameter.grad is not None
    }, additions.count


@pytest.mark.parametrize(
    "case", [Case(2, 3, _block(2), 6, tuple(range(0, 12, 2))), Case(3, 2, _block(5), 7)], ids=["aligned", "straddling"]
)
def test_gradients_of_cached_sources_flow_through_the_reads(case: Case) -> None:
    """Autograd adds to what the rank's later stages have left only what comes back over the hop out of a stage."""
    plan = make_plan(case.config(), case.pp, case.virtual)
    with use_backend("triton"):
        gradients, additions = step(case, plan)
        expected, without = step(case, replace(plan, cache=False))
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-10, atol=1e-12)
    both = sum(len(plan.carried(s + 1)) for s in range(plan.num_stages) if plan.keeps(s))
    assert additions - without == both
