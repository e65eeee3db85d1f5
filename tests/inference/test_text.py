"""Text of tokens as they come: whole characters, and nothing of a stop text."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fathom
from fathom.errors import UserError
from fathom.inference.text import TextStream, decode_stream, encode_prompt
from fathom.train.tokenizer import load_tokenizer

TOKENIZER = Path(fathom.__path__[0]) / "assets" / "sotu-tokenizer.json"


@pytest.mark.parametrize("text", ["plain", "héllo → 日本 👩‍👩‍👧\n\n naïve  x", "𝔘" * 7, " "])
def test_stream_gives_whole_characters(text: str) -> None:
    tokenizer, _ = load_tokenizer(TOKENIZER)
    pieces = list(decode_stream(tokenizer, encode_prompt(tokenizer, text)))
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_stream_does_not_wait_longer_than_it_must() -> None:
    tokenizer, _ = load_tokenizer(TOKENIZER)
    tokens = encode_prompt(tokenizer, "aé b")
    fed: list[int] = []

    def feed() -> Iterator[int]:
        for token in tokens:
            fed.append(token)
            yield token

    for piece in decode_stream(tokenizer, feed()):
        assert tokenizer.decode(fed).endswith(piece)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 1023), max_size=40))
def test_stream_of_any_tokens_is_their_decoding(tokens: list[int]) -> None:
    tokenizer, _ = load_tokenizer(TOKENIZER)
    assert "".join(decode_stream(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_special_tokens_in_a_prompt_are_text() -> None:
    tokenizer, end = load_tokenizer(TOKENIZER)
    tokens = encode_prompt(tokenizer, "<|endoftext|>")
    assert end not in tokens and tokenizer.decode(tokens) == "<|endoftext|>"


def test_prompt_that_is_not_text() -> None:
    tokenizer, _ = load_tokenizer(TOKENIZER)
    with pytest.raises(UserError, match="UTF-8"):
        encode_prompt(tokenizer, "a\udcff")


@settings(max_examples=100, deadline=None)
@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop(text: str, stop: list[str]) -> None:
    tokenizer, _ = load_tokenizer(TOKENIZER)
    letters = [tokenizer.token_to_id(letter) for letter in text]
    stream = TextStream(tokenizer, stop)
    pieces = [stream.push(token) for token in letters]
    whole = "".join(pieces) + stream.close()
    places = [text.find(s) for s in stop if s in text]
    # Of two stops, the one that is complete first counts, wherever it begins.
    ends = [text.find(s) + len(s) for s in stop if s in text]
    if not places:
        assert whole == text and not stream.stopped
    else:
        first = min(ends)
        assert stream.stopped
        assert whole == text[: min(text[:first].find(s) for s in stop if s in text[:first])]


def test_a_possible_beginning_of_a_stop_waits() -> None:
    tokenizer, _ = load_tokenizer(TOKENIZER)
    stream = TextStream(tokenizer, ["stop", "zz"])
    assert [stream.push(token) for token in map(tokenizer.token_to_id, "astxs")] == ["a", "", "", "stx", ""]
    assert stream.close() == "s"


def test_a_character_may_begin_in_the_prompt() -> None:
    tokenizer, _ = load_tokenizer(TOKENIZER)
    tokens = encode_prompt(tokenizer, "a\U0001d518b")
    stream = TextStream(tokenizer, before=tokens[:-2])
    assert "".join(map(stream.push, tokens[-2:])) + stream.close() == "\U0001d518b"
