"""Text in, shards out: the same result however it is made, and after any accident all of it or nothing."""

import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fathom.errors import UserError
from fathom.train import spool
from fathom.train.data import Manifest, TokenShards
from fathom.train.prepare import PrepareOptions, prepare, sample_documents
from fathom.train.spool import drop_seen_paragraphs
from fathom.train.workers import processes
from tests.train.datasets import OPTIONS, TEXTS, contents, decoded, folder_of_texts, prepare_fails


def test_documents_come_back_and_splits_share_none(tmp_path: Path):
    out = tmp_path / "out"
    manifest = prepare(folder_of_texts(tmp_path / "in"), out, options=OPTIONS)
    train, val = decoded(out, "train"), decoded(out, "val")
    assert sorted(train + val) == sorted(TEXTS)
    assert len(val) == manifest.total("val", "documents") > 3
    assert manifest.total("train", "bytes") == sum(len(text.encode()) for text in train)
    assert manifest.total("train", "tokens") == TokenShards(out, "train").num_tokens
    assert Manifest.load(out) == manifest
    assert manifest.vocab_size <= 400 and manifest.name == "in"
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_the_result_does_not_depend_on_workers_or_file_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(spool, "CHUNK_BYTES", 300)  # many tasks, several shards
    options = replace(OPTIONS, shard_tokens=200)
    source = folder_of_texts(tmp_path / "in")
    prepare(source, tmp_path / "one", options=replace(options, workers=1))
    prepare(source, tmp_path / "five", options=replace(options, workers=5))
    assert contents(tmp_path / "one") == contents(tmp_path / "five")
    assert len(Manifest.load(tmp_path / "one").splits["train"]) > 3
    backwards = folder_of_texts(tmp_path / "backwards", TEXTS[::-1])
    prepare(backwards, tmp_path / "other", options=options)
    one, other = Manifest.load(tmp_path / "one"), Manifest.load(tmp_path / "other")
    assert (one.corpus_hash, one.splits, one.tokenizer_sha256) == (
        other.corpus_hash,
        other.splits,
        other.tokenizer_sha256,
    )


def test_a_document_keeps_its_split_as_the_corpus_grows(tmp_path: Path):
    prepare(folder_of_texts(tmp_path / "small", TEXTS[:40]), tmp_path / "a", options=OPTIONS)
    prepare(folder_of_texts(tmp_path / "large"), tmp_path / "b", options=OPTIONS)
    assert set(decoded(tmp_path / "a", "val")) == set(decoded(tmp_path / "b", "val")) & set(TEXTS[:40])


def test_duplicates_go_wherever_they_are(tmp_path: Path):
    source = folder_of_texts(tmp_path / "in", TEXTS + TEXTS[:20])
    (source / "crlf.md").write_bytes(b"\xef\xbb\xbf" + TEXTS[3].replace("\n", "\r\n").encode())
    manifest = prepare(source, tmp_path / "out", options=OPTIONS)
    assert manifest.total("train", "documents") + manifest.total("val", "documents") == len(TEXTS)
    assert (
        manifest.corpus_hash == prepare(folder_of_texts(tmp_path / "once"), tmp_path / "b", options=OPTIONS).corpus_hash
    )


def test_paragraphs_seen_before_are_dropped():
    long, seen = "The same long paragraph of a licence, " * 4, set()
    assert drop_seen_paragraphs(f"One.\n\n{long}\n\nTwo.", seen) == f"One.\n\n{long}\n\nTwo."
    assert drop_seen_paragraphs(f"One.\n\n{long.upper().replace(' ', chr(10))}\n\nThree.", seen) == "One.\n\nThree."


def test_paragraph_dedupe_is_an_option(tmp_path: Path):
    texts = [f"Chapter {i}\n\n{'All rights reserved, none given. ' * 4}" for i in range(40)]
    source = folder_of_texts(tmp_path / "in", texts)
    plain = prepare(source, tmp_path / "plain", options=OPTIONS)
    deduped = prepare(source, tmp_path / "deduped", options=replace(OPTIONS, dedupe_paragraphs=True))
    assert deduped.total("train", "bytes") < plain.total("train", "bytes") / 4


def test_what_cannot_work_is_said_before_the_work(tmp_path: Path):
    prepare_fails(tmp_path / "absent", tmp_path, "does not exist")
    source = folder_of_texts(tmp_path / "in")
    prepare_fails(source, tmp_path, "is not a readable tokenizer", replace(OPTIONS, tokenizer=source / "000.txt"))
    prepare_fails(source, tmp_path, "split val got none of the 60", replace(OPTIONS, val_fraction=1e-9))
    for wrong in ({"val_fraction": 1.0}, {"vocab_size": 256}, {"chunk_kib": 0}, {"workers": -1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            PrepareOptions(**wrong)


def test_an_existing_folder_is_kept(tmp_path: Path):
    source, out = folder_of_texts(tmp_path / "in"), tmp_path / "out"
    manifest = prepare(source, out, options=OPTIONS)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert prepare(source, out, options=replace(OPTIONS, workers=1)) == manifest
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    prepare_fails(source, tmp_path, "exists and is not this dataset", replace(OPTIONS, vocab_size=300))
    (source / "new.txt").write_text("One more.")
    prepare_fails(source, tmp_path, "exists and is not this dataset")
    (tmp_path / "notes").mkdir()
    with pytest.raises(UserError, match="exists and is not this dataset"):
        prepare(source, tmp_path / "notes", options=OPTIONS)
    assert list((tmp_path / "notes").iterdir()) == []


CHILD = """
import sys
from pathlib import Path
from fathom.train.prepare import PrepareOptions, build
from fathom.train.text import Document
def endless():
    i = 0
    while True:
        i += 1
        yield Document(f"document {i}", "here")
        if i == 5000:
            print("writing", flush=True)
build(endless(), Path(sys.argv[1]), PrepareOptions(), name="endless", source={"identity": "x"})
"""


@pytest.fixture
def endless(tmp_path: Path):
    """A process that prepares for ever: its source has no end."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "writing\n"
    yield child
    child.kill()
    child.wait()
    child.stdout.close()


def test_a_second_writer_is_refused_and_a_killed_one_leaves_no_dataset(tmp_path: Path, endless: subprocess.Popen):
    source = folder_of_texts(tmp_path / "in")
    prepare_fails(source, tmp_path, "is being written by another process")
    endless.send_signal(signal.SIGKILL)
    endless.wait()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "text.spool").stat().st_size > 0
    (tmp_path / ".out.partial" / "train-00099.bin").write_bytes(b"left over")
    prepare(source, tmp_path / "out", options=OPTIONS)
    assert sorted(decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")) == sorted(TEXTS)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    assert not (tmp_path / "out" / "train-00099.bin").exists()


def test_an_interrupted_writer_clears_up(tmp_path: Path, endless: subprocess.Popen):
    endless.send_signal(signal.SIGINT)
    assert endless.wait(timeout=10) != 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [1000, 4500])  # while reading, and while writing shards
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, limit: int):
    source = folder_of_texts(tmp_path / "in", [f"{i} {'x' * 50}" for i in range(60)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        prepare_fails(source, tmp_path, "nothing was kept, make room", replace(OPTIONS, vocab_size=300))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(UserError, match=r"a worker process died: memory ran out, or .*__main__"), processes(1) as pool:
        pool.submit(os._exit, 1).result()


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    source = folder_of_texts(tmp_path / "in")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write beside"):
        prepare(source, tmp_path / "file" / "out", options=OPTIONS)


def test_samples_are_whole_documents(tmp_path: Path):
    out = tmp_path / "out"
    prepare(folder_of_texts(tmp_path / "in"), out, options=OPTIONS)
    samples = sample_documents(out, 10, seed=1)
    assert len(samples) == len(set(samples)) == 10
    assert set(samples) <= set(decoded(out, "train"))
    assert sample_documents(out, 10, seed=1) == samples != sample_documents(out, 10, seed=2)
    (out / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json was altered"):
        sample_documents(out, 10, seed=1)
