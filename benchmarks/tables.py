"""The tables of README and docs, written from the committed results, so that no number is copied by hand.

    python benchmarks/tables.py            write every table anew
    python benchmarks/tables.py --check    exit 1 and name the files whose tables differ from the results

A table stands between two comments; the metrics are optional and choose rows:

    <!-- result: 2026-11-22_debian-50m val_loss tokens_per_s -->
    <!-- end of result -->

A cell is a row of ``result.json``: the value, in brackets its low and high, and after × its ratio to PreNorm.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- result: (\S+)((?: \w+)*) -->\n).*?(<!-- end of result -->)", re.DOTALL)


def pages() -> list[Path]:
    """Every page that may hold a table."""
    return [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(RESULTS.glob("**/README.md"))]


def number(value: float, unit: str) -> str:
    """Losses to a thousandth of a nat, counts whole, everything else to three digits."""
    if unit.startswith("nats"):
        return f"{value:.3f}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def cell(row: dict[str, Any]) -> str:
    text = number(row["median"], row["unit"])
    if row["low"] != row["high"]:
        text += f" ({number(row['low'], row['unit'])} to {number(row['high'], row['unit'])})"
    if row["over_prenorm"] is not None and row["arm"] != "prenorm":
        text += f", ×{row['over_prenorm']:.2f}"
    return text


def table(rows: list[dict[str, Any]]) -> str:
    """Rows of one case and metric on a line, an arm in each column."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    lines = [["case", "metric", "n", *arms], ["---"] * (3 + len(arms))]
    for case, metric in dict.fromkeys((row["case"], row["metric"]) for row in rows):
        found = {row["arm"]: row for row in rows if (row["case"], row["metric"]) == (case, metric)}
        counts = " / ".join(str(count) for count in dict.fromkeys(row["n"] for row in found.values()))
        unit = next(iter(found.values()))["unit"]
        cells = [cell(found[arm]) if arm in found else "" for arm in arms]
        lines.append([case, f"{metric}, {unit}", counts, *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def render(text: str) -> str:
    """``text`` with every table in it written anew."""

    def replace(match: re.Match[str]) -> str:
        opening, folder, metrics, closing = match.groups()
        rows = json.loads((RESULTS / folder / "result.json").read_text())["rows"]
        chosen = [row for row in rows if not metrics or row["metric"] in metrics.split()]
        return opening + table(chosen) + closing

    return TABLE.sub(replace, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = [page for page in pages() if render(page.read_text()) != page.read_text()]
    for page in stale:
        print(page.relative_to(ROOT))
        if not check:
            page.write_text(render(page.read_text()))
    sys.exit(1 if check and stale else 0)


if __name__ == "__main__":
    main()
