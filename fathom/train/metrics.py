"""Where a run's numbers go: ``metrics.jsonl``, an optional second sink, and one progress line on a terminal."""

import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from fathom.errors import UserError
from fathom.train.config import RunConfig, to_dict

_KEYS = {"train": {"step", "loss", "tokens", "step_seconds", "tokens_per_second"}, "val": {"step", "loss"},
         "dynamics": {"step", "layers", "sites"}}  # fmt: skip
"""What a line of each kind holds at least."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A disk that is full or read-only, while ``path`` is written, is a ``UserError`` that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror}") from None


class Metrics:
    """Appends one JSON object a line; each has ``kind`` (train, val, dynamics) and ``step``. Losses are in nats per token."""

    def __init__(self, run: Path, config: RunConfig, *, keep_until: int, writes: bool = True) -> None:
        """Lines of steps after ``keep_until`` belong to a part of the run that will be run again, and are dropped.

        Without ``writes``, nothing is written: several processes know the metrics, and one writes them.
        """
        self.path = run / "metrics.jsonl"
        kept = [row for row in _rows(self.path) if row["step"] <= keep_until]
        self.validation_loss: float = next((row["loss"] for row in reversed(kept) if row["kind"] == "val"), math.nan)
        """Of the newest validation that was kept."""
        steps = [row for row in kept if row["kind"] == "train"]
        self.rates: list[float] = [row["tokens_per_second"] for row in steps]
        """Tokens per second of every step that was kept."""
        self.seconds: float = sum(row["step_seconds"] for row in steps)
        """That all of these took."""
        self.file: TextIO | None = None
        self.sink: _TensorBoard | _Trackio | None = None
        if not writes:
            return
        with writing(self.path):
            temporary = self.path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
            temporary.replace(self.path)
        self.sink = _sink(run, config, keep_until)
        with writing(self.path):
            self.file = self.path.open("a")

    def write(self, kind: str, step: int, **values: Any) -> None:
        if self.file is None:
            return
        with writing(self.path):
            self.file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self.file.flush()
        if self.sink is not None:
            self.sink.log(kind, step, {k: v for k, v in values.items() if isinstance(v, int | float)})

    def close(self) -> None:
        if self.file is not None:
            with suppress(OSError):  # of a line that `write` has already reported
                self.file.close()
        if self.sink is not None:
            self.sink.close()


def _rows(path: Path) -> list[dict[str, Any]]:
    """Every complete line; a killed run may leave half of one at the end."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(keepends=True), 1):
        if line.endswith("\n"):
            try:
                row = json.loads(line)
                if not _KEYS[row["kind"]] <= row.keys():
                    raise KeyError
            except json.JSONDecodeError as error:
                raise UserError(f"{path}, line {number} is not valid JSON: {error.msg}") from None
            except (KeyError, TypeError, AttributeError, ValueError):
                raise UserError(f"{path}, line {number} is not a metric line") from None
            rows.append(row)
    return rows


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """All metric lines of a run folder; ``UserError`` if there are none or one is damaged."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run} is not a run folder: it has no metrics.jsonl")
    return _rows(path)


class _TensorBoard:
    def __init__(self, run: Path, keep_until: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run / "tensorboard", purge_step=keep_until + 1)

    def log(self, kind: str, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        self.writer.close()


class _Trackio:
    def __init__(self, run: Path, config: RunConfig) -> None:
        import trackio

        self.trackio = trackio
        trackio.init(project="fathom", name=run.name, config=to_dict(config), embed=False)

    def log(self, kind: str, step: int, values: dict[str, float]) -> None:
        self.trackio.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self.trackio.finish()


def _sink(run: Path, config: RunConfig, keep_until: int) -> _TensorBoard | _Trackio | None:
    if config.track == "none":
        return None
    try:
        return _TensorBoard(run, keep_until) if config.track == "tensorboard" else _Trackio(run, config)
    except ImportError:
        raise UserError(f"--track {config.track} needs an extra: pip install 'fathom-attnres[track]'") from None


class ProgressLine:
    """One line that rewrites itself; silent where the stream is not a terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.shown = self.stream.isatty()
        self.last = 0.0

    def show(self, text: str, *, force: bool = False) -> None:
        now = time.monotonic()
        if self.shown and (force or now - self.last > 0.1):
            self.last = now
            width = shutil.get_terminal_size().columns - 1
            self.stream.write("\r\x1b[K" + text[:width])
            self.stream.flush()

    def clear(self) -> None:
        if self.shown:
            self.stream.write("\r\x1b[K")
            self.stream.flush()


def duration(seconds: float) -> str:
    """``75`` as ``1:15``, ``4000`` as ``1:06:40``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
