"""One run of a sweep in a process of its own: ``python -m fathom.lab.sweep_run FOLDER NAME``.

The run starts, or goes on from its newest checkpoint. It dies with the sweep that started it, whose end closes standard input.

    exit code 0     done
    exit code 1     diverged: said in runs/NAME/diverged.json
    exit code 2     a mistake that the user can mend: one line on standard error
    exit code 130   stopped by SIGTERM, after a checkpoint
"""

import json
import os
import signal
import sys
import threading
from dataclasses import replace
from pathlib import Path

from fathom.errors import UserError
from fathom.lab.plan import read_sweep
from fathom.train.config import load_config
from fathom.train.loop import Diverged, Interrupted, train


def _die_with_parent() -> None:
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGKILL)


def execute(folder: Path, name: str) -> int:
    """Start or continue run ``name`` of the sweep in ``folder``; returns the exit code."""
    sweep = read_sweep(folder)
    planned = next(run for run in sweep.runs if run.name == name)
    run = sweep.run_folder(planned)
    started = (run / "config.json").is_file()
    if started:
        found = load_config(run / "config.json")
        same = replace(found, model=replace(found.model, vocab_size=planned.config.model.vocab_size))
        if same != planned.config:
            raise UserError(f"{run} has other settings than {folder / 'sweep.json'}; delete it to run it anew")
    (run / "diverged.json").unlink(missing_ok=True)  # a damaged one: a run that diverged is not taken up again
    try:
        train(planned.config, run, resume=started)
    except Diverged as error:
        (run / "diverged.json").write_text(json.dumps({"message": str(error)}) + "\n")
        print(error, file=sys.stderr)
        return 1
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    return 0


def main() -> int:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        return execute(Path(sys.argv[1]), sys.argv[2])
    except UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
