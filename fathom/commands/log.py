"""`fathom log`: check, prove and witness a log of questions, and release what is under quarantine."""

import secrets
from pathlib import Path

from tyro.conf import Positional

from fathom.commands.output import Function, print_json
from fathom.errors import UserError


def verify() -> Function:
    def run(
        log: Positional[Path], checkpoint: Path | None = None, public_key: str | None = None, witness: str | None = None
    ) -> None:
        """Check a log's chain and, against what you kept, that it still begins as it did.

        Args:
            log: A log that `fathom ask --log` or a server wrote.
            checkpoint: The file that `fathom log checkpoint` printed earlier.
            public_key: The signer's key, 64 hexadecimal digits: an unsigned checkpoint is then refused.
            witness: INDEX:HEAD of an answer that you got, as in 17:5be0...
        """
        from fathom.scientist.log import Entry, Log

        kept = None if checkpoint is None else checkpoint.read_text()
        if public_key is not None and kept is None:
            raise UserError("a public key checks a checkpoint: give one")
        index, _, head = (witness or "").partition(":")
        if witness is not None and not (index.isdecimal() and len(head) == 64):
            raise UserError("a witness is INDEX:HEAD, as an answer's log entry says")
        entry = None if witness is None else Entry(int(index), head)
        size = Log(log).verify(kept, None if public_key is None else read_key(public_key), entry)
        print(f"{size} records, chain whole" + ("" if kept is None else ", as at the checkpoint")
              + ("" if entry is None else f", record {index} as witnessed"))  # fmt: skip

    return run


def checkpoint() -> Function:
    def run(log: Positional[Path], key: Path | None = None) -> None:
        """Print the size and tree head of a log, for you to keep elsewhere.

        Args:
            log: A log that `fathom ask --log` wrote.
            key: A file with the 64 hexadecimal digits of an Ed25519 private key, to sign it.
        """
        from fathom.scientist.log import Log

        print(Log(log).checkpoint(None if key is None else read_key(key.read_text())), end="")

    return run


def prove() -> Function:
    def run(log: Positional[Path], index: Positional[int], since: bool = False) -> None:
        """Print the proof that a record is in a log, or that the log continues what it was.

        Args:
            log: A log that `fathom ask --log` or a server wrote.
            index: The record's number, from 0; with --since, how many records the log had.
            since: Prove that the log continues its first INDEX records.
        """
        from fathom.scientist.log import Log

        print_json(Log(log).prove_since(index) if since else Log(log).prove(index))

    return run


def key() -> Function:
    def run(file: Positional[Path]) -> None:
        """Make an Ed25519 key for checkpoints or releases if there is none, and print its public half.

        Args:
            file: Of the private key: keep it where the server cannot read it.
        """
        from fathom.scientist.signing import public_of

        if not file.exists():
            file.touch(mode=0o600)
            file.write_text(secrets.token_hex(32) + "\n")
        print(public_of(read_key(file.read_text())).hex())

    return run


def release() -> Function:
    def run(log: Positional[Path], key: Path, reason: str, by: str, scope: str = "all") -> None:
        """Release a key, or all, from quarantine: a person's signed word, in the log.

        Args:
            log: The server's log.
            key: The file of the private key whose public half the server was started with.
            reason: Why questions may be answered again.
            by: Who says so.
            scope: The id of the key under quarantine, or all.
        """
        from fathom.scientist import signing
        from fathom.scientist.log import Log
        from fathom.scientist.triggers import Watch

        private = read_key(key.read_text())
        watch = Watch(signing.public_of(private))
        written = Log(log)
        written.verify()
        for record in written.read_on()[0]:
            watch.fold(record)
        held = watch.quarantined.get(scope)
        if held is None:
            raise UserError(
                f"{log}: {scope} is not under quarantine; held are {', '.join(watch.quarantined) or 'none'}"
            )
        if not reason.strip() or not by.strip():
            raise UserError("a release has a reason and a name")
        entry = written.append("release", signing.release(private, held["hash"], scope, reason, by))
        print(
            f"{scope} is released from {held['reason']} in record {entry.index}; a server with another key ignores it"
        )

    return run


def read_key(text: str) -> bytes:
    """64 hexadecimal digits as the 32 bytes of an Ed25519 key."""
    try:
        key = bytes.fromhex(text.strip())
    except ValueError:
        key = b""
    if len(key) != 32:
        raise UserError("a key is 64 hexadecimal digits")
    return key
