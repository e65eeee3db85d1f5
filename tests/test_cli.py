"""The command line as its user sees it: results, exit codes, and every mistake in exactly one line."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch
from torch import Tensor

from fathom import cli, commands
from fathom.bench import arms, gate
from fathom.block import BlockAttnRes, BlockState
from fathom.cli import main
from fathom.errors import UserError
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.transformer import Transformer

TINY = shlex.split(
    "--model.dim 16 --model.num-layers 1 --model.context 16 --optim.warmup 2 --data.batch 2 --eval-sequences 2"
)
FATHOM = [sys.executable, "-m", "fathom.cli"]

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset `data`, a finished run `run`, and some things that are neither."""
    place = tmp_path_factory.mktemp("cli")
    text = "\n\n".join(f"Paragraph {i} says that {i * i} is the square of {i}: naïve, and → true." for i in range(600))
    (place / "text.txt").write_text(text)
    options = ["--vocab-size", "300", "--chunk-kib", "1", "--val-fraction", "0.3", "--workers", "1"]
    assert main(["data", "prepare", str(place / "text.txt"), str(place / "data"), *options]) == 0
    assert main(["train", "quick", "--out", str(place / "run"), "--steps", "3", *tiny(place)]) == 0
    (place / "broken").mkdir()
    (place / "broken" / "config.json").write_text("{not json")
    (place / "strange").mkdir()
    (place / "strange" / "config.json").write_text('{"optim": {"lr": "fast"}}')
    (place / "binary").mkdir()
    (place / "binary" / "config.json").write_bytes(b"\xff\xfe\x00")
    return place


def tiny(place: Path) -> list[str]:
    return ["--data.folder", str(place / "data"), *TINY]


MISTAKES = """
nonsense
trian quick
--verbose
""
'üñí çödé'
data
data prep
data prepare
data prepare text.txt
data prepare nowhere out
data prepare text.txt out --vocab-size 12
data prepare text.txt out --vocab-size many
data prepare text.txt out --val-fraction 2
data prepare text.txt data
data pack nowhere out.fathom
data unpack text.txt out
data unpack nowhere out
data sample text.txt
data sample data --count 0
data sample data --count -1
train
train quik
train ""
train quick quick
train quick --optm.lr 1
train quick --optim.lr fast
train quick --optim.lr
train quick --optim.lr -1
train quick --optim.lr=
train quick --optim.lr nan
train quick --optim.optimizer sgd
train quick --steps 1.5
train quick --steps -3
train quick --steps 0x10
train quick --seed -1
train quick --seed 10000000000000000000
train quick --model.rope-base nan
train quick --model.norm-eps nan
train quick --data.micro-batch x
train quick --data.micro-batch 3
train quick --model.dim 30 --model.num-heads 4
train quick --model.num-layers 0
train quick --model.residual.rule densenet
train quick --model.residual.rule full --model.residual.num-blocks 2
train quick --model.residual.num-blocks 99
train quick --device tpu
train quick --device cuda:99
train quick --compile yes
train quick --model 3
train quick --data.folder nowhere
train quick --data.folder text.txt
train quick --data.folder ''
train quick --out run
train quick --out text.txt
train quick --out text.txt/run
train quick --resume run
train --resume
train --resume nowhere
train --resume text.txt
train --resume broken
train --resume strange
train --resume binary
train --resume data
train --resume run --steps 5
sample
sample nowhere
sample text.txt
sample broken
sample data
sample run --tokens 0
sample run --tokens lots
sample run --seed -1
sample run --seed 10000000000000000000
sample run --temperature -1
sample run --temperature warm
sample run --top-k 0
sample run --top-p 1.5
sample run --checkpoint 77
sample run --checkpoint newest
sample run --promt Hi
sample run extra
residuals --dim 0
residuals --dim wide
residuals --layers -1
report
report nowhere
report text.txt
report data
quickstart --out run
quickstart --out text.txt
quickstart --steps many
quickstart --stpes 3
bench --rounds 2
bench --batch 0
bench --model.dim 7
bench --precision fp8
""".strip().splitlines()


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line(line: str, place: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    assert main(shlex.split(line)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1 and captured.err.startswith("fathom") and len(captured.err) > 20
    left = [path for path in sorted(place.rglob("*")) if path not in before]
    assert left == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "fathom: 'trian' is not a command; did you mean train?"),
        ("--versoin", "fathom: '--versoin' is not a flag; did you mean --version?"),
        ("data smaple", "fathom data: 'smaple' is not a command; did you mean sample?"),
        ("train quik", "fathom train: 'quik' is not a recipe; did you mean quick?"),
        (
            "train --from models/block --steps 3",
            "fathom train: --from is not a flag; `fathom finetune MODEL OUT` trains",
        ),
        ("train quick --optm.lr 1", "fathom train: --optm.lr is not a flag; did you mean --optim.lr?"),
        ("train quick --model.num_laiers 1", "is not a flag; did you mean --model.num-layers?"),
        ("train quick --optim.lr fast", "fathom train: --optim.lr: 'fast' is not a float"),
        ("train quick --steps 1.5", "fathom train: --steps: '1.5' is not an int"),
        ("train quick --data.micro-batch x", "fathom train: --data.micro-batch: 'x' is not an int"),
        ("train quick --optim.lr", "fathom train: --optim.lr: its value is missing"),
        ("train quick --track paper", "fathom train: --track: 'paper' is not one of none, tensorboard, trackio"),
        ("train quick 3", "fathom train: '3' is not expected here"),
        ("train quick --model.dim 30 --model.num-heads 4", "fathom train: model.dim 30 is not a multiple of"),
        ("sample", "fathom sample: RUN is missing"),
        ("data prepare", "fathom data prepare: SOURCE and OUT are missing"),
    ],
)
def test_the_line_says_what_is_wrong(line: str, message: str, capsys: Capture) -> None:
    assert main(shlex.split(line)) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("args", [["train", "quick", "--op\ntim"], ["sample", "no\nwhere"]])
def test_a_line_break_in_a_mistake_stays_in_the_line(args: list[str], capsys: Capture) -> None:
    assert main(args) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_file_that_cannot_be_written_is_one_line(place: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> Callable[[], None]:
        def run() -> None:
            (place / "text.txt" / "report.html").write_text("")

        return run

    monkeypatch.setitem(commands.COMMANDS, "residuals", full)
    assert main(["residuals"]) == 2
    assert re.fullmatch(r"fathom: .*report.html: Not a directory\n", capsys.readouterr().err)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Callable[[], None]:
        def run() -> None:
            raise ValueError("a bug")

        return run

    monkeypatch.setitem(commands.COMMANDS, "residuals", broken)
    with pytest.raises(ValueError, match="a bug"):
        main(["residuals"])


def test_help_teaches_every_command(capsys: Capture) -> None:
    assert cli.COMMANDS.keys() == commands.COMMANDS.keys()
    for line in ([], ["--help"], ["-h"]):
        assert main(line) == 0
        page = capsys.readouterr().out
        for command in cli.COMMANDS.values():
            assert command.sentence in page and command.example in page


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_examples_use_flags_that_exist(name: str, capsys: Capture) -> None:
    words = shlex.split(cli.COMMANDS[name].example)
    assert words[: 1 + len(name.split())] == ["fathom", *name.split()]
    assert main([*name.split(), *(["quick"] if name == "train" else []), "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    for flag in (word for word in words if word.startswith("--")):
        assert flag in captured.out


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"fathom \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_prepare_prints_its_manifest(place: Path, capsys: Capture) -> None:
    args = [str(place / "text.txt"), str(place / "data"), "--vocab-size", "300", "--chunk-kib", "1", "--json"]
    assert main(["data", "prepare", *args, "--val-fraction", "0.3"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((place / "data" / "manifest.json").read_text())


def test_pack_unpack_and_sample_data(place: Path, tmp_path: Path, capsys: Capture) -> None:
    packed, back = tmp_path / "data.fathom", tmp_path / "back"
    assert main(["data", "pack", str(place / "data"), str(packed)]) == 0
    assert capsys.readouterr().out == f"{packed}\n"
    assert main(["data", "unpack", str(packed), str(back)]) == 0
    assert {path.name: path.read_bytes() for path in back.iterdir()} == {
        path.name: path.read_bytes() for path in (place / "data").iterdir()
    }
    capsys.readouterr()
    assert main(["data", "sample", str(back), "--count", "2"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("---\n") == 2 and "is the square of" in shown


def test_train_by_default_names_its_run(
    place: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--seed", "4", "--steps", "1", "--model.residual.rule", "full", "--optim.lr", "1e-4", *tiny(place)]
    assert main(["train", "quick", *flags]) == 0
    result, following = capsys.readouterr().out.splitlines()
    config = json.loads(Path("runs/quick-full-4/config.json").read_text())
    assert config["optim"]["lr"] == 1e-4 and config["model"]["residual"]["rule"] == "full" and config["seed"] == 4
    assert result.startswith("full: validation loss 5.") and result.endswith("in runs/quick-full-4")
    assert main([*shlex.split(following)[1:], "--tokens", "3"]) == 0


def test_sample_streams_the_prompt_and_more(place: Path, capsys: Capture) -> None:
    outputs = []
    for seed in ("1", "1", "2"):
        assert main(["sample", str(place / "run"), "--prompt", "naïve → ", "--tokens", "20", "--seed", seed]) == 0
        captured = capsys.readouterr()
        assert captured.out.startswith("naïve → ") and captured.out.endswith("\n")
        assert re.fullmatch(r"\d+ tokens, [\d.]+ tokens/s\n", captured.err)
        outputs.append(captured.out)
    assert outputs[0] == outputs[1] != outputs[2]


def test_sample_refuses_a_prompt_that_is_not_text(place: Path, capsys: Capture) -> None:
    assert main(["sample", str(place / "run"), "--prompt", "\udcff"]) == 2
    assert capsys.readouterr().err == "fathom: the prompt is not valid UTF-8 text\n"


def test_report_measures_depth_and_compares(place: Path, tmp_path: Path, capsys: Capture) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(place / "run"), "--out", str(page), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"report": str(page)} and captured.err == ""
    assert json.loads((place / "run" / "depth.json").read_text())["step"] == 3
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")


def test_quickstart_prints_only_its_result_as_json(tmp_path: Path, capsys: Capture) -> None:
    assert main(["quickstart", "--steps", "1", "--out", str(tmp_path / "q"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"prenorm", "block"} <= result.keys() and Path(result["report"]).is_file()


def test_ctrl_c_saves_and_resume_goes_on(place: Path, tmp_path: Path, capsys: Capture) -> None:
    run = tmp_path / "run"

    def stop_after_a_few_steps() -> None:
        metrics = run / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
            time.sleep(0.002)
        os.kill(os.getpid(), signal.SIGINT)

    stopper = threading.Thread(target=stop_after_a_few_steps)
    stopper.start()
    code = main(["train", "quick", "--out", str(run), "--steps", "60", *tiny(place)])
    stopper.join()
    captured = capsys.readouterr()
    assert code == 130 and captured.out == ""
    match = re.fullmatch(rf"fathom train: stopped after step (\d+); .*`(fathom train --resume {run})`\n", captured.err)
    assert match is not None and int(match[1]) < 60

    assert main([*shlex.split(match[2])[1:], "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["steps"] == 60 and summary["run"] == str(run)
    steps = [
        row["step"]
        for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if row["kind"] == "train"
    ]
    assert steps == list(range(1, 61))


def test_divergence_is_one_line_and_exit_code_1(place: Path, tmp_path: Path, capsys: Capture) -> None:
    flags = ["--optim.lr", "1e38", "--steps", "20", "--out", str(tmp_path / "run"), *tiny(place)]
    assert main(["train", "quick", *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("fathom train: the loss of step") and error.count("\n") == 1


def test_too_little_memory_is_one_line(place: Path, tmp_path: Path, capsys: Capture) -> None:
    flags = ["--model.dim", "4000000000", "--out", str(tmp_path / "run"), "--data.folder", str(place / "data")]
    assert main(["train", "quick", *flags]) == 2
    assert capsys.readouterr().err.startswith("fathom: this needs more memory than there is; give a smaller")


def test_residuals_counts_what_is_built(capsys: Capture) -> None:
    assert main(["residuals", "--dim", "8", "--layers", "5", "--json"]) == 0
    rows = {row["rule"]: row for row in json.loads(capsys.readouterr().out)["rules"]}
    assert set(rows) == set(get_args(get_type_hints(ResidualConfig)["rule"]))
    for rule, row in rows.items():
        model = Transformer(ModelConfig(dim=8, num_layers=5, num_heads=1, residual=ResidualConfig(rule=rule)))
        assert row["parameters"] == sum(parameter.numel() for parameter in model.stream.parameters())
    # 10 sublayers: one hidden state; the embedding and 10 outputs; the embedding and 8 blocks. Two bytes a channel.
    assert [rows[rule]["state_bytes_per_token"] for rule in ("prenorm", "full", "block")] == [16, 176, 144]
    assert rows["full"]["mean_sources"] == sum(range(1, 12)) / 11

    assert main(["residuals", "--dim", "8", "--layers", "5"]) == 0
    table = capsys.readouterr().out
    assert all(row["equation"] in table and row["source"] in table for row in rows.values())


def test_bench_takes_a_block_without_key_gains() -> None:
    config = ModelConfig(residual=ResidualConfig(rule="block", num_blocks=2, gain=False))
    assert [arm.residual.rule for arm in arms(config).values()] == ["prenorm", "block", "block", "full"]
    assert not arms(config)["full"].residual.gain


def test_bench_rows_follow_the_schema_of_results(capsys: Capture) -> None:
    shape = "--model.dim 8 --model.num-heads 1 --model.num-layers 2 --model.context 8"
    flags = shlex.split(f"{shape} --batch 1 --rounds 5")
    assert main(["bench", *flags, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"name", "date", "command", "machine", "versions", "rows"} <= result.keys()
    assert {"torch", "python", "threads", "backend"} <= result["versions"].keys()
    assert [row["arm"] for row in result["rows"]] == ["prenorm", "block", "block-single-pass", "full"]
    for row in result["rows"]:
        assert list(row) == ["case", "arm", "metric", "unit", "median", "low", "high", "n", "over_prenorm"]
        assert 0 < row["low"] <= row["median"] <= row["high"] and row["n"] == 5
    assert result["rows"][0]["over_prenorm"] == 1

    assert main(["bench", *flags]) == 0
    assert "over prenorm" in capsys.readouterr().out


def test_bench_does_not_time_a_wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig(dim=8, num_heads=1, num_layers=4, context=8, vocab_size=16)
    assert gate(config, torch.device("cpu")) < 1e-12
    assert [arm.residual.schedule for arm in arms(config).values()].count("single_pass") == 1
    right = BlockAttnRes.write

    def wrong_forward(self: BlockAttnRes, state: BlockState, site: int, output: Tensor) -> BlockState:
        return right(self, state, site, 1.001 * output)

    def wrong_backward(self: BlockAttnRes, state: BlockState, site: int, output: Tensor) -> BlockState:
        return right(self, state, site, output.detach() if site == 1 else output)

    for wrong in (wrong_forward, wrong_backward):
        monkeypatch.setattr(BlockAttnRes, "write", wrong)
        with pytest.raises(UserError, match="block differs from prenorm"):
            gate(config, torch.device("cpu"))


def test_help_of_finetune_imports_no_transformers() -> None:
    code = (
        "import sys; from fathom.cli import main; main(['finetune', '--help']); sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_help_imports_no_torch() -> None:
    code = "import sys; from fathom.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen([*FATHOM, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.wait(60) == 141 and process.stderr.read() == b""
    process.stderr.close()


def test_output_that_goes_nowhere_is_no_traceback() -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run([*FATHOM, "--help"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (2, "fathom: the output cannot be written: its disk is full\n")
    closed = subprocess.run(["sh", "-c", f"{shlex.join([*FATHOM, '--help'])} >&-"], capture_output=True, text=True)
    assert (closed.returncode, closed.stderr) == (0, "")


def test_a_run_folder_needs_a_name_in_utf8(place: Path, tmp_path: Path, capsys: Capture) -> None:
    assert main(["train", "quick", "--steps", "1", *tiny(place), "--out", str(tmp_path / "caf\udce9")]) == 2
    assert "not UTF-8" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_streams_and_exit_code_of_the_real_command(place: Path) -> None:
    wrong = subprocess.run([*FATHOM, "train", "quick", "--optm.lr", "1"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr == "fathom train: --optm.lr is not a flag; did you mean --optim.lr?\n"

    ascii_terminal = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [*FATHOM, "sample", "run", "--prompt", "→", "--tokens", "2"]
    right = subprocess.run(command, capture_output=True, text=True, cwd=place, env=ascii_terminal)
    assert right.returncode == 0 and right.stdout.startswith("?") and right.stderr.count("\n") == 1


def test_the_process_that_speaks_fails_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torchrun ends the others once one has failed, so a silent one that were faster would take the line away."""
    waited: list[float] = []
    monkeypatch.setattr("fathom.cli.time.sleep", waited.append)
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert main(["nothing"]) == 2
        assert bool(capsys.readouterr().err) == (rank == "0")
    assert waited == [cli.SECONDS_TO_SPEAK]
