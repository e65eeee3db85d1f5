"""The grammar's sampler against exact enumeration, and the interpretability scan of its network.

    python benchmarks/scientist_grammar.py

Synthetic runs of a power law in which one of the rules helps and one further design matters a little. The sampler is trained on
grammars of 144 and 2592 theories, both enumerated to check it; the probes look at the network of the larger. Labels that it
has no use for are given to its states as a server would have them: who asked, when, as which question, and whether the outcome
is called a reward. Writes benchmarks/results/2026-11-22_scientist-grammar/result.json.
"""

import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fathom.scientist.gflownet import total_variation, train
from fathom.scientist.grammar import grammar, weigher
from fathom.scientist.probes import probe

DATE = "2026-11-22"
RESULTS = Path(__file__).resolve().parent / "results"
Row = dict[str, Any]


def row(
    case: str, arm: str, metric: str, value: float, low: float | None = None, high: float | None = None, n: int = 1
) -> Row:
    unit = "s" if metric.endswith("seconds") else "1"
    low, high = value if low is None else low, value if high is None else high
    return {"case": case, "arm": arm, "metric": metric, "unit": unit, "median": value, "low": low, "high": high, "n": n,
            "over_prenorm": None}  # fmt: skip


def runs(rules: int, extra: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    arms = ["base", *(f"r{k}" for k in range(rules))]
    rows = []
    for c in np.geomspace(0.6, 18, 5):
        for arm in arms:
            more = {f"x{k}": float(random.random()) for k in range(extra)}
            y = (
                0.6
                - 0.06 * math.log(c / 3)
                - 0.01 * (arm == "r0")
                + 0.004 * more["x0"]
                + 0.003 * random.standard_normal()
            )
            rows.append({"C": float(c), "arch": arm, "y": float(y)} | more)
    designs = {"C": {"low": 0.5, "high": 20, "log": True}, "arch": {"levels": arms}}
    return {
        "world": "grown", "outcome": {"name": "y", "center": 0.6, "spread": 0.4, "noise": 0.003},
        "designs": designs | {f"x{k}": {"low": 0, "high": 1} for k in range(extra)},
        "grammar": {"law": "C", "levels": "arch", "drift": 0.01}, "evidence": [{"kind": "measured", "data": rows}],
    }  # fmt: skip


def main() -> None:
    rows: list[Row] = []
    for rules, extra in ((2, 1), (4, 2)):
        given = grammar(runs(rules, extra))
        weight = weigher(given)
        start = time.process_time()
        exact = {choice: weight(choice) for choice in given.choices()}
        enumerated = time.process_time() - start
        case = f"{given.count}-theories"
        rows.append(row(case, "enumeration", "cpu_seconds", enumerated))
        for steps in (400, 1200):
            start = time.process_time()
            trained = train([len(slot) for slot in given.slots], weight, steps=steps)
            distance = total_variation(trained.policy, exact)
            rows += [row(case, f"{steps} steps", "total_variation", distance),
                     row(case, f"{steps} steps", "theories_tried", len(trained.weighed)),
                     row(case, f"{steps} steps", "training_cpu_seconds", time.process_time() - start)]  # fmt: skip
            print(
                f"{case}: {steps} steps, total variation {distance:.5f}, {len(trained.weighed)} theories tried",
                flush=True,
            )
    random = np.random.default_rng(1)
    drawn = trained.policy.draw(4000, torch.Generator().manual_seed(2), explore=0.7)
    with torch.no_grad():
        hidden = trained.policy.hidden(drawn, len(given.slots) - 1).numpy()
    index = np.arange(len(drawn))
    weights = np.array([exact[tuple(choice)] for choice in drawn.tolist()])
    labels = {
        "outcome called a reward": random.integers(0, 2, len(drawn)),
        "asked in the second half of the day": (index >= len(drawn) // 2).astype(int),
        "key of whoever asked": random.integers(0, 2, len(drawn)), "index of the question is odd": index % 2,
        "first rule has an effect (an input)": (drawn[:, 1] > 0).numpy().astype(int),
        "weight above the median (its objective)": (weights > np.median(weights)).astype(int),
    }  # fmt: skip
    for name, label in labels.items():
        seen = probe(name, hidden, label, random)
        rows += [row(name, "probe", "auc", seen.auc, n=len(drawn)),
                 row(name, "shuffled labels", "auc", 0.5 * (seen.low + seen.high), seen.low, seen.high)]  # fmt: skip
        verdict = "found" if seen.found else "not found"
        print(f"{name:42} AUC {seen.auc:.3f}, shuffled {seen.low:.3f} to {seen.high:.3f}: {verdict}")
    out = RESULTS / f"{DATE}_scientist-grammar"
    out.mkdir(parents=True, exist_ok=True)
    result = {
        "name": "scientist-grammar", "date": DATE, "command": "python benchmarks/scientist_grammar.py",
        "machine": f"2 CPU cores, {platform.machine()}, shared",
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "torch": torch.__version__}, "rows": rows,
    }  # fmt: skip
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
