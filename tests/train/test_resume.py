"""A resumed run has the bits of an unbroken one, whatever stopped it: a signal, a kill at any moment, a full disk."""

import contextlib
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fathom.errors import UserError
from fathom.train.checkpoint import checkpoints, read_progress
from fathom.train.config import RunConfig, load_config
from fathom.train.loop import Interrupted, Trainer, resume, train
from fathom.train.metrics import read_metrics
from tests.train.conftest import AfterStep, Start, Tiny, files, numbers, wait_until

FATHOM = [sys.executable, "-m", "fathom.cli"]


def press_ctrl_c(_: Trainer) -> None:
    os.kill(os.getpid(), signal.SIGINT)


def assert_same_run(run: Path, unbroken: Path) -> None:
    """The last checkpoints agree in every bit, and the metrics in every number, none twice and none missing."""
    assert files(checkpoints(run)[-1]) == files(checkpoints(unbroken)[-1])
    assert numbers(run) == numbers(unbroken)


@pytest.mark.parametrize("rule", ["prenorm", "block"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_stopped_at_any_step_and_resumed_has_the_bits_of_an_unbroken_one(
    rule: str, optimizer: str, tiny: Tiny, tmp_path: Path, after_step: AfterStep
) -> None:
    config = tiny(rule, optim={"optimizer": optimizer})
    whole = tmp_path / "whole"
    train(config, whole)
    steps = [row["step"] for row in numbers(whole) if row["kind"] == "train"]
    assert steps == list(range(1, 13)) and checkpoints(whole)[-1].name == "step-000012"
    for step in range(1, 12):
        run = tmp_path / f"stopped-{step}"
        after_step(step, press_ctrl_c)
        with pytest.raises(
            Interrupted, match=rf"stopped after step {step}; saved {run}/checkpoints/step-0000{step:02}"
        ):
            train(config, run)
        resume(run)
        assert_same_run(run, whole)


def test_a_run_stopped_after_every_step_has_the_bits_of_an_unbroken_one(
    tiny: Tiny, tmp_path: Path, after_step: AfterStep
) -> None:
    config = tiny(log_every=5)
    train(config, tmp_path / "whole")
    for step in range(1, 12):
        after_step(step, press_ctrl_c)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run")
    for _ in range(10):
        with pytest.raises(Interrupted):
            resume(tmp_path / "run")
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_signal_in_the_last_step_ends_the_run_as_usual(tiny: Tiny, tmp_path: Path, after_step: AfterStep) -> None:
    after_step(12, press_ctrl_c)
    assert train(tiny(), tmp_path / "run")["steps"] == 12


def test_resuming_a_finished_run_changes_nothing_but_its_clock(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = train(tiny(), run)
    before = numbers(run), files(run / "checkpoints")
    again = resume(run)
    assert (numbers(run), files(run / "checkpoints")) == before
    assert again["val_loss"] == summary["val_loss"]


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_from_its_newest_whole_checkpoint(
    tiny: Tiny, tmp_path: Path, start: Start
) -> None:
    config = tiny(steps=60, checkpoint_every=1)
    whole, run = tmp_path / "whole", tmp_path / "run"
    train(config, whole)

    def changed(folder: Path) -> int:
        return folder.stat().st_mtime_ns if folder.exists() else 0

    saving, moment, in_a_save = run / "checkpoints", random.Random(0), 0
    for kill in range(16):
        # Killed in its first moments it is not yet a run, and starts anew.
        process = start(resume, run) if (run / "config.json").exists() else start(train, config, run)
        if kill < 3:
            wait_until(lambda: run.exists() and any(run.iterdir()))
            time.sleep(moment.uniform(0, 0.02))
        else:
            before, newest = changed(saving), checkpoints(run)[-1:]
            wait_until(lambda before=before: changed(saving) != before)
            # Mostly while files are being written, which takes a few milliseconds; sometimes in the steps that follow.
            if kill % 4 == 0:
                wait_until(lambda newest=newest: checkpoints(run)[-1:] != newest)
            time.sleep(moment.uniform(0, 0.004 if kill % 4 else 0.02))
        assert process.is_alive()
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        in_a_save += bool(list(saving.glob(".step-*.tmp")))
        for folder in checkpoints(run):
            assert read_progress(folder).step == int(folder.name[5:])
    assert in_a_save > 0, "no kill met a save: the test does not show what it should"
    assert 0 < int(checkpoints(run)[-1].name[5:]) < 60
    resume(run)
    assert_same_run(run, whole)
    assert [path.name for path in sorted(saving.iterdir())] == ["step-000059", "step-000060"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_line_says_how_to_go_on(number: signal.Signals, tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "a run"
    with command_line(tiny(steps=100_000), run) as process:
        wait_until(lambda: (run / "metrics.jsonl").exists() and len(numbers(run)) > 2)
        process.send_signal(number)
        out, error = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    told = re.fullmatch(r"fathom train: stopped after step (\d+); saved (.*); go on with `(.*)`\n", error)
    assert told is not None and shlex.split(told[3]) == ["fathom", "train", "--resume", str(run)]
    assert checkpoints(run)[-1] == Path(told[2]) and read_progress(Path(told[2])).step == int(told[1])
    trainer = Trainer(load_config(run / "config.json"), run, resume=True)
    assert trainer.progress.step == int(told[1]) == numbers(run)[-1]["step"]
    trainer.close()


def test_a_second_ctrl_c_ends_at_once(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # One step of this takes minutes: the first Ctrl-C waits for its end, the second does not.
    with command_line(tiny(data={"batch": 1_000_000, "micro_batch": 1}), run) as process:
        wait_until(lambda: (run / "metrics.jsonl").exists())
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.communicate(timeout=1)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == ("", "fathom: interrupted\n")
    assert process.returncode == 130 and checkpoints(run) == []


@contextlib.contextmanager
def command_line(config: RunConfig, run: Path, *, limit: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """`fathom train` of a tiny config, in a process that may write files of at most ``limit`` bytes and is killed at the end."""
    flags = f"""
        --device cpu --steps {config.steps} --data.folder {config.data.folder} --data.batch {config.data.batch}
        --data.micro-batch {config.data.micro_batch} --model.dim 16 --model.num-layers 2 --model.context 32
        --eval-every 4 --eval-sequences 3 --checkpoint-every {config.checkpoint_every} --optim.warmup 2"""
    arguments = [*FATHOM, "train", "quick", "--out", str(run), *shlex.split(flags)]
    preexec = None if limit is None else lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=preexec,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_a_failing_test_leaves_no_process(tiny: Tiny, tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="as a test does"),
        command_line(tiny(steps=100_000), tmp_path / "run") as process,
    ):
        raise AssertionError("as a test does")
    assert process.returncode == -signal.SIGKILL


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process grows beyond ``size`` bytes: what a full disk is to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_the_run_goes_on_once_there_is_room(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny()
    train(config, tmp_path / "whole")
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()}
    told = set()
    for limit in sorted({0, 10, *sizes.values(), *(size - 1 for size in sizes.values() if size)}):
        run = tmp_path / f"limit-{limit}"
        with file_size_limit(limit):
            try:
                train(config, run)
            except UserError as error:
                assert "\n" not in str(error) and "File too large" in str(error)
                told.add(re.sub(r" .*", "", str(error).replace(str(run), "RUN")))
        assert not list((run / "checkpoints").glob(".*"))
        for folder in checkpoints(run):
            read_progress(folder)
        if (run / "config.json").exists():
            resume(run)
            assert_same_run(run, tmp_path / "whole")
        else:
            train(config, run)
            assert_same_run(run, tmp_path / "whole")
    assert told == {"RUN", "checkpoint"}


def test_half_a_line_of_metrics_is_one_line_and_dropped_by_the_resume(
    tiny: Tiny, tmp_path: Path, after_step: AfterStep
) -> None:
    config, run = tiny(), tmp_path / "run"
    train(config, tmp_path / "whole")
    room = contextlib.ExitStack()
    after_step(6, lambda _: room.enter_context(file_size_limit((run / "metrics.jsonl").stat().st_size + 20)))
    with room, pytest.raises(UserError, match=r"metrics.jsonl could not be written: File too large$"):
        train(config, run)
    assert (run / "metrics.jsonl").read_text().rpartition("\n")[2] == '{"kind": "train", "s'
    assert [row["step"] for row in read_metrics(run) if row["kind"] == "train"] == [1, 2, 3, 4, 5]
    resume(run)
    assert_same_run(run, tmp_path / "whole")


def test_a_full_disk_leaves_the_earlier_checkpoint_good(tiny: Tiny, tmp_path: Path) -> None:
    trainer = Trainer(tiny(), tmp_path / "run")
    trainer.step()
    first = trainer.save()
    before = files(first)
    trainer.step()
    for limit in (1000, (first / "model.safetensors").stat().st_size):
        with (
            file_size_limit(limit),
            pytest.raises(UserError, match=f"step-000002 .*; the last good checkpoint is {first}"),
        ):
            trainer.save()
        assert [path.name for path in first.parent.iterdir()] == [first.name] and files(first) == before
    assert read_progress(trainer.save()).step == 2
    trainer.close()


def test_a_full_disk_is_one_line_of_the_command(tiny: Tiny, tmp_path: Path) -> None:
    with command_line(tiny(), tmp_path / "run", limit=50_000) as process:
        out, error = process.communicate(timeout=60)
    assert (process.returncode, out, error.count("\n")) == (2, "", 1)
    assert error.startswith(f"fathom: checkpoint {tmp_path}/run/checkpoints/step-000004 could not be written")
