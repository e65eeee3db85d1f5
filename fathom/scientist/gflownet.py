"""A sampler of sequences of choices in proportion to a weight: a GFlowNet trained by trajectory balance (arXiv 2201.13259).

    loss = (log Z + sum_t log P(choice_t | choices before) - log weight)^2

Every sequence of choices has one way to be made, so the backward policy is 1 and at the optimum P(sequence) = weight / Z.
It is trained offline on the weights of one world's evidence, by the world's owner; no question runs or trains it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

Choice = tuple[int, ...]
FLOOR = 20.0
"""Weights lower than the best so far by e to this are raised to that: their number times e^-20 is what the sampler is off by."""


class Policy(nn.Module):
    """Logits of the next choice from the choices so far.

    Args:
        sizes: How many options each place has, in the order of choosing.
    """

    def __init__(self, sizes: list[int], hidden: int = 64) -> None:
        super().__init__()
        self.sizes = sizes
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        self.body = nn.Sequential(
            nn.Linear(int(self.starts[-1]) + len(sizes), hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
        )
        self.head = nn.Linear(hidden, max(sizes))
        self.log_z = nn.Parameter(torch.zeros(()))

    def state(self, choices: Tensor, place: int) -> Tensor:
        """[B, T] choices, of which the first ``place`` count, as one-hot features [B, F]."""
        features = torch.zeros(len(choices), int(self.starts[-1]) + len(self.sizes))
        if place:
            features.scatter_(1, choices[:, :place] + torch.as_tensor(self.starts[:place]), 1.0)
        features[:, int(self.starts[-1]) + place] = 1.0
        return features

    def hidden(self, choices: Tensor, place: int) -> Tensor:
        """What the network holds of a state [B, H]: what probes look at."""
        found: Tensor = self.body(self.state(choices, place))
        return found

    def log_policy(self, choices: Tensor, place: int) -> Tensor:
        """Log probability of each option of ``place`` [B, size]."""
        logits: Tensor = self.head(self.hidden(choices, place))[:, : self.sizes[place]]
        return logits.log_softmax(1)

    def log_probability(self, choices: Tensor) -> Tensor:
        """Of whole sequences [B]."""
        count, places = choices.shape
        states = torch.stack([self.state(choices, place) for place in range(places)], 1)
        logits = self.head(self.body(states))
        beyond = torch.arange(logits.shape[-1]) >= torch.tensor(self.sizes)[:, None]
        log = logits.masked_fill(beyond, -math.inf).log_softmax(-1)
        taken: Tensor = log.gather(2, choices[:, :, None])[:, :, 0].sum(1)
        assert taken.shape == (count,)
        return taken

    @torch.no_grad()
    def draw(self, count: int, random: torch.Generator, explore: float = 0.0) -> Tensor:
        """``count`` sequences [count, T]; with probability ``explore`` a choice is uniform."""
        choices = torch.zeros(count, len(self.sizes), dtype=torch.long)
        for place, size in enumerate(self.sizes):
            p = (1 - explore) * self.log_policy(choices, place).exp() + explore / size
            choices[:, place] = torch.multinomial(p, 1, generator=random)[:, 0]
        return choices


@dataclass(frozen=True)
class Trained:
    policy: Policy
    weighed: dict[Choice, float]
    """Every sequence whose weight was asked for, and its log."""
    loss: float
    """The mean over the last tenth of training, in squared nats."""


def train(
    sizes: list[int], log_weight: Callable[[Choice], float], *, steps: int = 1200, batch: int = 48, seed: int = 0
) -> Trained:
    """A policy whose sequences come in proportion to their weights.

    A third of each batch is drawn from the best sequences found so far, which keeps found modes from being forgotten.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _train(sizes, log_weight, steps, batch, seed)
    finally:
        torch.set_num_threads(threads)


def _train(sizes: list[int], log_weight: Callable[[Choice], float], steps: int, batch: int, seed: int) -> Trained:
    random = torch.Generator().manual_seed(seed)
    policy = _policy(sizes, seed)
    optimizer = torch.optim.Adam(
        [
            {"params": [*policy.body.parameters(), *policy.head.parameters()], "lr": 3e-3},
            {"params": [policy.log_z], "lr": 0.1},
        ]
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 2 * (1 - step / steps)))
    weighed: dict[Choice, float] = {}
    losses: list[float] = []
    best: list[Choice] = []
    for step in range(steps):
        explore = 0.5 * max(0.0, 1 - 2 * step / steps) + 0.05
        drawn = policy.draw(batch, random, explore)
        if step % 10 == 0:
            best = sorted(weighed, key=lambda choice: -weighed[choice])[: 4 * batch]
        if best:
            heights = torch.tensor([weighed[choice] for choice in best])
            kept = torch.multinomial(
                ((heights - heights.max()) / 2).exp(), batch // 3, replacement=True, generator=random
            )
            drawn[: batch // 3] = torch.tensor(best)[kept]
        for choice in map(tuple, drawn.tolist()):
            if choice not in weighed:
                weighed[choice] = log_weight(choice)
        top = max(weighed.values())
        target = torch.tensor([max(weighed[choice], top - FLOOR) - top for choice in map(tuple, drawn.tolist())])
        loss = ((policy.log_z + policy.log_probability(drawn) - target) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return Trained(policy, weighed, float(np.mean(losses[-max(steps // 10, 1) :])))


def _policy(sizes: list[int], seed: int) -> Policy:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Policy(sizes)


@torch.no_grad()
def total_variation(policy: Policy, log_weights: dict[Choice, float]) -> float:
    """Half the sum of |P(sequence) - weight / Z| over all sequences, whose log weights are given."""
    choices = torch.tensor(list(log_weights))
    exact = torch.tensor(list(log_weights.values()), dtype=torch.float64)
    own = policy.log_probability(choices).double().exp()
    missing = max(1 - float(own.sum()), 0.0)
    return 0.5 * (float((own - exact.softmax(0)).abs().sum()) + missing)


def found(trained: Trained, most: int, share: float = 0.999) -> tuple[list[Choice], float]:
    """The best sequences weighed, as few as hold ``share`` of all weight that was found, and the share that they hold."""
    order = sorted(trained.weighed, key=lambda choice: -trained.weighed[choice])
    heights = np.array([trained.weighed[choice] for choice in order])
    heights = np.exp(heights - heights[0])
    total = np.cumsum(heights) / heights.sum()
    count = min(int(np.searchsorted(total, share)) + 1, most, len(order))
    return order[:count], float(total[count - 1]) if math.isfinite(total[count - 1]) else 0.0
