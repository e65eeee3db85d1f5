"""`fathom quickstart`, `train` and `report`: what makes a run folder and what reads one."""

import contextlib
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from fathom.commands.output import Function, Json, enough_memory, first_process, print_json, tell
from fathom.errors import UserError


def quickstart() -> Function:
    from fathom.quickstart import QuickstartOptions
    from fathom.quickstart import quickstart as run_quickstart

    def run(options: Annotated[QuickstartOptions, arg(name="")], as_json: Json = False) -> int | None:
        """Train a small AttnRes decoder and its PreNorm twin on the text inside the package, and compare them."""
        # What it tells as it goes is for people: with --json, standard output is for the result alone.
        with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
            result = _finish("quickstart", lambda: run_quickstart(options))
        if isinstance(result, int):
            return result
        if as_json:
            print_json(result)
        return None

    return run


def train(recipe: str) -> Function:
    """The command `fathom train RECIPE`."""
    from fathom.train import loop
    from fathom.train.config import RunConfig
    from fathom.train.recipes import RECIPES

    default = RECIPES[recipe]()

    out_help = "The run folder to make; runs/<recipe>-<rule>-<seed> if not given."

    def run(
        out: Annotated[Path | None, arg(help=out_help)] = None,
        as_json: Json = False,
        config: Annotated[RunConfig, arg(name="")] = default,
    ) -> int | None:
        folder = out or Path("runs") / f"{recipe}-{config.model.residual.rule}-{config.seed}"
        return _train(folder, lambda: loop.train(config, folder), as_json)

    run.__doc__ = RECIPES[recipe].__doc__
    return run


def train_resume() -> Function:
    from dataclasses import replace

    from fathom.parallel.config import Counts
    from fathom.train import loop
    from fathom.train.config import load_config
    from fathom.train.recipes import RECIPES

    resume_help = "The run folder to continue from its newest checkpoint, with its own settings."

    as_before = Counts()

    def run(
        resume: Annotated[Path, arg(help=resume_help)], as_json: Json = False, parallel: Counts = as_before
    ) -> int | None:
        def go_on() -> dict[str, Any]:
            own = load_config(resume / "config.json").parallel
            given = {name: count for name, count in vars(parallel).items() if count is not None}
            return loop.resume(resume, replace(own, **given))

        return _train(resume, go_on, as_json)

    recipes = "\n\n".join(f"{name}: {recipe.__doc__}" for name, recipe in RECIPES.items())
    usage = "Train with `fathom train RECIPE` (`fathom train RECIPE --help` lists its flags), or resume a run. Recipes:"
    run.__doc__ = f"{usage}\n\n{recipes}"
    return run


def _finish(name: str, train: Callable[[], dict[str, Any]], *, resume: str = "") -> dict[str, Any] | int:
    """The summary of a training, or the exit code of one that ended early, after a line on standard error."""
    from fathom.train.loop import Diverged, Interrupted

    try:
        with enough_memory("give a smaller --data.micro-batch, --model.dim or --model.context"):
            return train()
    except Interrupted as stop:
        tell(f"fathom {name}: {stop}{resume}")
        return 130
    except Diverged as error:
        tell(f"fathom {name}: {error}")
        return 1


def _train(run: Path, train: Callable[[], dict[str, Any]], as_json: bool) -> int | None:
    folder = shlex.quote(str(run))
    summary = _finish("train", train, resume=f"; go on with `fathom train --resume {folder}`")
    if isinstance(summary, int):
        return summary
    if not first_process():
        return None
    if as_json:
        print_json({"run": str(run), **summary})
        return None
    print(
        f"{summary['rule']}: validation loss {summary['val_loss']:.4f} nats per token after {summary['steps']:,} steps "
        f"({summary['tokens']:,} tokens, {summary['parameters']:,} parameters) in {run}"
    )
    print(f"fathom sample {folder} --prompt 'The '")
    return None


def report() -> Function:
    from fathom.lab.report import write_report
    from fathom.lab.report_measure import measure
    from fathom.lab.report_sweep import read_given
    from fathom.train.released import run_folder

    def run(
        runs: Positional[tuple[Path, ...]],
        out: Path = Path("report.html"),
        figures: Path | None = None,
        as_json: Json = False,
    ) -> None:
        """Compare runs, or the runs of sweeps, in one interactive HTML page that needs no network.

        What each layer and token reads is first measured on the newest checkpoint of a run, where that has not been done.

        Args:
            runs: Run folders and sweeps, or `debian-5m` or `sotu-1m`, the runs that come with Fathom.
            out: The page to write.
            figures: A folder for the paper's figures of these runs, as SVG and PNG.
        """
        if not runs:
            raise UserError("give at least one run folder")
        runs = tuple(map(run_folder, runs))
        for folder in read_given(list(runs)).measured:
            try:
                measure(folder)
            except UserError as error:  # the page shows the rest of the run
                print(f"fathom report: {folder} goes without depth maps: {error}", file=sys.stderr)
        page = write_report(list(runs), out)
        drawn: list[Path] = []
        if figures is not None:
            from fathom.lab.figures_paper import write_figures

            drawn = write_figures(list(runs), figures)
        if as_json:
            print_json({"report": str(page)} | ({"figures": [str(path) for path in drawn]} if drawn else {}))
        else:
            print("\n".join(map(str, [page, *drawn])))

    return run
