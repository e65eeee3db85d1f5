"""One file that carries a dataset, and every way in which it can arrive broken."""

import lzma
import math
import resource
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fathom.errors import UserError
from fathom.train import spool
from fathom.train.data import Manifest, TokenShards
from fathom.train.packing import pack, unpack
from fathom.train.prepare import PrepareOptions, build
from fathom.train.text import Document


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of several training shards: a shard a chunk, here of 50 kB."""
    out = tmp_path_factory.mktemp("data") / "numbers"
    rng = np.random.default_rng(0)
    texts = [" ".join(map(str, rng.integers(0, 999, 3000).tolist())) for _ in range(20)]
    documents = (Document(text, "here", "val" if i == 0 else "train") for i, text in enumerate(texts))
    options = PrepareOptions(vocab_size=257, shard_tokens=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool, "CHUNK_BYTES", 50_000)
        build(documents, out, options, name="numbers", source={"identity": "numbers"})
    return out


def same_files(one: Path, other: Path) -> bool:
    a, b = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in (one, other))
    return a == b


def test_a_pack_is_the_dataset(dataset: Path, tmp_path: Path):
    file = tmp_path / "numbers.fathom"
    assert pack(dataset, file) == [file]
    assert file.stat().st_size < sum(path.stat().st_size for path in dataset.iterdir()) / 3
    assert unpack(file, tmp_path / "out") == Manifest.load(dataset)
    assert same_files(dataset, tmp_path / "out")
    assert unpack(file, tmp_path / "out") == Manifest.load(dataset)  # already there
    assert {path.name for path in tmp_path.iterdir()} == {"numbers.fathom", "out"}
    content = subprocess.run(["xz", "-dc", "--suffix=.fathom", str(file)], capture_output=True, check=True).stdout
    assert content.startswith(b"fathom-pack-1\n")


def test_packing_again_gives_the_same_file(dataset: Path, tmp_path: Path):
    pack(dataset, tmp_path / "a", workers=1)
    pack(dataset, tmp_path / "b", workers=3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_more_than_a_hundred_parts_join_in_the_order_of_their_numbers(dataset: Path, tmp_path: Path):
    parts = pack(dataset, tmp_path / "n[1].fathom", limit_mib=0.0005)
    assert len(parts) > 100
    assert unpack(parts[0], tmp_path / "out") == Manifest.load(dataset)


@pytest.mark.parametrize("options", [{"limit_mib": -1}, {"limit_mib": math.nan}, {"max_tokens": 0}])
def test_an_impossible_limit_is_refused_by_name(dataset: Path, tmp_path: Path, options: dict):
    with pytest.raises(UserError, match=next(iter(options))):
        pack(dataset, tmp_path / "n.fathom", **options)
    assert not list(tmp_path.glob("n*"))


def test_parts_stay_under_the_limit_and_join(dataset: Path, tmp_path: Path):
    parts = pack(dataset, tmp_path / "n.fathom", limit_mib=0.04)
    assert [part.name for part in parts] == [f"n.fathom.part{i:02d}" for i in range(len(parts))] and len(parts) > 2
    assert all(part.stat().st_size <= 0.04 * 2**20 for part in parts)
    unpack(parts[0], tmp_path / "out")
    assert same_files(dataset, tmp_path / "out")
    parts[1].rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="with all its parts"):
        unpack(parts[0], tmp_path / "again")
    (tmp_path / "elsewhere").rename(parts[1])
    parts[-1].unlink()
    with pytest.raises(UserError, match="with all its parts"):
        unpack(parts[0], tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_prefix_takes_whole_shards_and_all_of_validation(dataset: Path, tmp_path: Path):
    whole = Manifest.load(dataset)
    ends = np.cumsum([shard.tokens for shard in whole.splits["train"]])
    assert len(ends) > 3
    pack(dataset, tmp_path / "two", max_tokens=int(ends[2]) - 1, name="numbers-small")
    small = unpack(tmp_path / "two", tmp_path / "out")
    assert (small.name, small.total("train", "tokens")) == ("numbers-small", ends[1])
    assert small.splits["val"] == whole.splits["val"]
    assert small.corpus_hash != whole.corpus_hash == small.source["prefix"]["corpus_hash"]
    a, b = TokenShards(dataset, "train"), TokenShards(tmp_path / "out", "train")
    assert np.array_equal(a.read(0, b.num_tokens), b.read(0, b.num_tokens))
    pack(dataset, tmp_path / "one", max_tokens=1)
    assert unpack(tmp_path / "one", tmp_path / "least").total("train", "tokens") == ends[0]
    pack(dataset, tmp_path / "all", max_tokens=int(ends[-1]))
    assert unpack(tmp_path / "all", tmp_path / "full") == whole


def test_what_is_there_is_kept(dataset: Path, tmp_path: Path):
    file = tmp_path / "n.fathom"
    pack(dataset, file, max_tokens=1)
    before = file.read_bytes()
    with pytest.raises(UserError, match=r"n\.fathom exists"):
        pack(dataset, file)
    assert file.read_bytes() == before
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError):
        unpack(file, tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        unpack(tmp_path / "none", tmp_path / "new")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-40],
        lambda data: data[:20],
        lambda data: b"",
        lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
        lambda data: b"no xz at all",
        lambda data: lzma.compress(b"other text"),
        lambda data: lzma.compress(b"fathom-pack-1\n" + (5).to_bytes(8, "little") + b"[1,2]"),
        lambda data: lzma.compress(lzma.decompress(data)[:-1] + b"\xff"),  # sound as xz, wrong by its sha256
    ],
)
def test_a_damaged_file_is_one_line_and_leaves_nothing(dataset: Path, tmp_path: Path, spoil):
    file = tmp_path / "n.fathom"
    pack(dataset, file, max_tokens=1)
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(UserError, match=r"n\.fathom") as error:
        unpack(file, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == [file]


def test_a_damaged_dataset_does_not_travel(dataset: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in dataset.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "val-00000.bin").write_bytes(bytes((copy / "val-00000.bin").stat().st_size))
    with pytest.raises(UserError, match=r"val-00000\.bin was altered"):
        pack(copy, tmp_path / "n.fathom")
    assert list(tmp_path.iterdir()) == [copy]


def test_a_full_disk_leaves_nothing(dataset: Path, tmp_path: Path):
    pack(dataset, tmp_path / "n.fathom")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(UserError, match="nothing was packed"):
            pack(dataset, tmp_path / "other.fathom")
        with pytest.raises(UserError, match="nothing was kept"):
            unpack(tmp_path / "n.fathom", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in tmp_path.iterdir()] == ["n.fathom"]
