"""What a key may cost: questions a minute, evaluations a day, and bits of answers a day.

    price     evaluations of a theory's outcome that a question asks for at most: counted beforehand, from the question alone
    bits      an upper bound on what its answer tells (filters.py), known once there is an answer

Everything is counted from the log's records, so that a restart forgives nothing. A key without all three numbers is no key.
"""

import hashlib
import json
import math
import secrets
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fathom.errors import UserError
from fathom.scientist.filters import texts_of

Values = dict[str, Any]
MINUTE, DAY = 60.0, 86_400.0
BUDGETS = {"queries_per_minute": 30.0, "evaluations_per_day": 2e9, "bits_per_day": 20_000.0}
"""What a new key gets."""


@dataclass(frozen=True)
class Key:
    id: str
    sha256: str
    """Of the secret, which is written nowhere."""
    queries_per_minute: float
    evaluations_per_day: float
    bits_per_day: float


def read_keys(path: Path) -> dict[str, Key]:
    """The keys of a file, by the SHA-256 of their secret.

    Raises:
        UserError: not such a file, two keys alike, or a budget that is missing: nothing is unlimited.
    """
    try:
        items = json.loads(path.read_text())
        keys = [Key(**item) for item in items]
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"{path} is no list of keys with id, sha256, {', '.join(BUDGETS)}: see fathom ask key"
        ) from None
    for key in keys:
        numbers = (key.queries_per_minute, key.evaluations_per_day, key.bits_per_day)
        whole = isinstance(key.id, str) and key.id not in ("", "all") and isinstance(key.sha256, str)
        if not whole or len(key.sha256) != 64 or any(
            isinstance(each, bool) or not isinstance(each, int | float) or not 0 < each < math.inf for each in numbers
        ):  # fmt: skip
            raise UserError(f"{path}: key {key.id!r} needs an id, a SHA-256 and three positive budgets")
    if len({key.id for key in keys}) < len(keys) or len({key.sha256 for key in keys}) < len(keys):
        raise UserError(f"{path}: two keys are alike")
    if not keys:
        raise UserError(f"{path} has no keys")
    return {key.sha256: key for key in keys}


def new_key(path: Path, id: str) -> str:
    """Add a key with the usual budgets to a file; its secret, shown this once."""
    items = [key.__dict__ for key in read_keys(path).values()] if path.exists() else []
    if any(item["id"] == id for item in items) or not id or id == "all":
        raise UserError(f"{path} has a key {id!r} already" if id not in ("", "all") else f"{id!r} is no name for a key")
    secret = secrets.token_urlsafe(32)
    items.append({"id": id, "sha256": sha256_of(secret), **BUDGETS})
    path.write_text(json.dumps(items, indent=2) + "\n")
    return secret


def sha256_of(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "replace")).hexdigest()


def price(verb: str, arguments: Values, world: Values) -> float:
    """Evaluations that a question asks for at most; ``world`` is what the zygote says of it."""
    length = 1 + sum(map(len, texts_of(arguments))) / 8
    theories, draws = world["theories"], world["draws"]
    match verb:
        case "theories":
            return float(theories)
        case "predict":
            return 60_000.0 * theories
        case "recommend":
            batch = arguments.get("batch", 1)
            return 40_000.0 * theories * len(arguments["candidates"]) * batch * length
        case "score":
            return 40_000.0 * theories * len(arguments["rows"])
        case "why":
            return float(draws * max(world["rows"], 1) * length)
    return float(draws * length)


@dataclass
class Account:
    """What a key has spent: a window over the log's records."""

    spent: deque[tuple[float, float, float]] = field(default_factory=deque)
    """Time, evaluations and bits of each question."""

    def add(self, time: float, evaluations: float, bits: float) -> None:
        self.spent.append((time, evaluations, bits))
        while self.spent and self.spent[0][0] < time - DAY:
            self.spent.popleft()

    def over(self, key: Key, now: float, evaluations: float) -> str | None:
        """The budget that a further question of this price would break, if any."""
        day = [each for each in self.spent if each[0] > now - DAY]
        if sum(each[0] > now - MINUTE for each in day) >= key.queries_per_minute:
            return f"{key.queries_per_minute:g} questions a minute"
        if sum(each[1] for each in day) + evaluations > key.evaluations_per_day:
            return f"{key.evaluations_per_day:g} evaluations a day"
        if self.bits(now) >= key.bits_per_day:
            return f"{key.bits_per_day:g} bits a day"
        return None

    def bits(self, now: float) -> float:
        return sum(each[2] for each in self.spent if each[0] > now - DAY)
