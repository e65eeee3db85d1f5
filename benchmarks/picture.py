"""The two figures of the README, drawn from the committed runs of the quick start's seed 0.

python benchmarks/picture.py
"""

from pathlib import Path

from fathom.lab.figures import depth_map, loss_figure, svg
from fathom.lab.runs import read_runs

ROOT = Path(__file__).resolve().parents[1]
SEED = ROOT / "benchmarks" / "results" / "2026-11-22_quickstart" / "seed-0"


def pictures() -> dict[str, str]:
    """SVG documents by file name: the losses of both rules, and what Block's attention sublayers read."""
    runs = read_runs([SEED / "prenorm", SEED / "block"])
    depth = runs[1].depth
    assert depth is not None
    drawn = {
        "quickstart-loss.svg": loss_figure(runs, "steps"),
        "quickstart-depth.svg": depth_map(depth, "attention", "Block"),
    }
    for figure in drawn.values():
        figure.set_size_inches(4.4, 3.5)  # equal, to stand side by side
    return {name: svg(figure) for name, figure in drawn.items()}


def main() -> None:
    for name, picture in pictures().items():
        (ROOT / "docs" / "images" / name).write_text(picture)


if __name__ == "__main__":
    main()
