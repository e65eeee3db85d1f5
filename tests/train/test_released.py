"""The models inside the package: what they weigh, that they open by their names, that a folder of the same name goes first."""

import json
import re
from pathlib import Path

import pytest
import torch

from fathom.cli import main
from fathom.inference.load import load_run
from fathom.train.checkpoint import checkpoints
from fathom.train.released import RELEASED, names, run_folder

KNOWN = {
    "debian-5m": "This function returns a pointer to the allocated memory, or NULL if the allocation fails.",
    "sotu-1m": "the people of the United States, and the Congress of the United States",
}
"""Each model's name, and words of the kind that it was trained on."""
each = pytest.mark.parametrize("name", KNOWN)


def test_a_name_is_the_folder_in_the_package_unless_there_is_one_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert names() == list(KNOWN)
    name = names()[0]
    assert run_folder(Path(name)) == RELEASED / name
    assert run_folder(Path("nothing")) == Path("nothing") and run_folder(Path(f"runs/{name}")) == Path(f"runs/{name}")
    (tmp_path / name).mkdir()
    assert run_folder(Path(name)) == Path(name)


@each
def test_it_weighs_under_ten_megabytes_and_has_learnt(name: str) -> None:
    checkpoint = checkpoints(RELEASED / name)[-1]
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) < 10e6
    model, tokenizer = load_run(RELEASED / name, torch.device("cpu"))
    tokens = torch.tensor([tokenizer.encode(KNOWN[name]).ids])
    with torch.no_grad():
        loss = model.loss(tokens[:, :-1], tokens[:, 1:]).item()
    assert loss < 3, f"{loss:.2f} nats per token on words that it has often seen"


@each
def test_its_card_says_what_its_run_did(name: str) -> None:
    card = (RELEASED / name / "README.md").read_text()
    summary = json.loads((RELEASED / name / "summary.json").read_text())
    assert card.startswith(f"# {name}\n")
    assert f"{summary['val_loss']:.3f} nats per token" in card and f"{summary['steps']:,} steps" in card
    assert f"{summary['parameters'] / 1e6:.2f} million parameters" in card


@each
def test_its_files_name_no_place_of_the_machine_that_made_them(name: str) -> None:
    for file in ("config.json", "data.json", "env.json", "summary.json"):
        assert not re.search(r'"/', (RELEASED / name / file).read_text()), file
    for file in (RELEASED / name).glob("*"):
        assert file.is_dir() or not re.search(rb"/(work|root|home|tmp)/\w", file.read_bytes()), file


@each
def test_it_samples_reports_and_exports_by_its_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sample", name, "--prompt", "The option", "--device", "cpu", "--tokens", "4"]) == 0
    assert capsys.readouterr().out.startswith("The option")
    assert main(["report", name, "--out", "report.html"]) == 0
    assert "goes without" not in capsys.readouterr().err
    assert "reads.json" not in {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert f"{name} has a validation loss of" in (tmp_path / "report.html").read_text()
    assert main(["export", name, "model"]) == 0
    assert f"# {name}\n" in (tmp_path / "model" / "README.md").read_text()


def test_its_mixing_matrix_is_measured_where_its_text_is_at_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lab", "mixing", "sotu-1m", "--sequence", "2"]) == 0
    assert "sotu-1m (block)" in capsys.readouterr().out


def test_a_released_config_keeps_no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    from release import without_paths  # type: ignore[import-not-found]

    given = {"folder": "/data/words", "command": ["twins.py", "--out", "/out/runs"], "seed": 0, "at": "data/words"}
    assert without_paths(given) == {
        "folder": "words", "command": ["twins.py", "--out", "runs"], "seed": 0, "at": "data/words"
    }  # fmt: skip
