"""`fathom probe`: whether depth lets a network follow several steps."""

from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from fathom.commands.output import Function, Json, columns, print_json
from fathom.lab.intervals import LEVEL, percent


def train() -> Function:
    from fathom.lab.probe import ProbeConfig, train_probe

    default = ProbeConfig()
    out_help = "The folder to make; runs/probe-TASK-RULE-LAYERS-SEED if not given."

    def run(
        out: Annotated[Path | None, arg(help=out_help)] = None,
        as_json: Json = False,
        config: Annotated[ProbeConfig, arg(name="")] = default,
    ) -> None:
        """Train a small decoder on a task whose questions need a set number of steps, and test it by that number."""
        name = f"probe-{config.task.name}-{config.residual.rule}-{config.layers}-{config.seed}"
        folder = out or Path("runs") / name
        accuracies = train_probe(config, folder)
        if as_json:
            print_json({"probe": str(folder), "accuracy": accuracies})
            return
        told = ", ".join(f"{k}: {share:.3f}" for k, share in enumerate(accuracies, 1))
        print(f"accuracy by number of steps: {told} (guessing: {1 / config.task.num_answers:.3f}) in {folder}")

    return run


def test() -> Function:
    from fathom.lab.probe import score

    def run(
        probes: Positional[tuple[Path, ...]],
        sequences: Annotated[int, arg(help="Test sequences; the same ones for every probe of a task.")] = 4096,
        as_json: Json = False,
    ) -> None:
        """Test trained probes: accuracy by number of steps, the mean over seeds with its interval.

        Args:
            probes: Folders of `fathom probe train`.
        """
        found = score(list(probes), sequences=sequences)
        if as_json:
            print_json([
                {"task": s.config.task.name, "rule": s.config.residual.rule, "layers": s.config.layers,
                 "seeds": s.seeds, "accuracy": s.accuracies, "mean": s.mean, "interval": s.intervals()}
                for s in found
            ])  # fmt: skip
            return
        most = max(s.config.task.hops for s in found)
        rows = [["task", "rule", "layers", "seeds", *(f"{k} step{'s' if k > 1 else ''}" for k in range(1, most + 1))]]
        for s in found:
            cells: list[Any] = []
            for mean, interval in zip(s.mean, s.intervals(), strict=True):
                cells.append(f"{mean:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else ""))
            rows.append([s.config.task.name, s.config.residual.rule, str(s.config.layers), str(len(s.seeds)),
                         *cells, *[""] * (most - len(cells))])  # fmt: skip
        print(columns(rows))
        if any(len(s.seeds) > 1 for s in found):
            print(f"Means over seeds, with {percent(LEVEL)} intervals by Student's t.")

    return run
