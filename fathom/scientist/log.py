"""A log of questions and answers in which nothing can be changed unnoticed by whoever keeps a checkpoint.

    hash_i = SHA-256(0x00 || hash_(i-1) || JCS(record_i without its hash))      a chain, one JSON record a line
    root   = the Merkle tree head of all lines (merkle.py)

The log is tamper-evident given a checkpoint kept elsewhere, not tamper-proof: the file's owner can rewrite it, and then no
old checkpoint fits. A reader who keeps only an answer's index and head is a witness as well.
"""

import fcntl
import hashlib
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from fathom.errors import UserError
from fathom.scientist import merkle, signing
from fathom.scientist.answer import Answer
from fathom.scientist.document import canonical, digest
from fathom.scientist.merkle import leaf
from fathom.scientist.world import World

GENESIS = "0" * 64
Record = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    index: int
    head: str
    """The chain's newest hash: an answer that carries it makes its reader a witness."""


def _hash(previous: str, body: Record) -> str:
    return hashlib.sha256(b"\x00" + bytes.fromhex(previous) + canonical(body)).hexdigest()


class Log:
    """An append-only file of records; made on the first append."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tail: tuple[int, int, Record] | None = None
        """Bytes and records of the file as this object left it, and its last record."""

    def append_answer(self, answer: Answer) -> Entry:
        return self.append("abstain" if answer.result is None else "answer", json.loads(answer.bytes))

    def append(self, kind: str, content: Record) -> Entry:
        """Write one record through to the disk, or fail: who cannot log must not answer.

        Raises:
            UserError: the log's last record is broken, or the clock is behind it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            count, last = self._last(file)
            time = datetime.now(UTC).isoformat(timespec="microseconds")
            if time < last["time"]:
                raise UserError(f"{self.path}: the clock is behind the last record: {time} is before {last['time']}")
            body = {"v": 1, "seq": count, "time": time, "kind": kind, "content": content, "prev": last["hash"]}
            record = {**body, "hash": _hash(last["hash"], body)}
            file.write(canonical(record) + b"\n")
            file.flush()
            os.fsync(file.fileno())
            self._tail = (os.fstat(file.fileno()).st_size, count + 1, record)
        return Entry(count, str(record["hash"]))

    def _last(self, file: BinaryIO) -> tuple[int, Record]:
        """How many records there are, and the last: read anew unless the file ends as this object left it."""
        if self._tail is not None:
            size, count, record = self._tail
            line = canonical(record) + b"\n"
            file.seek(size - len(line))
            if file.read() == line:
                return count, record
        lines = self._lines(self.path)
        return len(lines), _record(lines[-1], len(lines) - 1, self.path) if lines else {"hash": GENESIS, "time": ""}

    def lines(self) -> list[bytes]:
        if not self.path.is_file():
            raise UserError(f"there is no log {self.path}")
        return self._lines(self.path)

    @staticmethod
    def _lines(path: Path) -> list[bytes]:
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            raise UserError(f"{path}: the last record is cut off")
        return content.splitlines()

    def read_on(self, place: tuple[int, int] = (0, 0)) -> tuple[list[Record], tuple[int, int]]:
        """The records after a place (bytes and records before it), each checked by itself, and the place after them.

        Raises:
            UserError: a record is broken, or the log is shorter than it was.
        """
        if not self.path.is_file():
            return [], place
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < place[0]:
                raise UserError(f"{self.path} is shorter than it was")
            file.seek(place[0])
            content = file.read()
        if content and not content.endswith(b"\n"):
            raise UserError(f"{self.path}: the last record is cut off")
        records = [_record(line, place[1] + i, self.path) for i, line in enumerate(content.splitlines())]
        return records, (place[0] + len(content), place[1] + len(records))

    def verify(
        self, checkpoint: str | None = None, public_key: bytes | None = None, witness: Entry | None = None
    ) -> int:
        """The number of records, if the chain holds and still begins as a checkpoint or an answer's head says it did.

        Raises:
            UserError: what is broken, and where.
        """
        lines = self.lines()
        previous, time, heads = GENESIS, "", []
        for index, line in enumerate(lines):
            record = _record(line, index, self.path)
            if record["prev"] != previous:
                raise UserError(f"{self.path}: record {index} does not follow record {index - 1}")
            if record["time"] < time:
                raise UserError(f"{self.path}: record {index} is earlier than record {index - 1}")
            previous, time = record["hash"], record["time"]
            heads.append(previous)
        if witness is not None and (witness.index >= len(heads) or heads[witness.index] != witness.head):
            raise UserError(f"{self.path}: record {witness.index} is not the one whose hash was given out")
        if checkpoint is not None:
            size, head = signing.read_checkpoint(checkpoint, public_key)
            if size > len(lines):
                raise UserError(f"{self.path}: {size} records were there at the checkpoint and {len(lines)} are now")
            if merkle.root([leaf(line) for line in lines[:size]]) != head:
                raise UserError(f"{self.path}: the first {size} records are not those of the checkpoint")
        return len(lines)

    def checkpoint(self, private_key: bytes | None = None) -> str:
        """The log's size and tree head as a note, signed if a key (32 bytes of Ed25519) is given."""
        lines = self.lines()
        return signing.checkpoint(len(lines), merkle.root([leaf(line) for line in lines]), private_key)

    def prove(self, index: int) -> Record:
        """That record ``index`` is in the log, for whoever holds only a tree head of this size."""
        leaves = [leaf(line) for line in self.lines()]
        if not 0 <= index < len(leaves):
            raise UserError(f"{self.path} has {len(leaves)} records: there is no record {index}")
        return {
            "index": index, "size": len(leaves), "leaf": leaves[index].hex(),
            "path": [each.hex() for each in merkle.inclusion(leaves, index)], "root": merkle.root(leaves).hex(),
        }  # fmt: skip

    def prove_since(self, size: int) -> Record:
        """That the log continues what it was at ``size`` records, for whoever holds only that tree head."""
        leaves = [leaf(line) for line in self.lines()]
        if not 0 < size <= len(leaves):
            raise UserError(f"{self.path} has {len(leaves)} records: it never had {size}")
        return {
            "since": size, "size": len(leaves), "root": merkle.root(leaves).hex(),
            "path": [each.hex() for each in merkle.consistency(leaves, size)],
        }  # fmt: skip

    def announce(self, world: World) -> int:
        """Write down a world that this log has not seen, with what differs from the last over the same evidence.

        Returns:
            How many worlds over this world's evidence the log knows, this one included: the paths of a garden of forking
            paths. More than one means that theories or priors were changed with the evidence at hand.
        """
        evidence = digest(world.document.get("evidence", []))
        seen = [each["content"] for each in self.read_on()[0] if each["kind"] == "world"]
        paths = {each["world"]: each for each in seen if each["evidence"] == evidence}
        if world.hash not in paths:
            parts = {key: digest(value) for key, value in world.document.items()}
            before = list(paths.values())[-1]["parts"] if paths else None
            changed = None if before is None else sorted(k for k in parts.keys() | before.keys()
                                                         if parts.get(k) != before.get(k))  # fmt: skip
            content = {"world": world.hash, "evidence": evidence, "parts": parts, "changed": changed}
            self.append("world", content)
            paths[world.hash] = content
        return len(paths)


def _record(line: bytes, index: int, path: Path) -> Record:
    try:
        record: Record = json.loads(line)
        body = {key: value for key, value in record.items() if key != "hash"}
        whole = record["seq"] == index and canonical(record) == line and _hash(record["prev"], body) == record["hash"]
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: record {index} is not what was written")
    return record
