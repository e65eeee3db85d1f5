"""One call of an operation, on any backend, dtype and device: its outputs and the gradients of everything that it was given."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fathom.kernels import Backend, use_backend

Tensors = Sequence[Tensor | None]
Call = Callable[[Tensors], Sequence[Tensor]]


DTYPES = (
    [torch.bfloat16, torch.float16, torch.float32]
    if torch.cuda.is_available()
    else [torch.float64, torch.float32, torch.float16]
)
"""What the kernels are for on a GPU; the interpreter has float64 instead of bfloat16, whose arithmetic it gets wrong."""
DRAWS = {torch.float64: 1, torch.float32: 4, torch.float16: 4, torch.bfloat16: 4}
"""Draws of the inputs that an error is the mean of: some are a few roundings of float32, and one draw tells little."""


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


ROUNDINGS = {torch.float64: 1e-12, torch.float32: 2.0**-21, torch.float16: 2.0**-21, torch.bfloat16: 2.0**-21}
"""Eight roundings of the accumulator (float32's, but for float64): what a sum in another order may differ by where the plain path
happens to be exact. Far below the rounding of half-precision outputs."""


def assert_as_good_as_plain(call: Call, *draws: Tensors) -> None:
    """At most twice the plain path's error against float64, for each output and each gradient, in the mean over ``draws``."""
    floor = ROUNDINGS[draws[0][0].dtype]  # type: ignore[union-attr]
    found = [errors(call, inputs) for inputs in draws]
    for index, pairs in enumerate(zip(*found, strict=True)):
        kernel, plain = (sum(values) / len(draws) for values in zip(*pairs, strict=True))
        assert kernel <= max(2 * plain, floor), (index, kernel, plain)
