"""Tasks of a set depth: a question needs as many steps, one after another, as its difficulty says.

hops         facts "a leads to f(a)", in any order, f one cycle through all nodes; the question (x, k) asks for f^k(x)
arithmetic   facts "root is r" and "v is u + d" or "v is u * d" modulo p, a chain through all variables in its order;
             the question x asks for x's value, and its difficulty is the number of facts that it takes, the root's being one

A fact is one token and so is a question, so that nothing is tested but following facts: one attention layer finds the fact of a
node it holds. A layer can also double what a fact says (f^2 from f), so depth h could reach 2^h - 1 hops in this way; what a
network does reach, the probe measures. On one cycle of n nodes f^k is no shorter than k hops forward or n - k back.

All questions of a sequence follow its facts and are answered where they stand; answers are the first ``num_answers`` logits.
reasoning-gym (0.1.25) has no such pair of tasks with an exact number of steps: its nearest, path_star and chain_sum, are texts
for language models.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from fathom.errors import UserError

MODULUS = 5
OPERATIONS = [("add", 1), ("add", 2), ("multiply", 2)]


class Sample(NamedTuple):
    """Sequences of facts and then questions."""

    tokens: Int[Tensor, "B T"]
    answers: Int[Tensor, "B Q"]
    """Of the last Q tokens, which are the questions."""
    difficulty: Int[Tensor, "B Q"]
    """Steps that a question needs, from 1."""


@dataclass(frozen=True)
class TaskConfig:
    """What is asked."""

    name: Literal["hops", "arithmetic"] = "hops"
    """hops: follow a chain of facts; arithmetic: compute a chain of assignments."""
    size: int = 8
    """Nodes of the cycle, or variables of the chain."""
    hops: int = 4
    """The largest number of steps."""
    questions: int = 16
    """Questions of one sequence (arithmetic asks each variable at most once)."""

    def __post_init__(self) -> None:
        if self.hops < 1:
            raise UserError(f"task.hops is {self.hops}: a question needs at least one step")
        if self.size <= self.hops:
            raise UserError(f"task.size is {self.size}: {self.hops} steps need more than {self.hops} facts")
        most = self.size * self.hops if self.name == "hops" else self.hops
        if self.questions < 1:
            raise UserError(f"task.questions is {self.questions}: it must be at least 1")
        if self.name == "hops" and self.questions > most:
            raise UserError(f"task.questions is {self.questions}: there are only {most}")

    @property
    def num_questions(self) -> int:
        """Q."""
        return self.questions if self.name == "hops" else min(self.questions, self.hops)

    @property
    def length(self) -> int:
        """T."""
        return self.size + self.num_questions

    @property
    def num_answers(self) -> int:
        return self.size if self.name == "hops" else MODULUS

    @property
    def vocab_size(self) -> int:
        n = self.size
        return n * n + n * self.hops if self.name == "hops" else n * MODULUS + n * n * len(OPERATIONS) + n

    def sample(self, count: int, generator: torch.Generator) -> Sample:
        """``count`` sequences, drawn by ``generator`` alone."""
        return (_hops if self.name == "hops" else _arithmetic)(self, count, generator)


def _shuffle(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows.gather(1, torch.rand(rows.shape, generator=generator).argsort(1))


def _hops(task: TaskConfig, count: int, generator: torch.Generator) -> Sample:
    n, k = task.size, task.hops
    nodes = _shuffle(torch.arange(n).expand(count, n), generator)
    after = torch.empty_like(nodes).scatter_(1, nodes, nodes.roll(-1, 1))
    reached = [after]
    for _ in range(k - 1):
        reached.append(after.gather(1, reached[-1]))
    asked = _shuffle(torch.arange(n * k).expand(count, n * k), generator)[:, : task.questions]
    facts = _shuffle(torch.arange(n) * n + after, generator)
    answers = torch.stack(reached, 2).flatten(1).gather(1, asked)  # node x, hops h at x * k + h - 1
    return Sample(torch.cat([facts, n * n + asked], 1), answers, asked % k + 1)


def _arithmetic(task: TaskConfig, count: int, generator: torch.Generator) -> Sample:
    n, kinds = task.size, len(OPERATIONS)
    chain = _shuffle(torch.arange(n).expand(count, n), generator)
    chosen = torch.randint(kinds, (count, n - 1), generator=generator)
    values = [torch.randint(MODULUS, (count,), generator=generator)]
    by = torch.tensor([d for _, d in OPERATIONS])[chosen]
    adds = torch.tensor([kind == "add" for kind, _ in OPERATIONS])[chosen]
    for step in range(n - 1):
        value = torch.where(adds[:, step], values[-1] + by[:, step], values[-1] * by[:, step])
        values.append(value % MODULUS)
    root = chain[:, :1] * MODULUS + values[0][:, None]
    rest = n * MODULUS + (chain[:, 1:] * n + chain[:, :-1]) * kinds + chosen
    facts = torch.cat([root, rest], 1)
    places = _shuffle(torch.arange(task.hops).expand(count, task.hops), generator)[:, : task.num_questions]
    questions = n * MODULUS + n * n * kinds + chain.gather(1, places)
    return Sample(torch.cat([facts, questions], 1), torch.stack(values, 1).gather(1, places), places + 1)
