"""`fathom data prepare`, `pack`, `unpack` and `sample`."""

import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fathom.commands.output import Function, Json, print_json
from fathom.errors import UserError


def prepare() -> Function:
    from fathom.train import prepare as preparation

    def run(
        source: Positional[str],
        out: Positional[Path],
        options: Annotated[preparation.PrepareOptions, arg(name="")],
        as_json: Json = False,
    ) -> None:
        """Turn text into a dataset folder: token shards, tokenizer and manifest.

        Args:
            source: A file (.txt, .md, .jsonl, .parquet, .arrow, also .gz or .zst), a folder of them, or debian-docs.
            out: The dataset folder to make.
            options: How.
        """
        if sys.stderr.isatty():
            logging.basicConfig(level=logging.INFO, format="%(message)s")
        manifest = preparation.prepare(source, out, options=options)
        if as_json:
            print_json(manifest.to_json())
            return
        splits = ", ".join(
            f"{split} {manifest.total(split, 'tokens'):,} tokens in {manifest.total(split, 'documents'):,} documents"
            for split in manifest.splits
        )
        print(f"{out}: {splits}; vocabulary {manifest.vocab_size:,}")
        print(f"fathom train quick --data.folder {shlex.quote(str(out))}")

    return run


def pack() -> Function:
    from fathom.train import packing

    def run(
        folder: Positional[Path],
        out: Positional[Path],
        max_tokens: int | None = None,
        limit_mib: float | None = None,
        name: str | None = None,
    ) -> None:
        """Put a dataset folder into one compressed file.

        Args:
            folder: The dataset.
            out: The file to write, NAME.fathom by custom.
            max_tokens: Pack only as many whole training shards as stay within this many tokens.
            limit_mib: Cut the file into parts of at most this many MiB.
            name: Name of the packed dataset; its own if not given.
        """
        for path in packing.pack(folder, out, max_tokens=max_tokens, limit_mib=limit_mib, name=name):
            print(path)

    return run


def unpack() -> Function:
    from fathom.train import packing

    def run(file: Positional[Path], out: Positional[Path]) -> None:
        """Make the dataset folder of a packed file, every byte checked.

        Args:
            file: The packed file, or its first part.
            out: The dataset folder to make.
        """
        manifest = packing.unpack(file, out)
        print(f"{out}: {manifest.name}, {manifest.total('train', 'tokens'):,} training tokens")

    return run


def sample() -> Function:
    from fathom.train.prepare import sample_documents

    def run(folder: Positional[Path], count: int = 5, seed: int = 0) -> None:
        """Show training documents of a dataset, drawn at random.

        Args:
            folder: The dataset.
            count: How many.
            seed: Of the draw.
        """
        if count < 1 or seed < 0:
            raise UserError(f"count is {count} and seed {seed}: they must be at least 1 and 0")
        for number, text in enumerate(sample_documents(folder, count, seed), 1):
            print(f"--- {number} ---\n{text}")

    return run
