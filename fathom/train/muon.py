"""Muon in batched products (arXiv 2502.16982).

``torch.optim.Muon`` goes through matrices one by one, some 25 operations each: thousands of launches for a small network's step.
``Muon`` orthogonalises those of one shape together, to the same update.

``torch.optim.Muon`` takes 2-D parameters alone; the experts of a layer are one parameter [E, m, n], which ``StackedMuon``
orthogonalises expert by expert; and the heads that a 2-D parameter has one above the other likewise. Momentum,
Newton-Schulz steps and the rate's adjustment are torch's. A parameter that lies on several ranks is put together as far as
its matrices need it: experts that lie whole on a rank stay there.
"""

from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

AT_ONCE = 2**25
"""Most elements of the matrices that are orthogonalised together: large ones gain nothing, and their copies take memory."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
EPS = 1e-7


def orthogonalize(matrices: Tensor) -> Tensor:
    """Newton-Schulz in bf16 on [E, m, n]: what is near U Vᵀ where a matrix is U S Vᵀ."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _orthogonal(update: Tensor, rows: int | None) -> Tensor:
    """``update`` with every matrix of it orthogonalised: of a stack, or blocks of so many ``rows``."""
    if not isinstance(update, DTensor):
        return orthogonalize(update if rows is None else update.unflatten(0, (-1, rows))).reshape(update.shape)
    whole = [p if rows is None and p == Shard(0) else Replicate() for p in update.placements]
    local = _orthogonal(update.redistribute(placements=whole).to_local(), rows)
    made = DTensor.from_local(
        local, update.device_mesh, whole, run_check=False, shape=update.shape, stride=update.stride()
    )
    return made.redistribute(placements=update.placements)


class Muon(torch.optim.Muon):
    """``torch.optim.Muon`` with ``match_rms_adamw``, state and all, whose step goes through many matrices at a time."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            found: dict[tuple[torch.Size, torch.device], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    found.setdefault((parameter.shape, parameter.device), []).append(parameter)
            for (shape, _), alike in found.items():
                count = max(1, AT_ONCE // shape.numel())
                for start in range(0, len(alike), count):
                    self._step(alike[start : start + count], group)

    def _step(self, alike: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [cast(Tensor, parameter.grad) for parameter in alike]
        for parameter, gradient in zip(alike, gradients, strict=True):
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(gradient)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in alike]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = orthogonalize(torch.stack(torch._foreach_lerp(gradients, buffers, group["momentum"])))
        torch._foreach_mul_(alike, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(alike, updates.unbind(), alpha=-group["lr"] * 0.2 * max(alike[0].shape) ** 0.5)


class StackedMuon(Optimizer):
    """Muon with Nesterov momentum, whose update is scaled to the size of AdamW's, on parameters [E, m, n].

    A group with ``rows`` is of parameters [H · rows, n]: H matrices each.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "rows": None})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rows = group["rows"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
                update = _orthogonal(parameter.grad.lerp(buffer, group["momentum"]), rows)
                sides = parameter.shape[1:] if rows is None else (rows, parameter.shape[1])
                rate = group["lr"] * 0.2 * max(sides) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-rate)
