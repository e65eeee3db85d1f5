"""How the next token is chosen: settings, the distribution that they make of the logits, and the draw.

    logits --> repetition penalty --> / temperature --> top_k --> top_p --> min_p --> normalised --> draw

Everything is computed in float64, and the random numbers are made on the CPU: a seed means the same draws on every device.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fathom.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a prompt is continued."""

    tokens: int = 200
    """How many tokens at most; the model may end its document earlier."""
    temperature: float = 1.0
    """1 draws as the model predicts; less keeps to likelier tokens, 0 takes the likeliest."""
    top_k: int | None = None
    """Draw only among this many likeliest tokens."""
    top_p: float | None = None
    """Draw only among the fewest tokens that hold this share of the probability."""
    min_p: float | None = None
    """Draw only among tokens at least this share as likely as the likeliest (arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Makes tokens that were there before less likely, if above 1 (arXiv 1909.05858)."""
    stop: tuple[str, ...] = ()
    """End before any of these texts."""
    seed: int = 0
    """Of the draws; prompt i of several uses seed + i."""

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise UserError(f"the number of tokens is {self.tokens}: it must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}: it must be at least 0 and below 2^63")
        if "" in self.stop:
            raise UserError("a stop text is empty: every text would end before its first letter")
        check_settings(self.temperature, self.top_k, self.top_p, self.min_p)
        if not 0 < self.repetition_penalty < math.inf:
            raise UserError(f"repetition_penalty is {self.repetition_penalty}: it must be a positive number")


def check_settings(temperature: float, top_k: int | None, top_p: float | None, min_p: float | None) -> None:
    """Raise ``UserError`` for a setting out of range."""
    if not temperature >= 0 or math.isinf(temperature):
        raise UserError(f"temperature is {temperature}: it must be 0 or a positive number")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k is {top_k}: it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}: it must be above 0 and at most 1")
    if min_p is not None and not 0 <= min_p <= 1:
        raise UserError(f"min_p is {min_p}: it must be between 0 and 1")


def next_token_distribution(
    logits: Float[Tensor, "*batch V"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
) -> Float[Tensor, "*batch V"]:
    """The probabilities that the next token is drawn from, float64, on the device of ``logits``.

    Args:
        logits: of one position, or of several.
        temperature: divides the logits; 0 puts all mass on the largest one (the first of equals).
        top_k: keep this many of the likeliest tokens; equals are kept in the order of their number.
        top_p: keep the fewest tokens whose mass, after ``top_k``, reaches this.
        min_p: keep the tokens whose probability is at least this share of the largest.

    Raises:
        UserError: a setting out of range, or logits that are not finite.
    """
    check_settings(temperature, top_k, top_p, min_p)
    if not logits.isfinite().all():
        raise UserError("the model's logits are not finite: its training diverged; use an earlier checkpoint")
    scores = logits.double()
    if temperature == 0:
        return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1)
    # Shifted first, so that a small temperature cannot overflow.
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature
    if top_k is None and min_p is None and (top_p is None or top_p == 1):
        return scores.softmax(-1)
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    kept = ordered.softmax(-1)
    if top_k is not None:
        kept[..., top_k:] = 0
        kept /= kept.sum(-1, keepdim=True)
    if top_p is not None and top_p < 1:
        # A token stays if those before it do not reach top_p yet, so that the first always does.
        kept[kept.cumsum(-1) - kept >= top_p] = 0
    if min_p is not None:
        kept[kept < min_p * kept[..., :1]] = 0
    kept /= kept.sum(-1, keepdim=True)
    return torch.empty_like(kept).scatter_(-1, order, kept)


def penalize(
    logits: Float[Tensor, "*batch V"], seen: Bool[Tensor, "*batch V"], penalty: float
) -> Float[Tensor, "*batch V"]:
    """Logits of ``seen`` tokens divided by ``penalty`` where they are positive, multiplied where they are negative."""
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def draw(distribution: Float[Tensor, "B V"], uniform: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The token at which each row's cumulative probability passes ``uniform``, numbers in [0, 1)."""
    cumulative = distribution.cumsum(-1)
    # Scaled by the sum, which rounding may leave beside 1; the last token that has any mass is the last to be drawn.
    threshold = uniform.to(cumulative).unsqueeze(-1) * cumulative[:, -1:]
    last = (cumulative < cumulative[:, -1:]).sum(-1)
    return torch.searchsorted(cumulative, threshold, right=True).squeeze(-1).minimum(last)
