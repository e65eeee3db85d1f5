"""What the rules of this folder share: parameters that set themselves, and coefficients that can be recorded.

Every rule here is linear in what the sublayers wrote once its *coefficients* are fixed: gates, attention weights, all that it
computes from the state and then multiplies by. A rule passes each of them through ``coefficient``, so that ``mixing.py`` can
record them in a real run and replay the rule, as a linear map, on other vectors.

Parameters are named by how they are trained (train/optimizers.py reads the names):

    *query, *gain, *gate    dotted with a vector of width D: the depth rate, never decayed
    *map                    a linear map of hidden vectors: the matrices' rate, decayed
    all others              scalars, scales, norms, mixing weights: the norms' rate, never decayed
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fathom.depth_attention import EPS, compute_dtype, full_precision
from fathom.stream import Stream

Tape = Callable[[Tensor], Tensor]


class Rule(Stream):
    """A stream of the zoo: L sublayers, width D, ``eps`` of the norms that the rule itself computes.

    A subclass sets its options after ``super().__init__`` and then calls ``create``.
    """

    def __init__(self, num_sublayers: int, dim: int, *, eps: float = EPS) -> None:
        super().__init__(num_sublayers, dim)
        self.eps = eps
        self.tape: Tape | None = None

    def initial(self, generator: torch.Generator) -> dict[str, Tensor | list[Tensor]]:
        """Every parameter's initial value by name; a list becomes a ``ParameterList``. Random values come from ``generator``."""
        return {}

    def create(self) -> None:
        """Make the parameters of ``initial``."""
        for name, value in self.initial(torch.Generator().manual_seed(0)).items():
            setattr(self, name, nn.ParameterList(value) if isinstance(value, list) else nn.Parameter(value))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Set every parameter to its initial value."""
        for name, value in self.initial(generator).items():
            targets, values = (
                ([getattr(self, name)], [value]) if isinstance(value, Tensor) else (getattr(self, name), value)
            )
            for target, source in zip(targets, values, strict=True):
                target.copy_(source)

    def coefficient(self, value: Tensor) -> Tensor:
        """``value``, or what the tape makes of it."""
        return value if self.tape is None else self.tape(value)

    def flops(self) -> float:
        """Floating-point operations that the rule adds to one token's forward pass over PreNorm's additions."""
        raise NotImplementedError

    def normalised(self, x: Tensor) -> Tensor:
        """``x / rms(x)`` over the last dim, in float32 at least."""
        return F.rms_norm(x.to(compute_dtype(x)), (x.shape[-1],), None, self.eps)

    def norm(self, x: Tensor, gain: Tensor) -> Tensor:
        """A norm on the stream itself: ``gain ⊙ x / rms(x)``, in ``x``'s dtype; 1 / rms(x) is a coefficient."""
        inverse = torch.rsqrt(x.to(compute_dtype(x)).square().mean(-1, keepdim=True) + self.eps)
        return (x * self.coefficient(inverse) * gain).to(x.dtype)


def product(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix`` in float32 at least, whatever autocast says."""
    dtype = compute_dtype(x)
    with full_precision(x):
        return x.to(dtype) @ matrix.to(dtype)


def weigh(weight: Tensor, vector: Tensor) -> Tensor:
    """``weight · vector`` for weights [...] of vectors [..., D], computed in float32 at least, in ``vector``'s dtype."""
    return (weight.unsqueeze(-1).to(compute_dtype(vector)) * vector).to(vector.dtype)


def weighted_sum(weights: Tensor, vectors: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    """``Σ_n weights[n] vectors[n]`` for weights [N, ...] and N vectors [..., D], rounded once to the vectors' dtype."""
    dtype = compute_dtype(vectors[0])
    total = weights[0].unsqueeze(-1).to(dtype) * vectors[0]
    for weight, vector in zip(weights[1:], vectors[1:], strict=True):
        total = torch.addcmul(total, weight.unsqueeze(-1).to(dtype), vector.to(dtype))
    return total.to(vectors[0].dtype)
