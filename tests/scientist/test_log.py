"""Every change of a log is found: by the chain, or by a checkpoint that somebody kept."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fathom.errors import UserError
from fathom.scientist import Scientist, World
from fathom.scientist.document import canonical
from fathom.scientist.log import GENESIS, Log, _hash
from fathom.scientist.merkle import consistency, consistent, included, inclusion, leaf, node, root
from fathom.scientist.signing import read_checkpoint

KEY = bytes(range(32))


def filled(path: Path, count: int = 9) -> Log:
    log = Log(path)
    for index in range(count):
        assert log.append("answer", {"p": index / 10}).index == index
    return log


def rechained(lines: list[bytes]) -> bytes:
    """A forger's log: whatever the records, with a chain that holds."""
    previous, result = GENESIS, b""
    for index, line in enumerate(lines):
        body = {key: value for key, value in json.loads(line).items() if key != "hash"} | {
            "seq": index,
            "prev": previous,
        }
        previous = _hash(previous, body)
        result += canonical({**body, "hash": previous}) + b"\n"
    return result


def test_the_tree_is_rfc_6962s() -> None:
    """Heads of the RFC's construction, written out for up to seven leaves."""
    a, b, c, d, e, f, g = (leaf(bytes([i])) for i in range(7))
    assert root([]) == hashlib.sha256(b"").digest() and root([a]) == hashlib.sha256(b"\x00\x00").digest()
    assert root([a, b, c]) == node(node(a, b), c)
    assert root([a, b, c, d, e]) == node(node(node(a, b), node(c, d)), e)
    assert root([a, b, c, d, e, f, g]) == node(node(node(a, b), node(c, d)), node(node(e, f), g))


def test_inclusion_is_proved_for_members_only() -> None:
    for size in range(1, 20):
        leaves = [leaf(str(i).encode()) for i in range(size)]
        for index in range(size):
            path = inclusion(leaves, index)
            assert included(leaves[index], index, size, path, root(leaves))
            assert not included(leaf(b"other"), index, size, path, root(leaves))
            assert not included(leaves[index], index, size, [*path, leaf(b"x")], root(leaves))
            assert size == 1 or not included(leaves[index], (index + 1) % size, size, path, root(leaves))


def test_growth_is_proved_and_nothing_else() -> None:
    """RFC 6962, section 2.1.2, for every pair of sizes; a changed head, proof or size is no proof."""
    leaves = [leaf(str(i).encode()) for i in range(20)]
    for later in range(1, 20):
        whole = root(leaves[:later])
        for size in range(1, later + 1):
            proof, head = consistency(leaves[:later], size), root(leaves[:size])
            assert consistent(size, head, later, whole, proof)
            assert not consistent(size, leaf(b"x"), later, whole, proof)
            assert not consistent(size, head, later, leaf(b"x"), proof)
            assert not consistent(size, head, later, whole, [*proof, leaf(b"x")])
            assert not proof or not consistent(size, head, later, whole, [leaf(b"x"), *proof[1:]])
            assert size == later or not consistent(size + 1, head, later, whole, proof)


def test_large_numbers_do_not_break_a_log(tmp_path: Path) -> None:
    """Whole doubles beyond 2^53 are written without an exponent, and read back as what they were."""
    log = Log(tmp_path / "log.jsonl")
    for number in (5.105362922935909e16, 1e20, 1e21, 1e100, 2.0**53, 10**17, -(10**18)):
        log.append("answer", {"C": number})
    assert log.verify() == 7 and len(Log(log.path).read_on()[0]) == 7


def test_questions_are_logged_to_the_last_digit(
    tmp_path: Path, made: Callable[[Any], World], line: dict[str, Any]
) -> None:
    scientist, log = Scientist(made(line)), Log(tmp_path / "log.jsonl")
    asked = [0.123456789, 0.12345678901234566]
    for x in asked:
        log.append_answer(scientist.predict({"x": x}))
    contents = [record["content"] for record in log.read_on()[0]]
    assert [each["query"]["design"]["x"] for each in contents] == asked
    assert contents[0]["query_sha256"] != contents[1]["query_sha256"]


def test_a_log_verifies_and_proves(tmp_path: Path) -> None:
    log = filled(tmp_path / "log.jsonl")
    early = log.checkpoint(KEY)
    log.append("abstain", {"reason": "extrapolation"})
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    public = Ed25519PrivateKey.from_private_bytes(KEY).public_key().public_bytes_raw()
    assert log.verify(early, public) == 10
    proof = log.prove(4)
    path = [bytes.fromhex(each) for each in proof["path"]]
    assert included(bytes.fromhex(proof["leaf"]), 4, 10, path, bytes.fromhex(proof["root"]))
    assert read_checkpoint(log.checkpoint())[1].hex() == proof["root"]
    with pytest.raises(UserError, match="not signed by this key"):
        read_checkpoint(early.replace("\n9\n", "\n8\n"), public)
    with pytest.raises(UserError, match="not signed by this key"):
        read_checkpoint(log.checkpoint(), public)


ATTACKS: dict[str, Callable[[list[bytes]], bytes]] = {
    "flip a byte": lambda lines: b"\n".join([*lines[:3], lines[3].replace(b"0.3", b"0.9"), *lines[4:], b""]),
    "truncate": lambda lines: rechained(lines[:-3]),
    "cut off": lambda lines: b"\n".join(lines)[:-5],
    "reorder": lambda lines: b"\n".join([lines[1], lines[0], *lines[2:], b""]),
    "reorder and rechain": lambda lines: rechained([lines[1], lines[0], *lines[2:]]),
    "drop one and rechain": lambda lines: rechained(lines[:4] + lines[5:] + lines[-1:]),
    "fork": lambda lines: rechained([*lines[:5], *(line.replace(b'"p":0.', b'"p":1.') for line in lines[5:])]),
    "roll back": lambda lines: b"\n".join([*lines[:6], b""]),
    "start anew": lambda lines: b"",
    "reformat": lambda lines: b"\n".join([json.dumps(json.loads(line)).encode() for line in lines] + [b""]),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_is_found(tmp_path: Path, attack: str) -> None:
    log = filled(tmp_path / "log.jsonl")
    kept = log.checkpoint()
    assert log.verify(kept) == 9
    before = log.path.read_bytes()
    log.path.write_bytes(ATTACKS[attack](log.lines()))
    assert log.path.read_bytes() != before
    with pytest.raises(UserError):
        log.verify(kept)


def test_records_of_another_history_are_found_without_a_checkpoint(tmp_path: Path) -> None:
    """Whole records in their places, each with a hash that holds: only the chain between them is broken."""
    log = filled(tmp_path / "log.jsonl")
    lines = log.lines()
    other = rechained([line.replace(b'"p":0.2', b'"p":1.2') for line in lines]).splitlines()
    log.path.write_bytes(b"\n".join([*lines[:5], *other[5:], b""]))
    with pytest.raises(UserError, match="record 5 does not follow record 4"):
        log.verify()


def test_a_shorter_log_is_named_as_such(tmp_path: Path) -> None:
    log = filled(tmp_path / "log.jsonl")
    kept = log.checkpoint()
    log.path.write_bytes(b"\n".join([*log.lines()[:6], b""]))
    with pytest.raises(UserError, match="9 records were there at the checkpoint and 6 are now"):
        log.verify(kept)


def test_a_rewritten_log_without_a_kept_checkpoint_is_not_found(tmp_path: Path) -> None:
    """The limit that docs/scientist.md states: tamper-evident given a checkpoint, not tamper-proof."""
    log = filled(tmp_path / "log.jsonl")
    log.path.write_bytes(rechained(log.lines()[:-3]))
    assert log.verify() == 6


def test_a_clock_that_goes_back_stops_the_log(tmp_path: Path) -> None:
    log = filled(tmp_path / "log.jsonl", 1)
    record = json.loads(log.lines()[0]) | {"time": "2999-01-01T00:00:00.000000+00:00"}
    log.path.write_bytes(rechained([canonical(record)]))
    with pytest.raises(UserError, match="the clock is behind"):
        log.append("answer", {})


def test_no_answer_is_added_to_a_broken_log(tmp_path: Path) -> None:
    log = filled(tmp_path / "log.jsonl", 2)
    log.path.write_bytes(log.path.read_bytes()[:-4])
    with pytest.raises(UserError, match="cut off"):
        log.append("answer", {})
