"""Fathom's kernels one at a time against their byte floor: each input read once, each output written once.

    PYTHONPATH=. python benchmarks/kernels_alone.py --out OUT
    PYTHONPATH=. python benchmarks/kernels_alone.py --widths 2048 --arms fathom fla liger --out OUT

16,384 tokens in bf16, from a cold level-two cache. ``floor`` is the time that the floor's bytes take at measured copy
bandwidth, as a share of the time measured: 1 is a kernel that does nothing but move its data once. Before a kernel is timed,
its outputs and gradients are compared, on 1,000 tokens, with the plain equation in float32: an error is at most twice that
of the plain equation in bf16 (for peers four times, on all tokens).

    inter-nN-sS     S reads of N sources in one sweep; forward N + S tensors of [tokens, D], backward 2 N + S
    mix-nN-sS       the same from scores that are known, and the sources handed on; forward N + S, backward 3 N + S
    score-kK        the sum that ends a block, and its scores for K later reads; forward 3, backward 3
    read-nN         one read of N sources; forward N + 1, backward 2 N + 1
    update          residual add, merge with the inter-block read, norm; forward 5, backward 6
    update-first    the same where the block has no partial sum yet; forward 3, backward 5
"""

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peers
import torch
import torch.nn.functional as F
from arms import Unavailable
from gate import PEER_SLACK, SLACK, Errors, Wrong, error, gate
from summarize import row
from timing import Clock, command
from torch import Tensor
from workloads import EPS, QUERY_STD

from fathom.kernels import backend_for, inter_block, mix, read, score, update_read
from fathom.train.environment import environment, pick_device

TOKENS = 16384
GATE_TOKENS = 1000
"""No multiple of any tile."""

Run = Callable[[list[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Operation:
    """One kernel: its inputs are ``wide`` tensors [tokens, D], ``queries`` [D], ``gains`` [D] and ``lses`` float32 [tokens]."""

    name: str
    wide: int
    queries: int
    gains: int
    lses: int
    plain: Run
    arms: dict[str, Callable[[], Run]]
    forward_wide: int
    """Tensors [tokens, D] that the forward pass must read or write."""
    backward_wide: int
    forward_lses: int = 0
    """Float32 [tokens] that it must read or write."""
    backward_lses: int = 0
    scored: tuple[int, int] = (0, 0)
    """How many float32 [K, tokens] it is given, and K."""
    asked: int = 0
    """Queries in one [K, D]."""

    def inputs(self, tokens: int, dim: int, device: torch.device) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, std: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
            return (torch.randn(shape, generator=generator, device=device) * std).to(dtype).requires_grad_()

        return [
            *(normal(tokens, dim) for _ in range(self.wide)),
            *(normal(dim, std=QUERY_STD) for _ in range(self.queries)),
            *(torch.ones(dim, dtype=torch.bfloat16, device=device).requires_grad_() for _ in range(self.gains)),
            *(normal(tokens, dtype=torch.float32) for _ in range(self.lses)),
            *(normal(self.scored[1], tokens, dtype=torch.float32) for _ in range(self.scored[0])),
            *(normal(self.asked, dim, std=QUERY_STD) for _ in range(min(1, self.asked))),
        ]


def scores(value: Tensor, query: Tensor, gain: Tensor) -> Tensor:
    return (value * (query.float() * gain.float())).sum(-1) * (value.square().mean(-1) + EPS).rsqrt()


def plain_inter(sources: Sequence[Tensor], queries: Sequence[Tensor], gains: Sequence[Tensor]) -> list[Tensor]:
    """S mixes [tokens, D] in the sources' dtype and S float32 log-denominators [tokens]."""
    values = torch.stack([source.float() for source in sources])
    outs, lses = [], []
    for query, gain in zip(queries, gains, strict=True):
        score = scores(values, query, gain)
        lses.append(score.logsumexp(0))
        outs.append((score.softmax(0).unsqueeze(-1) * values).sum(0).to(sources[0].dtype))
    return [*outs, *lses]


def plain_update(
    partial: Tensor | None, output: Tensor, inter: Tensor, lse: Tensor, query: Tensor, gain: Tensor, weight: Tensor
) -> list[Tensor]:
    """The new partial sum, and the norm of its merge with the inter-block read."""
    total = output if partial is None else partial + output
    share = torch.sigmoid(scores(total.float(), query, gain) - lse).unsqueeze(-1)
    mixed = torch.lerp(inter.float(), total.float(), share)
    normed = F.rms_norm(mixed, (mixed.shape[-1],), weight.float(), EPS).to(output.dtype)
    return [normed] if partial is None else [total, normed]


def inter(n: int, s: int) -> Operation:
    def plain(x: list[Tensor]) -> list[Tensor]:
        return plain_inter(x[:n], x[n : n + s], x[n + s :])

    def fathom(x: list[Tensor]) -> list[Tensor]:
        out, lse = inter_block(x[:n], torch.stack(x[n : n + s]), torch.stack(x[n + s :]), eps=EPS)
        return [*out, *lse]

    return Operation(
        f"inter-n{n}-s{s}", n, s, s, 0, plain, {"fathom": lambda: fathom}, n + s, 2 * n + s, s, 2 * s
    )  # fmt: skip


def mixing(n: int, s: int) -> Operation:
    def plain(x: list[Tensor]) -> list[Tensor]:
        values, known = torch.stack([source.float() for source in x[:n]]), torch.stack(x[n:])
        outs = torch.einsum("nst,ntd->std", known.softmax(0), values).to(x[0].dtype)
        return [*outs, *known.logsumexp(0), *(source.view_as(source) for source in x[:n])]

    def fathom(x: list[Tensor]) -> list[Tensor]:
        outs, lse, sources = mix(x[:n], x[n:])
        return [*outs, *lse, *sources]

    # The numbers of a token: its scores in, its lse, largest scores and their sums out, and what there is of them backward.
    return Operation(
        f"mix-n{n}-s{s}", n, 0, 0, 0, plain, {"fathom": lambda: fathom}, n + s, 3 * n + s, (n + 3) * s, (2 * n + 3) * s,
        (n, s),
    )  # fmt: skip


def scoring(k: int) -> Operation:
    def plain(x: list[Tensor]) -> list[Tensor]:
        total = x[0] + x[1]
        value = total.float()
        return [total, x[2].float() @ value.T * (value.square().mean(-1) + EPS).rsqrt()]

    def fathom(x: list[Tensor]) -> list[Tensor]:
        return list(score(*x, eps=EPS))

    return Operation(
        f"score-k{k}", 2, 0, 0, 0, plain, {"fathom": lambda: fathom}, 3, 3, k + 1, 2 * k + 1, asked=k
    )  # fmt: skip


def single(n: int) -> Operation:
    def plain(x: list[Tensor]) -> list[Tensor]:
        return plain_inter(x[:n], [x[n]], [x[n + 1]])[:1]

    def fathom() -> Run:
        return lambda x: [read(x[:n], x[n], x[n + 1], eps=EPS)]

    def fla() -> Run:
        fused = peers.load("fla.ops.attnres").fused_attnres
        return lambda x: [fused(x[n], x[:n], x[n + 1], rms_eps=EPS)]

    def fast_attnres() -> Run:
        attnres = peers.load("attnres").attnres
        return lambda x: [attnres(x[:n], x[n] * x[n + 1], eps=EPS)]

    def liger() -> Run:
        function = peers.load("liger_kernel.ops.attn_res").LigerAttnResFunction
        return lambda x: [function.apply(torch.stack(x[:n]).unsqueeze(1), x[n], x[n + 1], EPS).squeeze(0)]

    arms = {"fathom": fathom, "fla": fla, "fast-attnres": fast_attnres, "liger": liger}
    return Operation(f"read-n{n}", n, 1, 1, 0, plain, arms, n + 1, 2 * n + 1)


def update(*, first: bool) -> Operation:
    """Inputs: [partial,] output, inter-block read, query, key gain, norm weight, lse."""

    def unpack(x: list[Tensor]) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        partial = None if first else x[0]
        output, inter_out, query, gain, weight, lse = x if first else x[1:]
        return partial, output, inter_out, lse, query, gain, weight

    def fathom(x: list[Tensor]) -> list[Tensor]:
        pair = update_read(*unpack(x), eps=EPS, norm_eps=EPS)
        return [pair[1]] if first else list(pair)

    # Backward: two gradients in (one at first, where it stays the caller's to add), the sum, the inter-block read; two out.
    return Operation(
        "update-first" if first else "update", 2 if first else 3, 1, 2, 1, lambda x: plain_update(*unpack(x)),
        {"fathom": lambda: fathom}, 3 if first else 5, 5 if first else 6, 1, 2,
    )  # fmt: skip


def with_gradients(run: Run, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor], Callable[[], object]]:
    """Outputs, gradients, and a function that runs the backward pass again."""
    outputs = list(run(inputs))
    generator = torch.Generator(inputs[0].device).manual_seed(1)
    given = [
        torch.randn(o.shape, generator=generator, device=o.device, dtype=torch.float32).to(o.dtype) for o in outputs
    ]

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, inputs, given, retain_graph=True)

    return outputs, list(backward()), backward


def check(operation: Operation, run: Run, dim: int, tokens: int, device: torch.device, slack: float) -> Errors:
    """Errors of outputs and gradients; ``Wrong`` if one is over its bound."""

    def results(function: Run, dtype: torch.dtype | None) -> dict[str, Tensor]:
        inputs = [
            x if dtype is None else x.detach().to(dtype).requires_grad_() for x in operation.inputs(tokens, dim, device)
        ]
        outputs, gradients, _ = with_gradients(function, inputs)
        named = [(f"output {i}", x) for i, x in enumerate(outputs)] + [
            (f"gradient {i}", x) for i, x in enumerate(gradients)
        ]
        # One row a token; a vector is a single row.
        return {name: x.detach().reshape(1, -1) if x.ndim == 1 else x.detach() for name, x in named}

    truth = results(operation.plain, torch.float32)
    eager = {name: error(x, truth[name]) for name, x in results(operation.plain, None).items()}
    found = {name: error(x, truth[name]) for name, x in results(run, None).items()}
    # Where bf16 leaves the plain path almost no error (an lse stays float32), float32 in another order is still allowed.
    floor = 1e-5
    gate(found, {name: (max(mean, floor), max(worst, floor)) for name, (mean, worst) in eager.items()}, slack)
    return found


def measure(operation: Operation, arm: str, dim: int, clock: Clock, bandwidth: float, tokens: int) -> dict[str, Any]:
    """Check, then time, one arm of one operation at one width: milliseconds of every repetition, and the floors."""
    run = operation.arms[arm]()
    # A peer is checked at the size that is timed: it tunes itself at the first size that it sees.
    gate_tokens, slack = (GATE_TOKENS, SLACK) if arm == "fathom" else (tokens, PEER_SLACK)
    found = check(operation, run, dim, gate_tokens, clock.device, slack)
    inputs = operation.inputs(tokens, dim, clock.device)
    forward = clock.kernel(lambda: run(inputs))
    _, _, again = with_gradients(run, inputs)
    wide, narrow = tokens * dim * 2, tokens * 4
    return {
        "operation": operation.name,
        "arm": arm,
        "dim": dim,
        "errors": found,
        "forward_ms": forward,
        "backward_ms": clock.kernel(again),
        "forward_floor_ms": (operation.forward_wide * wide + operation.forward_lses * narrow) / bandwidth * 1e3,
        "backward_floor_ms": (operation.backward_wide * wide + operation.backward_lses * narrow) / bandwidth * 1e3,
    }


def rows(raw: dict[str, Any]) -> list[dict[str, Any]]:
    case = f"{raw['operation']}-d{raw['dim']}"
    found = []
    for direction in ("forward", "backward"):
        times = raw[f"{direction}_ms"]
        shares = [raw[f"{direction}_floor_ms"] / value for value in times]
        found.append(row(case, raw["arm"], f"{direction}_us", "us", [value * 1e3 for value in times]))
        found.append(row(case, raw["arm"], f"{direction}_floor", "of the byte floor", shares))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[1024, 2048, 4096, 7168])
    parser.add_argument("--sources", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--reads", type=int, nargs="+", default=[6, 8], help="reads of a block")
    parser.add_argument(
        "--queries", type=int, nargs="+", default=[9, 25], help="later reads that a source is scored for"
    )
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--arms", nargs="+", choices=("fathom", "fla", "fast-attnres", "liger"), default=["fathom"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    device = pick_device(options.device)
    torch.set_float32_matmul_precision("highest")
    clock = Clock(device)
    bandwidth = clock.copy_bandwidth()
    env = environment(device) | {"backend": backend_for(device), "command": command("kernels_alone.py")}
    print(f"{env['machine']}: copy {bandwidth / 1e12:.2f} TB/s; median us and share of the byte floor")
    print(f"{'case':24s} {'arm':12s} {'forward':>10s} {'floor':>7s} {'backward':>10s} {'floor':>7s}")
    operations = [inter(n, s) for s in options.reads for n in options.sources]
    operations += [mixing(n, s) for s in options.reads for n in options.sources if n > 1]
    operations += [scoring(k) for k in options.queries]
    operations += [single(n) for n in options.sources] + [update(first=False), update(first=True)]
    result: dict[str, Any] = {
        "name": "kernels-alone",
        "date": datetime.date.today().isoformat(),
        "command": command("kernels_alone.py"),
        "machine": env["machine"],
        "versions": {key: env[key] for key in ("python", "torch", "cuda", "backend")} | peers.versions(),
        "rows": [],
    }
    raws: list[dict[str, Any]] = []
    failed = False
    options.out.mkdir(parents=True, exist_ok=True)
    for dim in options.widths:
        for operation in operations:
            for arm in (arm for arm in options.arms if arm in operation.arms):
                label = f"{operation.name}-d{dim}"
                try:
                    raw = measure(operation, arm, dim, clock, bandwidth, options.tokens)
                except Unavailable as reason:
                    print(f"{label:24s} {arm:12s} not available: {reason}", flush=True)
                    continue
                except Wrong as reason:
                    failed = True
                    print(f"{label:24s} {arm:12s} GATE FAILED, not timed: {reason}", flush=True)
                    continue
                raws.append(raw)
                result["rows"] += rows(raw)
                medians = [statistics.median(raw[f"{direction}_ms"]) for direction in ("forward", "backward")]
                floors = [raw[f"{direction}_floor_ms"] for direction in ("forward", "backward")]
                cells = [f"{ms * 1e3:10.1f} {floor / ms:7.2f}" for ms, floor in zip(medians, floors, strict=True)]
                print(f"{label:24s} {arm:12s} {' '.join(cells)}", flush=True)
        (options.out / "kernels.json").write_text(json.dumps(result, indent=1) + "\n")
        raw_text = json.dumps({"env": env, "copy_bytes_per_second": bandwidth, "measurements": raws})
        (options.out / "kernels-raw.json").write_text(raw_text + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
