"""Token shards on disk, and the one integer that is the whole state of data order.

A dataset is a folder:

    manifest.json                 what is in it (`Manifest`), with the sha256 of every other file
    tokenizer.json                Hugging Face tokenizers format
    train-00000.bin, ...          raw little-endian uint16 (uint32 when the vocabulary passes 65,536)
    val-00000.bin, ...            held-out documents; no document is in both splits

The shards of a split, concatenated, are one token stream s_0 .. s_{n-1}; every document is its tokens followed by
`eos_id`. Window i of a context of T tokens is s_{iT} .. s_{iT+T}: T inputs, and as targets the same tokens one later,
so that n tokens hold N = (n - 1) // T windows. The training stream is w(0), w(1), ... with

    w(p) = window pi_{seed, e}(p mod N),    e = p // N  (the epoch),

where pi is a keyed pseudo-random permutation of 0 .. N-1: a Feistel network on the next power of four, walked until it
lands below N. It needs no table and no state, so "sequences consumed so far" resumes a run exactly, at any batch size
and on any number of ranks: a global step takes positions [consumed, consumed + batch), and each rank its slice of them.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Int64, Shaped, UInt64

from fathom.errors import UserError

FORMAT = "fathom-tokens-1"
MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
SPLITS = ("train", "val")
DType = Literal["uint16", "uint32"]
_LITTLE_ENDIAN: Mapping[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class Shard:
    """One file of tokens."""

    file: str
    """Name inside the dataset folder."""
    tokens: int
    """Number of tokens, each document's end token included."""
    documents: int
    """Documents that end in this file."""
    bytes: int
    """Bytes of UTF-8 text that these tokens encode."""
    sha256: str
    """Hexadecimal digest of the file."""


@dataclass(frozen=True)
class Manifest:
    """What a dataset folder holds."""

    name: str
    corpus_hash: str
    """Identity of the text, whatever the tokenizer: a sha256 over the sha256 of each document, in order."""
    tokenizer_sha256: str
    vocab_size: int
    eos_id: int
    dtype: DType
    splits: Mapping[str, tuple[Shard, ...]]
    source: Mapping[str, Any] = field(default_factory=dict)
    """Where the text came from."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """How it was prepared."""

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read `folder`/manifest.json; a missing, malformed or inconsistent field is a `UserError` that names it."""
        path = Path(folder) / MANIFEST
        try:
            data = json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{folder} has no {MANIFEST}, so it is no dataset; make one with `fathom data prepare`"
            ) from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error}); prepare the dataset again") from None
        return cls.from_json(data, where=str(path))

    @classmethod
    def from_json(cls, data: Any, where: str = MANIFEST) -> "Manifest":
        """The manifest that `to_json` wrote; `where` names it in errors."""

        def take(part: Any, key: str, kind: type, at: str = "") -> Any:
            if not isinstance(part, dict) or key not in part:
                raise UserError(f"{where}: field {at}{key} is missing; prepare the dataset again")
            value = part[key]
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UserError(f"{where}: field {at}{key} is {value!r}, of the wrong type; prepare the dataset again")
            if isinstance(value, int) and value < 0:
                raise UserError(f"{where}: field {at}{key} is {value}, below 0; prepare the dataset again")
            return value

        if take(data, "format", str) != FORMAT:
            raise UserError(f"{where}: field format is {data['format']!r}, but this Fathom reads {FORMAT!r}")
        splits: dict[str, tuple[Shard, ...]] = {}
        for split, rows in take(data, "splits", dict).items():
            if split not in SPLITS or not isinstance(rows, list):
                raise UserError(f"{where}: field splits.{split} must be a list named {' or '.join(SPLITS)}")
            shards = []
            for i, row in enumerate(rows):
                at = f"splits.{split}[{i}]."
                name = take(row, "file", str, at)
                if Path(name).name != name or not name:
                    raise UserError(f"{where}: field {at}file is {name!r}, but must be a plain file name")
                counts = {key: take(row, key, int, at) for key in ("tokens", "documents", "bytes")}
                if counts["tokens"] == 0:
                    raise UserError(f"{where}: field {at}tokens is 0; a shard is never empty")
                shards.append(Shard(name, **counts, sha256=take(row, "sha256", str, at)))
            splits[split] = tuple(shards)
        manifest = cls(
            name=take(data, "name", str),
            corpus_hash=take(data, "corpus_hash", str),
            tokenizer_sha256=take(data, "tokenizer_sha256", str),
            vocab_size=take(data, "vocab_size", int),
            eos_id=take(data, "eos_id", int),
            dtype=take(data, "dtype", str),
            splits=splits,
            source=take(data, "source", dict),
            settings=take(data, "settings", dict),
        )
        if manifest.dtype not in get_args(DType):
            raise UserError(f"{where}: field dtype is {manifest.dtype!r}, but must be {' or '.join(get_args(DType))}")
        if manifest.dtype == "uint16" and manifest.vocab_size > 2**16:
            raise UserError(f"{where}: field vocab_size is {manifest.vocab_size}, beyond what dtype uint16 holds")
        if manifest.eos_id >= manifest.vocab_size:
            raise UserError(f"{where}: field eos_id is {manifest.eos_id}, beyond vocab_size {manifest.vocab_size}")
        return manifest

    def to_json(self) -> dict[str, Any]:
        """The JSON object of manifest.json."""
        return {"format": FORMAT, **asdict(self)}

    def save(self, folder: Path) -> None:
        """Write `folder`/manifest.json."""
        (folder / MANIFEST).write_text(json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n", "utf-8")

    def total(self, split: str, count: Literal["tokens", "documents", "bytes"]) -> int:
        """Sum of one count over the shards of a split."""
        return sum(getattr(shard, count) for shard in self.splits.get(split, ()))


class TokenShards:
    """The token stream of one split, memory-mapped.

    Args:
        folder: the dataset.
        split: "train" or "val".
        verify: compare every shard and the tokenizer with the sha256 in the manifest, and the tokens with the size of
            its vocabulary (about 1 s per GB); sizes are always compared. A file that is missing, truncated or altered
            is a `UserError` that names it.
    """

    def __init__(self, folder: Path, split: str, *, verify: bool = True) -> None:
        self.folder, self.split = Path(folder), split
        self.manifest = Manifest.load(self.folder)
        shards = self.manifest.splits.get(split, ())
        if not shards:
            raise UserError(f"{folder} has no split {split!r}; it has {', '.join(self.manifest.splits) or 'none'}")
        dtype = _LITTLE_ENDIAN[self.manifest.dtype]
        self._maps: list[Shaped[np.ndarray, " tokens"]] = []
        for shard in shards:
            path = self.folder / shard.file
            self._check(path, shard.sha256 if verify else None, shard.tokens * dtype.itemsize)
            self._maps.append(np.memmap(path, dtype, mode="r", shape=(shard.tokens,)))
            if verify and (largest := int(self._maps[-1].max())) >= self.manifest.vocab_size:
                raise UserError(
                    f"{path} holds token {largest}, beyond vocab_size {self.manifest.vocab_size} in {MANIFEST}: that "
                    "was altered; prepare or unpack the dataset again"
                )
        if verify:
            self._check(self.folder / TOKENIZER, self.manifest.tokenizer_sha256)
        self._ends = np.cumsum([shard.tokens for shard in shards])
        self.num_tokens = int(self._ends[-1])
        self.vocab_size, self.eos_id = self.manifest.vocab_size, self.manifest.eos_id
        self.corpus_hash = self.manifest.corpus_hash
        self.bytes_per_token = self.manifest.total(split, "bytes") / self.num_tokens

    @staticmethod
    def _check(path: Path, sha256: str | None, size: int | None = None) -> None:
        if not path.is_file():
            raise UserError(f"{path} is missing; prepare or unpack the dataset again")
        if size is not None and path.stat().st_size != size:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes, not {size} as in {MANIFEST}; prepare or unpack it again"
            )
        if sha256 is not None and file_sha256(path) != sha256:
            raise UserError(f"{path} was altered: its sha256 is not that in {MANIFEST}; prepare or unpack it again")

    def read(self, start: int, count: int) -> Int64[np.ndarray, " count"]:
        """Tokens start .. start + count - 1 of the split, across shard borders; IndexError outside of it."""
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"tokens [{start}, {start + count}) of a split of {self.num_tokens}")
        out = np.empty(count, np.int64)
        filled, shard = 0, int(np.searchsorted(self._ends, start, side="right"))
        while filled < count:
            tokens = self._maps[shard]
            offset = start + filled - (int(self._ends[shard]) - len(tokens))
            part = tokens[offset : offset + count - filled]
            out[filled : filled + len(part)] = part
            filled, shard = filled + len(part), shard + 1
        return out


def _mix(x: UInt64[np.ndarray, "*shape"]) -> UInt64[np.ndarray, "*shape"]:
    """splitmix64's finalizer: every output bit depends on every input bit (Steele, Lea and Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class SequenceOrder:
    """Position in the stream -> sequence index: another keyed permutation of 0 .. num_sequences-1 in every epoch."""

    ROUNDS = 8

    def __init__(self, num_sequences: int, seed: int) -> None:
        if num_sequences < 1:
            raise UserError(f"num_sequences is {num_sequences}, but must be at least 1")
        self.num_sequences, self.seed = num_sequences, seed
        self._half_bits = max(1, ((num_sequences - 1).bit_length() + 1) // 2)
        self._seed_key = _mix(np.array([seed % 2**64], np.uint64) + np.uint64(0x9E3779B97F4A7C15))

    def index(self, position: Int64[np.ndarray, "*shape"]) -> Int64[np.ndarray, "*shape"]:
        """Sequence index in 0 .. num_sequences-1 at each position >= 0 of the endless stream."""
        position = np.asarray(position, np.int64)
        if position.size and position.min() < 0:
            raise IndexError(f"position {position.min()} is below 0")
        epoch, x = np.divmod(position.ravel().astype(np.uint64), np.uint64(self.num_sequences))
        key = _mix(self._seed_key ^ _mix(epoch))
        outside = np.arange(len(x))
        # Cycle walking: a permutation of the larger domain, repeated until it is inside again, permutes the inside.
        while len(outside):
            x[outside] = self._feistel(x[outside], key[outside])
            outside = outside[x[outside] >= self.num_sequences]
        return x.astype(np.int64).reshape(position.shape)

    def _feistel(self, x: UInt64[np.ndarray, " n"], key: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
        bits, mask = np.uint64(self._half_bits), np.uint64(2**self._half_bits - 1)
        left, right = x >> bits, x & mask
        for number in range(1, self.ROUNDS + 1):
            left, right = right, left ^ (_mix(_mix(key + np.uint64(number)) ^ right) & mask)
        return (left << bits) | right


class Batches:
    """Training sequences by their position in the global order.

    Args:
        shards: the token stream.
        context: T, the tokens of one sequence.
        seed: key of the order.
        shuffle: False keeps the order of the text, epoch after epoch (evaluation).

    Raises:
        UserError: the split is too short for one sequence.
    """

    def __init__(self, shards: TokenShards, context: int, seed: int, *, shuffle: bool = True) -> None:
        if context < 1:
            raise UserError(f"context is {context}, but must be at least 1")
        self.shards, self.context = shards, context
        self.num_sequences = (shards.num_tokens - 1) // context
        if self.num_sequences < 1:
            raise UserError(
                f"split {shards.split!r} of {shards.folder} has {shards.num_tokens} tokens, too few for one sequence "
                f"of {context} + 1: use a smaller context or more text"
            )
        self.order = SequenceOrder(self.num_sequences, seed) if shuffle else None

    def get(
        self, first: int, count: int
    ) -> tuple[Int64[np.ndarray, "count context"], Int64[np.ndarray, "count context"]]:
        """Inputs and targets at positions first .. first + count - 1 of the endless global order."""
        position = np.arange(first, first + count)
        index = self.order.index(position) if self.order else position % self.num_sequences
        windows = np.empty((count, self.context + 1), np.int64)
        for row, i in zip(windows, index, strict=True):
            row[:] = self.shards.read(int(i) * self.context, self.context + 1)
        return windows[:, :-1].copy(), windows[:, 1:].copy()
