"""Text in, token shards out: `fathom data prepare SOURCE OUT`.

    read    documents are normalised and exact duplicates dropped; the text is spooled to one temporary file
    order   documents are put in the order of their sha256: a uniform shuffle that needs no seed. Those below
            `val_fraction` of the hash range are held out, so a document's split never changes as the corpus grows
    learn   byte-level BPE from the first `sample_mb` of training text, or an existing tokenizer.json
    encode  in threads (both encoders release Python's lock), written in order

The result depends on the text and the options alone: not on the order of files, the number of workers, or whether
tiktoken is there. All is written to a hidden folder beside OUT, which takes OUT's name at the end: OUT is complete or
it is absent.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import mmap
import os
import shutil
import sys
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from tokenizers import Tokenizer

from fathom.errors import UserError
from fathom.train.data import SPLITS, TOKENIZER, DType, Manifest, Shard, TokenShards, file_sha256
from fathom.train.text import Document, describe_source, read_documents
from fathom.train.tokenizer import Encoder, load_tokenizer, train_tokenizer

_log = logging.getLogger(__name__)
_CHUNK_BYTES = 1 << 20  # text that one task encodes; part of the format, as shards end where chunks end


@dataclass(frozen=True)
class PrepareOptions:
    """How text becomes a dataset."""

    name: str | None = None
    """Name of the dataset; the source's by default."""
    vocab_size: int = 16384
    """Tokens of the vocabulary to learn, bytes and end token included."""
    tokenizer: Path | None = None
    """Use this tokenizer.json and learn none."""
    eos: str | None = None
    """End token of that tokenizer; the usual names are found by themselves."""
    field: str = "text"
    """Field or column that holds the text: JSON lines, Parquet, Arrow."""
    chunk_kib: int = 256
    """Plain text and Markdown files longer than this are cut, at the next blank line, into several documents."""
    min_chars: int = 1
    """Shorter documents are dropped."""
    dedupe_paragraphs: bool = False
    """Also drop every paragraph of at least 80 characters that was seen before, anywhere in the source."""
    invalid_utf8: Literal["error", "replace"] = "error"
    """Bytes that are not UTF-8: stop and name the file, or put U+FFFD in their place."""
    val_fraction: float = 0.01
    """Share of the documents held out for validation, decided by each document's hash."""
    sample_mb: int = 50
    """Megabytes of training text that the tokenizer learns from."""
    shard_tokens: int = 1 << 22
    """Tokens after which a shard ends; `fathom data pack --max-tokens` takes whole shards."""
    workers: int = 0
    """Threads and processes; 0 takes every core. The result does not depend on it."""
    cache: Path | None = None
    """debian-docs: keep the downloaded packages here, and use those already here."""
    packages: Path | None = None
    """debian-docs: another list of package names, one a line."""

    def __post_init__(self) -> None:
        lowest = {"chunk_kib": 1, "min_chars": 1, "sample_mb": 1, "shard_tokens": 1, "workers": 0, "vocab_size": 257}
        for key, low in lowest.items():
            if getattr(self, key) < low:
                raise UserError(f"{key} is {getattr(self, key)}, but must be at least {low}")
        if not 0 < self.val_fraction < 1:
            raise UserError(f"val_fraction is {self.val_fraction}, but must be between 0 and 1")

    def settings(self) -> dict[str, Any]:
        """The options that the result depends on, as they stand in the manifest."""
        settings = asdict(self)
        for key in ("name", "workers", "cache", "packages"):
            del settings[key]
        settings["tokenizer"] = None if self.tokenizer is None else file_sha256(self.tokenizer)
        return settings


def prepare(source: Path | str, out: Path, *, options: PrepareOptions) -> Manifest:
    """Make the dataset folder `out` from `source`: a file or folder (see `fathom.train.text`), or "debian-docs".

    An `out` that already is this very dataset is left as it is.

    Raises:
        UserError: the source is missing or malformed, the disk is full, or `out` holds something else. Nothing is left.
    """
    if str(source) == "debian-docs" and not Path(source).exists():
        from fathom.train.debian_docs import DebianDocs

        with DebianDocs.download(options) as corpus:
            return build(corpus.documents(), out, options, name="debian-docs", source=corpus.source)
    source = Path(source)
    documents = read_documents(
        source, field=options.field, chunk_kib=options.chunk_kib, invalid_utf8=options.invalid_utf8
    )
    return build(documents, out, options, name=source.name, source=describe_source(source))


def build(
    documents: Iterable[Document], out: Path, options: PrepareOptions, *, name: str, source: Mapping[str, Any]
) -> Manifest:
    """Make the dataset folder `out` from a stream of documents.

    Args:
        documents: read once.
        source: goes into the manifest as it is at the end, so that `documents` may complete it while it is read; its
            `identity` decides whether an existing `out` is the same dataset.
    """
    out = Path(out)
    if options.tokenizer is not None:
        load_tokenizer(options.tokenizer, options.eos)  # a wrong one fails before the work
    if out.exists():
        return _same_dataset(out, options, source)
    workers = options.workers or cores()
    with staging(out) as folder:
        with _Spool(folder / "text.spool") as spool:
            started = time.monotonic()
            spool.fill(documents, options)
            _log.info("read: %.1f MB, %d documents, %.1f s", spool.size / 1e6, len(spool.digests), _since(started))
            started = time.monotonic()
            if options.tokenizer is None:
                tokenizer, eos_id = train_tokenizer(spool.texts("train", options.sample_mb * 10**6), options.vocab_size)
            else:
                tokenizer, eos_id = load_tokenizer(options.tokenizer, options.eos)
            (folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True), "utf-8")
            _log.info("tokenizer: %d tokens, %.1f s", tokenizer.get_vocab_size(), _since(started))
            started = time.monotonic()
            dtype: DType = "uint16" if tokenizer.get_vocab_size() <= 2**16 else "uint32"
            encoder = Encoder(tokenizer)
            splits = {
                split: spool.encode(split, folder, encoder, eos_id, dtype, options.shard_tokens, workers)
                for split in SPLITS
            }
            _log.info("encode with %s: %d threads, %.1f s", encoder.backend, workers, _since(started))
            corpus_hash = spool.corpus_hash()
        (folder / "text.spool").unlink()
        manifest = Manifest(
            name=options.name or name,
            corpus_hash=corpus_hash,
            tokenizer_sha256=file_sha256(folder / TOKENIZER),
            vocab_size=tokenizer.get_vocab_size(),
            eos_id=eos_id,
            dtype=dtype,
            splits=splits,
            source=dict(source),
            settings=options.settings(),
        )
        manifest.save(folder)
    return manifest


def sample_documents(folder: Path, count: int, seed: int) -> list[str]:
    """Up to `count` training documents, found at random tokens: long ones come up more often, as in training."""
    shards = TokenShards(folder, "train", verify=False)
    tokenizer = Tokenizer.from_file(str(Path(folder) / TOKENIZER))
    rng = np.random.default_rng(seed)
    texts: dict[str, None] = {}
    for position in rng.integers(0, shards.num_tokens, size=4 * count).tolist():
        if len(texts) < count:
            texts[tokenizer.decode(_document_at(shards, position).tolist(), skip_special_tokens=False)] = None
    return list(texts)


def _document_at(shards: TokenShards, position: int) -> np.ndarray:
    """The tokens of the document that `position` falls in, without the end token."""
    start, stop, step = position, position, 4096
    while start > 0:
        block = shards.read(max(0, start - step), min(start, step))
        ends = np.flatnonzero(block == shards.eos_id)
        if len(ends):
            start += int(ends[-1]) + 1 - len(block)
            break
        start -= len(block)
    while True:  # every document has its end
        block = shards.read(stop, min(step, shards.num_tokens - stop))
        ends = np.flatnonzero(block == shards.eos_id)
        if len(ends):
            return shards.read(start, stop + int(ends[0]) - start)
        stop += len(block)


def _same_dataset(out: Path, options: PrepareOptions, source: Mapping[str, Any]) -> Manifest:
    refusal = UserError(f"{out} exists and is not this dataset; choose another folder or remove it")
    try:
        manifest = Manifest.load(out)
    except UserError:
        raise refusal from None
    wanted = json.loads(json.dumps(options.settings()))
    if manifest.settings != wanted or manifest.source.get("identity") != source["identity"]:
        raise refusal
    return manifest


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that becomes `out` if the body succeeds and vanishes if it fails.

    A lock on the folder keeps a second writer out; it goes with the process, so what a killed one left is cleared here.
    """
    folder = out.parent / f".{out.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"cannot write beside {out}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(handle), folder.stat())
        except OSError:
            mine = False
        if not mine:
            raise UserError(f"{out} is being written by another process; wait for it or choose another folder")
        try:
            for leftover in folder.iterdir():
                leftover.unlink()
            yield folder
            for path in folder.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            folder.rename(out)
        except OSError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(
                f"{error.filename or out}: {error.strerror or error}; nothing was kept, make room and start again"
            ) from None
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(handle)


class _Spool:
    """The text of every kept document in one temporary file, and what is known of each."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self.digests: list[bytes] = []
        self._starts, self._in_val = array("Q"), bytearray()
        self._orders: dict[str, list[int]] = {}

    def __enter__(self) -> "_Spool":
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_text"):
            self._text.close()

    def fill(self, documents: Iterable[Document], options: PrepareOptions) -> None:
        """Write the documents, without duplicates, and order them."""
        seen: set[bytes] = set()
        seen_paragraphs: set[bytes] | None = set() if options.dedupe_paragraphs else None
        limit = int(options.val_fraction * 2**64)
        with self.path.open("wb") as file, Progress("read", "MB") as progress:
            for document in documents:
                text = document.text
                if seen_paragraphs is not None:
                    text = drop_seen_paragraphs(text, seen_paragraphs)
                data = text.encode()
                digest = hashlib.sha256(data).digest()
                if len(text) < options.min_chars or not data or digest in seen:
                    continue
                seen.add(digest)
                file.write(data)
                held_out = document.split == "val" if document.split else int.from_bytes(digest[:8]) < limit
                self.digests.append(digest)
                self._starts.append(self.size)
                self._in_val.append(held_out)
                self.size += len(data)
                progress.show(self.size / 1e6)
        self._starts.append(self.size)
        order = sorted(range(len(self.digests)), key=self.digests.__getitem__)
        self._orders = {split: [i for i in order if self._in_val[i] == (split == "val")] for split in SPLITS}
        for split, indices in self._orders.items():
            if not indices:
                raise UserError(
                    f"split {split} got none of the {len(order)} documents: give more text, or change --val-fraction "
                    f"(now {options.val_fraction}) or --chunk-kib (now {options.chunk_kib})"
                )
        with self.path.open("rb") as file:
            self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def text(self, i: int) -> str:
        return self._text[self._starts[i] : self._starts[i + 1]].decode()

    def texts(self, split: str, limit: int) -> Iterator[str]:
        """Documents of a split, in order, up to `limit` bytes (at least one)."""
        size = 0
        for i in self._orders[split]:
            if size >= limit:
                return
            size += self._starts[i + 1] - self._starts[i]
            yield self.text(i)

    def corpus_hash(self) -> str:
        digest = hashlib.sha256()
        for split in SPLITS:
            digest.update(f"{split} {len(self._orders[split])}\n".encode())
            for i in self._orders[split]:
                digest.update(self.digests[i])
        return digest.hexdigest()

    def encode(
        self, split: str, folder: Path, encoder: Encoder, eos_id: int, dtype: DType, shard_tokens: int, workers: int
    ) -> tuple[Shard, ...]:
        """Write the shards of a split."""
        order, little_endian = self._orders[split], "<u2" if dtype == "uint16" else "<u4"

        def chunks() -> Iterator[list[int]]:
            chunk: list[int] = []
            size = 0
            for i in order:
                chunk.append(i)
                size += self._starts[i + 1] - self._starts[i]
                if size >= _CHUNK_BYTES:
                    yield chunk
                    chunk, size = [], 0
            if chunk:
                yield chunk

        def encode(chunk: list[int]) -> tuple[bytes, int, int]:
            ids = encoder.encode([self.text(i) for i in chunk])
            end = np.array([eos_id], np.uint32)
            tokens = np.concatenate([part for document in ids for part in (document, end)])
            size = sum(self._starts[i + 1] - self._starts[i] for i in chunk)
            return tokens.astype(little_endian).tobytes(), len(chunk), size

        shards: list[Shard] = []
        with contextlib.ExitStack() as stack:
            pool = stack.enter_context(ThreadPoolExecutor(workers))
            progress = stack.enter_context(Progress(f"encode {split}", "documents", len(order)))
            encoded = in_order(lambda chunk: pool.submit(encode, chunk), chunks(), 2 * workers)
            done = 0
            while (first := next(encoded, None)) is not None:
                path = folder / f"{split}-{len(shards):05d}.bin"
                shard = Shard(path.name, tokens=0, documents=0, bytes=0, sha256="")
                with path.open("wb") as file:
                    for data, documents, size in chain([first], encoded):
                        file.write(data)
                        tokens = shard.tokens + len(data) // np.dtype(little_endian).itemsize
                        shard = replace(
                            shard, tokens=tokens, documents=shard.documents + documents, bytes=shard.bytes + size
                        )
                        progress.show(done := done + documents)
                        if tokens >= shard_tokens:
                            break
                shards.append(replace(shard, sha256=file_sha256(path)))
        return tuple(shards)


def drop_seen_paragraphs(text: str, seen: set[bytes], at_least: int = 80) -> str:
    """`text` without its paragraphs of `at_least` characters that are in `seen`; adds the others to it.

    Letter case and white space make no difference: the same paragraph is often wrapped anew.
    """
    kept = []
    for paragraph in text.split("\n\n"):
        if len(paragraph) >= at_least:
            key = hashlib.blake2b(" ".join(paragraph.lower().split()).encode(), digest_size=8).digest()
            if key in seen:
                continue
            seen.add(key)
        kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept).strip("\n")


Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(submit: Callable[[Item], Future[Result]], items: Iterable[Item], ahead: int) -> Iterator[Result]:
    """Results of the submitted items in their order, with at most `ahead` of them in memory."""
    waiting: deque[Future[Result]] = deque()
    for item in items:
        waiting.append(submit(item))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


class Progress:
    """One line on a terminal's stderr, rewritten a few times a second; nothing elsewhere."""

    def __init__(self, what: str, unit: str, total: float | None = None) -> None:
        self._what, self._unit, self._total = what, unit, total
        self._next = 0.0
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            sys.stderr.write("\r\x1b[K")

    def show(self, done: float) -> None:
        if self._terminal and (now := time.monotonic()) >= self._next:
            self._next = now + 0.2
            of = f" of {self._total:,.0f}" if self._total else ""
            sys.stderr.write(f"\r\x1b[K{self._what}: {done:,.0f}{of} {self._unit}")
            sys.stderr.flush()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def _since(started: float) -> float:
    return time.monotonic() - started
