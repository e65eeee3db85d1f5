"""What the tests of data share: a folder of small texts, and what became of them in a dataset."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from fathom.errors import UserError
from fathom.train.data import TokenShards
from fathom.train.prepare import PrepareOptions, prepare

OPTIONS = PrepareOptions(vocab_size=400, val_fraction=0.2, sample_mb=1)
TEXTS = [f"Document {i} tells of {i * i} ships.\n\nIt ends here, naïvely: {'so ' * (i % 7)}done. ✓" for i in range(60)]


def folder_of_texts(folder: Path, texts: list[str] = TEXTS) -> Path:
    folder.mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / f"{i:03d}.txt").write_text(text, "utf-8")
    return folder


def decoded(folder: Path, split: str) -> list[str]:
    """The documents of a split, decoded from its tokens."""
    shards, tokenizer = TokenShards(folder, split), Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = shards.read(0, shards.num_tokens)
    documents = np.split(tokens, np.flatnonzero(tokens == shards.eos_id) + 1)
    assert len(documents.pop()) == 0  # the stream ends with an end token
    return [tokenizer.decode(document[:-1].tolist()) for document in documents]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prepare_fails(source: Path, tmp_path: Path, match: str, options: PrepareOptions = OPTIONS) -> None:
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=match) as error:
        prepare(source, tmp_path / "out", options=options)
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == before, "a failure left something behind"
