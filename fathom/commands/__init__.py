"""What each command of `fathom` does: a signature is its flags, a docstring its help (parsed by tyro, see fathom/cli.py).

A command is made when it is chosen, so that a light one imports nothing heavy. Results go to standard output, for
people or, with `--json`, as one JSON value; all else goes to standard error.
"""

from collections.abc import Callable

from fathom.commands import (
    ask,
    data,
    evidence,
    grow,
    hf,
    instrument,
    lab,
    log,
    measure,
    mixing,
    probe,
    runs,
    sample,
    sweep,
)
from fathom.commands.output import Function
from fathom.commands.sizes import sizes

COMMANDS: dict[str, Callable[[], Function]] = {
    "quickstart": runs.quickstart,
    "data prepare": data.prepare,
    "data pack": data.pack,
    "data unpack": data.unpack,
    "data sample": data.sample,
    "train": runs.train_resume,
    "sample": sample.sample,
    "report": runs.report,
    "residuals": measure.residuals,
    "sizes": sizes,
    "bench": measure.bench,
    "sweep": sweep.sweep,
    "export": hf.export,
    "convert": hf.convert,
    "finetune": hf.finetune,
    "eval": hf.evaluate,
    "lab scaling": lab.scaling,
    "lab ablations": lab.ablations,
    "lab depth-width": lab.depth_width,
    "lab dynamics": lab.dynamics,
    "lab pruning": lab.pruning,
    "lab evidence": evidence.evidence,
    "lab mixing": mixing.mixing,
    "probe train": probe.train,
    "probe test": probe.test,
    "ask prob": ask.prob,
    "ask interval": ask.interval,
    "ask theories": ask.theories,
    "ask predict": ask.predict,
    "ask next": ask.next_run,
    "ask guard": ask.guard,
    "ask why": ask.why,
    "ask score": ask.score,
    "ask serve": instrument.serve,
    "ask mcp": instrument.mcp,
    "ask key": instrument.key,
    "world lint": ask.lint,
    "world grow": grow.grow,
    "world freeze": ask.freeze,
    "log verify": log.verify,
    "log checkpoint": log.checkpoint,
    "log prove": log.prove,
    "log key": log.key,
    "log release": log.release,
}
"""Makes the function of each command of `fathom.cli.COMMANDS`; `train` with a recipe is `runs.train`."""
