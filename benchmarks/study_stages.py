"""What the study runs: its sizes, the optimizer's settings that are tried and how they are carried, the runs of each stage."""

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fathom.lab.plan import Planned, outcomes, read_sweep, training_flops
from fathom.lab.sweeps import ABLATIONS, residual, shapes
from fathom.models.config import ModelConfig
from fathom.train.config import DataConfig, OptimConfig, RunConfig
from fathom.train.data import Manifest
from fathom.train.loop import data_folder

STAGES = ("rates", "edges", "factors", "sizes", "rows", "shapes", "checks")
ARMS = {"prenorm": "prenorm", "block": "block", "full": "full"}


@dataclass(frozen=True)
class Scale:
    """How large the study is."""

    sizes: tuple[tuple[int, int, int, int], ...]
    """Decoder layers, width, heads and optimizer steps of each size."""
    muon: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    """Rates that are tried of matrices, embedding and head, the matrices' under Muon; vectors take the head's."""
    adamw: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    """Likewise, all under AdamW."""
    edges: tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]
    """Factors of the best of these, of matrices, embedding and head."""
    factors: tuple[float, ...]
    context: int
    batch: int
    precision: str
    compile: str
    shapes: int
    """How many of the 25 shapes of Fig. 7 are taken, evenly."""
    rows: tuple[str, ...] = tuple(ABLATIONS)
    """Rows of Table 4."""
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seeds: tuple[int, ...] = (0, 1)


SCALES = {
    # 4.5e7 to 3.2e8 FLOPs a token forward and backward, 12 to 27 M tokens: 16 times the compute from first to last.
    "h100": Scale(((8, 192, 3, 732), (12, 256, 4, 1037), (16, 320, 5, 1465), (24, 384, 6, 1650)),
                  ((0.01, 0.02, 0.04), (0.03, 0.1, 0.3), (1e-3, 4e-3)), ((2e-3, 4e-3, 8e-3), (0.03, 0.1), (1e-3, 4e-3)),
                  ((0.25, 0.5, 1.0), (1.0, 3.0), (1.0, 4.0, 16.0)), (0.5, 0.71, 1.0, 1.41), 512, 32, "bf16", "layers", 9),
    "toy": Scale(((2, 8, 1, 6), (3, 12, 1, 8), (4, 16, 1, 16)), ((0.02,), (0.1,), (4e-3,)), ((8e-3,), (0.1,), (4e-3,)),
                 ((0.5, 1.0), (1.0,), (1.0,)), (0.5, 1.0), 32, 2, "float32", "none", 2, ("prenorm", "block-s4-heads16"),
                 (0,), (0,)),
}  # fmt: skip


def run_config(scale: Scale, data: str, size: int, arm: str, optim: OptimConfig, seed: int) -> RunConfig:
    """Of one run of size ``size`` (an index), at the rates of ``optim``."""
    layers, dim, heads, steps = scale.sizes[size]
    folder = DataConfig(folder=data, batch=scale.batch)
    config = RunConfig(
        model=ModelConfig(context=scale.context, dim=dim, num_layers=layers, num_heads=heads, residual=residual(arm)),
        data=folder, optim=replace(optim, warmup=max(1, steps // 10)), steps=steps, seed=seed,
        precision=scale.precision, compile=scale.compile, eval_every=max(1, steps // 8), eval_sequences=512 // scale.batch * 8,
        checkpoint_every=max(1, steps // 3), keep_checkpoints=1, log_every=max(1, steps // 200),
    )  # type: ignore[arg-type]  # fmt: skip
    vocab_size = Manifest.load(data_folder(config)).vocab_size
    return replace(config, model=replace(config.model, vocab_size=vocab_size))


def setting(name: str, matrix: float, embedding: float, head: float) -> tuple[str, OptimConfig]:
    """The optimizer ``name`` with its tuned rates, and what this setting is called."""
    rates = {"muon_lr": matrix, "lr": head} if name == "muon" else {"lr": matrix}
    optim = OptimConfig(optimizer=name, embedding_lr=embedding, head_lr=head, **rates)  # type: ignore[arg-type]
    return f"{name}-{matrix:g}-{embedding:g}-{head:g}", optim


def candidates(scale: Scale) -> dict[str, OptimConfig]:
    """Every setting of the optimizer that is tried first, by name."""
    grids = (("muon", scale.muon), ("adamw", scale.adamw))
    return dict(setting(name, *each) for name, grid in grids for each in itertools.product(*grid))


def beyond(scale: Scale, best: OptimConfig) -> dict[str, OptimConfig]:
    """Settings beyond the first grid, from its best."""
    muon = best.optimizer == "muon"
    at = (best.muon_lr if muon else best.lr, best.embedding_lr, best.head_lr)
    found = {}
    for factors in itertools.product(*scale.edges):
        name, optim = setting(best.optimizer, *(float(f"{a * f:.3g}") for a, f in zip(at, factors, strict=True)))
        if factors != (1.0, 1.0, 1.0):
            found[name] = optim
    return found


def scaled(optim: OptimConfig, factor: float) -> OptimConfig:
    """``optim`` with every tuned rate times ``factor``."""
    rates = ("lr", "muon_lr", "embedding_lr", "head_lr")
    return replace(optim, **{name: float(f"{factor * getattr(optim, name):.3g}") for name in rates})


def best_rate(rates: list[float], losses: list[float]) -> float:
    """The lowest point of the parabola through the best rate and its neighbours, over log rate; the best at an end itself."""
    at = int(np.argmin(losses))
    if at in (0, len(rates) - 1):
        return rates[at]
    a, b, _ = np.polyfit(np.log(rates[at - 1 : at + 2]), losses[at - 1 : at + 2], 2)
    return float(np.exp(-b / (2 * a)))


def carried_factor(first: float, second: float, compute: tuple[float, float], to: float) -> float:
    """The factor at compute ``to``: a power of compute through the two tuned ones, its exponent held between -0.25 and 0.

    Two optima are noisy: unheld, their line could send the largest size's rates anywhere. The paper's rates fall like C^-0.19.
    """
    exponent = math.log(second / first) / math.log(compute[1] / compute[0])
    exponent = min(0.0, max(-0.25, exponent))
    middle = math.sqrt(first * second)
    return middle * (to / math.sqrt(compute[0] * compute[1])) ** exponent


def of_prenorm(scale: Scale, data: str, size: int, settings: dict[str, OptimConfig]) -> list[Planned]:
    return [
        Planned(f"{name}-seed{seed}", name, "prenorm", seed, run_config(scale, data, size, "prenorm", optim, seed))
        for name, optim in settings.items() for seed in scale.tuning_seeds
    ]  # fmt: skip


def rates(out: Path, scale: Scale, data: str) -> list[Planned]:
    return of_prenorm(scale, data, 0, candidates(scale))


def edges(out: Path, scale: Scale, data: str) -> list[Planned]:
    return of_prenorm(scale, data, 0, beyond(scale, best_of(out, candidates(scale), "rates")))


def factors(out: Path, scale: Scale, data: str) -> list[Planned]:
    best = best_rates(out, scale)
    return of_prenorm(scale, data, 1, {f"x{factor:g}": scaled(best, factor) for factor in scale.factors})


def mean_losses(out: Path, stage: str) -> dict[str, float]:
    """Mean final loss of each case over its seeds; infinite if one did not end well."""
    found: dict[str, list[float]] = {}
    for end in outcomes(read_sweep(out / stage)):
        found.setdefault(end.planned.case, []).append(math.inf if end.val_loss is None else end.val_loss)
    return {case: statistics.mean(losses) for case, losses in found.items()}


def best_of(out: Path, settings: dict[str, OptimConfig], *stages: str) -> OptimConfig:
    """The setting with the lowest mean loss in ``stages``."""
    losses = {case: loss for stage in stages for case, loss in mean_losses(out, stage).items()}
    return settings[min(losses, key=losses.__getitem__)]


def best_rates(out: Path, scale: Scale) -> OptimConfig:
    first = candidates(scale)
    return best_of(out, first | beyond(scale, best_of(out, first, "rates")), "rates", "edges")


def tuned(out: Path, scale: Scale, data: str) -> list[OptimConfig]:
    """The optimizer of every size, from the finished stages ``rates`` and ``factors``."""
    best = best_rates(out, scale)
    losses = mean_losses(out, "factors")
    second = best_rate(list(scale.factors), [losses[f"x{factor:g}"] for factor in scale.factors])
    cost = [training_flops(run_config(scale, data, size, "prenorm", best, 0)) for size in range(len(scale.sizes))]
    return [scaled(best, carried_factor(1.0, second, (cost[0], cost[1]), each)) for each in cost]


def sizes(out: Path, scale: Scale, data: str) -> list[Planned]:
    found = tuned(out, scale, data)
    return [
        Planned(f"s{size + 1}-{arm}-seed{seed}", f"s{size + 1}", arm, seed,
                run_config(scale, data, size, rule, found[size], seed))
        for seed in scale.seeds for size in range(len(scale.sizes)) for arm, rule in ARMS.items()
    ]  # fmt: skip


def rows(out: Path, scale: Scale, data: str) -> list[Planned]:
    optim, model = tuned(out, scale, data)[0], scale.sizes[0]
    planned = []
    for seed in scale.seeds:
        for arm, rule in ((name, ABLATIONS[name]) for name in scale.rows if name not in ARMS):
            if "heads=" in rule:  # sixteen heads in the paper, of which each is as wide as a head of attention
                arm, rule = f"block-s4-heads{model[2]}", f"block:block_size=4,heads={model[2]}"
            planned.append(Planned(f"{arm}-seed{seed}", "s1", arm, seed, run_config(scale, data, 0, rule, optim, seed)))
    return planned


def depth_width(out: Path, scale: Scale, data: str) -> list[Planned]:
    base = run_config(scale, data, 0, "prenorm", tuned(out, scale, data)[0], 0)
    made = shapes(base)
    chosen = [list(made)[round(at)] for at in np.linspace(0, len(made) - 1, min(scale.shapes, len(made)))]
    return [
        Planned(f"{case}-{arm}-seed0", case, arm, 0,
                replace(made[case], model=replace(made[case].model, residual=residual(ARMS[arm]))))
        for case in dict.fromkeys(chosen) for arm in ("prenorm", "block")
    ]  # fmt: skip


def checks(out: Path, scale: Scale, data: str) -> list[Planned]:
    found = tuned(out, scale, data)
    every_output = f"full:window={2 * scale.sizes[0][0]}"  # all of them, and yet none of the fused kernels
    return [
        Planned(f"s{size + 1}-{arm}-seed{seed}", f"s{size + 1}", arm, seed,
                run_config(scale, data, size, rule, found[size], seed))
        for seed in scale.seeds for size, arm, rule in (
            (0, "full-plain", every_output), (0, "full-input-query", ABLATIONS["full-input-query"]),
            (2, "full-window8", ABLATIONS["full-window8"]))
    ]  # fmt: skip


MAKE: dict[str, Callable[[Path, Scale, str], list[Planned]]] = {
    "rates": rates, "edges": edges, "factors": factors, "sizes": sizes, "rows": rows, "shapes": depth_width, "checks": checks
}  # fmt: skip
