"""Every format is read as the same documents, and what is malformed is named in one line."""

import gzip
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fathom.train.data import Manifest
from fathom.train.prepare import prepare
from fathom.train.text import describe_source, read_documents
from tests.train.datasets import OPTIONS, TEXTS, decoded, folder_of_texts, prepare_fails


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
        (source / split / "state.json").write_text("{}")
    (source / "dataset_dict.json").write_text('{"splits": ["train", "validation", "test"]}')
    # Results that `map` left beside the data: other texts, or no texts at all.
    (source / "train" / "cache-0a1b2c.arrow").write_bytes(b"left over")
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


def test_a_short_file_read_whole_is_what_it_is_line_by_line(tmp_path: Path):
    options = {"field": "text", "chunk_kib": 1, "invalid_utf8": "replace"}
    for text in (
        b"\xef\xbb\xbfone\r\n\r\ntwo\n\n",
        b"cut \xe2\x82\nhere \xe2\x82",
        b"\xff",
        b"x" * 1023,
        b"x\n\n" * 300,
    ):
        for name, data in (("whole.txt", text), ("lines.txt.gz", gzip.compress(text))):
            (tmp_path / name).write_bytes(data)
        whole, lines = (
            [d.text for d in read_documents(tmp_path / name, **options)] for name in ("whole.txt", "lines.txt.gz")
        )
        assert whole == lines != []


def test_huge_lines_and_empty_files_are_read(tmp_path: Path):
    (tmp_path / "line.txt").write_text("word " * 1_000_000)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.txt").write_text(" \n\n ")
    (tmp_path / ".hidden.txt").write_text("hidden")
    documents = list(read_documents(tmp_path, field="text", chunk_kib=256, invalid_utf8="error"))
    assert [document.text for document in documents] == ["word " * 1_000_000]


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


def test_a_source_is_known_by_names_and_contents(tmp_path: Path):
    source = folder_of_texts(tmp_path / "in")
    first = describe_source(source)
    assert first["files"] == 60 and first == describe_source(source)
    (source / "000.txt").rename(source / "999.txt")
    assert describe_source(source)["identity"] != first["identity"]


def test_file_names_need_not_be_utf8(tmp_path: Path):
    source = folder_of_texts(tmp_path / "caf\udce9")
    (source / "000.txt").rename(source / "\udcff.txt")
    manifest = prepare(source, tmp_path / "out", options=OPTIONS)
    assert manifest.name == "caf\ufffd" and Manifest.load(tmp_path / "out") == manifest
