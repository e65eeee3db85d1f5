"""Text from a run: load its newest checkpoint, draw tokens one by one, decode them as they come.

A token is drawn from ``softmax(logits / temperature)``, cut to its ``top_k`` likeliest tokens and then to the fewest of
those that hold ``top_p`` of the mass, and normalised again.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from fathom.errors import UserError
from fathom.models.transformer import Transformer
from fathom.train import checkpoint
from fathom.train.config import load_config
from fathom.train.tokenizer import Encoder, load_tokenizer


def load_run(run: Path, device: torch.device, *, step: int | None = None) -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer of a run folder.

    Args:
        run: a folder written by ``fathom train``.
        device: where the model goes; its parameters stay float32.
        step: which checkpoint; the newest one if not given.

    Raises:
        UserError: no run, no (such) checkpoint, or one that is damaged or of another model.
    """
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is not a run folder: it has no config.json")
    config = load_config(run / "config.json")
    folder = _checkpoint(run, step)
    progress = checkpoint.read_progress(folder)
    tokenizer, _ = load_tokenizer(run / "tokenizer.json")
    if tokenizer.get_vocab_size() > config.model.vocab_size:
        raise UserError(
            f"{run / 'tokenizer.json'} has {tokenizer.get_vocab_size()} tokens, the model {config.model.vocab_size}: "
            "it belongs to another run"
        )
    model = Transformer(config.model, end_of_text=progress.end_of_text)
    checkpoint.load_model(folder, model)
    return model.to(device).eval(), tokenizer


def _checkpoint(run: Path, step: int | None) -> Path:
    found = checkpoint.checkpoints(run)
    if not found:
        raise UserError(f"{run} has no checkpoint yet; train on with `fathom train --resume {run}`")
    if step is None:
        return found[-1]
    steps = {int(folder.name.removeprefix("step-")): folder for folder in found}
    if step not in steps:
        raise UserError(f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
    return steps[step]


def next_token_distribution(
    logits: Float[Tensor, " V"], temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Float[Tensor, " V"]:
    """The probabilities that the next token is drawn from, float64, on the device of ``logits``.

    Args:
        logits: of one position.
        temperature: divides the logits; 0 puts all mass on the largest one (the first of equals).
        top_k: keep this many of the likeliest tokens; equals are kept in the order of their number.
        top_p: keep the fewest tokens whose mass, after ``top_k``, reaches this.

    Raises:
        UserError: a setting out of range, or logits that are not finite.
    """
    if not temperature >= 0 or math.isinf(temperature):
        raise UserError(f"temperature is {temperature}: it must be 0 or a positive number")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}: it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}: it must be above 0 and at most 1")
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite: its training diverged; use an earlier checkpoint")
    scores = logits.double()
    if temperature == 0:
        return torch.zeros_like(scores).index_fill_(0, scores.argmax(), 1)
    # Shifted first, so that a small temperature cannot overflow.
    scores = (scores - scores.max()) / temperature
    ordered, order = scores.sort(descending=True, stable=True)
    kept = ordered.softmax(-1)
    if top_k is not None:
        kept[top_k:] = 0
        kept /= kept.sum()
    if top_p is not None and top_p < 1:
        # A token stays if those before it do not reach top_p yet, so that the first always does.
        kept[kept.cumsum(-1) - kept >= top_p] = 0
        kept /= kept.sum()
    return torch.empty_like(kept).scatter_(0, order, kept)


def generate(
    model: Transformer,
    tokens: Sequence[int],
    *,
    count: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[int]:
    """Up to ``count`` tokens that continue ``tokens``; ends early before an end-of-text token.

    Each token costs a forward pass over the last ``model.config.context`` tokens: nothing is cached yet.

    Args:
        tokens: the prompt; empty starts from the end-of-text token, as documents do in training.
        seed: of the draws. They are made on the CPU, so a seed means the same draws on every device.

    Raises:
        UserError: a token outside the vocabulary, a setting out of range, or logits that are not finite.
    """
    if count < 1:
        raise UserError(f"the number of tokens is {count}: it must be at least 1")
    if not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed}: it must be at least 0 and below 2^63")
    size, context, end = model.config.vocab_size, model.config.context, model.end_of_text
    for token in tokens:
        if not 0 <= token < size:
            raise UserError(f"token {token} of the prompt is not in the model's vocabulary of {size}")
    history = list(tokens)
    if not history:
        if end is None:
            raise UserError("an empty prompt starts from the end-of-text token, but the model has none; give a prompt")
        history = [end]
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        with torch.inference_mode():
            logits = model(torch.tensor([history[-context:]], device=device))[0, -1].cpu()
            distribution = next_token_distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p)
            token = int(torch.multinomial(distribution, 1, generator=generator))
        if token == end:
            return
        history.append(token)
        yield token


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens of a prompt; the text of a special token is plain text here, as it is in training."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("the prompt is not valid UTF-8 text") from None
    return Encoder(tokenizer, fast=False).encode([prompt])[0].tolist()


def decode_stream(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    """The text of ``tokens`` in pieces, each as early as its bytes are whole characters.

    Joined, they are the plain decoding, U+FFFD for bytes that make no character included.
    """
    stream, seen, length = DecodeStream(skip_special_tokens=True), [], 0
    for token in tokens:
        seen.append(token)
        if piece := stream.step(tokenizer, token):
            length += len(piece)
            yield piece
    if rest := tokenizer.decode(seen)[length:]:
        yield rest
