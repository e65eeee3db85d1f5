"""The hash tree of RFC 6962: heads, proofs that a leaf is in a tree, and proofs that one tree continues another.

leaf = SHA-256(0x00 || line)      node = SHA-256(0x01 || left || right)      splits at the largest power of two below n
"""

import hashlib


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


def consistency(leaves: list[bytes], size: int) -> list[bytes]:
    """The proof that the tree of ``leaves`` continues that of its first ``size`` (RFC 6962, section 2.1.2)."""

    def prove(part: list[bytes], size: int, whole: bool) -> list[bytes]:
        if size == len(part):
            return [] if whole else [root(part)]
        k = _split(len(part))
        if size <= k:
            return [*prove(part[:k], size, whole), root(part[k:])]
        return [*prove(part[k:], size - k, False), root(part[:k])]

    return prove(leaves, size, True) if 0 < size <= len(leaves) else []


def consistent(size: int, head: bytes, later: int, later_head: bytes, proof: list[bytes]) -> bool:
    """Whether a proof shows that the tree of ``later`` leaves begins with that of ``size``."""
    if not 0 <= size <= later:
        return False
    if size == 0:
        return not proof

    def up(size: int, later: int, proof: list[bytes], whole: bool) -> tuple[bytes, bytes] | None:
        """The heads of both trees that a proof implies."""
        if size == later:
            if whole:
                return (head, head) if not proof else None
            return (proof[0], proof[0]) if len(proof) == 1 else None
        if not proof:
            return None
        k, last = _split(later), proof[-1]
        if size <= k:
            below = up(size, k, proof[:-1], whole)
            return below and (below[0], node(below[1], last))
        below = up(size - k, later - k, proof[:-1], False)
        return below and (node(last, below[0]), node(last, below[1]))

    return up(size, later, proof, True) == (head, later_head)
