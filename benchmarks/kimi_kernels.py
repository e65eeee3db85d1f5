"""What ``kimi_nano.py`` computes with on a GPU: fla-core's configurations, and the gate that its numbers must pass first.

fla-core times about 130 variants of its KDA kernels at the first call, each compiled for itself: minutes, before a step is made.
``pin`` gives it one configuration a kernel, out of its own lists, by its own files; what another one would gain is not known.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fathom.errors import UserError
from fathom.models.kda import backend_for, chunked, delta_rule
from fathom.models.kimi_config import KimiConfig
from fathom.models.layers import document_cuts
from fathom.models.moe import Experts

# Kernel: block sizes, warps, stages.
PINNED: dict[str, tuple[dict[str, int], int, int]] = {
    "chunk_local_cumsum_vector_kernel": ({"BS": 32}, 4, 3),
    "chunk_kda_fwd_kernel_intra_token_parallel": ({"BH": 2}, 2, 3),
    "chunk_kda_fwd_kernel_inter_solve_fused": ({"BK": 32}, 2, 3),
    "recompute_w_u_fwd_kda_kernel": ({}, 4, 2),
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": ({"BV": 32}, 4, 2),
    "chunk_gla_fwd_kernel_o": ({"BK": 64, "BV": 64}, 4, 2),
    "chunk_kda_bwd_kernel_dAv": ({}, 4, 2),
    "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64": ({"BV": 32}, 4, 2),
    "chunk_kda_bwd_kernel_wy_dqkg_fused": ({"BK": 32, "BV": 64}, 2, 2),
    "chunk_kda_bwd_kernel_intra": ({}, 2, 2),
}

BOUND = 0.03
"""Largest relative error of a bf16 result against float32: several times what rounding makes, far below any wrong term."""


def pin(folder: Path) -> None:
    """Give fla-core, which must not be imported yet, one configuration a kernel; files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for kernel, (blocks, warps, stages) in PINNED.items():
        config = {"kwargs": blocks, "num_warps": warps, "num_stages": stages, "num_ctas": 1}
        (folder / f"{kernel}.json").write_text(json.dumps({"kernel_name": kernel, "default_config": config}))
    os.environ.update(FLA_CACHE_MODE="default", FLA_CONFIG_DIR=str(folder))


def _error(found: Tensor, truth: Tensor) -> float:
    return float((found.float() - truth).norm() / truth.norm())


def _errors(names: str, found: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    return {name: _error(a, b) for name, a, b in zip(names.split(), found, truth, strict=True)}


def _gradients(run: Callable[[list[Tensor]], Tensor], given: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in given]
    output = run(leaves)
    weight = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output)
    return [output.detach(), *torch.autograd.grad((output * weight).sum(), leaves)]


def delta_rule_errors(config: KimiConfig, device: torch.device, *, rows: int = 2) -> dict[str, float]:
    """Errors of the KDA that ``device`` takes, in bf16, at the shape of ``config``, against the chunked equations in float32."""
    generator = torch.Generator().manual_seed(1)
    shape = (rows, config.context, config.num_heads, config.head_width)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    query, key = (nn.functional.normalize(normal(*shape), dim=-1) for _ in range(2))
    # From channels that never forget to channels that forget at once, as at the start of training and worse.
    log_decay = -nn.functional.softplus(3 * normal(*shape) - 4)
    given = [query, key, normal(*shape), log_decay, torch.sigmoid(normal(*shape[:3]))]
    given = [x.to(device) if x is log_decay else x.to(device, torch.bfloat16) for x in given]
    documents = (torch.rand(rows, config.context, generator=generator) < 0.01).cumsum(1).to(device)
    cuts = document_cuts(documents)
    found = _gradients(lambda x: delta_rule(*x, documents=documents, cuts=cuts)[0], given)  # type: ignore[misc,arg-type]
    wide = [x.float() for x in given]
    truth = _gradients(lambda x: chunked(*x, documents=documents)[0], wide)  # type: ignore[misc,arg-type]
    return _errors("output query key value log_decay beta", found, truth)


def experts_errors(config: KimiConfig, device: torch.device, *, rows: int = 4096) -> dict[str, float]:
    """Errors of the experts in bf16, one of which gets nothing, against a loop over them in float32."""
    generator = torch.Generator().manual_seed(3)
    dim, width, number = config.latent_dim or config.dim, config.expert_dim, config.num_experts
    experts = Experts(number, dim, width, config.mlp_activation).to(device)
    with torch.no_grad():
        for weight in (experts.gate_up, experts.down):
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
            weight.copy_(weight.bfloat16())
    ends = torch.randint(1, rows, (number - 2,), generator=generator).sort().values
    ends = torch.cat((torch.zeros(1, dtype=torch.int64), ends, torch.tensor([rows])))
    counts = ends.diff(prepend=torch.zeros(1, dtype=torch.int64)).to(device)
    x = torch.randn(rows, dim, generator=generator).to(device, torch.bfloat16)

    def run(leaves: list[Tensor]) -> Tensor:
        return torch.func.functional_call(
            experts, {"gate_up": leaves[1], "down": leaves[2]}, (leaves[0], counts), tie_weights=False
        )

    experts.forward = experts.sorted  # type: ignore[method-assign,assignment]
    given = [x, experts.gate_up.bfloat16(), experts.down.bfloat16()]
    found, truth = (_gradients(run, [g.to(dtype) for g in given]) for dtype in (torch.bfloat16, torch.float32))
    return _errors("output input gate_up down", found, truth)


def gate(config: KimiConfig, device: torch.device) -> dict[str, Any]:
    """Both sets of errors; ``UserError`` for experts that are wrong, ``RuntimeError`` for a KDA that is."""
    errors = {
        "experts": experts_errors(config, device),
        backend_for(device, torch.bfloat16): delta_rule_errors(config, device),
    }
    for part, found in errors.items():
        wrong = [f"{name} {value:.1e}" for name, value in found.items() if not value < BOUND]  # NaN too
        if wrong:
            kind = UserError if part == "experts" else RuntimeError
            raise kind(f"{part}: wrong by more than {BOUND}: {', '.join(wrong)}")
    return errors
