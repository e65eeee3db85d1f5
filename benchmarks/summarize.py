"""The ``result.json`` of the GPU runs, computed from their raw rows; a test holds the committed files to it.

    python benchmarks/summarize.py

``median`` is a median over ``n`` logged stretches of steps, with the lowest and the highest beside it. Metrics that hold
something else say so in their name: ``mean_val_loss`` over seeds (lowest and highest seed beside it), ``mean_gain`` over
pairs of one seed (with the 90 % interval of the mean by Student's t), ``gain`` of one pair (no interval),
``compute_multiplier`` of a fit (with its 90 % bootstrap interval, n sizes),
``lowest_val_loss`` over learning rates.
"""

import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

from fathom.lab.ablations import table
from fathom.lab.outcomes import read_outcomes
from fathom.lab.scaling import fit_arms, points_of
from fathom.train.metrics import read_metrics

RESULTS = Path(__file__).parent / "results"

Rows = list[dict[str, Any]]

# Student's t at 95 % (a two-sided 90 % interval) for 1 to 9 degrees of freedom.
T_95 = (6.314, 2.920, 2.353, 2.132, 2.015, 1.943, 1.895, 1.860, 1.833)


def paired_interval(gains: list[float]) -> tuple[float, float]:
    """The 90 % interval of the mean of paired gains, by Student's t."""
    half = T_95[len(gains) - 2] * statistics.stdev(gains) / math.sqrt(len(gains))
    return statistics.mean(gains) - half, statistics.mean(gains) + half


def row(
    case: str, arm: str, metric: str, unit: str, values: list[float], *, over_prenorm: float | None = None
) -> dict[str, Any]:
    """A row of the schema: median, lowest, highest and number of ``values``."""
    return {"case": case, "arm": arm, "metric": metric, "unit": unit, "median": statistics.median(values),
            "low": min(values), "high": max(values), "n": len(values), "over_prenorm": over_prenorm}  # fmt: skip


def seeds_rows(case: str, prenorm: list[float], block: list[float], metric: str = "mean_val_loss") -> Rows:
    """The mean loss of both rules over the same seeds, and the mean of their paired gains, PreNorm minus Block."""
    rows = [
        row(case, arm, metric, "nats per token", found) | {"median": statistics.mean(found)}
        for arm, found in (("prenorm", prenorm), ("block", block))
    ]
    return [*rows, gain_row(case, prenorm, block)]


def gain_row(case: str, prenorm: list[float], block: list[float]) -> dict[str, Any]:
    """The mean of the paired gains, PreNorm minus Block, with its 90 % interval."""
    gains = [a - b for a, b in zip(prenorm, block, strict=True)]
    low, high = paired_interval(gains)
    return row(case, "block", "mean_gain", "nats per token", gains) | {
        "median": statistics.mean(gains), "low": low, "high": high,
    }  # fmt: skip


def read_sweep(name: str) -> Rows:
    lines = (RESULTS / "2026-11-22_quickstart" / "tuning" / name).read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(rows: Rows, rule: str, **optim: float | None) -> list[float]:
    """Validation losses of the runs of ``rule`` with these optimizer settings, in the order of their seeds."""
    found = [
        (run["config"]["seed"], run["val_loss"])
        for run in rows
        if run["config"]["model"]["residual"]["rule"] == rule
        and all(run["config"]["optim"][key] == value for key, value in optim.items())
    ]
    return [loss for _, loss in sorted(found)]


def tuning() -> Rows:
    """The quick start's sweeps: rates and seeds, the queries' rate, Muon, initialisation and depth."""
    rows: Rows = []
    sweep = read_sweep("seeds-and-depth.jsonl")
    seeds = [run for run in sweep if run["label"] == "seeds"]
    for lr in (8e-3, 1.2e-2, 1.6e-2, 2.4e-2):
        prenorm, block = losses(seeds, "prenorm", lr=lr), losses(seeds, "block", lr=lr)
        rows += seeds_rows(f"lr {lr}", prenorm, block)
    own = losses(seeds, "prenorm", lr=1.6e-2), losses(seeds, "block", lr=1.2e-2)
    rows += [gain_row("each at its best lr", *own)]

    scan = [run for run in sweep if run["label"] == "depth_lr"]
    for lr in (8e-3, 1.6e-2, 2.4e-2):
        for depth_lr in (5e-4, 1e-3, 2e-3, 4e-3, 8e-3):
            found = losses(scan, "block", lr=lr, depth_lr=depth_lr)
            rows += [row(f"lr {lr}, depth_lr {depth_lr}", "block", "depth_lr_val_loss", "nats per token", found)]

    second = [run for run in read_sweep("explore-2.jsonl") if run["label"] == "muon"]
    muon = [losses(second, rule, lr=1.6e-2, muon_lr=0.02) for rule in ("prenorm", "block")]
    rows += seeds_rows("muon, muon_lr 0.02", muon[0], muon[1])

    first = read_sweep("explore.jsonl")
    for layers, std in ((12, 0.05), (12, 0.3), (12, 1.0), (16, 1.0)):
        for rule in ("prenorm", "block"):
            found = losses([run for run in first if run["label"] == f"{layers}L std{std}"], rule)
            lowest = row(f"{layers} layers, std {std}", rule, "lowest_val_loss", "nats per token", found)
            rows += [lowest | {"median": min(found), "low": min(found), "high": min(found)}]
    return rows


DEBIAN = RESULTS / "2026-11-22_debian-50m"
FIRST_CALLS = {"prenorm": {1}, "block": {1, 2540}}
"""The steps of the twins that began a process and so waited for the compiler: Block was stopped and resumed once."""


def validations(lines: Rows) -> list[tuple[float, float]]:
    """(tokens, loss) of each validation."""
    return [(line["tokens"], line["loss"]) for line in lines if line["kind"] == "val"]


def tokens_at(loss: float, curve: list[tuple[float, float]]) -> float:
    """The tokens after which a falling validation curve first reaches ``loss``, on straight lines between its points."""
    for (tokens, above), (later, below) in itertools.pairwise(curve):
        if above > loss >= below:
            return tokens + (later - tokens) * (above - loss) / (above - below)
    raise ValueError(f"no validation is as low as {loss}")


def debian_50m() -> Rows:
    """The 50M runs: the tuning of PreNorm's rate, then both rules' speed and validation losses at equal steps."""
    rows: Rows = []
    first_calls = []
    for lr in ("5e-4", "1e-3", "2e-3", "4e-3"):
        lines = read_metrics(DEBIAN / "tune" / lr / "prenorm")
        first_calls += [lines[0]["step_seconds"]]
        last = [line["loss"] for line in lines if line["kind"] == "val"][-1:]
        rows += [row(f"lr {lr}, step 1000", "prenorm", "tuning_val_loss", "nats per token", last)]
    rows += [row("tuning, four at once", "prenorm", "first_call_s", "s", first_calls)]

    speeds: dict[str, float] = {}
    metrics = {arm: read_metrics(DEBIAN / arm) for arm in FIRST_CALLS}
    for arm, lines in metrics.items():
        train = [line for line in lines if line["kind"] == "train"]
        # Steps that were logged together share one time: each stretch counts once.
        later = [line for line in train if line["step"] not in FIRST_CALLS[arm]]
        stretches = [next(group) for _, group in itertools.groupby(later, key=lambda line: line["step_seconds"])]
        found = [line["tokens_per_second"] for line in stretches]
        speeds[arm] = statistics.median(found)
        ratio = speeds[arm] / speeds["prenorm"]
        rows += [row("debian-50m", arm, "tokens_per_s", "tokens/s", found, over_prenorm=ratio)]
        rows += [row("debian-50m", arm, "mfu", "%", [100 * line["mfu"] for line in stretches])]
        rows += [
            row(f"step {line['step']}, compiled before", arm, "first_call_s", "s", [line["step_seconds"]])
            for line in train
            if line["step"] in FIRST_CALLS[arm]
        ]
        peak = json.loads((DEBIAN / arm / "summary.json").read_text())["peak_gib"]
        rows += [row("debian-50m", arm, "peak_gib", "GiB", [peak])]
        for line in lines:
            if line["kind"] == "val":
                rows += [row(f"step {line['step']}", arm, "val_loss", "nats per token", [line["loss"]])]

    prenorm, block = (validations(metrics[arm]) for arm in ("prenorm", "block"))
    (tokens, loss), (_, lower) = prenorm[-1], block[-1]
    fewer = tokens_at(loss, block)
    rows += [row("to PreNorm's last loss", "prenorm", "tokens", "tokens", [tokens], over_prenorm=1.0)]
    rows += [row("to PreNorm's last loss", "block", "tokens", "tokens", [fewer], over_prenorm=fewer / tokens)]
    seconds = {"prenorm": tokens / speeds["prenorm"], "block": fewer / speeds["block"]}
    for arm, value in seconds.items():
        ratio = value / seconds["prenorm"]
        rows += [row("to PreNorm's last loss", arm, "seconds", "s", [value], over_prenorm=ratio)]
    rows += [row("debian-50m", "block", "gain", "nats per token", [loss - lower])]
    return rows


def recorded(run: Path) -> dict[str, Any]:
    """Machine and versions as a run wrote them down."""
    env = json.loads((run / "env.json").read_text())
    return {"machine": f"one {env['machine']}", "versions": {key: env[key] for key in ("python", "torch", "cuda")}}


SMALL = RESULTS / "2026-11-22_small-sweep"


def small_sweep() -> Rows:
    """The lab's own small sweeps: four rules over two seeds, and the compute multiplier of five tiny sizes."""
    rows: Rows = []
    for found in table(read_outcomes([SMALL / "rules"])):
        case = f"rules-{len(found.losses)}-seeds"
        mean = row(case, found.arm, "mean_val_loss", "nats per token", list(found.losses.values()))
        rows += [mean | {"median": found.mean}]
        if (gap := found.difference) is not None:
            assert gap.low is not None and gap.high is not None
            rows += [row(case, found.arm, "mean_gain", "nats per token", [-gap.mean])
                     | {"low": -gap.high, "high": -gap.low, "n": gap.n}]  # fmt: skip
    points = points_of(read_outcomes([SMALL / "sizes"]), "prenorm")
    budget = float(max(each.compute.max() for each in points.values()))
    fitted = fit_arms(points, baseline="prenorm", budget=budget, irreducible=False)
    for arm, fit in fitted.items():
        if (worth := fit.multiplier) is not None:
            value, low, high = (round(x, 3) for x in (worth.value, *worth.interval))
            rows += [row("five-sizes", arm, "compute_multiplier", "x", [value])
                     | {"low": low, "high": high, "n": len(fit.residuals)}]  # fmt: skip
    return rows


RESULT_FILES: dict[str, dict[str, Any]] = {
    "2026-11-22_quickstart/tuning": {
        "name": "quickstart-tuning",
        "date": "2026-11-22",
        "command": "python benchmarks/quickstart_sweep.py explore (then: depth seeds) --out OUT --gpu-workers 12 --minutes 5",
        "machine": "one NVIDIA H200, shared by 7 to 13 of these runs at a time; some runs on its CPU (device, in each row)",
        "versions": {"python": "3.12.3", "torch": "2.11.0+cu130", "cuda": "13.0"},
        "rows": tuning,
    },
    "2026-11-22_debian-50m": {
        "name": "debian-50m",
        "date": "2026-11-22",
        "command": "python benchmarks/twins.py debian-50m --data data/debian-docs-75M --lr 2e-3 --out OUT/twins",
        **recorded(DEBIAN / "prenorm"),
        "rows": debian_50m,
    },
    "2026-11-22_small-sweep": {
        "name": "small-sweep",
        "date": "2026-11-22",
        "command": "fathom sweep seeds --seeds 2 --arms prenorm block full hyper_connections --set steps=200 eval_every=50 "
        "dynamics_every=50 --out rules (sizes and shapes: see the README)",
        "machine": "2 CPU cores, shared with other work",
        "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"},
        "rows": small_sweep,
    },
}


def main() -> None:
    for folder, head in RESULT_FILES.items():
        result = head | {"rows": head["rows"]()}
        (RESULTS / folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
