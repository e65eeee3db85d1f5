"""Answers to many prompts at once: each takes a free slot, is prefilled, and decodes with the others until it ends.

An answer does not depend on its neighbours: every prompt has random numbers of its own. A sequence that fills its slot goes on
from its newest half, prefilled anew; what it knew of the older half is gone.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fathom.errors import UserError
from fathom.inference.engine import Engine
from fathom.inference.sampling import Sampling, draw, next_token_distribution, penalize
from fathom.inference.text import TextStream, encode_prompt

Ending = Literal["end", "stop", "length"]


class Piece(NamedTuple):
    """What one step adds to one answer."""

    prompt: int
    """Which prompt it answers."""
    token: int | None
    """The token; None where the answer ended without one."""
    text: str
    """What can be shown by now; empty without a tokenizer."""
    ending: Ending | None
    """On an answer's last piece: the model ended its document, a stop text came, or there were as many tokens as asked for."""


class _Answer:
    """One prompt on its way."""

    def __init__(self, engine: Engine, index: int, tokens: list[int], given: bool, sampling: Sampling) -> None:
        self.index, self.sampling = index, sampling
        self.history = tokens
        self.made = 0
        self.random = torch.Generator().manual_seed((sampling.seed + index) % 2**63)
        self.text: TextStream | None = None
        if engine.tokenizer is not None:
            self.text = TextStream(engine.tokenizer, sampling.stop, before=tokens if given else ())
        self.seen: Tensor | None = None
        if sampling.repetition_penalty != 1:
            self.seen = torch.zeros(engine.config.vocab_size, dtype=torch.bool, device=engine.device)
            self.seen[torch.tensor(tokens, device=engine.device)] = True

    def take(self, token: int, end_of_text: int | None) -> Piece:
        """The piece that ``token`` makes."""
        if token == end_of_text:
            return Piece(self.index, None, self.text.close() if self.text else "", "end")
        self.history.append(token)
        self.made += 1
        if self.seen is not None:
            self.seen[token] = True
        text = self.text.push(token) if self.text else ""
        ending: Ending | None = "length" if self.made == self.sampling.tokens else None
        if self.text is not None and ending:
            text += self.text.close()
        if self.text is not None and self.text.stopped:
            ending = "stop"
        return Piece(self.index, token, text, ending)


def generate(
    engine: Engine, prompts: Sequence[str | Sequence[int]], sampling: Sampling | None = None
) -> Iterator[Piece]:
    """Answer ``prompts``, piece by piece as the tokens come.

    The engine serves one call at a time: where another has begun, going on with this one is refused.

    Args:
        prompts: texts, or tokens; more of them than slots wait for their turn. An empty one begins a document.
        sampling: how; ``Sampling()`` if not given. Prompt i draws with seed + i.

    Raises:
        UserError: here for a prompt that ``Engine.check_prompt`` refuses, or text without a tokenizer; at the step where it
            happens for logits that are not finite. The engine stays usable.
    """
    sampling = sampling or Sampling()
    if engine.tokenizer is None and (sampling.stop or any(isinstance(prompt, str) for prompt in prompts)):
        raise UserError("prompts and stop texts need the tokenizer that the engine was made without")
    answers = []
    for index, prompt in enumerate(prompts):
        name = f"prompt {index + 1}" if len(prompts) > 1 else "the prompt"
        if isinstance(prompt, str):
            assert engine.tokenizer is not None
            tokens = encode_prompt(engine.tokenizer, prompt)
        else:
            tokens = list(prompt)
        answers.append(_Answer(engine, index, engine.check_prompt(tokens, name), bool(tokens), sampling))
    engine.turn += 1
    return _run(engine, deque(answers), engine.turn)


def _run(engine: Engine, waiting: deque[_Answer], turn: int) -> Iterator[Piece]:
    active: list[_Answer | None] = [None] * engine.slots
    restart = [False] * engine.slots
    while waiting or any(active):
        for slot in range(engine.slots):
            if active[slot] is None and waiting:
                active[slot], restart[slot] = waiting.popleft(), True
        for first, last in _spans(restart):
            group = active[first:last]
            logits = engine.prefill([_window(engine, answer) for answer in group if answer], first=first)
            yield from _advance(engine, logits, active, range(first, last), turn)
        # A slot that is full starts again in the next round.
        restart = [a is not None and engine.lengths[s] == engine.capacity for s, a in enumerate(active)]
        live = [s for s, answer in enumerate(active) if answer is not None and not restart[s]]
        if live:
            tokens = [a.history[-1] if (a := active[s]) else 0 for s in range(live[-1] + 1)]
            logits = engine.decode(tokens, rows=[s in live for s in range(live[-1] + 1)])
            yield from _advance(engine, logits[live], active, live, turn)


def _spans(flags: list[bool]) -> Iterator[tuple[int, int]]:
    """The runs of True, as (first, last + 1)."""
    edges = [i for i in range(len(flags) + 1) if (i > 0 and flags[i - 1]) != (i < len(flags) and flags[i])]
    return zip(edges[::2], edges[1::2], strict=True)


def _window(engine: Engine, answer: _Answer) -> list[int]:
    """What to prefill: all, or the newest half of a slot where a sequence has outgrown it."""
    history = answer.history
    return history if len(history) <= engine.capacity else history[-max(1, engine.capacity // 2) :]


def _advance(
    engine: Engine, logits: Tensor, active: list[_Answer | None], slots: Sequence[int], turn: int
) -> Iterator[Piece]:
    """Draw the next token of ``slots`` from a row of ``logits`` each; a slot whose answer ended becomes free."""
    answers = [answer for slot in slots if (answer := active[slot])]
    tokens = choose(engine, logits, answers)
    for slot, answer, token in zip(slots, answers, tokens, strict=True):
        piece = answer.take(token, engine.end_of_text)
        if piece.ending:
            active[slot] = None
        yield piece
        if engine.turn != turn:
            raise UserError("another generation has begun on this engine: this one cannot go on")


@torch.inference_mode()
def choose(engine: Engine, logits: Tensor, answers: Sequence[_Answer]) -> list[int]:
    """A token for each row; raises ``UserError``, after clearing the cache, where logits are not finite."""
    sampling = answers[0].sampling
    if sampling.repetition_penalty != 1:
        seen = torch.stack([answer.seen for answer in answers if answer.seen is not None])
        logits = penalize(logits, seen, sampling.repetition_penalty)
    try:
        distribution = next_token_distribution(
            logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
        )
    except UserError:
        engine.reset()
        raise
    uniform = torch.cat([torch.rand(1, generator=answer.random, dtype=torch.float64) for answer in answers])
    return draw(distribution, uniform.to(engine.device)).tolist()
