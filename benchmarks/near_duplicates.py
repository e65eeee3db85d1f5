"""How many documents of a dataset are near-duplicates of another one, by MinHash (Broder 1997), checked exactly.

    pip install datasketch
    python benchmarks/near_duplicates.py data/debian-docs --out near-duplicates.json

Two documents are alike by the Jaccard similarity of their sets of five consecutive words, letter case and white space
aside. Candidates come from locality-sensitive hashing of 128 permutations; each is then compared by its own words.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from datasketch import MinHash, MinHashLSH
from tokenizers import Tokenizer

from fathom.train.data import TokenShards

PERMUTATIONS = 128
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9)


def shingles(text: str) -> set[bytes]:
    words = text.lower().split()
    return {" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))}


def hash32(shingle: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(shingle, digest_size=4).digest(), "little")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    shards = TokenShards(options.dataset, "train")
    tokenizer = Tokenizer.from_file(str(options.dataset / "tokenizer.json"))
    tokens = shards.read(0, shards.num_tokens)
    documents = np.split(tokens, np.flatnonzero(tokens == shards.eos_id) + 1)[:-1]

    def text(i: int) -> str:
        return tokenizer.decode(documents[i][:-1].tolist(), skip_special_tokens=False)

    index = MinHashLSH(threshold=min(LEVELS), num_perm=PERMUTATIONS)
    likeness: list[float] = []  # of each document to the most similar one before it, where that may be high
    sizes: list[int] = []
    total = 0
    for i in range(len(documents)):
        words, size = shingles(text(i)), len(text(i).encode())
        total += size
        signature = MinHash(num_perm=PERMUTATIONS, hashfunc=hash32)
        signature.update_batch(words)
        earlier = [shingles(text(j)) for j in index.query(signature)[:20]]
        if earlier:
            likeness.append(max(len(words & other) / len(words | other) for other in earlier))
            sizes.append(size)
        index.insert(i, signature, check_duplication=False)
    found = {}
    for level in LEVELS:
        near = [size for like, size in zip(likeness, sizes, strict=True) if like >= level]
        found[str(level)] = {"documents": len(near), "bytes": sum(near)}
    result = {"corpus_hash": shards.corpus_hash, "documents": len(documents), "bytes": total, "at_least": found}
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
