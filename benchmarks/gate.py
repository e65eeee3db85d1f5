"""The correctness gate of the residual-path benchmark: nothing is timed whose numbers are wrong.

At the very shape and inputs that are timed, the output, the gradient of the embedding and the gradients of the depth queries
are compared with the plain equations in float32 (the network copied to float32, its bf16 weights unchanged, no TF32).
Two errors of each, and the same two of the plain equations in bf16, which no rounding path can be asked to beat by much:

    mean    |a - truth| / |truth|, Euclidean, over the whole tensor
    worst   the largest such error of a row (a token, a site), over the root mean square of the true rows

An arm passes if its mean error is at most ``SLACK`` times, and its worst row at most twice ``SLACK`` times, that of eager bf16.
"""

import copy
from dataclasses import dataclass

from arms import Arm, ListAttnRes, plain_read, prenorm_stream, stream_arm
from torch import Tensor
from workloads import Workload

SLACK = 2.0
PEER_SLACK = 4.0
"""Peers round in other places: Liger rounds the key before the score, flash-attn-res rounds each phase."""

Errors = dict[str, tuple[float, float]]
"""(mean, worst) of ``output``, ``input_gradient`` and, but for PreNorm, ``query_gradient``."""


class Wrong(Exception):
    """An arm that failed the gate, and how."""


@dataclass(frozen=True)
class Truth:
    """The float32 results of one residual rule, and the errors of its plain equations in bf16."""

    values: dict[str, Tensor]
    eager: Errors


def backward_results(arm: Arm, workload: Workload) -> dict[str, Tensor]:
    """Output and gradients of one step, detached; every gradient but these is dropped."""
    embedding = workload.embedding
    output = arm.run(embedding)
    output.backward(workload.gradient)
    assert embedding.grad is not None
    results = {"output": output.detach(), "input_gradient": embedding.grad}
    query_gradient = arm.query_gradient()
    if query_gradient is not None:
        results["query_gradient"] = query_gradient.detach()
    workload.clear()
    for parameter in arm.parameters:
        parameter.grad = None
    return results


def error(value: Tensor, truth: Tensor) -> tuple[float, float]:
    """The mean and the worst error (see the top of the file); infinite where anything is not finite."""
    rows = (value.float() - truth).flatten(0, -2).norm(dim=-1)
    scale = truth.flatten(0, -2).norm(dim=-1).square().mean().sqrt()
    mean, worst = (rows.square().mean().sqrt() / scale).item(), (rows.max() / scale).item()
    return (mean, worst) if mean == mean and worst == worst else (float("inf"), float("inf"))


def errors(results: dict[str, Tensor], truth: dict[str, Tensor]) -> Errors:
    return {name: error(results[name], value) for name, value in truth.items()}


def _plain(workload: Workload, prenorm: bool) -> Arm:
    """The plain equations, each sublayer checkpointed: float32 at full size must fit beside the network."""
    if prenorm:
        return stream_arm("prenorm", workload, prenorm_stream(workload, compiled=False), 1)
    return stream_arm("eager", workload, ListAttnRes(workload, plain_read, compiled_norms=False), 1)


def _plain_results(workload: Workload, prenorm: bool) -> dict[str, Tensor]:
    """Without gradients of the network's weights, which would cost as much memory as the weights."""
    workload.network.requires_grad_(False)
    try:
        return backward_results(_plain(workload, prenorm), workload)
    finally:
        workload.network.requires_grad_(True)


def truths(workload: Workload) -> dict[str, Truth]:
    """The truth of ``prenorm`` and of ``attnres``."""
    exact = Workload(
        workload.case,
        copy.deepcopy(workload.network).float(),
        workload.embedding.detach().float().requires_grad_(),
        workload.gradient.float(),
        workload.queries.float(),
        workload.gains.float(),
    )
    found = {}
    for name in ("prenorm", "attnres"):
        values = _plain_results(exact, name == "prenorm")
        found[name] = Truth(values, errors(_plain_results(workload, name == "prenorm"), values))
    return found


def gate(found: Errors, eager: Errors, slack: float) -> None:
    """Raise ``Wrong`` with the first error that is over its bound."""
    for name, pair in found.items():
        for kind, value, reference, factor in zip(
            ("mean", "worst"), pair, eager[name], (slack, 2 * slack), strict=True
        ):
            if not value <= factor * reference:
                raise Wrong(
                    f"{name}: {kind} error {value:.2e}, over {factor:g} times that of eager bf16, {reference:.2e}"
                )
