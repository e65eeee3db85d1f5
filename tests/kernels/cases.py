"""One call of an operation, on any backend, dtype and device: its outputs and the gradients of everything that it was given."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fathom.kernels import Backend, use_backend

Tensors = Sequence[Tensor | None]
Call = Callable[[Tensors], Sequence[Tensor]]


def run(call: Call, inputs: Tensors, backend: Backend, *, wide: bool = False) -> list[Tensor]:
    """Outputs, then gradients, for gradients of the outputs drawn from a fixed seed; in float64 if ``wide``."""
    leaves = [None if t is None else t.detach().to(torch.float64 if wide else t.dtype).requires_grad_() for t in inputs]
    with use_backend(backend):
        outputs = call(leaves)
    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs]
    given = [g.to(inputs[0].dtype).to(o.device, o.dtype) for g, o in zip(given, outputs, strict=True)]  # type: ignore[union-attr]
    torch.autograd.backward(list(outputs), given)
    return [*outputs, *(leaf.grad for leaf in leaves if leaf is not None)]  # type: ignore[misc]


def error(found: Tensor, truth: Tensor) -> float:
    """The norm of the difference as a share of the truth's; infinite where something is not finite."""
    found = found.detach().double()
    if not found.isfinite().all():
        return float("inf")
    return ((found - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def errors(call: Call, inputs: Tensors) -> list[tuple[float, float]]:
    """The error of the kernel and of the plain path, for each output and each gradient, against float64."""
    truth = run(call, inputs, "reference", wide=True)
    kernel, plain = run(call, inputs, "triton"), run(call, inputs, "reference")
    return [(error(k, t.detach()), error(p, t.detach())) for k, p, t in zip(kernel, plain, truth, strict=True)]


ROUNDINGS = {torch.float64: 1e-12, torch.float32: 2.0**-20, torch.float16: 2.0**-20, torch.bfloat16: 2.0**-20}
"""Sixteen roundings of the accumulator (float32's, but for float64): what sums in another order may differ by where the plain path
happens to be exact. Far below the rounding of half-precision outputs."""


def assert_as_good_as_plain(call: Call, inputs: Tensors) -> None:
    """At most twice the plain path's error against float64, for each output and each gradient."""
    floor = ROUNDINGS[inputs[0].dtype]  # type: ignore[union-attr]
    for index, (kernel, plain) in enumerate(errors(call, inputs)):
        assert kernel <= max(2 * plain, floor), (index, kernel, plain)
