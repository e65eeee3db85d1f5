"""The training loop: a ``Trainer`` that takes one step at a time, and ``train``, which drives it to the end.

A run folder describes itself:

    config.json      the RunConfig; loads back and resumes
    env.json         versions, machine, git state
    data.json        the corpus: its folder, the hashes of its text and of its tokens, end of text
    metrics.jsonl    a line a step (train), a line a validation (val), a line a record of dynamics (dynamics)
    dynamics.json    what a line of dynamics holds, if any are asked for
    tokenizer.json   so that the run can be sampled from
    checkpoints/     see checkpoint.py
    summary.json     written at the end: final losses, parameters, tokens, seconds of training steps
"""

import fcntl
import hashlib
import json
import math
import os
import shutil
import signal
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from fathom.errors import UserError
from fathom.models.accounting import assert_parameters, flops_per_token
from fathom.models.kimi_linear import build
from fathom.parallel.config import ParallelConfig
from fathom.parallel.ranks import Ranks
from fathom.train import checkpoint
from fathom.train.checkpoint import Progress
from fathom.train.config import RunConfig, load_config, read_object, save_config
from fathom.train.data import SPLITS, Batches, Manifest, TokenShards
from fathom.train.dynamics import DEFINITIONS, Recorder
from fathom.train.embedded import embedded
from fathom.train.environment import environment, peak_flops, pick_device
from fathom.train.metrics import Metrics, ProgressLine, duration, writing
from fathom.train.network import make_network
from fathom.train.optimizers import lr_share, set_lr


class Diverged(RuntimeError):
    """A loss, gradient or parameter is not finite. The message names the step, its batch and the last good checkpoint."""


class Interrupted(Exception):
    """Training was stopped by the user after a checkpoint was written."""


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did; tensors stay on the device until somebody asks."""

    loss: Tensor
    """Mean training loss of the step's batch, nats per token."""
    grad_norm: Tensor
    """Global gradient norm before clipping."""
    lr: float
    """AdamW's rate."""
    expert_load: Tensor | None
    """Of every layer with experts, the largest load over the mean; None without experts."""


def data_folder(config: RunConfig) -> Path:
    return embedded() if config.data.folder == "embedded" else Path(config.data.folder)


def tokens_hash(manifest: Manifest) -> str:
    """Identity of the very tokens that a run sees; ``corpus_hash`` is that of the text, whatever the tokenizer and splits."""
    parts = [manifest.tokenizer_sha256, *(f"{split} {s.sha256}" for split in SPLITS for s in manifest.splits[split])]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class Trainer:
    """A run: model, optimizers, data and folder. ``step`` advances it; ``record``, ``save`` and ``close`` are the caller's.

    With ``resume`` the newest checkpoint of ``run`` is loaded; without, ``run`` must not exist yet. Raises ``UserError``
    for a folder in use, a damaged checkpoint, or data that does not fit. Where ``ranks`` are several processes, each has a
    Trainer and makes the same calls; the first one writes the folder.
    """

    def __init__(self, config: RunConfig, run: Path, *, resume: bool = False, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks(config.parallel, pick_device(config.device))
        self.run, self.device = run, self.ranks.device
        folder = self.ranks.once(lambda: data_folder(config))
        shards = TokenShards(folder, "train")
        validation = TokenShards(folder, "val", verify=True)
        # The data decides the vocabulary, so that a recipe fits any corpus.
        self.config = config = replace(config, model=replace(config.model, vocab_size=shards.vocab_size))
        self.batches = Batches(shards, config.model.context, config.seed)
        held_out = Batches(validation, config.model.context, 0, shuffle=False)
        if config.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS sums in one order only with this
        torch.use_deterministic_algorithms(config.deterministic)
        self.model = build(config.model, seed=config.seed, end_of_text=shards.eos_id)
        self.num_parameters = assert_parameters(self.model)
        self.network = make_network(self.model, config, self.ranks)
        self.optimizers = self.network.optimizers
        self.progress = Progress(step=0, consumed=0, end_of_text=shards.eos_id)

        self.lock: TextIO | None = None
        try:
            self.ranks.once(lambda: self._open(folder, shards, resume=resume))
            if resume and (found := self.ranks.once(lambda: checkpoint.newest(run))):
                self.progress = found[1]
                self.network.load(found[0])
            self.metrics = Metrics(run, config, keep_until=self.progress.step, writes=self.ranks.first)
        except BaseException:
            self._unlock()
            raise
        count = min(config.eval_sequences, held_out.num_sequences)
        self.validation = [self._tensors(held_out, first, min(8, count - first)) for first in range(0, count, 8)]
        self.tokens_per_step = config.data.batch * config.model.context
        self.flops_per_token = 3 * sum(flops_per_token(config.model, config.model.context).values())
        peak = peak_flops(self.device)
        self.peak = None if peak is None else peak * self.ranks.size
        self.rates, self.seconds = self.metrics.rates, self.metrics.seconds
        self.validation_loss = self.metrics.validation_loss

    def _open(self, folder: Path, shards: TokenShards, *, resume: bool) -> None:
        """Lock the run folder, and fill a new one."""
        run, identity = self.run, tokens_hash(shards.manifest)
        self.lock = _claim(run, resume=resume)
        if not resume:
            data = {"folder": self.config.data.folder, "corpus_hash": shards.corpus_hash, "tokens_hash": identity,
                    "end_of_text": shards.eos_id, "bytes_per_token": shards.bytes_per_token}  # fmt: skip
            with writing(run):
                (run / "env.json").write_text(json.dumps(environment(self.device), indent=2) + "\n")
                (run / "data.json").write_text(json.dumps(data, indent=2) + "\n")
                shutil.copy(folder / "tokenizer.json", run / "tokenizer.json")
                # Last, because a run folder is one that has a config.json: a killed start can be told from a run.
                save_config(self.config, run / "config.json")
        if read_object(run / "data.json").get("tokens_hash") != identity:
            raise UserError(f"{folder} holds other tokens than {run} was trained on; give the original data")

    def _tensors(self, batches: Batches, first: int, count: int) -> tuple[Tensor, Tensor]:
        inputs, targets = batches.get(first, count)
        return torch.from_numpy(inputs).to(self.device), torch.from_numpy(targets).to(self.device)

    def step(self) -> StepResult:
        """One optimizer step on the next ``data.batch`` sequences of the order."""
        share = lr_share(self.config.optim, self.progress.step, self.config.steps)
        set_lr(self.optimizers, share)
        losses = []
        pieces = self.network.pieces(self.progress.consumed)
        for piece in pieces:
            inputs, targets = self._tensors(self.batches, piece.start, len(piece))
            losses.append(self.network.backward(inputs, targets, 1 / len(pieces)))
        grad_norm = self.network.clip()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.progress = replace(
            self.progress, step=self.progress.step + 1, consumed=self.progress.consumed + self.config.data.batch
        )
        return StepResult(self.network.total(losses), grad_norm, self.config.optim.lr * share, self.network.balance())

    def record(self, results: list[tuple[int, StepResult]], seconds: float) -> None:
        """Write the metrics of steps that took ``seconds`` each; ``Diverged`` at the first that is not finite."""
        rate = self.tokens_per_step / seconds
        for step, result in results:
            loss, grad_norm = result.loss.item(), result.grad_norm.item()
            self._require_finite("the loss", loss, step)
            self._require_finite("the gradient norm", grad_norm, step)
            self.rates.append(rate)
            self.seconds += seconds
            load = {} if result.expert_load is None else {"expert_load": result.expert_load.mean().item()}
            self.metrics.write(
                "train", step, loss=loss, grad_norm=grad_norm, lr=result.lr,
                tokens=step * self.tokens_per_step, step_seconds=seconds, tokens_per_second=rate, mfu=self.mfu(rate), **load,
            )  # fmt: skip

    def recorder(self) -> Recorder | None:
        """What records dynamics, on the first validation sequence, if the config asks for it; writes ``dynamics.json``."""
        if not self.config.dynamics_every:
            return None
        about = {"every": self.config.dynamics_every, "tokens": self.config.model.context, "definitions": DEFINITIONS}
        _write_json(self.run / "dynamics.json", about)
        tokens, targets = self.validation[0]
        return Recorder(self.model, tokens[:1], targets[:1], every=self.config.dynamics_every)

    def record_dynamics(self, recorder: Recorder) -> None:
        """Write what ``recorder`` has seen of the last step; ``Diverged`` if a number of it is not finite."""
        seen, step = recorder.after_step(), self.progress.step
        values = [value for layer in seen["layers"] for value in layer.values()]
        self._require_finite("a magnitude of the dynamics", torch.tensor(values), step)
        self.metrics.write("dynamics", step, **seen)

    def mfu(self, rate: float) -> float | None:
        """Model FLOPs utilisation at ``rate`` tokens per second; None where the peak is not known."""
        return None if self.peak is None else self.flops_per_token * rate / self.peak

    def validate(self) -> float:
        """Mean loss on the validation sequences, nats per token; also written to the metrics."""
        losses = [(self.network.loss(inputs, targets), len(inputs)) for inputs, targets in self.validation]
        loss = sum(loss.item() * count for loss, count in losses) / sum(count for _, count in losses)
        step = self.progress.step
        self._require_finite("the validation loss", loss, step)
        self.metrics.write("val", step, loss=loss, tokens=step * self.tokens_per_step)
        self.validation_loss = loss
        return loss

    def summarize(self) -> dict[str, Any]:
        """Write and return ``summary.json``; its rate and seconds are those of all steps, before a resume too."""
        self.network.finish_saving()
        if math.isnan(self.validation_loss):
            self.validate()
        on_gpu = self.device.type == "cuda"
        summary = {
            "rule": self.config.model.residual.rule,
            "steps": self.progress.step,
            "tokens": self.progress.step * self.tokens_per_step,
            "parameters": self.num_parameters,
            "val_loss": self.validation_loss,
            "tokens_per_second": statistics.median(self.rates) if self.rates else None,
            "seconds": self.seconds,
            "peak_gib": torch.cuda.max_memory_allocated(self.device) / 2**30 if on_gpu else None,
        }
        self.ranks.once(lambda: _write_json(self.run / "summary.json", summary))
        return summary

    def save(self) -> Path:
        """Write a checkpoint; ``Diverged`` if a parameter is not finite, as after a huge step from a loss that still was."""
        if broken := self.network.broken():
            self._require_finite(broken, math.nan, self.progress.step)
        return self.network.save(self.run, self.progress)

    def _require_finite(self, what: str, value: float | Tensor, step: int) -> None:
        """``Diverged`` if ``what``, of ``step`` (1-based), is not."""
        if torch.isfinite(torch.as_tensor(value)).all():
            return
        first = (step - 1) * self.config.data.batch
        earlier = checkpoint.checkpoints(self.run)
        good = f"last good checkpoint: {earlier[-1]}" if earlier else "no checkpoint had been written"
        raise Diverged(
            f"{what} of step {step} is not finite (sequences {first} to {first + self.config.data.batch - 1} of the "
            f"order with seed {self.config.seed}); {good}; a lower learning rate is the usual cure"
        )

    def _unlock(self) -> None:
        if self.lock is not None:
            self.lock.close()

    def close(self) -> None:
        self.metrics.close()
        self._unlock()


def _write_json(path: Path, value: Any) -> None:
    with writing(path):
        path.write_text(json.dumps(value, indent=2) + "\n")


START_FILES = {".lock", "env.json", "data.json", "tokenizer.json"}
"""What a run folder may hold before it has a config.json."""


def _claim(run: Path, *, resume: bool) -> TextIO:
    """Make (or, to resume, find) the run folder and lock it for this process."""
    try:
        str(run).encode()
    except UnicodeEncodeError:
        raise UserError(f"run folder {str(run)!r} has a name that is not UTF-8: checkpoints need one that is") from None
    if resume and not (run / "config.json").is_file():
        raise UserError(f"{run} is not a run folder: it has no config.json")
    left = {path.name for path in run.iterdir()} if run.is_dir() else {run.name} if run.exists() else set()
    # A start that failed or was killed before it was a run leaves its lock and perhaps some of the rest.
    if not resume and left and not (".lock" in left and left <= START_FILES):
        if not (run / "config.json").is_file():
            raise UserError(f"{run} exists already and is not a run folder; delete it or give another --out")
        raise UserError(f"{run} exists already; resume it with `fathom train --resume {run}` or give another --out")
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / ".lock").open("a")
    except OSError as error:
        raise UserError(f"run folder {run} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise UserError(f"{run} is in use by another process") from None
    return lock


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Collect the first Ctrl-C or SIGTERM instead of dying of it; a second one is immediate."""
    received: list[int] = []

    def handler(number: int, _: Any) -> None:
        received.append(number)
        for signum, previous in before.items():
            signal.signal(signum, previous)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def train(config: RunConfig, run: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train ``config`` in folder ``run`` to its last step and return the summary that ``summary.json`` holds.

    Raises ``UserError`` for what the user can mend, ``Diverged`` for a loss that is not finite, and ``Interrupted``
    after Ctrl-C or SIGTERM, once the step in progress is done and saved.
    """
    with Ranks(config.parallel, pick_device(config.device)) as ranks:
        ranks.say_on_death(f"; go on with `fathom train --resume {run}`, started alike")
        trainer = Trainer(config, run, resume=resume, ranks=ranks)
        try:
            with stop_on_signal() as stop:
                return _drive(trainer, stop)
        finally:
            trainer.close()


def resume(run: Path, parallel: ParallelConfig | None = None) -> dict[str, Any]:
    """Continue the run in folder ``run`` from its newest checkpoint, with its own config, or on other processes."""
    config = load_config(run / "config.json")
    return train(config if parallel is None else replace(config, parallel=parallel), run, resume=True)


def _drive(trainer: Trainer, stop: list[int]) -> dict[str, Any]:
    config, line = trainer.config, ProgressLine()
    line.shown &= trainer.ranks.first
    pending: list[tuple[int, StepResult]] = []
    begin = mark = time.perf_counter()
    started = trainer.progress.step
    recorder = trainer.recorder()

    def record() -> None:
        """Losses stay on the device until now, so that a GPU is not made to wait at every step."""
        nonlocal mark
        if pending:
            _wait(trainer.device)
            trainer.record(pending, (time.perf_counter() - mark) / len(pending))
            pending.clear()
        mark = time.perf_counter()

    while trainer.progress.step < config.steps:
        observer = recorder if recorder is not None and recorder.due(trainer.progress.step + 1) else None
        if observer is not None:
            observer.before_step()
        result = trainer.step()
        step = trainer.progress.step
        pending.append((step, result))
        last = step == config.steps
        stopping = trainer.ranks.any(bool(stop))
        evaluate = step % config.eval_every == 0 or last
        save = step % config.checkpoint_every == 0 or last or stopping
        # The first step of a process compiles and warms up: it gets a line of its own.
        if len(pending) == config.log_every or step == started + 1 or observer or evaluate or save:
            record()
            left = (config.steps - step) * (time.perf_counter() - begin) / (step - started)
            use = trainer.mfu(trainer.rates[-1])
            share = f"{trainer.rates[-1] / torch.get_num_threads():,.0f}/core" if use is None else f"mfu {use:.1%}"
            held_out = "" if math.isnan(trainer.validation_loss) else f"  val {trainer.validation_loss:.3f}"
            line.show(
                f"{config.model.residual.rule} step {step}/{config.steps}  loss {result.loss.item():.3f}{held_out}  "
                f"{trainer.rates[-1]:,.0f} tokens/s  {share}  {duration(left)} left"
            )
        if observer is not None:
            trainer.record_dynamics(observer)
        if evaluate:
            trainer.validate()
        if save:
            saved = trainer.save()
            if stopping and not last:
                trainer.network.finish_saving()
                line.clear()
                raise Interrupted(f"stopped after step {step}; saved {saved}")
        if observer or evaluate or save:
            mark = time.perf_counter()
    line.clear()
    return trainer.summarize()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
