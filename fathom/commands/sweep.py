"""`fathom sweep`: many runs from one line, or the rest of a sweep that was stopped."""

import inspect
import sys
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from fathom.commands.output import Function, Json, columns, print_json
from fathom.errors import UserError


def sweep() -> Function:
    from fathom.lab.sweeps import SWEEPS

    def run(
        name: Positional[str],
        out: Path | None = None,
        base: str = "quick",
        settings: Annotated[
            tuple[str, ...], arg(name="set", help="Settings of the base run to change: model.dim=32 optim.lr=3e-3 ...")
        ] = (),
        grid: tuple[str, ...] = (),
        seeds: int | None = None,
        arms: tuple[str, ...] = (),
        cases: tuple[str, ...] = (),
        workers: int | None = None,
        threads: int | None = None,
        dry_run: bool = False,
        as_json: Json = False,
    ) -> int | None:
        """Train every run of a sweep, several side by side, or continue one that was stopped.

        The same line again continues; a run that diverged is marked and kept out of every mean. Sweeps:

        SWEEPS

        Args:
            name: A sweep of the list above, or the folder of one to continue.
            out: The sweep's folder; runs/NAME if not given.
            base: The run that all others are made from: a recipe, or the config.json of a run. Its rule is not used.
            grid: Values of a setting, every combination a case of its own: optim.lr=1e-3,2e-3,4e-3.
            seeds: Seeds of each case and arm.
            arms: Only these arms; a residual rule with its settings is one: block:block_size=4.
            cases: Only these cases.
            workers: Runs at a time; by default one a core, or what a GPU's memory holds.
            threads: CPU threads of one run; 1 if not given.
            dry_run: Only list the runs.
        """
        from fathom.lab.plan import make_sweep, outcomes, read_sweep
        from fathom.lab.sweep import run_sweep
        from fathom.lab.sweeps import expand_grid
        from fathom.train.loop import Interrupted

        if name not in SWEEPS and (Path(name) / "sweep.json").is_file():
            given = (out, settings, grid, arms, cases, seeds, threads)
            if any(each not in (None, ()) for each in given) or base != "quick":
                raise UserError(f"{name} has its plan: continue it without other flags than --workers")
            plan = read_sweep(Path(name))
            if dry_run:
                report(plan.folder, outcomes(plan), {}, as_json)
                return None
        else:
            runs = expand_grid(name, base, settings, grid, seeds=seeds, arms=arms, cases=cases)
            if dry_run:
                list_runs(runs, as_json)
                return None
            if threads is not None and threads < 1:
                raise UserError(f"threads is {threads}: it must be at least 1")
            plan = make_sweep(out or Path("runs") / name, name, runs, threads=threads or 1)
        try:
            found, failed = run_sweep(plan, workers=workers)
        except Interrupted as stop:
            print(f"fathom sweep: {stop}", file=sys.stderr)
            return 130
        report(plan.folder, found, failed, as_json)
        return 1 if failed or any(end.state == "diverged" for end in found) else None

    sweeps = "\n\n".join(f"{name}: {recipe.sentence}" for name, recipe in SWEEPS.items())
    run.__doc__ = inspect.cleandoc(run.__doc__ or "").replace("SWEEPS", sweeps)
    return run


def list_runs(runs: list[Any], as_json: bool) -> None:
    """What a sweep would run, and what each run costs."""
    from fathom.lab.plan import training_flops

    if as_json:
        print_json([
            {"run": run.name, "case": run.case, "arm": run.arm, "seed": run.seed, "steps": run.config.steps,
             "tokens": run.tokens, "flops": training_flops(run.config)}
            for run in runs
        ])  # fmt: skip
        return
    rows = [["run", "steps", "tokens", "layers", "width", "heads", "lr", "PFLOPs"]]
    for r in runs:
        m = r.config.model
        cost = f"{training_flops(r.config) / 1e15:.3g}"
        rows.append([r.name, f"{r.config.steps:,}", f"{r.tokens:,}", str(m.num_layers), str(m.dim),
                     str(m.num_heads), f"{r.config.optim.lr:.3g}", cost])  # fmt: skip
    print(columns(rows))


def report(folder: Path, found: list[Any], failed: dict[str, str], as_json: bool) -> None:
    """Every run with its state and loss, and where to go on."""
    states = {end.planned.name: "failed" if end.planned.name in failed else end.state for end in found}
    if as_json:
        print_json([
            {"run": end.planned.name, "case": end.planned.case, "arm": end.planned.arm, "seed": end.planned.seed,
             "state": states[end.planned.name], "step": end.step, "val_loss": end.val_loss,
             "note": failed.get(end.planned.name, end.note)}
            for end in found
        ])  # fmt: skip
        return
    rows = [["run", "state", "step", "val loss"]]
    for end in found:
        loss = "" if end.val_loss is None else f"{end.val_loss:.4f}"
        rows.append([end.planned.name, states[end.planned.name], f"{end.step:,}", loss])
    print(columns(rows))
    for end in found:
        if why := failed.get(end.planned.name, end.note):
            print(f"{end.planned.name} {states[end.planned.name]}: {why}")
    print(f"fathom lab ablations {folder}")
