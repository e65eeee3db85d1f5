"""Muon for stacks of matrices: every matrix of a 3-D parameter is a matrix of its own (arXiv 2502.16982).

``torch.optim.Muon`` takes 2-D parameters alone; the experts of a layer are one parameter [E, m, n], which this orthogonalises
expert by expert in batched products; and the heads that a 2-D parameter has one above the other likewise. Momentum,
Newton-Schulz steps and the rate's adjustment are torch's. A parameter that lies on several ranks is put together as far as
its matrices need it: experts that lie whole on a rank stay there.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import Optimizer

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
