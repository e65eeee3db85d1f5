"""The text inside the package becomes a dataset, once, wherever there is a place for it."""

import time
from pathlib import Path

import pytest

from fathom.train import embedded as embedded_module
from fathom.train.data import TokenShards
from fathom.train.embedded import embedded
from tests.train.datasets import decoded


def test_the_embedded_dataset(tmp_path: Path):
    started = time.monotonic()
    folder = embedded(tmp_path)
    assert time.monotonic() - started < 3
    train, val = TokenShards(folder, "train"), TokenShards(folder, "val")
    assert train.vocab_size == 1024 and train.num_tokens > 1_000_000 and val.num_tokens > 60_000
    assert train.manifest.total("train", "documents") == 72 and val.manifest.total("val", "documents") == 8
    assert "Fellow-Citizens of the Senate" in "".join(decoded(folder, "train"))
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert embedded(tmp_path) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    (folder / "val-00000.bin").write_bytes(b"damaged")
    assert TokenShards(embedded(tmp_path), "val").num_tokens == val.num_tokens
    assert list(tmp_path.iterdir()) == [folder]


def test_another_version_makes_its_own_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = embedded(tmp_path)
    monkeypatch.setattr(embedded_module, "__version__", "0.0.1")
    other = embedded(tmp_path)
    assert other != folder and {path.name for path in tmp_path.iterdir()} == {folder.name, other.name}


def test_the_embedded_dataset_finds_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert embedded().parent == tmp_path / "cache" / "fathom"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # cannot hold a folder
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    folder = embedded()
    assert folder.is_relative_to(tmp_path / "tmp") and folder == embedded()
