"""What a run folder tells about its run: metrics, environment, summary, and the sinks beside them."""

import io
import json
import os
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import fathom
from fathom.errors import UserError
from fathom.models.accounting import parameters
from fathom.train import environment as environment_module
from fathom.train.config import load_config
from fathom.train.data import Manifest
from fathom.train.environment import environment, peak_flops, pick_device
from fathom.train.loop import Trainer, resume, train
from fathom.train.metrics import Metrics, ProgressLine, duration, read_metrics
from tests.train.conftest import AfterStep, Tiny, numbers


def test_metric_lines_have_the_documented_keys_and_count_tokens(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(steps=6, log_every=4, optim={"warmup": 3, "lr": 0.5})
    train(config, tmp_path / "run")
    numbers(tmp_path / "run")  # every line is strict JSON
    rows = read_metrics(tmp_path / "run")
    assert [(row["kind"], row["step"]) for row in rows] == [
        *(("train", step) for step in (1, 2, 3, 4)), ("val", 4), ("train", 5), ("train", 6), ("val", 6),
    ]  # fmt: skip
    for row in rows:
        assert row["tokens"] == row["step"] * 4 * 32 and row["loss"] > 0
        if row["kind"] == "train":
            assert row.keys() == {
                "kind", "step", "loss", "grad_norm", "lr", "tokens", "step_seconds", "tokens_per_second", "mfu",
            }  # fmt: skip
            assert row["tokens_per_second"] == pytest.approx(4 * 32 / row["step_seconds"]) and row["mfu"] is None
        else:
            assert row.keys() == {"kind", "step", "loss", "tokens"}
    assert [row["lr"] for row in rows if row["kind"] == "train"][:4] == pytest.approx([0.5 / 3, 1 / 3, 0.5, 0.5])


def test_the_summary_is_that_of_the_run(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = train(tiny(), run)
    assert json.loads((run / "summary.json").read_text()) == summary
    rows = read_metrics(run)
    rates = [row["tokens_per_second"] for row in rows if row["kind"] == "train"]
    seconds = summary.pop("seconds")
    assert 0 < seconds < 60
    assert summary == {
        "rule": "block",
        "steps": 12,
        "tokens": 12 * 4 * 32,
        "parameters": sum(parameters(load_config(run / "config.json").model).values()),
        "val_loss": [row for row in rows if row["kind"] == "val"][-1]["loss"],
        "tokens_per_second": statistics.median(rates),
        "peak_gib": None,
    }


def test_the_summary_covers_what_was_before_a_resume(tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    summary = train(tiny(), run)
    assert resume(run) == summary  # nothing was left to do
    assert summary["seconds"] == pytest.approx(sum(row["step_seconds"] for row in read_metrics(run) if "mfu" in row))


def test_the_run_folder_describes_itself(tiny: Tiny, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = tiny()
    train(config, run)
    saved = load_config(run / "config.json")
    assert saved.model.vocab_size == 260  # the data's
    assert {**vars(saved), "model": None} == {**vars(config), "model": None}
    manifest = Manifest.load(corpus)
    data = json.loads((run / "data.json").read_text())
    assert data.keys() == {"folder", "corpus_hash", "tokens_hash", "end_of_text", "bytes_per_token"}
    assert (data["folder"], data["corpus_hash"], data["end_of_text"]) == (str(corpus), manifest.corpus_hash, 0)
    total = manifest.total("train", "bytes") / manifest.total("train", "tokens")
    assert data["bytes_per_token"] == pytest.approx(total)
    assert (run / "tokenizer.json").read_bytes() == (corpus / "tokenizer.json").read_bytes()


def test_the_environment_names_versions_code_and_backend(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(steps=1), tmp_path / "run")
    found = json.loads((tmp_path / "run" / "env.json").read_text())
    assert found == environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__ and found["python"] == sys.version.split()[0]
    assert found["fathom"] == fathom.__version__ == version("fathom-attnres")
    assert found["backend"] == "reference" and found["cuda"] is None and found["threads"] == torch.get_num_threads()
    root = Path(environment_module.__file__).parent
    head = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert found["git_commit"] == (head.stdout.strip() if head.returncode == 0 else None)
    assert found["git_changed"] in ((True, False) if head.returncode == 0 else (None,))


def test_without_git_the_environment_says_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = environment(torch.device("cpu"))
    assert (found["git_commit"], found["git_changed"]) == (None, None)
    assert found["fathom"] == fathom.__version__


def test_devices() -> None:
    assert pick_device("cpu") == torch.device("cpu") and peak_flops(torch.device("cpu")) is None
    for name, message in (
        ("gpu", "must be auto, cpu or cuda"),
        ("meta", "must be auto, cpu or cuda"),
        ("cuda:99", "sees"),
    ):
        with pytest.raises(UserError, match=f"device is '{name}'.*{message}"):
            pick_device(name)


@pytest.mark.parametrize("end", ['{"kind": "train", "st', "{", "\udcff"])
def test_half_a_line_at_the_end_is_dropped(end: str, tiny: Tiny, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny(), run)
    before = numbers(run)
    with (run / "metrics.jsonl").open("a", errors="surrogateescape") as file:
        file.write(end)
    assert len(read_metrics(run)) == len(before)
    resume(run)
    assert numbers(run) == before


def test_lines_after_the_checkpoint_are_dropped(tiny: Tiny, tmp_path: Path) -> None:
    others = {"tokens": 8, "step_seconds": 0.5, "tokens_per_second": 16}
    metrics = Metrics(tmp_path, tiny(), keep_until=0)
    for step in (1, 2, 3):
        metrics.write("train", step, loss=1 / step, **others)
        metrics.write("val", step, loss=2 / step)
    metrics.close()
    again = Metrics(tmp_path, tiny(), keep_until=2)
    assert again.validation_loss == 1.0
    again.write("train", 3, loss=5, **others)
    again.close()
    assert [(row["kind"], row["step"], row["loss"]) for row in read_metrics(tmp_path)] == [
        ("train", 1, 1), ("val", 1, 2), ("train", 2, 0.5), ("val", 2, 1), ("train", 3, 5),
    ]  # fmt: skip


def test_a_damaged_line_is_named(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "val", "step": 1, "loss": 1}\n{"kind"\n')
    for read in (lambda: read_metrics(tmp_path), lambda: Metrics(tmp_path, tiny(), keep_until=9)):
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is not "):
            read()
    for line in ("[1]", "{}", '{"kind": "train", "step": 1}', '{"kind": ["val"]}', "9" * 5000):
        (tmp_path / "metrics.jsonl").write_text(line + "\n")
        with pytest.raises(UserError, match=r"metrics\.jsonl, line 1 is not a metric line"):
            read_metrics(tmp_path)
    with pytest.raises(UserError, match="it has no metrics"):
        read_metrics(tmp_path / "nowhere")


def test_tensorboard_has_the_same_numbers_also_after_a_resume(
    tiny: Tiny, tmp_path: Path, after_step: AfterStep
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def crash(_: Trainer) -> None:
        raise MemoryError

    run = tmp_path / "run"
    after_step(7, crash)
    with pytest.raises(MemoryError):  # three steps after the checkpoint, which a resume repeats
        train(tiny(track="tensorboard"), run)
    resume(run)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for kind, name in (("train", "loss"), ("train", "lr"), ("val", "loss")):
        rows, found = [row for row in read_metrics(run) if row["kind"] == kind], events.Scalars(f"{kind}/{name}")
        assert [event.step for event in found] == [row["step"] for row in rows]
        assert [event.value for event in found] == pytest.approx([row[name] for row in rows])


def test_trackio_has_the_same_numbers(tiny: Tiny, tmp_path: Path) -> None:
    """In a process of its own, because trackio reads where to write when it is imported, and writes in threads."""
    run = tmp_path / "run"
    train(tiny(), tmp_path / "plain")
    code = (
        "import sys; from pathlib import Path; from fathom.train.config import load_config; "
        "from fathom.train.loop import train; from dataclasses import replace; "
        "train(replace(load_config(Path(sys.argv[1])), track='trackio'), Path(sys.argv[2])); "
        "from trackio.sqlite_storage import SQLiteStorage; import json; "
        "print(json.dumps(SQLiteStorage.get_logs('fathom', 'run')))"
    )
    environ = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "plain" / "config.json"), str(run)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    logs = json.loads(result.stdout.splitlines()[-1])
    losses = [(row["step"], row["train/loss"]) for row in logs if "train/loss" in row]
    assert losses == [(row["step"], row["loss"]) for row in read_metrics(run) if row["kind"] == "train"]


@pytest.mark.parametrize(("sink", "module"), [("tensorboard", "torch.utils.tensorboard"), ("trackio", "trackio")])
def test_a_missing_sink_names_the_extra(
    sink: str, module: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"--track {sink} needs an extra: pip install 'fathom-attnres\[track\]'"):
        train(tiny(track=sink), tmp_path / "run")


def test_the_progress_line_rewrites_itself_on_a_terminal_only() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    silent, terminal = io.StringIO(), Terminal()
    for stream in (silent, terminal):
        line = ProgressLine(stream)
        line.show("one", force=True)
        line.show("x" * 10_000, force=True)
        line.clear()
    assert silent.getvalue() == ""
    assert terminal.getvalue().startswith("\r\x1b[Kone\r\x1b[Kxx") and terminal.getvalue().endswith("x\r\x1b[K")
    assert len(terminal.getvalue()) < 1000 and "\n" not in terminal.getvalue()


def test_durations() -> None:
    assert [duration(s) for s in (0, 75, 59.6, 4000, 86_400)] == ["0:00", "1:15", "1:00", "1:06:40", "24:00:00"]
