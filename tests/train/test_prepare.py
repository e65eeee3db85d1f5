"""Text in, shards out: every format, every accident, and the same result however it is made."""

import gzip
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fathom.errors import UserError
from fathom.train import prepare as prepare_module
from fathom.train import spool
from fathom.train.data import Manifest, TokenShards
from fathom.train.embedded import documents as embedded_documents
from fathom.train.embedded import embedded
from fathom.train.prepare import PrepareOptions, prepare, sample_documents
from fathom.train.spool import drop_seen_paragraphs
from fathom.train.text import describe_source, read_documents
from fathom.train.tokenizer import EOS, Encoder, load_tokenizer, train_tokenizer

OPTIONS = PrepareOptions(vocab_size=400, val_fraction=0.2, sample_mb=1)
TEXTS = [f"Document {i} tells of {i * i} ships.\n\nIt ends here, naïvely: {'so ' * (i % 7)}done. ✓" for i in range(60)]


def folder_of_texts(folder: Path, texts: list[str] = TEXTS) -> Path:
    folder.mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_text(text, "utf-8")
    return folder


def decoded(folder: Path, split: str) -> list[str]:
    """The documents of a split, decoded from its tokens."""
    shards, tokenizer = TokenShards(folder, split), Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = shards.read(0, shards.num_tokens)
    documents = np.split(tokens, np.flatnonzero(tokens == shards.eos_id) + 1)
    assert len(documents.pop()) == 0  # the stream ends with an end token
    return [tokenizer.decode(document[:-1].tolist()) for document in documents]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# What comes out


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


def test_file_names_need_not_be_utf8(tmp_path: Path):
    source = folder_of_texts(tmp_path / "caf\udce9")
    (source / "000.txt").rename(source / "\udcff.txt")
    manifest = prepare(source, tmp_path / "out", options=OPTIONS)
    assert manifest.name == "caf\ufffd" and Manifest.load(tmp_path / "out") == manifest


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


# Formats


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts) + "\n")
    return path


def packed(path: Path, data: bytes) -> None:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    else:
        with pyarrow.output_stream(str(path), compression="zstd") as file:
            file.write(data)


def test_every_format_gives_the_dataset_of_plain_text(tmp_path: Path):
    expected = prepare(folder_of_texts(tmp_path / "txt"), tmp_path / "expected", options=OPTIONS)
    sources = {name: tmp_path / name for name in ("jsonl", "parquet", "gz", "zst", "arrow", "mixed")}
    for folder in sources.values():
        folder.mkdir()
    jsonl = write_jsonl(sources["jsonl"] / "a.jsonl", TEXTS)
    table = pyarrow.table({"id": list(range(61)), "text": [*TEXTS, None]})
    pyarrow.parquet.write_table(table, sources["parquet"] / "a.parquet", row_group_size=7)
    with (
        pyarrow.OSFile(str(sources["arrow"] / "data-00000-of-00001.arrow"), "wb") as file,
        pyarrow.ipc.new_stream(file, table.schema) as stream,
    ):
        stream.write_table(table, max_chunksize=11)
    (sources["arrow"] / "state.json").write_text("{}")
    packed(sources["gz"] / "a.jsonl.gz", jsonl.read_bytes())
    packed(sources["zst"] / "a.jsonl.zst", jsonl.read_bytes())
    for i in range(20):
        packed(sources["mixed"] / f"{i}.txt{'.gz' if i % 2 else '.zst'}", TEXTS[i].encode())
    packed(sources["mixed"] / "b.parquet.gz", (sources["parquet"] / "a.parquet").read_bytes())
    for name, source in sources.items():
        manifest = prepare(source, tmp_path / f"out-{name}", options=OPTIONS)
        assert manifest.splits == expected.splits, name
        assert manifest.corpus_hash == expected.corpus_hash, name
    single = prepare(jsonl, tmp_path / "single", options=OPTIONS)
    assert single.splits == expected.splits and single.name == "a.jsonl"


def test_the_splits_of_a_saved_dataset_keep_their_roles(tmp_path: Path):
    source = tmp_path / "saved"
    for split, texts in (("train", TEXTS[:30]), ("validation", TEXTS[25:40]), ("test", TEXTS[40:])):
        (source / split).mkdir(parents=True)
        table = pyarrow.table({"body": texts})
        with (
            pyarrow.OSFile(str(source / split / "data-00000-of-00001.arrow"), "wb") as file,
            pyarrow.ipc.new_stream(file, table.schema) as stream,
        ):
            stream.write_table(table)
    (source / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    prepare(source, tmp_path / "out", options=replace(OPTIONS, field="body"))
    assert set(decoded(tmp_path / "out", "val")) == set(TEXTS[25:40])
    assert set(decoded(tmp_path / "out", "train")) == set(TEXTS[:25])


def test_long_plain_text_is_cut_at_blank_lines(tmp_path: Path):
    path = tmp_path / "book.txt"
    paragraphs = [f"Paragraph {i}.\nIts second line." for i in range(2000)]
    path.write_text("\n\n".join(paragraphs))
    options = {"field": "text", "chunk_kib": 4, "invalid_utf8": "error"}
    pieces = [document.text for document in read_documents(path, **options)]
    assert "\n\n".join(pieces) == path.read_text()
    assert 10 < len(pieces) < 20 and all(piece.endswith("second line.") for piece in pieces)
    path.write_text("\n".join("no blank line ever" for _ in range(2000)))
    assert max(len(document.text) for document in read_documents(path, **options)) < 9000


def test_huge_lines_and_empty_files_are_read(tmp_path: Path):
    (tmp_path / "line.txt").write_text("word " * 1_000_000)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\n ")
    (tmp_path / ".hidden.txt").write_text("hidden")
    documents = list(read_documents(tmp_path, field="text", chunk_kib=256, invalid_utf8="error"))
    assert [document.text for document in documents] == ["word " * 1_000_000]


# Mistakes


def prepare_fails(source: Path, tmp_path: Path, match: str, options: PrepareOptions = OPTIONS) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=match) as error:
        prepare(source, tmp_path / "out", options=options)
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == before, "a failure left something behind"


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "fine"}\n\n[1]\n', r"a\.jsonl, line 3: no field 'text'"),
        ("a.jsonl", b'{"body": "fine"}', r"a\.jsonl, line 1: no field 'text'; .* --field"),
        ("a.jsonl", b'{"text": 5}', r"a\.jsonl, line 1: 'text' holds int"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl, line 1: half a surrogate"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1: not JSON"),
        ("a.txt", b"fine\nnot \xff fine", r"a\.txt, line 2: byte 0xff is not UTF-8; .*--invalid-utf8 replace"),
        ("a.txt.gz", gzip.compress(b"text " * 999)[:-20], r"a\.txt\.gz is damaged or cut short"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz cannot be read"),
        ("a.txt.zst", b"no zstd", r"a\.txt\.zst cannot be read"),
        ("a.parquet", b"no parquet", r"a\.parquet is not readable as Parquet"),
        ("a.arrow", b"no arrow", r"a\.arrow is not readable as Arrow"),
        ("a.pdf", b"%PDF", r"holds no text files; known: \.txt"),
    ],
)
def test_malformed_files_are_named_in_one_line(tmp_path: Path, name: str, content: bytes, match: str):
    source = folder_of_texts(tmp_path / "in", [] if name.endswith("pdf") else TEXTS)
    (source / name).write_bytes(content)
    prepare_fails(source, tmp_path, match)


def test_a_zstandard_file_cut_short_is_no_whole_one(tmp_path: Path):
    source = folder_of_texts(tmp_path / "in")
    packed(source / "a.txt.zst", os.urandom(10_000).hex().encode())
    data = (source / "a.txt.zst").read_bytes()
    (source / "a.txt.zst").write_bytes(data[: len(data) // 2])
    prepare_fails(source, tmp_path, r"a\.txt\.zst cannot be read")


def test_wrong_columns_are_named(tmp_path: Path):
    source = tmp_path / "in"
    source.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS, "id": list(range(60))}), source / "a.parquet")
    prepare_fails(source, tmp_path, "no column 'text' but body, id")
    prepare_fails(source, tmp_path, "row 1: 'id' holds int", replace(OPTIONS, field="id"))


def test_invalid_utf8_can_be_replaced(tmp_path: Path):
    source = folder_of_texts(tmp_path / "in")
    (source / "z.txt").write_bytes(b"latin \xe9 text")
    (source / "z.jsonl").write_bytes(b'{"text": "half \\ud800 pair"}')
    prepare(source, tmp_path / "out", options=replace(OPTIONS, invalid_utf8="replace"))
    texts = decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")
    assert "latin � text" in texts and sum(text.startswith("half �") for text in texts) == 1


def test_a_missing_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = folder_of_texts(tmp_path / "in")
    (source / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    prepare_fails(source, tmp_path, r"needs the package pyarrow: pip install 'fathom-attnres\[data\]'")


def test_without_tiktoken_the_result_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = folder_of_texts(tmp_path / "in")
    prepare(source, tmp_path / "with", options=OPTIONS)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    prepare(source, tmp_path / "without", options=OPTIONS)
    assert contents(tmp_path / "with") == contents(tmp_path / "without")


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


# Accidents. The child prepares forever: its source is a pipe that never ends.

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


def test_a_folder_that_cannot_be_written(tmp_path: Path):
    source = folder_of_texts(tmp_path / "in")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write beside"):
        prepare(source, tmp_path / "file" / "out", options=OPTIONS)


# Tokenizers


@pytest.fixture(scope="module")
def sotu() -> Tokenizer:
    return train_tokenizer([document.text for document in embedded_documents()][:10], 1024)[0]


def test_tiktoken_gives_the_same_ids(sotu: Tokenizer):
    fast, slow = Encoder(sotu), Encoder(sotu, fast=False)
    assert (fast.backend, slow.backend) == ("tiktoken", "tokenizers")
    texts = [document.text for document in embedded_documents()][:16]
    texts += ["", " ", "\n\n \n", f"a{EOS}b", "don't DON'T ſ 'S", "1234567 ¼ ٣٤٥", "\u200b\u0085\u180e\ufeff\x00 \x1c"]
    texts += [" " * 300_000, "^" * 20_000, "a" * 20_000, "\n" * 20_000]
    for text, a, b in zip(texts, fast.encode(texts), slow.encode(texts), strict=True):
        assert a.tolist() == b.tolist(), text[:50]
        assert sotu.decode(a.tolist(), skip_special_tokens=False) == text


def test_words_are_cut_as_the_pattern_says(sotu: Tokenizer):
    text = "I'd say   12345 (no!)\n\n  done\tnow "
    cut = [text[start:stop] for _, (start, stop) in sotu.pre_tokenizer.pre_tokenize_str(text)]
    assert cut == ["I", "'d", " say", "  ", " ", "123", "45", " (", "no", "!)\n\n", " ", " done", "\tnow", " "]


@given(st.lists(st.text(max_size=60), max_size=4))
@settings(max_examples=300, deadline=None)
def test_tiktoken_gives_the_same_ids_on_anything(sotu: Tokenizer, texts: list[str]):
    fast, slow = Encoder(sotu).encode(texts), Encoder(sotu, fast=False).encode(texts)
    assert [ids.tolist() for ids in fast] == [ids.tolist() for ids in slow]


def gpt2_like(**changes) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**changes))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def test_tiktoken_is_used_only_where_it_reads_alike():
    plain = gpt2_like()
    assert Encoder(plain).backend == "tiktoken"
    text = "It's 12345 naïve  ships,\n\n and\tso on. ✓ don’t"
    assert Encoder(plain).encode([text])[0].tolist() == Encoder(plain, fast=False).encode([text])[0].tolist()
    prefixed = gpt2_like()
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    word = gpt2_like()
    word.add_tokens(["ships"])
    for other in (prefixed, word, gpt2_like(dropout=0.5)):
        assert Encoder(other).backend == "tokenizers"


def test_an_existing_tokenizer_is_taken_as_it_is(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    gpt2_like().save(str(path))
    source = folder_of_texts(tmp_path / "in")
    manifest = prepare(source, tmp_path / "out", options=replace(OPTIONS, tokenizer=path))
    assert manifest.eos_id == gpt2_like().token_to_id("</s>")
    assert sorted(decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "val")) == sorted(TEXTS)
    with pytest.raises(UserError, match=r"no end token '<stop>'; .*--eos"):
        load_tokenizer(path, "<stop>")


def test_the_text_of_the_end_token_ends_no_document(tmp_path: Path):
    texts = [*TEXTS, f"before {EOS} after"]
    for name, fast in (("fast", True), ("slow", False)):
        options = replace(OPTIONS, val_fraction=0.1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare_module, "Encoder", lambda tokenizer, fast=fast: Encoder(tokenizer, fast=fast))
            prepare(folder_of_texts(tmp_path / f"in-{name}", texts), tmp_path / name, options=options)
        assert sorted(decoded(tmp_path / name, "train") + decoded(tmp_path / name, "val")) == sorted(texts)
    assert Manifest.load(tmp_path / "fast").splits == Manifest.load(tmp_path / "slow").splits


# Reading samples, and the text inside the package


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


def test_the_embedded_dataset_finds_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert embedded().parent == tmp_path / "cache" / "fathom"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # cannot hold a folder
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    folder = embedded()
    assert folder.is_relative_to(tmp_path / "tmp") and folder == embedded()


def test_a_source_is_known_by_names_and_contents(tmp_path: Path):
    source = folder_of_texts(tmp_path / "in")
    first = describe_source(source)
    assert first["files"] == 60 and first == describe_source(source)
    (source / "000.txt").rename(source / "999.txt")
    assert describe_source(source)["identity"] != first["identity"]
