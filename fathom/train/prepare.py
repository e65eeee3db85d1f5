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
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from fathom.errors import UserError
from fathom.train.data import SPLITS, TOKENIZER, DType, Manifest, TokenShards, file_sha256
from fathom.train.spool import Spool
from fathom.train.text import Document, describe_source, read_documents
from fathom.train.tokenizer import Encoder, load_tokenizer, train_tokenizer
from fathom.train.workers import cores

_log = logging.getLogger(__name__)


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
        if self.vocab_size > 2**20:
            raise UserError(f"vocab_size is {self.vocab_size}, but must be at most {2**20}")
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
        with Spool(folder / "text.spool") as spool:
            started = time.monotonic()
            spool.fill(
                documents,
                min_chars=options.min_chars,
                val_fraction=options.val_fraction,
                dedupe_paragraphs=options.dedupe_paragraphs,
            )
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
            # A file's name may be no UTF-8, and a manifest is.
            name=os.fsencode(options.name or name).decode("utf-8", "replace"),
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
    shards = TokenShards(folder, "train")
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


def _since(started: float) -> float:
    return time.monotonic() - started
