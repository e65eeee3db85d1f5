"""The shard format, and the promise that one integer is the whole state of data order."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.errors import UserError
from fathom.train.data import Batches, Manifest, SequenceOrder, Shard, TokenShards

EOS = 0
GOLDEN_10 = [1, 0, 9, 3, 7, 2, 6, 8, 5, 4, 4, 6, 0, 3, 9, 1, 8, 5, 2, 7]
GOLDEN_BIG = [292866, 542787, 594791, 252404]


def write_dataset(folder: Path, shards: list[list[int]], *, dtype: str = "uint16", vocab_size: int = 1000) -> Path:
    """A dataset of the given training shards, and a validation shard of one document."""
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    splits = {}
    for split, parts in (("train", shards), ("val", [[5, EOS]])):
        rows = []
        for i, tokens in enumerate(parts):
            data = np.array(tokens, dtype="<u2" if dtype == "uint16" else "<u4").tobytes()
            (folder / f"{split}-{i:05d}.bin").write_bytes(data)
            sha256 = hashlib.sha256(data).hexdigest()
            rows.append(Shard(f"{split}-{i:05d}.bin", len(tokens), tokens.count(EOS), 3 * len(tokens), sha256))
        splits[split] = tuple(rows)
    tokenizer = hashlib.sha256(b"{}").hexdigest()
    Manifest("tiny", "c0ffee", tokenizer, vocab_size, EOS, dtype, splits).save(folder)
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    tokens = [i % 997 + 1 for i in range(100)]
    return write_dataset(tmp_path / "data", [tokens[:33], tokens[33:34], tokens[34:]])


def edit_manifest(folder: Path, change) -> None:
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# Manifest


def test_manifest_survives_the_round_trip(dataset: Path):
    manifest = Manifest.load(dataset)
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest
    assert manifest.total("train", "tokens") == 100


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda m: m.pop("eos_id"), "eos_id"),
        (lambda m: m.update(format="fathom-tokens-9"), "format"),
        (lambda m: m.update(vocab_size="1000"), "vocab_size"),
        (lambda m: m.update(vocab_size=True), "vocab_size"),
        (lambda m: m.update(dtype="int8"), "dtype"),
        (lambda m: m.update(vocab_size=70_000), "vocab_size"),
        (lambda m: m.update(eos_id=1000), "eos_id"),
        (lambda m: m.update(eos_id=-1), "eos_id"),
        (lambda m: m["splits"].update(test=[]), "splits.test"),
        (lambda m: m["splits"].update(val={}), "splits.val"),
        (lambda m: m["splits"]["train"][1].pop("sha256"), r"splits\.train\[1\]\.sha256"),
        (lambda m: m["splits"]["train"][0].update(tokens=0), r"splits\.train\[0\]\.tokens"),
        (lambda m: m["splits"]["train"][0].update(file="../secret"), r"splits\.train\[0\]\.file"),
        (lambda m: m.update(source=None), "source"),
    ],
)
def test_a_wrong_manifest_field_is_named(dataset: Path, change, named: str):
    edit_manifest(dataset, change)
    with pytest.raises(UserError, match=f"field {named}") as error:
        Manifest.load(dataset)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff", b'"text"'])
def test_a_manifest_that_is_none_is_one_line(dataset: Path, content: bytes):
    (dataset / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        Manifest.load(dataset)


def test_a_folder_without_manifest(tmp_path: Path):
    with pytest.raises(UserError, match="fathom data prepare"):
        TokenShards(tmp_path, "train")


# Shards


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_vocabulary_smaller_than_the_tokens_is_one_line(dataset: Path, split: str):
    edit_manifest(dataset, lambda manifest: manifest.update(vocab_size=101, eos_id=0))
    TokenShards(dataset, "train")
    edit_manifest(dataset, lambda manifest: manifest.update(vocab_size=100))
    with pytest.raises(
        UserError, match=r"train-\d+\.bin holds token 100, beyond vocab_size 100 in manifest\.json"
    ) as error:
        TokenShards(dataset, "train")
    assert "\n" not in str(error.value)


def test_read_crosses_shard_borders(dataset: Path):
    shards = TokenShards(dataset, "train")
    whole = shards.read(0, 100)
    assert whole.dtype == np.int64
    assert whole.tolist() == [i % 997 + 1 for i in range(100)]
    for start in (0, 31, 32, 33, 34, 99, 100):
        for count in (0, 1, 2, 3, 50):
            if start + count <= 100:
                assert shards.read(start, count).tolist() == whole[start : start + count].tolist()
    assert shards.bytes_per_token == 3.0
    assert (shards.num_tokens, shards.vocab_size, shards.eos_id, shards.corpus_hash) == (100, 1000, EOS, "c0ffee")


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (99, 2), (101, 0), (0, -1)])
def test_read_outside_is_refused(dataset: Path, start: int, count: int):
    with pytest.raises(IndexError):
        TokenShards(dataset, "train").read(start, count)


def test_uint32_shards_hold_large_vocabularies(tmp_path: Path):
    tokens = [1, 65_535, 65_536, 199_999, EOS]
    folder = write_dataset(tmp_path / "big", [tokens], dtype="uint32", vocab_size=200_000)
    assert TokenShards(folder, "train").read(0, 5).tolist() == tokens


def test_a_flipped_byte_is_refused_by_name(dataset: Path):
    path = dataset / "train-00002.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"train-00002\.bin was altered"):
        TokenShards(dataset, "train")
    TokenShards(dataset, "train", verify=False)
    TokenShards(dataset, "val")


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_shard_is_refused_by_name(dataset: Path, verify: bool):
    path = dataset / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train-00000\.bin has 64 bytes, not 66"):
        TokenShards(dataset, "train", verify=verify)


def test_missing_files_are_named(dataset: Path):
    (dataset / "train-00001.bin").unlink()
    with pytest.raises(UserError, match=r"train-00001\.bin is missing"):
        TokenShards(dataset, "train")
    (dataset / "tokenizer.json").write_text("{ }")
    with pytest.raises(UserError, match=r"tokenizer\.json was altered"):
        TokenShards(dataset, "val")
    with pytest.raises(UserError, match="no split 'test'"):
        TokenShards(dataset, "test")


# Order


@given(num=st.integers(1, 700), seed=st.integers(-(2**63), 2**64), epoch=st.integers(0, 2**20))
@settings(max_examples=150, deadline=None)
def test_every_epoch_is_a_permutation(num: int, seed: int, epoch: int):
    index = SequenceOrder(num, seed).index(np.arange(epoch * num, (epoch + 1) * num))
    assert sorted(index.tolist()) == list(range(num))


@pytest.mark.parametrize("num", [1, 2, 3, 4, 5, 16, 17, 64, 65])
def test_tiny_and_round_sizes_permute(num: int):
    order = SequenceOrder(num, 3)
    for epoch in range(50):
        assert sorted(order.index(np.arange(num) + epoch * num).tolist()) == list(range(num))


def test_epochs_and_seeds_differ():
    orders = [
        tuple(SequenceOrder(50, seed).index(np.arange(500)).reshape(10, 50)[e]) for seed in (0, 1) for e in range(10)
    ]
    assert len(set(orders)) == 20


@pytest.mark.parametrize(("num", "permutations"), [(2, 2), (3, 6), (4, 24)])
def test_small_permutations_are_equally_likely(num: int, permutations: int):
    epochs = 400 * permutations
    index = SequenceOrder(num, 11).index(np.arange(epochs * num)).reshape(epochs, num)
    counts = Counter(map(tuple, index.tolist()))
    assert len(counts) == permutations
    chi_square = sum((count - 400) ** 2 / 400 for count in counts.values())
    assert chi_square < 2.5 * permutations + 10  # far above the mean of permutations - 1; fixed seed


def test_neighbours_are_scattered():
    index = SequenceOrder(100_000, 5).index(np.arange(100_000))
    assert abs(np.corrcoef(index[:-1], index[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(index, np.arange(100_000))[0, 1]) < 0.02
    assert np.mean(np.abs(np.diff(index)) == 1) < 1e-3


def test_the_order_is_frozen():
    """A run that resumes under a later version must see the same data."""
    assert SequenceOrder(10, 0).index(np.arange(20)).tolist() == GOLDEN_10
    assert SequenceOrder(1_000_003, 2026).index(np.array([0, 1, 2, 10**12])).tolist() == GOLDEN_BIG


def test_the_order_needs_sequences():
    with pytest.raises(UserError, match="num_sequences"):
        SequenceOrder(0, 1)
    with pytest.raises(IndexError):
        SequenceOrder(5, 1).index(np.array([-1]))


# Batches


def test_windows_and_targets(dataset: Path):
    batches = Batches(TokenShards(dataset, "train"), context=10, seed=0, shuffle=False)
    assert batches.num_sequences == 9
    inputs, targets = batches.get(0, 9)
    assert inputs.shape == targets.shape == (9, 10)
    assert inputs.ravel().tolist() == list(range(1, 91))
    assert targets.ravel().tolist() == list(range(2, 92))
    assert batches.get(9, 2)[0].tolist() == inputs[:2].tolist()
    assert batches.get(4, 0)[0].shape == (0, 10)


@given(
    context=st.sampled_from([7, 30, 40, 60, 99]),  # 14, 3, 2, 1 and 1 sequences
    seed=st.integers(0, 100),
    cuts=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    ranks=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_any_batches_ranks_and_resumes_give_one_stream(dataset_once: Path, context, seed, cuts, ranks):
    """A fresh `Batches` per step is a resume; each step has its own batch size; each rank takes its slice."""
    total = sum(cut * ranks for cut in cuts)
    expected = Batches(TokenShards(dataset_once, "train"), context, seed).get(0, total)
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    consumed = 0
    for cut in cuts:
        for rank in range(ranks):
            resumed = Batches(TokenShards(dataset_once, "train", verify=False), context, seed)
            parts.append(resumed.get(consumed + rank * cut, cut))
        consumed += cut * ranks
    for i in (0, 1):
        assert np.array_equal(np.concatenate([part[i] for part in parts]), expected[i])


@pytest.fixture(scope="module")
def dataset_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("once") / "data", [list(range(1, 41)), list(range(41, 101))])


def test_an_epoch_shows_every_window_once(dataset: Path):
    batches = Batches(TokenShards(dataset, "train"), context=7, seed=4)
    firsts = batches.get(0, 28)[0][:, 0]
    assert sorted(firsts[:14]) == sorted(firsts[14:]) == list(range(1, 99, 7))
    assert firsts[:14].tolist() != firsts[14:].tolist()


def test_too_little_text_says_what_to_do(dataset: Path):
    assert Batches(TokenShards(dataset, "train"), context=99, seed=0).num_sequences == 1
    with pytest.raises(UserError, match=r"100 tokens, too few .* smaller context"):
        Batches(TokenShards(dataset, "train"), context=100, seed=0)
    with pytest.raises(UserError, match="context"):
        Batches(TokenShards(dataset, "train"), context=0, seed=0)
