"""Text to tokens, and tokens to text as they come: whole characters only, and nothing of a text that ends the answer."""

from collections.abc import Iterable, Iterator, Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from fathom.errors import UserError
from fathom.train.tokenizer import Encoder


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a prompt; the text of a special token is plain text here, as it is in training."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt is not valid UTF-8 text") from None
    return Encoder(tokenizer, fast=False).encode([prompt])[0].tolist()


class TextStream:
    """The text of tokens that come one by one; joined, its pieces are the plain decoding, up to the first of ``stop``.

    A piece is given as early as its bytes are whole characters (U+FFFD stands for bytes that make none) and cannot be the
    beginning of a stop text.

    Args:
        before: tokens that came before; their text is not given again, but may belong to a character of the first piece.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, before: Sequence[int] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._decode = DecodeStream(skip_special_tokens=True)
        self._seen: list[int] = []
        self._decoded = 0
        self._held = ""
        self.stopped = False
        """Whether a stop text has come."""
        for token in before:
            self._step(token)

    def _step(self, token: int) -> str:
        self._seen.append(token)
        piece = self._decode.step(self._tokenizer, token) or ""
        self._decoded += len(piece)
        return piece

    def push(self, token: int) -> str:
        """The text that ``token`` completes."""
        return "" if self.stopped else self._release(self._step(token))

    def close(self) -> str:
        """The rest."""
        if self.stopped:
            return ""
        text = self._release(self._tokenizer.decode(self._seen)[self._decoded :])
        held, self._held = self._held, ""
        return text + held

    def _release(self, piece: str) -> str:
        text, self._held = self._held + piece, ""
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        longest = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        text, self._held = text[: len(text) - longest], text[len(text) - longest :]
        return text


def decode_stream(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of ``tokens`` in pieces, as ``TextStream`` gives them."""
    stream = TextStream(tokenizer)
    for token in tokens:
        if piece := stream.push(token):
            yield piece
    if rest := stream.close():
        yield rest
