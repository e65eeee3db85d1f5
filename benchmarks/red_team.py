"""The long versions of the red team's tests, and what containment costs: one table, by one command.

    python benchmarks/red_team.py          writes benchmarks/results/2026-11-22_scientist-red-team/result.json

100,000 fuzzed expressions; 1000 orders of questions, each answered by a child of its own; requests made by schemathesis from
the interface's schema; ten attacks on a log; time of a question in a child beside the same question in the process itself.
"""

import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from fathom.errors import UserError  # noqa: E402
from fathom.scientist import Scientist, fingerprint, read  # noqa: E402
from fathom.scientist.budget import BUDGETS, Key, sha256_of  # noqa: E402
from fathom.scientist.containment import Instrument  # noqa: E402
from fathom.scientist.log import Log  # noqa: E402
from fathom.scientist.server import application  # noqa: E402
from fathom.scientist.service import SERVED, Policy, Service  # noqa: E402
from tests.scientist.conftest import build_world, line_world  # noqa: E402
from tests.scientist.fuzz import fuzz  # noqa: E402
from tests.scientist.test_log import ATTACKS, filled  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "2026-11-22_scientist-red-team"
Row = dict[str, Any]
QUESTIONS: list[tuple[str, dict[str, Any]]] = [
    ("theories", {}), ("prob", {"event": "slope > 0.9"}), ("prob", {"event": "slope > 1", "given": "slope > 0.5"}),
    ("interval", {"expression": "slope"}), ("predict", {"design": {"x": 1.2}}), ("prob", {"event": "slope"}),
    ("guard", {"design": {"x": 2.0}, "harm": "y > 3", "threshold": 0.1, "delta": 0.1}),
    ("recommend", {"candidates": [{"x": 0.0}, {"x": 4.0}]}), ("score", {"rows": [{"x": 1.0, "y": 1.0}]}),
]  # fmt: skip


def row(
    case: str, metric: str, unit: str, value: float, low: float | None = None, high: float | None = None, n: int = 1
) -> Row:
    return {"case": case, "arm": "fathom", "metric": metric, "unit": unit, "median": value, "low": value if low is None else low,
            "high": value if high is None else high, "n": n, "over_prenorm": None}  # fmt: skip


def expressions() -> list[Row]:
    start = time.process_time()
    ends = fuzz(build_world(line_world()), 100_000, seed=7)
    return [
        row("fuzzed-expressions", name, "expressions", ends[name], n=100_000) for name in ("answered", "refused")
    ] + [
        row("fuzzed-expressions", "other_ends", "expressions", 100_000 - ends["answered"] - ends["refused"], n=100_000),
        row("fuzzed-expressions", "cpu_seconds", "s", time.process_time() - start),
    ]


def orders() -> list[Row]:
    """Two of nine questions in a random order, a thousand times; each question in a child of its own."""
    draws, different = random.Random(0), 0
    with Instrument({SERVED: build_world(line_world()).document}) as instrument:

        def ask(index: int) -> str:
            found = instrument.ask(SERVED, *QUESTIONS[index])
            return json.dumps([found.answer, found.wrong, found.failed])

        alone = [ask(index) for index in range(len(QUESTIONS))]
        for _ in range(1000):
            first, second = draws.sample(range(len(QUESTIONS)), 2)
            ask(first)
            different += ask(second) != alone[second]
    return [row("orders-of-questions", "different_answers", "answers", different, n=1000)]


def costs() -> list[Row]:
    world = read("paper-table2")
    scientist, rows = Scientist(world), []
    scientist.theories()
    with Instrument({SERVED: world.document}) as instrument:
        for verb, given in (("theories", {}), ("prob", {"event": "multiplier(C=5.6) > 1.1"})):
            inside, outside, cpu = [], [], []
            for _ in range(200):
                start = time.perf_counter()
                cpu.append(1000 * instrument.ask(SERVED, verb, given).cpu)
                outside.append(1000 * (time.perf_counter() - start))
                start = time.perf_counter()
                getattr(scientist, verb)(**given)
                inside.append(1000 * (time.perf_counter() - start))
            for name, values in (("in_a_child_ms", outside), ("child_cpu_ms", cpu), ("in_process_ms", inside)):
                low, high = np.quantile(values, [0.1, 0.9]).tolist()
                rows.append(row(f"question-{verb}", name, "ms", statistics.median(values), low, high, 200))
        start = time.perf_counter()
        replies = {name: vars(instrument.ask(w, v, a)) for name, w, v, a in fingerprint.questions()}
        rows.append(row("fingerprint", "seconds", "s", time.perf_counter() - start, n=len(replies)))
        rows.append(row("fingerprint", "wrong_canaries", "canaries", len(fingerprint.wrong(replies)), n=len(replies)))
    with tempfile.TemporaryDirectory() as folder:
        log = Log(Path(folder) / "log.jsonl")
        start = time.perf_counter()
        for index in range(2000):
            log.append("answer", {"p": index / 2000})
        rows.append(row("log", "appends_per_second", "1/s", 2000 / (time.perf_counter() - start), n=2000))
        start = time.perf_counter()
        log.verify(log.checkpoint())
        rows.append(row("log", "verified_per_second", "1/s", 2000 / (time.perf_counter() - start), n=2000))
    return rows


def attacks() -> list[Row]:
    found = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, attack in enumerate(ATTACKS.values()):
            log = filled(Path(folder) / f"{number}.jsonl")
            kept = log.checkpoint()
            log.path.write_bytes(attack(log.lines()))
            try:
                log.verify(kept)
            except UserError:
                found += 1
    return [row("attacks-on-a-log", "found", "attacks", found, n=len(ATTACKS))]


def requests(examples: int = 500) -> list[Row]:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    seen: Counter[int] = Counter()
    world = build_world(line_world())
    keys = {sha256_of(f"{i}"): Key(f"{i}", sha256_of(f"{i}"), **BUDGETS) for i in range(3000)}
    with Instrument({SERVED: world.document}) as first, Instrument({SERVED: world.document}) as second, \
            tempfile.TemporaryDirectory() as folder:  # fmt: skip
        service = Service(world, Path(folder) / "log.jsonl", keys, instrument=first, second=second,
                          policy=Policy("y > 30", 0.05, 0.1), band=0.001)  # fmt: skip
        for found in schemathesis.openapi.from_asgi("/v1/schema", application(service)).get_all_operations():
            operation = found.ok()
            modes = (
                list(schemathesis.GenerationMode)
                if operation.method == "post"
                else [schemathesis.GenerationMode.POSITIVE]
            )
            for mode in modes:

                @given(case=operation.as_strategy(generation_mode=mode))
                @settings(max_examples=examples, phases=[Phase.generate], derandomize=True, database=None, deadline=None,
                          suppress_health_check=list(HealthCheck))  # fmt: skip
                def call(case: Any) -> None:
                    response = case.call(headers={"Authorization": f"Bearer {seen.total() % 3000}"})
                    case.validate_response(response, excluded_checks=[positive_data_acceptance])
                    seen[response.status_code] += 1

                call()
        records = Log(service.log.path).verify()
    case = "requests-from-the-schema"
    rows = [row(case, f"status_{status}", "requests", count, n=seen.total()) for status, count in sorted(seen.items())]
    return [*rows, row(case, "records_of_a_whole_log", "records", records)]


if __name__ == "__main__":
    rows: list[Row] = []
    for part in (attacks, costs, expressions, orders, requests):
        rows += part()
        print(json.dumps(rows[-3:]), flush=True)
    RESULT.mkdir(parents=True, exist_ok=True)
    (RESULT / "result.json").write_text(json.dumps({
        "name": "scientist-red-team", "date": "2026-11-22", "command": "python benchmarks/red_team.py",
        "machine": "2 CPU cores, shared with other work", "rows": rows,
        "versions": {"python": platform.python_version(), "numpy": np.__version__},
    }, indent=1) + "\n")  # fmt: skip
