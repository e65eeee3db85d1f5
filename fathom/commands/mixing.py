"""`fathom lab mixing`: residual rules and trained runs as matrices over depth."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from fathom.commands.output import Function, Json, columns, print_json
from fathom.errors import UserError


def mixing() -> Function:
    from fathom.lab.dynamics import load_newest
    from fathom.lab.figures import svg
    from fathom.lab.figures_mixing import figure_9, mixing_figure
    from fathom.lab.table_5 import table_5
    from fathom.residuals.mixing import mixing as measure
    from fathom.residuals.mixing import rank, semiseparable_rank
    from fathom.train.metrics import writing
    from fathom.train.released import run_folder

    def run(
        runs: Positional[tuple[Path, ...]] = (),
        sequence: Annotated[int, arg(help="Tokens of the first validation sequence that are read.")] = 64,
        out: Path | None = None,
        as_json: Json = False,
    ) -> None:
        """The depth-mixing matrix of runs, from their newest checkpoints; without a run, Table 5 of arXiv 2603.15031 by code.

        A rank of one token's matrix says how many vectors a recurrence over depth would have to carry to read as the run does.

        Args:
            runs: Run folders with a checkpoint, or `sotu-1m`, a run that comes with Fathom.
            out: A folder for the figures, as SVG.
        """
        if sequence < 1:
            raise UserError(f"sequence is {sequence}: at least one token must be read")
        figures: dict[str, Any] = {}
        if not runs:
            rows = table_5()
            figures["figure-9"] = figure_9
            if as_json:
                print_json([row._asdict() for row in rows])
            else:
                head = ["method", "weight", "vectors of D", "rank", "semiseparable rank", "update"]
                cells = [
                    [r.method, r.weight, str(r.vectors), str(r.rank), str(r.semiseparable or "-"), r.update]
                    for r in rows
                ]
                print(columns([head, *cells]))
        found: dict[str, dict[str, Any]] = {}
        for folder in runs:
            newest = load_newest(run_folder(folder), sequences=1, device="cpu")
            result = measure(newest.model.double(), newest.arrays[0][0][:1, :sequence])
            mean, last = result.mean(), result.matrix[:-1, :-1, 0, -1, 0]
            found[str(folder)] = {
                "rule": newest.model.config.residual.rule, "matrix": mean.tolist(), "remainder": result.remainder,
                "rank": rank(last), "semiseparable_rank": semiseparable_rank(last, tolerance=1e-6),
                "mean_semiseparable_rank": semiseparable_rank(mean[:-1, :-1], tolerance=1e-6),
            }  # fmt: skip
            name = f"mixing-{folder.resolve().name}"
            if name in figures:
                name += f"-{sum(other.startswith(name) for other in figures) + 1}"
            figures[name] = partial(mixing_figure, mean, folder.resolve().name)
        if as_json and runs:
            print_json(found)
        for name, row in found.items() if not as_json else ():
            print(
                f"{name} ({row['rule']}): L = {len(row['matrix']) - 1}, rank {row['rank']}, semiseparable rank "
                f"{row['semiseparable_rank']} for a token, {row['mean_semiseparable_rank']} for the mean; "
                f"not told by M: {row['remainder']:.1e}"
            )
            print(
                "\n".join("  ".join(f"{v:6.3f}" for v in line[: i + 1]) for i, line in enumerate(row["matrix"])) + "\n"
            )
        if out is not None:
            with writing(out):
                out.mkdir(parents=True, exist_ok=True)
                for name, make in figures.items():
                    (out / f"{name}.svg").write_text(svg(make()), encoding="utf-8")

    return run
