"""An answer: what was asked of which world, what came out, how sure that is, or why there is no answer."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fathom.scientist.document import canonical, digest

REASONS = {
    "computational": "the numbers did not pass the gates of inference",
    "extrapolation": "the design lies outside the data and no theory says how laws drift there",
    "improbable_premise": "the premise is as good as excluded by this world",
    "no_adequate_theory": "the flexible theory beats all named ones, or rows scatter as none of them says",
    "straddles_the_threshold": "the probability cannot be told from the threshold",
}
DIGITS = 6


class Abstain(Exception):
    """Raised inside a question: there is no answer, for one of ``REASONS``."""

    def __init__(self, reason: str, detail: str, in_model: dict[str, Any] | None = None) -> None:
        super().__init__(detail)
        self.reason, self.detail, self.in_model = reason, detail, in_model


@dataclass(frozen=True)
class Answer:
    verb: str
    world: str
    """The snapshot's hash: every probability is P(. | this world)."""
    query: dict[str, Any]
    result: dict[str, Any] | None
    """None where the scientist abstains."""
    abstain: dict[str, Any] | None
    inference: dict[str, Any]
    assumptions: list[str]

    def document(self) -> dict[str, Any]:
        return {
            "verb": self.verb, "world": self.world, "query": self.query, "query_sha256": digest(self.query),
            "result": self.result, "abstain": self.abstain, "inference": self.inference, "assumptions": self.assumptions,
        }  # fmt: skip

    @property
    def bytes(self) -> bytes:
        """Canonical JSON: equal for equal questions to equal worlds, whatever was asked before."""
        return canonical(self.document())

    def __getitem__(self, name: str) -> Any:
        """A value of the result; ``None`` of an abstention."""
        return None if self.result is None else self.result[name]


EXACT = 17
"""Digits that a double needs: of questions nothing is rounded, so that two of them are never taken for one."""


def plain(value: Any, digits: int = DIGITS) -> Any:
    """``value`` as JSON: numbers to so many digits, and None for what is not finite."""
    if isinstance(value, dict):
        return {str(key): plain(each, digits) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, digits) for each in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist(), digits)
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        number = float(value)
        return float(f"{number:.{digits}g}") if math.isfinite(number) else None
    return value
