"""A checkpoint is written whole or not at all, and refused by the name of its file once a byte has changed."""

import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fathom.errors import UserError
from fathom.train import checkpoint
from fathom.train.checkpoint import checkpoints, read_progress
from fathom.train.loop import Trainer, resume, train
from tests.train.conftest import Tiny, files, numbers

FILES = ("checkpoint.json", "model.safetensors", "optimizer.safetensors")


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path) -> Path:
    """A finished run of 12 steps with checkpoints of steps 8 and 12."""
    train(tiny(), tmp_path / "run")
    return tmp_path / "run"


def test_a_checkpoint_holds_every_parameter_and_the_whole_optimizer(run: Path, tiny: Tiny) -> None:
    folder = checkpoints(run)[-1]
    assert {path.name for path in folder.iterdir()} == set(FILES)
    progress = read_progress(folder)
    assert (progress.step, progress.consumed) == (12, 48)
    assert progress.end_of_text == json.loads((run / "data.json").read_text())["end_of_text"]
    with closing(Trainer(tiny(), run, resume=True)) as trainer:
        saved = load_file(folder / "model.safetensors")
        assert saved.keys() == {name for name, _ in trainer.model.named_parameters()}
        assert all(torch.equal(saved[name], value) for name, value in trainer.model.named_parameters())
        (adamw,) = trainer.optimizers
        kept = [tensor for state in adamw.state.values() for tensor in state.values()]
        assert len(kept) == len(load_file(folder / "optimizer.safetensors")) == 3 * len(saved)
        assert {state["step"].item() for state in adamw.state.values()} == {12}


def test_only_the_newest_are_kept(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(checkpoint_every=1, keep_checkpoints=3), tmp_path / "run")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-000010", "step-000011", "step-000012"]
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3


def test_checkpoints_are_ordered_by_number_and_other_names_ignored(tmp_path: Path) -> None:
    for name in ("step-000009", "step-1000000", "step-999999", ".step-000010.tmp", "step-latest", "step-12.bak"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000009", "step-999999", "step-1000000"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "empty"])
def test_a_damaged_file_is_named_and_the_earlier_checkpoint_resumes(name: str, damage: str, run: Path) -> None:
    before = files(checkpoints(run)[-1]), numbers(run)
    newest = checkpoints(run)[-1]
    file = newest / name
    data = file.read_bytes()
    match damage:
        case "truncated":
            file.write_bytes(data[:-7])
        case "flipped":
            middle = len(data) // 2
            file.write_bytes(data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :])
        case "missing":
            file.unlink()
        case "empty":
            file.write_bytes(b"")
    with pytest.raises(UserError, match=f"{file} is .*(damaged|missing).*; use another checkpoint") as error:
        resume(run)
    assert "\n" not in str(error.value)
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    assert checkpoints(run)[-1].name == "step-000008"
    resume(run)
    assert (files(newest), numbers(run)) == before


def test_any_flipped_bit_of_checkpoint_json_is_seen(run: Path) -> None:
    """A digit of a number is still a number: the file carries the sum of its own values."""
    folder = checkpoints(run)[-1]
    good = read_progress(folder)
    file = folder / "checkpoint.json"
    data = file.read_bytes()
    for position in range(len(data)):
        for bit in (1, 2, 16):
            file.write_bytes(data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :])
            try:
                assert read_progress(folder) == good  # white space into other white space
            except UserError as error:
                assert str(folder) in str(error) and "use another checkpoint" in str(error)
    for values in ("[]", "{}", "3", '{"seal": 1}', '{"sha256": 3}', "null"):
        file.write_text(values)
        with pytest.raises(UserError, match=r"checkpoint\.json is missing or damaged"):
            read_progress(folder)


def test_leftovers_of_a_killed_save_do_not_disturb(run: Path, tiny: Tiny) -> None:
    """A half-written newer one is not read; the next save deletes it."""
    leftover = run / "checkpoints" / ".step-000013.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    with closing(Trainer(tiny(), run, resume=True)) as trainer:
        assert trainer.progress.step == 12
        trainer.step()
        trainer.save()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000012", "step-000013"]
    read_progress(checkpoints(run)[-1])


def test_a_deletion_cut_short_leaves_no_half_checkpoint(run: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint.shutil.rmtree

    def killed(folder: Path, **_: object) -> None:
        next(Path(folder).iterdir()).unlink()
        raise KeyboardInterrupt

    with closing(Trainer(tiny(), run, resume=True)) as trainer:
        trainer.step()
        monkeypatch.setattr(checkpoint.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.save()
        monkeypatch.setattr(checkpoint.shutil, "rmtree", real)
    for folder in checkpoints(run):
        read_progress(folder)
    assert [path.name for path in checkpoints(run)] == ["step-000012", "step-000013"]


def test_tied_embeddings_are_saved_once(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(steps=2, model={"tie_embeddings": True})
    train(config, tmp_path / "run")
    saved = load_file(checkpoints(tmp_path / "run")[-1] / "model.safetensors")
    assert "head.weight" not in saved
    with closing(Trainer(config, tmp_path / "run", resume=True)) as trainer:
        assert torch.equal(trainer.model.head.weight, saved["embedding.weight"])
        assert trainer.model.head.weight is trainer.model.embedding.weight
