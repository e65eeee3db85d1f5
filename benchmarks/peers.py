"""Other people's AttnRes kernels as arms of the residual-path benchmark, from their released wheels, unchanged.

    pip install --target .peers --no-deps --no-compile --only-binary=:all: --python-version 3.12 \\
        fla-core==0.6.0 fast-attnres==2.1.0 flash-attn-res==0.1.12 liger-kernel==0.8.5

They are pure Python (10 MB), need torch, triton, einops and packaging, and are imported from `.peers/` or from wherever they
are installed. FLA, fast-attnres and Liger read one site at a time over the list of sources; Fathom's stream, add and norm
around them are those of the other arms, but where a peer fuses the norm. flash-attn-res is a whole network in one function,
which recomputes its sublayers in the backward pass: compare it with the arms named *-checkpoint.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from arms import Arm, Bank, ListAttnRes, Unavailable, compiled_norm, stream_arm
from torch import Tensor, nn
from workloads import EPS, Workload

FOLDER = Path(__file__).resolve().parents[1] / ".peers"
PACKAGES = ("triton", "fla-core", "fast-attnres", "flash-attn-res", "liger-kernel")


def load(module: str) -> Any:
    """The peer's module; ``Unavailable`` if it does not import here."""
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    try:
        return import_module(module)
    except Exception as error:  # whatever someone else's package does at import is a reason to go on without it
        raise Unavailable(f"import {module}: {type(error).__name__}: {error}") from error


def versions() -> dict[str, str]:
    """The versions of triton and of the peers that are here."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def add(partial: Tensor | None, output: Tensor) -> Tensor:
    return output if partial is None else partial + output


def fla(workload: Workload, *, checkpoint_level: int = 1, name: str = "fla") -> Arm:
    """flash-linear-attention: fused read with the output norm in it."""
    fused_attnres = load("fla.ops.attnres").fused_attnres

    def read(
        bank: Bank, partial: Tensor | None, output: Tensor, query: Tensor, gain: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        total = add(partial, output)
        x = fused_attnres(
            query, (*bank, total), gain, output_rms_weight=weight, rms_eps=EPS, checkpoint_level=checkpoint_level
        )
        return total, x

    return stream_arm(name, workload, ListAttnRes(workload, read))


def fast_attnres(workload: Workload) -> Arm:
    """fast-attnres: fused read over the list; the key gain folded into the query, the norm apart."""
    attnres = load("attnres").attnres

    def read(
        bank: Bank, partial: Tensor | None, output: Tensor, query: Tensor, gain: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        total = add(partial, output)
        return total, compiled_norm(attnres((*bank, total), query * gain, eps=EPS), weight)

    return stream_arm("fast-attnres", workload, ListAttnRes(workload, read))


def liger(workload: Workload) -> Arm:
    """Liger: fused read over a stack of the sources, the norm apart."""
    function = load("liger_kernel.ops.attn_res").LigerAttnResFunction

    def read(
        bank: Bank, partial: Tensor | None, output: Tensor, query: Tensor, gain: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        total = add(partial, output)
        return total, compiled_norm(function.apply(torch.stack((*bank, total)), query, gain, EPS), weight)

    return stream_arm("liger", workload, ListAttnRes(workload, read))


class NormedSublayer(nn.Module):
    """A sublayer with its PreNorm inside, as flash-attn-res calls it."""

    def __init__(self, sublayer: nn.Module) -> None:
        super().__init__()
        self.sublayer = sublayer

    def forward(self, x: Tensor) -> Tensor:
        normed = compiled_norm(x, self.sublayer.norm.weight)  # type: ignore[union-attr, arg-type]
        return self.sublayer(normed)


def flash_attn_res(workload: Workload) -> Arm:
    """flash-attn-res: two-phase over the whole network in one autograd function."""
    case, network = workload.case, workload.network
    if case.dim & (case.dim - 1):
        raise Unavailable(f"its kernels need a width that is a power of two, not {case.dim}")
    function = load("flash_attn_res.experimental.autograd").BlockAttentionResiduals
    layers = [NormedSublayer(sublayer) for sublayer in network.sublayers]
    weights = [weight for layer in layers for weight in layer.parameters()]
    query, gain = nn.Parameter(workload.queries.clone()), nn.Parameter(workload.gains.clone())

    def run(embedding: Tensor) -> Tensor:
        mixed = function.apply(embedding, query * gain, layers, case.block_size, EPS, *weights)
        return compiled_norm(mixed, network.final_norm.weight)

    return Arm("flash-attn-res", run, [query, gain], lambda: query.grad)


PEERS: dict[str, Callable[[Workload], Arm]] = {
    "fla": fla,
    "fla-level-0": lambda workload: fla(workload, checkpoint_level=0, name="fla-level-0"),
    "liger": liger,
    "fast-attnres": fast_attnres,
    "flash-attn-res": flash_attn_res,
}
