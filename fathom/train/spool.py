"""Between reading and training: documents spooled to one file, deduplicated, ordered, and encoded into shards.

The spool is the text of all kept documents in one temporary file, with a digest, a place and a split for each, so that the
source is read once, any number of threads can encode, and memory holds some 200 bytes a document.
"""

import contextlib
import hashlib
import mmap
import sys
import time
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np

from fathom.errors import UserError
from fathom.train.data import SPLITS, DType, Shard, file_sha256
from fathom.train.text import Document
from fathom.train.tokenizer import Encoder
from fathom.train.workers import in_order

CHUNK_BYTES = 1 << 20  # text that one task encodes; part of the format, as shards end where chunks end


class Spool:
    """The text of every kept document in one temporary file, and what is known of each."""

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, 0
        self.digests: list[bytes] = []
        self._starts, self._in_val = array("Q"), bytearray()
        self._orders: dict[str, list[int]] = {}

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_text"):
            self._text.close()

    def fill(
        self, documents: Iterable[Document], *, min_chars: int, val_fraction: float, dedupe_paragraphs: bool
    ) -> None:
        """Write the documents, without duplicates, and order them; `UserError` if a split gets none."""
        seen: set[bytes] = set()
        seen_paragraphs: set[bytes] | None = set() if dedupe_paragraphs else None
        limit = int(val_fraction * 2**64)
        with self.path.open("wb") as file, Progress("read", "MB") as progress:
            for document in documents:
                text = document.text
                if seen_paragraphs is not None:
                    text = drop_seen_paragraphs(text, seen_paragraphs)
                data = text.encode()
                digest = hashlib.sha256(data).digest()
                if len(text) < min_chars or not data or digest in seen:
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
                    f"split {split} got none of the {len(order)} documents: give more text, change --val-fraction "
                    f"(now {val_fraction}), or cut long files into more documents with a smaller --chunk-kib"
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
                if size >= CHUNK_BYTES:
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
