"""Byte-level byte-pair encoding: trained and read with `tokenizers`, encoded with `tiktoken` where that is the same.

A tokenizer is one `tokenizer.json`. Text is cut into words by PATTERN, a word is its UTF-8 bytes, and merges join them,
so that every string has tokens and decodes back to itself. `tiktoken` encodes from the same merges about three times
faster; `Encoder` uses it only for tokenizers of a form that it reads alike, and gives the same ids without it.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt32
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from fathom.errors import UserError

EOS = "<|endoftext|>"
# Contractions, words with one leading character, up to three digits, punctuation, line ends, spaces.
PATTERN = (
    r"'(?:[sdmtSDMT]|ll|LL|ve|VE|re|RE)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_KNOWN_EOS = (EOS, "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> tuple[Tokenizer, int]:
    """A byte-level BPE learned from `texts`, and the id of its `EOS`; little text gives fewer tokens than asked."""
    if vocab_size < 257:
        raise UserError(f"vocab_size is {vocab_size}, but 256 bytes and the end token need at least 257")
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return tokenizer, 0  # special tokens come first


def load_tokenizer(path: Path, eos: str | None = None) -> tuple[Tokenizer, int]:
    """A tokenizer.json and the id of its end token: `eos`, or the usual name that it knows."""
    try:
        tokenizer = Tokenizer.from_str(Path(path).read_text("utf-8"))
    except Exception as error:  # tokenizers raises bare Exception for a malformed file
        raise UserError(f"{path} is not a readable tokenizer.json: {' '.join(str(error).split())}") from None
    for name in (eos,) if eos else _KNOWN_EOS:
        if (eos_id := tokenizer.token_to_id(name)) is not None:
            return tokenizer, eos_id
    tried = repr(eos) if eos else ", ".join(_KNOWN_EOS)
    raise UserError(f"{path} has no end token {tried}; name the one to use with --eos")


class Encoder:
    """Text to ids, from any number of threads; both encoders release Python's lock while they work.

    The text of a special token is encoded like any other text, so no document can end another one.

    Args:
        tokenizer: whose ids are wanted.
        fast: False never uses tiktoken.
    """

    def __init__(self, tokenizer: Tokenizer, *, fast: bool = True) -> None:
        self._slow = Tokenizer.from_str(tokenizer.to_str())
        self._slow.encode_special_tokens = True
        self._slow.no_truncation()
        self._slow.no_padding()
        self._fast = _tiktoken(tokenizer) if fast else None

    @property
    def backend(self) -> str:
        """Which library encodes."""
        return "tokenizers" if self._fast is None else "tiktoken"

    def encode(self, texts: Sequence[str]) -> list[UInt32[np.ndarray, " tokens"]]:
        """The ids of each text, without any end token."""
        if self._fast is None:
            encodings = self._slow.encode_batch_fast(list(texts), add_special_tokens=False)
            return [np.array(encoding.ids, np.uint32) for encoding in encodings]
        return [self._encode_fast(text) for text in texts]

    def _encode_fast(self, text: str) -> UInt32[np.ndarray, " tokens"]:
        assert self._fast is not None
        # tiktoken's regex engine backtracks over a run of spaces and overflows its stack at some 100,000 of them.
        if " " * 4096 not in text:
            try:
                return self._fast.encode_to_numpy(text, disallowed_special=())
            except BaseException as error:  # pyo3's PanicException is no Exception
                if type(error).__name__ != "PanicException":
                    raise
        return np.array(self._slow.encode_batch_fast([text], add_special_tokens=False)[0].ids, np.uint32)


def _tiktoken(tokenizer: Tokenizer):  # type: ignore[no-untyped-def]  # tiktoken.Encoding, an optional dependency
    """The same tokenizer for tiktoken, or None where tiktoken is missing or the ids could differ."""
    try:
        import tiktoken
    except ImportError:
        return None
    data = json.loads(tokenizer.to_str())
    model, pattern = data["model"], _split_pattern(data["pre_tokenizer"])
    plain = model["type"] == "BPE" and data["normalizer"] is None
    for key in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        plain = plain and not model.get(key)
    if (
        pattern is None
        or not plain
        or model.get("ignore_merges")
        or not all(token["special"] for token in data["added_tokens"])
    ):
        return None
    byte_of = _byte_of_letter()
    special = {token["content"]: token["id"] for token in data["added_tokens"]}
    vocab = {token: i for token, i in model["vocab"].items() if token not in special}
    # tiktoken joins by the rank of the result, `tokenizers` by that of the pair: one order if ids follow the merges.
    merged = [vocab.get("".join(pair if isinstance(pair, list) else pair.split(" ")), -1) for pair in model["merges"]]
    if -1 in merged or merged != sorted(set(merged)) or len(vocab) != len(merged) + 256:
        return None
    if any(letter not in byte_of for token in vocab for letter in token) or any(b not in vocab for b in byte_of):
        return None
    ranks = {bytes(byte_of[letter] for letter in token): i for token, i in vocab.items()}
    return tiktoken.Encoding("fathom", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)


def _split_pattern(pre: dict | None) -> str | None:
    """The regex of a byte-level pre-tokenizer that tiktoken reads alike, else None."""
    match pre:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return _GPT2_PATTERN
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        } if pattern == PATTERN:
            return PATTERN
    return None


def _byte_of_letter() -> dict[str, int]:
    """GPT-2's printable stand-ins for bytes, inverted: printable Latin-1 is itself, the rest count from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}
