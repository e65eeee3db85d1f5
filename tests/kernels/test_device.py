"""Kernels run on the device of their tensors, which need not be the current one: Triton launches on the current one."""

from typing import Any

import pytest
import torch
from triton.runtime.interpreter import GridExecutor

from fathom import kernels
from fathom.kernels import use_backend


def test_every_launch_is_on_its_tensors_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    if device == "cuda":
        pytest.skip("two GPUs show it: tests/gpu/test_placement_gpu.py")
    inside, launched = [0], []
    real_enter, real_exit, real_call = (
        torch.cuda.device_of.__enter__, torch.cuda.device_of.__exit__, GridExecutor.__call__
    )  # fmt: skip

    def enter(self: Any) -> Any:
        inside[0] += 1
        return real_enter(self)

    def leave(self: Any, *error: Any) -> Any:
        inside[0] -= 1
        return real_exit(self, *error)

    def call(self: GridExecutor, *args: Any, **kwargs: Any) -> Any:
        launched.append((self.fn.__name__, inside[0]))
        return real_call(self, *args, **kwargs)

    monkeypatch.setattr(torch.cuda.device_of, "__enter__", enter, raising=False)
    monkeypatch.setattr(torch.cuda.device_of, "__exit__", leave, raising=False)
    monkeypatch.setattr(GridExecutor, "__call__", call)
    sources = [torch.randn(3, 16, requires_grad=True) for _ in range(2)]
    queries, weight = torch.randn(2, 16, requires_grad=True), torch.rand(16, requires_grad=True)
    with use_backend("triton"):
        outs, lse = kernels.inter_block(sources, queries)
        total, x = kernels.update_read(sources[0], sources[1], outs[1], lse[1], queries[1], None, weight)
        last, scores = kernels.score(sources[0], total, queries)
        reads, lses, _ = kernels.mix([sources[1], last], [scores, scores])
        results = [x, *reads, *lses]
        torch.autograd.backward(results, list(map(torch.ones_like, results)))
        with torch.no_grad():
            kernels.turn(None, sources[0], [], [], queries, 2)
    names = {name for name, _ in launched}
    assert names >= {"_scores", "_mix", "_forward", "_backward", "_gradients", "_coefficients", "_turn"}, names
    assert all(depth == 1 for _, depth in launched), launched
