"""What the tests of training share: a small corpus, small runs on it, and other processes to train in."""

import json
import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from fathom.models.config import ModelConfig, ResidualConfig
from fathom.train.config import DataConfig, OptimConfig, RunConfig
from fathom.train.loop import StepResult, Trainer
from fathom.train.prepare import PrepareOptions, build
from fathom.train.text import Document


def write_corpus(folder: Path, seed: int) -> Path:
    words = random.Random(seed)
    vocabulary = ("to", "fathom", "is", "to", "measure", "the", "depth", "of", "water")
    texts = [" ".join(words.choices(vocabulary, k=200)) for _ in range(20)]
    documents = (Document(text, "here", "val" if i < 2 else "train") for i, text in enumerate(texts))
    build(documents, folder, PrepareOptions(vocab_size=260), name="words", source={"identity": str(seed)})
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "words", 0)


@pytest.fixture(scope="session")
def other_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "other", 1)


Tiny = Callable[..., RunConfig]
Section = dict[str, Any] | None


@pytest.fixture
def tiny(corpus: Path) -> Tiny:
    """A function that makes the config of a run of 12 steps and two layers; keywords change it, by section or at the top."""

    def make(
        rule: str = "block", *, model: Section = None, data: Section = None, optim: Section = None, **run: Any
    ) -> RunConfig:
        residual = ResidualConfig(rule=rule, num_blocks=2 if rule == "block" else None)  # type: ignore[arg-type]
        settings = {"steps": 12, "device": "cpu", "eval_every": 4, "eval_sequences": 3, "checkpoint_every": 4, **run}
        return RunConfig(
            model=ModelConfig(**{"dim": 16, "num_layers": 2, "context": 32, "residual": residual, **(model or {})}),
            data=DataConfig(**{"folder": str(corpus), "batch": 4, "micro_batch": 2, **(data or {})}),
            optim=OptimConfig(**{"warmup": 2, **(optim or {})}),
            **settings,
        )

    return make


AfterStep = Callable[[int, Callable[[Trainer], Any]], None]


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> AfterStep:
    """``after_step(number, act)``: call ``act(trainer)`` right after the real optimizer step ``number``, once."""
    real = Trainer.step
    acts: dict[int, Callable[[Trainer], Any]] = {}

    def step(self: Trainer) -> StepResult:
        result = real(self)
        acts.pop(self.progress.step, lambda _: None)(self)
        return result

    monkeypatch.setattr(Trainer, "step", step)
    return acts.__setitem__


Start = Callable[..., ForkServerProcess]


@pytest.fixture(scope="session")
def processes() -> ForkServerContext:
    """Processes that find torch imported already (torch._dynamo, too, which optimizers import when they are made)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fathom.train.loop", "torch._dynamo"])
    return context


@pytest.fixture
def start(processes: ForkServerContext, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """``start(function, *arguments)`` in a process of its own, which does not outlive the test."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    started = []

    def make(function: Callable[..., Any], *arguments: Any) -> ForkServerProcess:
        process = processes.Process(target=function, args=arguments, daemon=True)
        process.start()
        started.append(process)
        return process

    yield make
    for process in started:
        process.kill()
        process.join()
        process.close()


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.0005)


def numbers(run: Path) -> list[dict[str, Any]]:
    """The metric lines of a run without what a clock measured; each must be JSON of the strict kind."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    rows = [json.loads(line, parse_constant=refuse) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("step_seconds", "tokens_per_second", "mfu")} for row in rows]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
