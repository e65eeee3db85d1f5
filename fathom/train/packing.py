"""A dataset as one compressed file, to carry to a machine without a network: `fathom data pack`, `fathom data unpack`.

A `.fathom` file is an xz file (a series of streams, so that `xz -d` opens it too) of

    "fathom-pack-1\\n" | length of the header: 8 bytes, little-endian | header | tokenizer.json | shards

where the header is JSON with the manifest, padded with blanks so that the shards start at a multiple of 4 bytes. Token
ids compress to about 6 bits with literal contexts chosen for 2-byte numbers (lc=0, lp=1, pb=1), a tenth better than
with xz's defaults. With a size limit the file is cut into NAME.part00, NAME.part01, ..., which `unpack` joins.
"""

import contextlib
import glob
import hashlib
import io
import itertools
import json
import lzma
import math
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, cast

from fathom.errors import UserError
from fathom.train.data import SPLITS, TOKENIZER, Manifest, TokenShards
from fathom.train.prepare import staging
from fathom.train.spool import Progress
from fathom.train.workers import cores, in_order

_MAGIC = b"fathom-pack-1\n"
_PIECE = 32 << 20  # compressed on its own, so that all cores work; smaller pieces pack worse


def pack(
    folder: Path,
    out: Path,
    *,
    max_tokens: int | None = None,
    limit_mib: float | None = None,
    name: str | None = None,
    workers: int = 0,
) -> list[Path]:
    """Write the dataset `folder` into the file `out`.

    Args:
        max_tokens: pack as many whole training shards, from the first, as stay within this many tokens (at least one),
            and all of the validation split. Documents lie in random order, so this is a random sample of them.
        limit_mib: cut the result into parts of at most this size.
        name: name of the packed dataset; its own by default.
        workers: threads; 0 takes every core.

    Returns:
        The files written: `out`, or its parts.

    Raises:
        UserError: `out` exists, the dataset is damaged, or the disk is full.
    """
    folder, out = Path(folder), Path(out)
    manifest = Manifest.load(folder)
    for split in manifest.splits:
        TokenShards(folder, split)  # nothing damaged travels
    manifest = replace(_prefix(manifest, max_tokens), name=name or manifest.name)
    if limit_mib is not None and not 1 <= limit_mib * 2**20 < math.inf:
        raise UserError(f"limit_mib is {limit_mib}, but must be positive, and at least a byte")
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}, but must be at least 1")
    limit = int(limit_mib * 2**20) if limit_mib else None
    if out.exists() or (part := out.with_name(f"{out.name}.part00")).exists():
        raise UserError(f"{out if out.exists() else part} exists; choose another name or remove it")
    tokenizer_bytes = (folder / TOKENIZER).stat().st_size
    header = json.dumps({"manifest": manifest.to_json(), "tokenizer_bytes": tokenizer_bytes}).encode()
    header += b" " * (-(len(_MAGIC) + 8 + len(header) + tokenizer_bytes) % 4)  # token ids start at an aligned byte
    start = _MAGIC + len(header).to_bytes(8, "little") + header
    files = [folder / TOKENIZER, *(folder / shard.file for split in SPLITS for shard in manifest.splits.get(split, ()))]
    width = 1 if manifest.dtype == "uint16" else 2
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "lp": width, "pb": width}]

    def compress(piece: bytes) -> bytes:
        return lzma.compress(piece, check=lzma.CHECK_CRC32, filters=filters)

    workers = workers or cores()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as work:
            whole = Path(work) / out.name
            with whole.open("wb") as file, ThreadPoolExecutor(workers) as pool, Progress("pack", "MB") as progress:
                for data in in_order(lambda piece: pool.submit(compress, piece), _pieces(start, files), 2 * workers):
                    file.write(data)
                    progress.show(file.tell() / 1e6)
            if limit is None or whole.stat().st_size <= limit:
                whole.rename(out)
                return [out]
            parts = _cut(whole, limit)
            for part in reversed(parts):  # the first part comes last: where it is, all are
                part.rename(out.parent / part.name)
            return [out.parent / part.name for part in parts]
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror or error}; nothing was packed") from None


def unpack(file: Path, out: Path) -> Manifest:
    """Make the dataset folder `out` from a packed file, or from its first part; every file is compared with its sha256.

    An `out` that already holds this dataset is left as it is.

    Raises:
        UserError: `file` is no packed dataset, or damaged, or incomplete; `out` holds something else; the disk is full.
    """
    file, out = Path(file), Path(out)
    parts = _parts(file) if file.suffix.startswith(".part") else [file]
    if not file.is_file():
        raise UserError(f"{file} does not exist")
    try:
        with contextlib.closing(_Joined(parts)) as joined, lzma.open(cast(IO[bytes], joined)) as stream:
            if stream.read(len(_MAGIC)) != _MAGIC:
                raise UserError(f"{file} is no packed dataset; make one with `fathom data pack`")
            header = json.loads(_exactly(stream, int.from_bytes(_exactly(stream, 8), "little")))
            manifest = Manifest.from_json(header["manifest"], where=str(file))
            if out.exists():
                if Manifest.load(out) == manifest:
                    return manifest
                raise UserError(f"{out} exists and holds another dataset; choose another folder or remove it")
            width = 2 if manifest.dtype == "uint16" else 4
            shards = [shard for split in SPLITS for shard in manifest.splits.get(split, ())]
            files = [(TOKENIZER, header["tokenizer_bytes"], manifest.tokenizer_sha256)]
            files += [(shard.file, shard.tokens * width, shard.sha256) for shard in shards]
            with staging(out) as folder, Progress("unpack", "files", len(files)) as progress:
                for number, (name, size, sha256) in enumerate(files):
                    data = _exactly(stream, size)
                    if hashlib.sha256(data).hexdigest() != sha256:
                        raise UserError(f"{file}: {name} in it is not what its manifest says; copy the file again")
                    (folder / name).write_bytes(data)
                    progress.show(number + 1)
                manifest.save(folder)
    except UserError:
        raise
    except (lzma.LZMAError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged or incomplete ({error}); copy it again, with all its parts") from None
    return manifest


def _parts(first: Path) -> list[Path]:
    """All parts of a packed file by their number: part100 follows part99, though it sorts before it as text."""
    found = first.parent.glob(f"{glob.escape(first.stem)}.part*")
    numbers = {path: path.suffix.removeprefix(".part") for path in found}
    return sorted((path for path, number in numbers.items() if number.isdecimal()), key=lambda path: int(numbers[path]))


class _Joined:
    """Files read one after the other, as one."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = iter(paths)
        self._file: IO[bytes] = next(self._paths).open("rb")

    def read(self, size: int = -1) -> bytes:
        while not (data := self._file.read(size)):
            following = next(self._paths, None)
            self._file.close()
            if following is None:
                self._file = io.BytesIO()
                return b""
            self._file = following.open("rb")
        return data

    def close(self) -> None:
        self._file.close()


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError(f"it ends {size - len(data):,} bytes early")
    return data


def _pieces(start: bytes, files: list[Path]) -> Iterator[bytes]:
    """`start` and the files as one stream of bytes, in pieces."""
    piece = bytearray(start)
    for path in files:
        with path.open("rb") as file:
            while block := file.read(_PIECE - len(piece)):
                piece += block
                if len(piece) == _PIECE:
                    yield bytes(piece)
                    piece.clear()
    yield bytes(piece)


def _cut(whole: Path, limit: int) -> list[Path]:
    """The bytes of `whole` in files NAME.part00, NAME.part01, ... of at most `limit` beside it."""
    parts: list[Path] = []
    with whole.open("rb") as file:
        while data := file.read(limit):
            part = whole.with_name(f"{whole.name}.part{len(parts):02d}")
            part.write_bytes(data)
            parts.append(part)
    return parts


def _prefix(manifest: Manifest, max_tokens: int | None) -> Manifest:
    """The manifest with only the first training shards, as many as stay within `max_tokens`."""
    shards = manifest.splits["train"]
    ends = list(itertools.accumulate(shard.tokens for shard in shards))
    count = len(shards) if max_tokens is None else max(1, sum(end <= max_tokens for end in ends))
    if count == len(shards):
        return manifest
    identity = hashlib.sha256(f"{manifest.corpus_hash}, {count} training shards".encode()).hexdigest()
    source = {**manifest.source, "prefix": {"corpus_hash": manifest.corpus_hash, "shards": count, "of": len(shards)}}
    return replace(manifest, corpus_hash=identity, source=source, splits={**manifest.splits, "train": shards[:count]})
