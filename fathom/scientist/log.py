"""A log of questions and answers in which nothing can be changed unnoticed by whoever keeps a checkpoint.

    hash_i = SHA-256(0x00 || hash_(i-1) || JCS(record_i without its hash))      a chain, one JSON record a line
    root   = the Merkle tree head of all lines (RFC 6962: 0x00 before a leaf, 0x01 before a node)

A checkpoint is a signed note: origin, size, root, and an Ed25519 signature where a key is given. The log is tamper-evident
given a checkpoint kept elsewhere, not tamper-proof: the file's owner can rewrite it, and then no old checkpoint fits.
"""

import base64
import fcntl
import hashlib
import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fathom.errors import UserError
from fathom.scientist.answer import Answer
from fathom.scientist.document import canonical

ORIGIN, GENESIS = "fathom-scientist", "0" * 64


@dataclass(frozen=True)
class Entry:
    index: int
    head: str
    """The chain's newest hash: an answer that carries it makes its reader a witness."""


def _hash(previous: str, body: dict[str, Any]) -> str:
    return hashlib.sha256(b"\x00" + bytes.fromhex(previous) + canonical(body)).hexdigest()


def leaf(line: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + line).digest()


def node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def _split(count: int) -> int:
    """The largest power of two below ``count``."""
    return 1 << (count - 1).bit_length() - 1


def root(leaves: list[bytes]) -> bytes:
    """The Merkle tree head of leaf hashes (RFC 6962, section 2.1)."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    level = leaves
    while len(level) > 1:
        paired = [node(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = paired + level[len(paired) * 2 :]
    return level[0]


def inclusion(leaves: list[bytes], index: int) -> list[bytes]:
    """The audit path of a leaf (RFC 6962, section 2.1.1)."""
    if len(leaves) <= 1:
        return []
    k = _split(len(leaves))
    if index < k:
        return [*inclusion(leaves[:k], index), root(leaves[k:])]
    return [*inclusion(leaves[k:], index - k), root(leaves[:k])]


def included(own: bytes, index: int, size: int, path: list[bytes], head: bytes) -> bool:
    """Whether a path shows that leaf ``index`` is in the tree of ``size`` leaves with this head."""
    if not 0 <= index < size:
        return False

    def up(index: int, size: int, path: list[bytes]) -> bytes | None:
        if size == 1:
            return own if not path else None
        if not path:
            return None
        k = _split(size)
        below = up(index, k, path[:-1]) if index < k else up(index - k, size - k, path[:-1])
        if below is None:
            return None
        return node(below, path[-1]) if index < k else node(path[-1], below)

    return up(index, size, path) == head


class Log:
    """An append-only file of records; made on the first append."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append_answer(self, answer: Answer) -> Entry:
        return self.append("abstain" if answer.result is None else "answer", json.loads(answer.bytes))

    def append(self, kind: str, content: dict[str, Any]) -> Entry:
        """Write one record through to the disk, or fail: who cannot log must not answer.

        Raises:
            UserError: the log's last record is broken, or the clock is behind it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            lines = self._lines(file.name)
            last = _record(lines[-1], len(lines) - 1, self.path) if lines else {"hash": GENESIS, "time": ""}
            time = datetime.now(UTC).isoformat(timespec="microseconds")
            if time < last["time"]:
                raise UserError(f"{self.path}: the clock is behind the last record: {time} is before {last['time']}")
            body = {"v": 1, "seq": len(lines), "time": time, "kind": kind, "content": content, "prev": last["hash"]}
            head = _hash(last["hash"], body)
            file.write(canonical({**body, "hash": head}) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        return Entry(len(lines), head)

    def lines(self) -> list[bytes]:
        if not self.path.is_file():
            raise UserError(f"there is no log {self.path}")
        return self._lines(self.path)

    @staticmethod
    def _lines(path: Any) -> list[bytes]:
        content = Path(path).read_bytes()
        if content and not content.endswith(b"\n"):
            raise UserError(f"{path}: the last record is cut off")
        return content.splitlines()

    def verify(self, checkpoint: str | None = None, public_key: bytes | None = None) -> int:
        """The number of records, if the chain holds and, with a checkpoint, still begins as it did then.

        Raises:
            UserError: what is broken, and where.
        """
        lines = self.lines()
        previous, time = GENESIS, ""
        for index, line in enumerate(lines):
            record = _record(line, index, self.path)
            if record["prev"] != previous:
                raise UserError(f"{self.path}: record {index} does not follow record {index - 1}")
            if record["time"] < time:
                raise UserError(f"{self.path}: record {index} is earlier than record {index - 1}")
            previous, time = record["hash"], record["time"]
        if checkpoint is not None:
            size, head = read_checkpoint(checkpoint, public_key)
            if size > len(lines):
                raise UserError(f"{self.path}: {size} records were there at the checkpoint and {len(lines)} are now")
            if root([leaf(line) for line in lines[:size]]) != head:
                raise UserError(f"{self.path}: the first {size} records are not those of the checkpoint")
        return len(lines)

    def checkpoint(self, private_key: bytes | None = None) -> str:
        """The log's size and tree head as a note, signed if a key (32 bytes of Ed25519) is given."""
        lines = self.lines()
        head = base64.b64encode(root([leaf(line) for line in lines])).decode()
        note = f"{ORIGIN}\n{len(lines)}\n{head}\n"
        if private_key is None:
            return note
        key = _ed25519().Ed25519PrivateKey.from_private_bytes(private_key)
        signature = _key_id(key.public_key().public_bytes_raw()) + key.sign(note.encode())
        return f"{note}\n— {ORIGIN} {base64.b64encode(signature).decode()}\n"

    def prove(self, index: int) -> dict[str, Any]:
        """That record ``index`` is in the log, for whoever holds only a tree head of this size."""
        leaves = [leaf(line) for line in self.lines()]
        if not 0 <= index < len(leaves):
            raise UserError(f"{self.path} has {len(leaves)} records: there is no record {index}")
        return {
            "index": index, "size": len(leaves), "leaf": leaves[index].hex(),
            "path": [each.hex() for each in inclusion(leaves, index)], "root": root(leaves).hex(),
        }  # fmt: skip


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise UserError("signatures need the extra `scientist`: pip install 'fathom-attnres[scientist]'") from None
    return ed25519


def _key_id(public: bytes) -> bytes:
    return hashlib.sha256(ORIGIN.encode() + b"\n\x01" + public).digest()[:4]


def _record(line: bytes, index: int, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(line)
        body = {key: value for key, value in record.items() if key != "hash"}
        whole = record["seq"] == index and canonical(record) == line and _hash(record["prev"], body) == record["hash"]
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: record {index} is not what was written")
    return record


def read_checkpoint(text: str, public_key: bytes | None = None) -> tuple[int, bytes]:
    """Size and tree head of a checkpoint; with a public key, only if it signed them.

    Raises:
        UserError: not a checkpoint of such a log, or not signed by that key.
    """
    note, _, signatures = text.partition("\n\n")
    note = note if note.endswith("\n") else note + "\n"
    parts = note.splitlines()
    try:
        if len(parts) != 3 or parts[0] != ORIGIN:
            raise ValueError
        size, head = int(parts[1]), base64.b64decode(parts[2], validate=True)
    except ValueError:
        raise UserError("this is not a checkpoint of a scientist's log") from None
    if public_key is not None:
        ed25519 = _ed25519()
        from cryptography.exceptions import InvalidSignature

        try:
            signed = base64.b64decode(signatures.split()[2], validate=True)
            if signed[:4] != _key_id(public_key):
                raise InvalidSignature
            ed25519.Ed25519PublicKey.from_public_bytes(public_key).verify(signed[4:], note.encode())
        except (InvalidSignature, IndexError, ValueError):
            raise UserError("the checkpoint is not signed by this key") from None
    return size, head
