"""The model that comes with Fathom: what it weighs, that it opens by its name, and that a folder of the same name goes first."""

from pathlib import Path

import pytest
import torch

from fathom.cli import main
from fathom.inference.load import load_run
from fathom.train.checkpoint import checkpoints
from fathom.train.released import RELEASED, names, run_folder

NAME = "sotu-1m"


def test_a_name_is_the_folder_in_the_package_unless_there_is_one_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert names() == [NAME]
    assert run_folder(Path(NAME)) == RELEASED / NAME
    assert run_folder(Path("nothing")) == Path("nothing") and run_folder(Path(f"runs/{NAME}")) == Path(f"runs/{NAME}")
    (tmp_path / NAME).mkdir()
    assert run_folder(Path(NAME)) == Path(NAME)


def test_it_weighs_under_ten_megabytes_and_has_learnt(tmp_path: Path) -> None:
    checkpoint = checkpoints(RELEASED / NAME)[-1]
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 10e6
    model, tokenizer = load_run(RELEASED / NAME, torch.device("cpu"))
    tokens = torch.tensor(
        [tokenizer.encode("the people of the United States, and the Congress of the United States").ids]
    )
    with torch.no_grad():
        loss = model.loss(tokens[:, :-1], tokens[:, 1:]).item()
    assert loss < 3, f"{loss:.2f} nats per token on words that every address has"


def test_it_samples_reports_and_exports_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sample", NAME, "--prompt", "The option", "--device", "cpu", "--tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("The option")
    assert main(["report", NAME, "--out", "report.html"]) == 0
    assert "goes without" not in capsys.readouterr().err
    assert "reads.json" not in {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert main(["export", NAME, "model"]) == 0
    assert f"# {NAME}\n" in (tmp_path / "model" / "README.md").read_text()
