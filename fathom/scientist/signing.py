"""Ed25519 notes: a log's checkpoints, and a person's release from quarantine.

A checkpoint is a note in the manner of C2SP's tlog-checkpoint: origin, size, tree head, a blank line, signatures.
"""

import base64
import hashlib
from typing import Any

from fathom.errors import UserError
from fathom.scientist.document import canonical

ORIGIN = "fathom-scientist"


def _ed25519() -> Any:
    try:
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError:
        raise UserError("signatures need the extra `scientist`: pip install 'fathom-attnres[scientist]'") from None
    return ed25519


def public_of(private_key: bytes) -> bytes:
    key: bytes = _ed25519().Ed25519PrivateKey.from_private_bytes(private_key).public_key().public_bytes_raw()
    return key


def sign(private_key: bytes, message: bytes) -> bytes:
    signature: bytes = _ed25519().Ed25519PrivateKey.from_private_bytes(private_key).sign(message)
    return signature


def signed(public_key: bytes, signature: bytes, message: bytes) -> bool:
    ed25519 = _ed25519()
    from cryptography.exceptions import InvalidSignature

    try:
        ed25519.Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _key_id(public: bytes) -> bytes:
    return hashlib.sha256(ORIGIN.encode() + b"\n\x01" + public).digest()[:4]


def checkpoint(size: int, head: bytes, private_key: bytes | None) -> str:
    """A log's size and tree head as a note, signed if a key (32 bytes) is given."""
    note = f"{ORIGIN}\n{size}\n{base64.b64encode(head).decode()}\n"
    if private_key is None:
        return note
    signature = _key_id(public_of(private_key)) + sign(private_key, note.encode())
    return f"{note}\n— {ORIGIN} {base64.b64encode(signature).decode()}\n"


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
        try:
            given = base64.b64decode(signatures.split()[2], validate=True)
        except (IndexError, ValueError):
            given = b""
        if given[:4] != _key_id(public_key) or not signed(public_key, given[4:], note.encode()):
            raise UserError("the checkpoint is not signed by this key")
    return size, head


def release(private_key: bytes, quarantine: str, scope: str, reason: str, by: str) -> dict[str, Any]:
    """A person's release of ``scope`` from the quarantine whose record has this hash."""
    said = {"of": quarantine, "scope": scope, "reason": reason, "by": by}
    return {**said, "signature": sign(private_key, b"release\n" + canonical(said)).hex()}


def released(public_key: bytes | None, content: dict[str, Any]) -> bool:
    """Whether a release is signed by the key whose word counts; without one nobody's does."""
    said = {key: content.get(key) for key in ("of", "scope", "reason", "by")}
    try:
        signature = bytes.fromhex(str(content.get("signature", "")))
    except ValueError:
        return False
    return public_key is not None and signed(public_key, signature, b"release\n" + canonical(said))
