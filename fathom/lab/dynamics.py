"""Training dynamics read and summarised: ``depth.json`` of a checkpoint, and the records of a run (fathom/train/dynamics.py).

growth     exponent g of the output magnitude's rise with depth, m_l ~ l^g, from the mean of the first quarter of the decoder
           layers to that of the last; a sum of independent outputs of one size grows with g = 1/2, so "growing" is
           g >= 1/2 and "bounded" is less
sinks      sources whose mean lift is at least 2: over the reads in which it is not the newest source, a source's weight
           times the number of sources, which is 1 where every source has the same weight (the embedding is left out)
"""

import itertools
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fathom.errors import UserError
from fathom.models.kimi_linear import build
from fathom.models.transformer import Transformer
from fathom.train import checkpoint
from fathom.train.checkpoint import Progress
from fathom.train.config import load_config, read_object
from fathom.train.data import Batches, TokenShards
from fathom.train.dynamics import measure_depth
from fathom.train.environment import pick_device
from fathom.train.loop import data_folder
from fathom.train.metrics import read_metrics, writing

GROWING = 0.5
SINK_LIFT = 2.0


@dataclass(frozen=True)
class Newest:
    """The newest checkpoint of a run, loaded, and its first validation sequences."""

    model: Transformer
    progress: Progress
    arrays: list[tuple[Tensor, Tensor]]
    """(tokens, next tokens), each [<= 4, T], on the model's device."""


def load_newest(run: Path, *, sequences: int, device: str) -> Newest:
    """Load what an instrument measures on.

    Raises:
        UserError: not a run folder, no whole checkpoint, or data that is gone or has changed.
    """
    if sequences < 1:
        raise UserError(f"sequences is {sequences}: it must be at least 1")
    for file in ("config.json", "data.json"):
        if not (run / file).is_file():
            raise UserError(f"{run} is not a run folder: it has no {file}")
    config, place = load_config(run / "config.json"), pick_device(device)
    found = checkpoint.checkpoints(run)
    if not found:
        raise UserError(f"{run} has no checkpoint to measure; let it train until it writes one")
    progress = checkpoint.read_progress(found[-1])
    folder = data_folder(config)
    shards = TokenShards(folder, "val")
    if read_object(run / "data.json").get("corpus_hash") != shards.corpus_hash:
        raise UserError(f"{folder} holds another corpus than the one {run} was trained on; give the original data")
    model = build(config.model, end_of_text=progress.end_of_text)
    checkpoint.load_model(found[-1], model)
    model.to(place)
    held_out = Batches(shards, config.model.context, 0, shuffle=False)
    count = min(sequences, held_out.num_sequences)
    arrays = (held_out.get(first, min(4, count - first)) for first in range(0, count, 4))
    return Newest(model, progress, [(torch.from_numpy(x).to(place), torch.from_numpy(y).to(place)) for x, y in arrays])


def write_json(path: Path, value: dict[str, Any]) -> Path:
    """Write ``value`` to ``path``, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    with writing(path):
        temporary.write_text(json.dumps(value, indent=2) + "\n")
        temporary.replace(path)
    return path


def write_depth(run: Path, *, sequences: int = 32, device: str = "auto") -> Path:
    """Measure the newest checkpoint of ``run`` on its first validation sequences; write and return ``run/depth.json``.

    Args:
        run: a run folder; its data must still be where its config says.
        sequences: how many validation sequences, at most; fewer if the split is shorter.
        device: cpu, cuda or auto.

    Raises:
        UserError: as ``load_newest``.
    """
    found = load_newest(run, sequences=sequences, device=device)
    depth = {"step": found.progress.step, **measure_depth(found.model, found.arrays)}
    return write_json(run / "depth.json", depth)


def growth(magnitudes: list[float]) -> float:
    """The exponent g of ``magnitudes`` ~ l^g over decoder layers l = 1, 2 ... (see the top); 0 for a single layer."""
    count = len(magnitudes)
    if count < 2:
        return 0.0
    quarter = -(-count // 4)
    first, last = statistics.mean(magnitudes[:quarter]), statistics.mean(magnitudes[-quarter:])
    depths = (quarter + 1) / 2, count - (quarter - 1) / 2
    return math.log(max(last, 1e-30) / max(first, 1e-30)) / math.log(depths[1] / depths[0])


def sinks(weights: list[list[float]]) -> dict[int, float]:
    """The sinks among sources by their number, with their lift; ``weights`` are each site's, oldest source first."""
    lifts: dict[int, list[float]] = {}
    for site in weights:
        for source, weight in enumerate(site[1:-1], 1):
            lifts.setdefault(source, []).append(weight * len(site))
    means = {source: statistics.mean(values) for source, values in sorted(lifts.items())}
    return {source: lift for source, lift in means.items() if lift >= SINK_LIFT}


@dataclass(frozen=True)
class Record:
    """One record of a run's dynamics, summarised over its decoder layers and sites."""

    step: int
    growth: float
    """Of the output magnitude, see the top of this file."""
    largest_output: float
    gradient_ratio: float
    """Largest gradient magnitude of a layer over the smallest."""
    update_to_weight: float
    """Median over layers."""
    effective_share: float | None
    """Mean over sites of effective sources over sources; None for a rule that does not attend, as all below."""
    embedding: float | None
    """Mean weight on the embedding, over the sites that have other sources."""
    last: float | None
    """Mean weight on the newest source, over the same sites."""
    sinks: dict[int, float] | None

    @property
    def verdict(self) -> Literal["growing", "bounded"]:
        return "growing" if self.growth >= GROWING else "bounded"


def _record(row: dict[str, Any]) -> Record:
    outputs, gradients, updates = (
        [layer[key] for layer in row["layers"]]
        for key in ("output_magnitude", "gradient_magnitude", "update_to_weight")
    )
    sites = [site for site in row["sites"] if len(site["weights"]) > 1]

    def mean(values: Iterator[float]) -> float | None:
        return statistics.mean(values) if sites else None

    smallest = min(gradients)
    return Record(
        step=row["step"],
        growth=growth(outputs),
        largest_output=max(outputs),
        gradient_ratio=max(gradients) / smallest if smallest > 0 else math.inf,
        update_to_weight=statistics.median(updates),
        effective_share=mean(site["effective_sources"] / len(site["weights"]) for site in sites),
        embedding=mean(site["weights"][0] for site in sites),
        last=mean(site["weights"][-1] for site in sites),
        sinks=sinks([site["weights"] for site in row["sites"]]) if sites else None,
    )


def records(run: Path) -> tuple[list[Record], float]:
    """A run's records and what recording took, as a share of the time of its training steps.

    Raises:
        UserError: the run has recorded no dynamics.
    """
    rows = read_metrics(run)
    seen = [row for row in rows if row["kind"] == "dynamics"]
    if not seen:
        raise UserError(f"{run} has no record of dynamics; train it with --dynamics-every 50")
    steps = [row for row in rows if row["kind"] == "train"]
    spent = itertools.accumulate(row["step_seconds"] for row in steps)
    total = list(spent)[-1]
    return [_record(row) for row in seen], sum(row["seconds"] for row in seen) / total
