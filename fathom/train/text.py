"""Documents out of files: plain text, Markdown, JSON lines, Parquet, Arrow folders; each also as .gz or .zst.

    .txt .md           a document is a file, cut at a blank line after every `chunk_kib`
    .jsonl .ndjson     a document is the string in `field` of each line
    .parquet           a document is each value of column `field`
    .arrow             the same, of a folder saved by Hugging Face `datasets` (`save_to_disk`); of several splits
                       `train` and `validation` keep their roles, and others (`test`) are left out, as are the files
                       that `datasets` keeps results of `map` in (`cache-*.arrow`)

Memory stays at one line, row group or chunk. Files are taken in the order of their path, by one process: handing texts
from process to process takes as long as reading them, and two threads need ten times as long to encode them. Empty
and null texts are skipped, line ends become LF, a byte order mark is dropped; all else is kept as it is.
"""

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from fathom.errors import UserError
from fathom.train.data import file_sha256

SUFFIXES = (".txt", ".md", ".markdown", ".jsonl", ".ndjson", ".parquet", ".arrow")
_PACKED = (".gz", ".zst")
_SPLIT_OF_FOLDER = {"train": "train", "validation": "val", "valid": "val", "val": "val", "dev": "val"}


class Document(NamedTuple):
    """One text."""

    text: str
    where: str
    """File and line, for errors."""
    split: str | None = None
    """The split it must go to; None lets its hash decide."""


class _File(NamedTuple):
    path: Path
    suffix: str
    split: str | None = None


def missing_extra(package: str) -> UserError:
    """The error for an optional dependency that is not installed."""
    return UserError(f"this needs the package {package}: pip install 'fathom-attnres[data]'")


def find_files(source: Path) -> list[_File]:
    """The text files of a file or folder, sorted by path, hidden ones left out; `UserError` if there are none."""
    source = Path(source)
    if not source.exists():
        raise UserError(f"{source} does not exist; give a text file, a folder of them, or debian-docs")
    if source.is_file():
        suffix = _suffix(source)
        if suffix is None:
            raise UserError(f"{source} is of no known kind; known: {', '.join(SUFFIXES)}, each also with .gz or .zst")
        return [_File(source, suffix)]
    roots: list[tuple[Path, str | None]] = [(source, None)]
    if (source / "dataset_dict.json").is_file():
        # Validation first: a text in both splits is then kept out of training.
        parts = sorted(part.name for part in source.iterdir() if part.name in _SPLIT_OF_FOLDER)
        roots = [(source / part, _SPLIT_OF_FOLDER[part]) for part in sorted(parts, key=lambda part: part == "train")]
    files = []
    for root, split in roots:
        for path in sorted(root.rglob("*")):
            hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
            cached = path.match("cache-*.arrow") and (path.parent / "state.json").is_file()
            if not hidden and not cached and path.is_file() and (suffix := _suffix(path)) is not None:
                files.append(_File(path, suffix, split))
    if not files:
        raise UserError(f"{source} holds no text files; known: {', '.join(SUFFIXES)}, each also with .gz or .zst")
    return files


def describe_source(source: Path) -> dict[str, Any]:
    """Number and bytes of the files, and `identity`: a sha256 over their names and contents."""
    digest, files = hashlib.sha256(), find_files(source)
    for file in files:
        name = file.path.relative_to(source).as_posix() if file.path != source else file.path.name
        digest.update(os.fsencode(name) + f"\0{file_sha256(file.path)}\n".encode())
    size = sum(file.path.stat().st_size for file in files)
    return {"kind": "files", "files": len(files), "bytes": size, "identity": digest.hexdigest()}


def read_documents(
    source: Path, *, field: str, chunk_kib: int, invalid_utf8: Literal["error", "replace"]
) -> Iterator[Document]:
    """Every document of a file or folder; malformed content is a `UserError` that names file and line."""
    for file in find_files(source):
        path, suffix, split = file
        try:
            if suffix == ".arrow":
                rows = _arrow(path, field)
            elif suffix == ".parquet":
                rows = _parquet(path, field)
            elif suffix in (".jsonl", ".ndjson"):
                rows = _json_lines(path, field, invalid_utf8)
            else:
                rows = _plain(path, chunk_kib * 1024, invalid_utf8)
            for text, where in rows:
                text = text.replace("\r\n", "\n").replace("\r", "\n").strip("\n")
                if text and not text.isspace():
                    yield Document(_encodable(text, where, invalid_utf8), where, split)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
        except (EOFError, zlib.error) as error:
            raise UserError(f"{path} is damaged or cut short: {error}") from None


def _suffix(path: Path) -> str | None:
    name = path.name.lower()
    for packed in _PACKED:
        name = name.removesuffix(packed)
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, unpacked."""
    match path.suffix.lower():
        case ".gz":
            with gzip.open(path, "rb") as file:
                yield file  # type: ignore[misc]
        case ".zst":
            try:
                import pyarrow
            except ImportError:
                raise missing_extra("pyarrow") from None
            # pyarrow rather than zstandard, whose reader takes a file that was cut short for a whole one.
            with pyarrow.input_stream(str(path), compression="zstd") as file:
                yield file
        case _:
            with path.open("rb") as file:
                yield file


def _lines(path: Path, invalid_utf8: str) -> Iterator[tuple[int, str]]:
    with _open(path) as file:
        rest, number = b"", 0
        while block := file.read(1 << 20):
            *whole, rest = (rest + block).split(b"\n")
            for line in whole:
                number += 1
                yield number, _decode(line, f"{path}, line {number}", invalid_utf8, first=number == 1)
        if rest:
            yield number + 1, _decode(rest, f"{path}, line {number + 1}", invalid_utf8, first=number == 0)


def _decode(line: bytes, where: str, invalid_utf8: str, *, first: bool) -> str:
    try:
        text = line.decode("utf-8", "replace" if invalid_utf8 == "replace" else "strict")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {line[error.start]:#04x} is not UTF-8; mend the file or use --invalid-utf8 replace"
        ) from None
    return text.removeprefix("\ufeff") if first else text


def _encodable(text: str, where: str, invalid_utf8: str) -> str:
    """JSON can spell half of a surrogate pair, which is no text in UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        if invalid_utf8 == "error":
            raise UserError(f"{where}: half a surrogate pair is no text; use --invalid-utf8 replace") from None
        return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return text


def _plain(path: Path, limit: int, invalid_utf8: str) -> Iterator[tuple[str, str]]:
    if path.suffix.lower() not in _PACKED and path.stat().st_size < limit:
        with contextlib.suppress(UnicodeDecodeError):  # or else line by line, to name the line
            text = path.read_bytes().decode("utf-8", "replace" if invalid_utf8 == "replace" else "strict")
            yield text.removeprefix("\ufeff"), f"{path}, line 1"
            return
    lines: list[str] = []
    size, start = 0, 1
    for number, line in _lines(path, invalid_utf8):
        lines.append(line)
        size += len(line) + 1
        if size >= limit and (not line.strip() or size >= 2 * limit):
            yield "\n".join(lines), f"{path}, line {start}"
            lines, size, start = [], 0, number + 1
    yield "\n".join(lines), f"{path}, line {start}"


def _json_lines(path: Path, field: str, invalid_utf8: str) -> Iterator[tuple[str, str]]:
    for number, line in _lines(path, invalid_utf8):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error})") from None
        if not isinstance(row, dict) or field not in row:
            raise UserError(f"{where}: no field {field!r}; name the one that holds the text with --field")
        if row[field] is not None:
            yield _string(row[field], field, where), where


def _string(value: Any, field: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {field!r} holds {type(value).__name__}, not text; name another with --field")
    return value


def _parquet(path: Path, field: str) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise missing_extra("pyarrow") from None
    with contextlib.ExitStack() as stack:
        file: Any = path
        if path.suffix.lower() in _PACKED:  # Parquet is read from its end: unpack it first
            file = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(stack.enter_context(_open(path)), file)
        try:
            table = stack.enter_context(pyarrow.parquet.ParquetFile(file))
            _check_column(path, field, table.schema_arrow.names)
            yield from _column(path, field, table.iter_batches(batch_size=1024, columns=[field]))
        except pyarrow.ArrowException as error:
            raise UserError(f"{path} is not readable as Parquet: {' '.join(str(error).split())}") from None


def _arrow(path: Path, field: str) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow
    except ImportError:
        raise missing_extra("pyarrow") from None
    try:
        with pyarrow.memory_map(str(path)) as file, pyarrow.ipc.open_stream(file) as stream:
            _check_column(path, field, stream.schema.names)
            yield from _column(path, field, stream)
    except pyarrow.ArrowException as error:
        raise UserError(f"{path} is not readable as Arrow: {' '.join(str(error).split())}") from None


def _check_column(path: Path, field: str, names: list[str]) -> None:
    if field not in names:
        raise UserError(f"{path} has no column {field!r} but {', '.join(names)}; name the one with text with --field")


def _column(path: Path, field: str, batches: Any) -> Iterator[tuple[str, str]]:
    row = 0
    for batch in batches:
        for value in batch.column(field).to_pylist():
            row += 1
            if value is not None:
                yield _string(value, field, f"{path}, row {row}"), f"{path}, row {row}"
