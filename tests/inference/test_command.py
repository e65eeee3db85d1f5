"""`fathom sample`, as a user sees it."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch

import fathom
from fathom.cli import main
from fathom.models.config import ModelConfig
from fathom.models.transformer import Transformer
from fathom.train import checkpoint
from fathom.train.config import RunConfig, save_config

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    config = RunConfig(model=ModelConfig(context=64, dim=16, num_layers=2, head_std=2.0))
    save_config(config, folder / "config.json")
    shutil.copy(Path(fathom.__path__[0]) / "assets" / "sotu-tokenizer.json", folder / "tokenizer.json")
    model = Transformer(config.model, seed=1)
    checkpoint.save(folder, checkpoint.Progress(1, 1, 0), model, [torch.optim.SGD(model.parameters(), lr=0.1)], keep=1)
    return str(folder)


def sample(capsys: Capture, *args: str) -> str:
    assert main(["sample", *args, "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "tokens/s" in err
    return out


def test_one_prompt(run: str, capsys: Capture) -> None:
    text = sample(capsys, run, "--prompt", "It is", "--tokens", "20", "--seed", "3")
    assert text.startswith("It is") and text.endswith("\n")
    assert text == sample(capsys, run, "--prompt", "It is", "--tokens", "20", "--seed", "3", "--chunk", "1")
    assert text == sample(
        capsys, f"{run}/checkpoints/step-000001", "--prompt", "It is", "--tokens", "20", "--seed", "3"
    )


def test_a_file_of_prompts(run: str, capsys: Capture, tmp_path: Path) -> None:
    """In the file's order, whichever ends first; each as if it were alone with its own seed."""
    (tmp_path / "prompts.txt").write_text("It is\nWe must\nThe Congress of the United States\n")
    common = ["--tokens", "12", "--temperature", "0.5"]
    text = sample(capsys, run, "--prompts", str(tmp_path / "prompts.txt"), "--slots", "2", *common)
    alone = [
        sample(capsys, run, "--prompt", prompt, "--seed", str(index), *common)
        for index, prompt in enumerate(["It is", "We must", "The Congress of the United States"])
    ]
    assert text == "".join(f"--- {index} ---\n{answer}" for index, answer in enumerate(alone, 1))


def test_json(run: str, capsys: Capture) -> None:
    (answer,) = json.loads(sample(capsys, run, "--prompt", "It is", "--tokens", "7", "--json"))
    assert answer["prompt"] == "It is" and answer["tokens"] == 7 and answer["ending"] == "length"


def test_interactive_goes_on_after_a_mistake(run: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("It is\n" + "long " * 99 + "\nWe must\n"))
    assert main(["sample", run, "--interactive", "--tokens", "5", "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert [line[:5] for line in out.splitlines() if line.startswith(("It is", "We mu"))] == ["It is", "We mu"]
    (mistake,) = [line for line in err.splitlines() if line.startswith("fathom sample:")]
    assert "a sequence may have 64 here" in mistake


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", "a", "--interactive"], "exclude one another"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--prompts", "blank.txt"], "blank.txt:2 is an empty prompt"),
        (["--prompts", "none.txt"], "none.txt is empty"),
        (["--prompts", "bytes.txt"], "bytes.txt is not UTF-8 text: byte 1 cannot be read"),
        (["--prompt", "long " * 99], "a sequence may have 64 here"),
        (["--min-p", "2"], "min_p is 2.0"),
        (["--repetition-penalty", "0"], "repetition_penalty is 0.0"),
        (["--chunk", "0"], "chunk is 0"),
        (["--cuda-graphs"], "they need a GPU"),
    ],
)
def test_a_mistake_is_one_line(
    run: str, args: list[str], message: str, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("blank.txt").write_text("a\n\nb\n")
    Path("none.txt").write_text("")
    Path("bytes.txt").write_bytes(b"a\xff")
    assert main(["sample", run, *args, "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err
