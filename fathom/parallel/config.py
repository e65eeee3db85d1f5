"""How many processes train one network, and how it lies on them."""

from dataclasses import dataclass
from typing import Literal

from fathom.errors import UserError

SCHEDULES = ("1f1b", "gpipe", "looped_bfs")
"""``1f1b`` is interleaved where a rank has several stages; ``gpipe`` has one a rank."""
SPLIT_BACKWARD = ("interleaved_zero_bubble", "zbv", "dualpipev")

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class ParallelConfig:
    """How the network and the batch lie on processes; `torchrun` starts pp x dp x tp of them (docs/parallel.md)."""

    pp: int = 1
    """Ranks of a pipeline, P."""
    virtual: int = 1
    """Stages of a rank, V; several are interleaved."""
    dp: int = 1
    """Parts of the batch, each on other ranks, over which FSDP2 also spreads the parameters."""
    ep: int = 1
    """Of the dp ranks, neighbours that share a layer's experts, each with its part of them; it divides dp."""
    tp: int = 1
    """Ranks that share each sublayer by heads and MLP columns, and the stream by tokens."""
    cache: bool = True
    """Keep sources on the pipeline ranks that have seen them, so that a hop carries the others only."""
    schedule: str = "1f1b"
    """Of the pipeline: 1f1b, looped_bfs, or gpipe with one stage a rank."""
    recompute: Recompute = "none"
    """Activations computed again in the backward pass: none, selective (all but matrix products and attention), full."""

    def __post_init__(self) -> None:
        for name, count in (
            ("pp", self.pp),
            ("virtual", self.virtual),
            ("dp", self.dp),
            ("ep", self.ep),
            ("tp", self.tp),
        ):
            if count < 1:
                raise UserError(f"parallel.{name} is {count}: it must be at least 1")
        if self.dp % self.ep:
            raise UserError(f"parallel.ep is {self.ep}: it must divide parallel.dp, {self.dp}, whose ranks it is of")
        if self.virtual > 1 and self.pp == 1:
            raise UserError(f"parallel.virtual is {self.virtual}, but parallel.pp is 1: several stages need a pipeline")
        check_schedule(self.schedule, self.virtual)

    @property
    def size(self) -> int:
        """How many processes there are."""
        return self.pp * self.dp * self.tp


@dataclass(frozen=True)
class Counts:
    """Other counts than a run began with, to go on with it."""

    pp: int | None = None
    """Ranks of a pipeline; as before if not given. The others likewise."""
    virtual: int | None = None
    """Stages of a rank."""
    dp: int | None = None
    """Parts of the batch."""
    ep: int | None = None
    """Of those, neighbours that share a layer's experts."""
    tp: int | None = None
    """Ranks that share each sublayer."""


def check_schedule(schedule: str, num_virtual: int) -> None:
    """``UserError`` with the reason if sources cannot be cached under ``schedule``, or V does not fit it."""
    if schedule in SPLIT_BACKWARD:
        raise UserError(
            f"schedule {schedule} cannot be cached: it puts off the weights' half of a backward pass, and its first half asks "
            "for gradients of a stage's own inputs only, so those of cached sources would be lost; use 1f1b or looped_bfs"
        )
    if schedule not in SCHEDULES:
        raise UserError(f"schedule is {schedule!r}: it must be one of {', '.join(SCHEDULES)}")
    if schedule == "gpipe" and num_virtual > 1:
        raise UserError(f"schedule gpipe runs one stage a rank, but virtual is {num_virtual}; use 1f1b or looped_bfs")


def check_micro_batches(count: int, schedule: str, num_ranks: int, num_virtual: int) -> None:
    """``UserError`` if ``count`` micro-batches a step do not fit the schedule of P ranks with V stages each."""
    if count < 1 or (schedule == "1f1b" and num_virtual == 1 and count < num_ranks):
        raise UserError(
            f"{count} micro-batches a step are too few for 1F1B on {num_ranks} ranks: give that many at least"
        )
    rounds = max(1, count // num_ranks)
    if schedule == "1f1b" and num_virtual > 1 and count % rounds:
        raise UserError(
            f"{count} micro-batches a step do not fit interleaved 1F1B on {num_ranks} ranks: give a multiple of {num_ranks}"
        )
