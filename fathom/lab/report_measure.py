"""Measures what the report shows of a checkpoint: ``depth.json`` and ``reads.json``, where a run has them not yet."""

from pathlib import Path

from fathom.errors import UserError
from fathom.lab.dynamics import load_newest, write_depth, write_json
from fathom.lab.report_reads import FILE, measure_reads
from fathom.train.checkpoint import checkpoints
from fathom.train.config import read_object
from fathom.train.tokenizer import load_tokenizer


def write_reads(run: Path, *, sentences: int = 4, device: str = "auto") -> Path:
    """Measure the newest checkpoint of ``run``; write and return ``run/reads.json``.

    Raises:
        UserError: no whole checkpoint, or data that is gone or has changed.
    """
    newest = load_newest(run, sequences=sentences, device=device)
    tokenizer, _ = load_tokenizer(run / "tokenizer.json")
    sequences = [row for tokens, _ in newest.arrays for row in tokens]
    return write_json(run / FILE, {"step": newest.progress.step, **measure_reads(newest.model, sequences, tokenizer)})


def measure(run: Path, *, device: str = "auto") -> None:
    """Write what is missing of ``run``, or of an earlier step than its newest checkpoint; nothing for a run without a checkpoint.

    Raises:
        UserError: as ``write_reads``.
    """
    newest = checkpoints(run)
    for file, write in (("depth.json", write_depth), (FILE, write_reads)):
        if newest and _step(run / file) != int(newest[-1].name.removeprefix("step-")):
            write(run, device=device)


def _step(path: Path) -> int | None:
    """The step that ``path`` was measured at; None if it is not there or damaged."""
    if not path.is_file():
        return None
    try:
        step = read_object(path).get("step")
    except UserError:
        return None
    return step if isinstance(step, int) else None
