"""Measures what the report shows of a checkpoint: ``depth.json`` and ``reads.json``, where a run has them not yet."""

from pathlib import Path

from fathom.lab.dynamics import load_newest, write_depth, write_json
from fathom.lab.report_reads import FILE, measure_reads
from fathom.train.checkpoint import checkpoints
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
    """Write what is missing of ``run``, or older than its newest checkpoint; nothing for a run without a checkpoint.

    Raises:
        UserError: as ``write_reads``.
    """
    newest = checkpoints(run)
    for file, write in (("depth.json", write_depth), (FILE, write_reads)):
        path = run / file
        if newest and not (path.is_file() and path.stat().st_mtime >= newest[-1].stat().st_mtime):
            write(run, device=device)
