"""``reads.json``: what single tokens read, and the mixing matrix, of a run's newest checkpoint, kept beside ``depth.json``.

    step        of the checkpoint
    sources     of each site that attends over depth, oldest first; none for PreNorm, which then has no sentences
    sentences   tokens (texts), and weights: base64 of one byte for each site, token and source, in this order of loops
    mixing      matrix [L+1, L+1], the mean over ``tokens`` tokens (fathom/residuals/mixing.py), its ``remainder``

A byte b stands for a weight of b / 255: a sentence of 32 tokens takes some 40 kB under Full AttnRes of 24 decoder layers, and 10
under Block of 8. Each sentence is the first whole one of a validation sequence that the model has read from its beginning.
"""

import base64
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from fathom.errors import UserError
from fathom.models.transformer import Transformer
from fathom.residuals.mixing import mixing

FILE = "reads.json"
READ = 256
"""Tokens of a sequence that the model is given."""
SHORTEST, LONGEST = 6, 64
"""Tokens of a sentence that is shown."""
MIXED = 32
"""Tokens that the mixing matrix is the mean over."""


def sentence(texts: list[str]) -> range:
    """The first whole sentence among tokens, by their texts; of what is longer or has no end the first tokens."""
    ends = [at + 1 for at, text in enumerate(texts) if text.strip().endswith((".", "!", "?"))]
    for begin, end in zip([0, *ends], ends, strict=False):
        if begin and SHORTEST <= end - begin <= LONGEST:
            return range(begin, end)
    return range(min(32, len(texts)))


def token_texts(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """The text of each token by itself; bytes that are no whole character show as U+FFFD."""
    return [tokenizer.decode([token], skip_special_tokens=False) for token in tokens]


@torch.no_grad()
def measure_reads(model: Transformer, sequences: list[Tensor], tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of reads.json but for the step.

    Args:
        model: any decoder; its mode and parameters stay.
        sequences: tokens [T] each, on the model's device.
        tokenizer: that made them.
    """
    stream = model.stream
    sources = {site: names for site in range(model.config.num_sublayers + 1) if (names := stream.source_names(site))}
    found = []
    for tokens in sequences if sources else []:
        tokens = tokens[:READ]
        texts = token_texts(tokenizer, tokens.tolist())
        shown = sentence(texts)
        packed: list[bytes] = []

        def observe(site: int, state: Any, _: Any, shown: range = shown, packed: list[bytes] = packed) -> None:
            if site in sources:
                weights = stream.weights(state, site)[:, 0, shown.start : shown.stop].T.float()  # [tokens, sources]
                packed.append((weights * 255).round().clamp(0, 255).to(torch.uint8).cpu().numpy().tobytes())

        model.hidden(tokens[None], observe)
        found.append({
            "tokens": [texts[at] for at in shown], "weights": base64.b64encode(b"".join(packed)).decode()
        })  # fmt: skip
    mixed = mixing(model, sequences[0][None, :MIXED])
    return {
        "sources": list(sources.values()),
        "sentences": found,
        "mixing": {
            "tokens": min(MIXED, len(sequences[0])),
            "matrix": [[round(value, 4) for value in row] for row in mixed.mean().tolist()],
            "remainder": mixed.remainder,
        },
    }


def check_reads(path: Path, reads: dict[str, Any]) -> dict[str, Any]:
    """``reads`` if it has what the report needs; ``UserError`` naming ``path`` if not."""
    if {"step", "sources", "sentences", "mixing"} <= reads.keys():
        size = sum(map(len, reads["sources"]))
        if all(len(base64.b64decode(s["weights"])) == size * len(s["tokens"]) for s in reads["sentences"]):
            return reads
    raise UserError(f"{path} is not a measurement of this run; delete it and measure again")
