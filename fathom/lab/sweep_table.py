"""A sweep as it goes: a live table on a terminal, a line at each start and end elsewhere."""

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table as RichTable

from fathom.lab.plan import Outcome, Planned, Sweep, outcome
from fathom.train.metrics import duration

TAIL_BYTES = 8192


class Active(NamedTuple):
    """A run under way and the ``time.monotonic()`` of its process's start."""

    planned: Planned
    begin: float


def newest(run: Path) -> dict[str, dict[str, Any]]:
    """The newest metric line of each kind near the end of ``metrics.jsonl``, without reading all of it."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    found = {}
    for line in lines:
        try:
            row = json.loads(line)
            found[row["kind"]] = row
        except (ValueError, KeyError, TypeError):
            continue  # the first of the tail is cut
    return found


def _loss(row: dict[str, Any] | None) -> str:
    return f"{row['loss']:.3f}" if row else ""


class Table:
    """Progress of a sweep on standard error; a context manager.

    Time left is by training FLOPs: what is left to do, at the pace since this call began.
    """

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.console = Console(stderr=True, highlight=False)
        self.live = Live(console=self.console, auto_refresh=False, transient=True)
        self.shown = sys.stderr.isatty()
        self.begin = self.last = time.monotonic()
        self.ends: dict[str, Outcome] = {}
        self.seen: set[str] = set()
        for run, flops in zip(sweep.runs, sweep.flops, strict=True):
            self.ends[run.name] = outcome(sweep.run_folder(run), run, flops)
        self.at_begin = self._flops_done([])

    def __enter__(self) -> "Table":
        if self.shown:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.shown:
            self.live.stop()

    def _flops_done(self, active: list[Active]) -> float:
        steps = {name: end.step for name, end in self.ends.items()}
        for run, _ in active:
            steps[run.name] = newest(self.sweep.run_folder(run)).get("train", {}).get("step", 0)
        return sum(
            flops if self.ends[run.name].state in ("done", "diverged") else flops * steps[run.name] / run.config.steps
            for run, flops in zip(self.sweep.runs, self.sweep.flops, strict=True)
        )

    def _time_left(self, active: list[Active]) -> str:
        done, elapsed = self._flops_done(active), time.monotonic() - self.begin
        if done <= self.at_begin:
            return "time left not known yet"
        return f"{duration((sum(self.sweep.flops) - done) * elapsed / (done - self.at_begin))} left"

    def show(self, active: list[Active], failed: dict[str, str]) -> None:
        """Redraw, at most twice a second."""
        for run, _ in active:
            if run.name not in self.seen:
                self.seen.add(run.name)
                self._line(f"{run.name}: starts")
        now = time.monotonic()
        if not self.shown or now - self.last < 0.5:
            return
        self.last = now
        running = {run.name for run, _ in active}
        rows = RichTable(box=None, pad_edge=False)
        for name in ("run", "state", "step", "loss", "val", "tokens/s"):
            rows.add_column(name, justify="left" if name in ("run", "state") else "right")
        height = self.console.size.height - 4
        # What is under way and what went wrong stays in sight in a short window.
        order = sorted(self.sweep.runs, key=lambda run: (run.name not in running, run.name not in failed))
        for run in order[: max(1, height)]:
            end = self.ends[run.name]
            lines = newest(self.sweep.run_folder(run))
            step = lines.get("train", {}).get("step", 0)
            state = "running" if run.name in running else "failed" if run.name in failed else end.state
            rate = f"{lines['train']['tokens_per_second']:,.0f}" if run.name in running and "train" in lines else ""
            rows.add_row(
                run.name, state, f"{step}/{run.config.steps}", _loss(lines.get("train")), _loss(lines.get("val")), rate
            )
        if len(order) > height:
            rows.add_row(f"... {len(order) - height} more", "", "", "", "", "")
        done = sum(end.state == "done" for end in self.ends.values())
        rows.caption = f"{done} of {len(order)} done, {self._time_left(active)}"
        rows.caption_justify = "left"
        self.live.update(rows, refresh=True)

    def ended(self, planned: Planned, why: str | None) -> None:
        """A run's process has ended; ``why`` if it failed."""
        run = self.sweep.run_folder(planned)
        before = self.ends[planned.name]
        end = self.ends[planned.name] = outcome(run, planned, before.flops)
        self.seen.discard(planned.name)
        if why is not None:
            self.note(f"{planned.name}: failed: {why} (log: {self.sweep.log(planned)})")
        elif end.state == "diverged":
            self.note(f"{planned.name}: diverged: {end.note}")
        elif end.val_loss is not None:
            done = sum(e.state in ("done", "diverged") for e in self.ends.values())
            self._line(
                f"{planned.name}: {end.val_loss:.4f} nats per token ({done} of {len(self.ends)}, {self._time_left([])})"
            )

    def _line(self, text: str) -> None:
        """What the table shows on a terminal, as a line elsewhere."""
        if not self.shown:
            print(text, file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        """A line that stays, terminal or not."""
        if self.shown:
            self.live.console.print(text, markup=False)
        else:
            print(text, file=sys.stderr, flush=True)
