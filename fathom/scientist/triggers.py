"""What is seen from the log alone: budgets, quarantines, and the patterns that lead to them.

A watch is a fold over the log's records: whoever reads the log anew stands where the last reader stood. It sees questions and
answers; the estimator sees neither this nor any earlier question. Scopes are a key's id, or "all".

    probing         the same question but for its numbers, again and again within an hour
    agent loop      questions that carry numbers of the key's last answers
    self-reference, limits broken, budgets exhausted: each so many times within an hour
    abstentions     a CUSUM of the abstained share above one in three
    system call, fingerprint, disagreement of two instances, calibration: recorded by the service as they happen; for all
"""

import json
import re
from collections import defaultdict, deque
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from fathom.errors import UserError
from fathom.scientist import signing
from fathom.scientist.budget import Account
from fathom.scientist.log import GENESIS

Values = dict[str, Any]
HOUR = 3600.0
ALIKE, QUOTES, REMEMBERED = 24, 6, 60
"""Questions of one shape, quotations of own answers, and released numbers that a quotation may be of."""
STRIKES = {"self_reference": 3, "measurement_apparatus": 3, "limits": 5, "budget": 40}
ALLOWED_SHARE, CUSUM = 0.35, 8.0
_NUMBER = re.compile(r"\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+")
_TEXT = re.compile(r"'[^']*'")


def shape(verb: str, arguments: Values) -> str:
    """A question with numbers, levels and the length of lists taken out."""

    def bare(value: Any) -> Any:
        match value:
            case str():
                return _NUMBER.sub("#", _TEXT.sub("'", value)).replace(" ", "").replace("-#", "#")
            case dict():
                return {key: bare(each) for key, each in value.items()}
            case list():
                return sorted({json.dumps(bare(each), sort_keys=True) for each in value})
        return "#"

    given = dict(arguments)
    if isinstance(given.get("design"), dict):
        given["design"] = sorted(given["design"])
    for name in ("candidates", "rows"):
        if name in given:
            given[name] = sorted({key for each in given[name] for key in each})
    return f"{verb} {json.dumps(bare(given), sort_keys=True)}"


def numbers(value: Any) -> list[float]:
    """Every number in a value, those inside texts included."""
    match value:
        case bool() | None:
            return []
        case int() | float():
            return [float(value)]
        case str():
            return [float(each) for each in _NUMBER.findall(value)]
        case dict():
            return [number for each in value.values() for number in numbers(each)]
        case list():
            return [number for each in value for number in numbers(each)]
    return []


def telling(number: float) -> str | None:
    """A number of at least three significant digits, as released; None of a round one, which anybody may name."""
    text = f"{abs(number):.3g}"
    digits = text.split("e")[0].replace(".", "").strip("0")
    return text if len(digits) >= 3 else None


@dataclass
class Watched:
    """What the last hour's records say of one key."""

    account: Account = field(default_factory=Account)
    shapes: deque[tuple[float, str, str]] = field(default_factory=deque)
    said: deque[str] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    quotes: deque[float] = field(default_factory=deque)
    strikes: defaultdict[str, deque[float]] = field(default_factory=lambda: defaultdict(deque))
    abstained: float = 0.0


class Watch:
    """The state that the log's records say a service is in.

    Args:
        release_key: The public key whose releases count.
    """

    def __init__(self, release_key: bytes | None) -> None:
        self.release_key = release_key
        self.head = GENESIS
        """The hash of the last record that was folded in."""
        self.keys: defaultdict[str, Watched] = defaultdict(Watched)
        self.quarantined: dict[str, Values] = {}
        """By scope: the quarantine's record hash, reason and detail."""
        self.alarms: dict[str, tuple[str, str]] = {}
        """By scope: a reason and a detail that no quarantine record speaks of yet."""
        self.fingerprint: Values | None = None

    def fold(self, record: Values) -> None:
        """Take note of the next record.

        Raises:
            UserError: it does not follow the last one.
        """
        if record["prev"] != self.head:
            raise UserError(f"record {record['seq']} of the log does not follow what was read before it")
        content, kind, self.head = record["content"], record["kind"], record["hash"]
        time = datetime.fromisoformat(record["time"]).timestamp()
        match kind:
            case "quarantine":
                self.alarms.pop(content["scope"], None)
                self.quarantined.setdefault(content["scope"], {**content, "hash": record["hash"]})
            case "release":
                held = self.quarantined.get(content.get("scope", ""))
                if held and held["hash"] == content.get("of") and signing.released(self.release_key, content):
                    del self.quarantined[content["scope"]]
                    self.keys[content["scope"]] = Watched(self.keys[content["scope"]].account)
            case "fingerprint":
                self.fingerprint = {**content, "time": time}
            case "answer" | "abstain" | "refuse" if "key" in content:
                self._question(kind, content, time)

    def _question(self, kind: str, content: Values, time: float) -> None:
        scope = content["key"]
        watched = self.keys[scope]
        watched.account.add(time, content["evaluations"], content["bits"])
        if content.get("failed") == "system call":
            self._alarm("all", "system_call", f"a question of {scope} made the child try a forbidden system call")
        elif content.get("failed") in ("time", "memory", "killed"):
            self._strike(scope, "limits", time)
        if kind == "refuse" and content["reason"] in STRIKES:
            self._strike(scope, content["reason"], time)
        if content.get("verb") is None:
            return
        asked = {key: each for key, each in content["arguments"].items() if key != "rows"}
        own = shape(content["verb"], asked)
        watched.shapes.append((time, own, json.dumps(asked, sort_keys=True)))
        while watched.shapes[0][0] < time - HOUR:
            watched.shapes.popleft()
        if (alike := len({exact for _, each, exact in watched.shapes if each == own})) >= ALIKE:
            self._alarm(scope, "probing", f"{alike} questions within an hour differ in their numbers only")
        if any(telling(number) in watched.said for number in numbers(asked)):
            watched.quotes.append(time)
            while watched.quotes[0] < time - HOUR:
                watched.quotes.popleft()
            if len(watched.quotes) >= QUOTES:
                self._alarm(scope, "agent_loop", f"{len(watched.quotes)} questions carry numbers of earlier answers")
        if kind == "answer":
            result = content["document"]["result"]
            watched.said.extend(text for number in numbers(_told(result)) if (text := telling(number)))
        if kind != "refuse":
            share = float(kind == "abstain") - ALLOWED_SHARE
            watched.abstained = max(0.0, watched.abstained + share)
            if watched.abstained > CUSUM:
                self._alarm(scope, "abstentions", "far more questions end without an answer than honest ones do")

    def _strike(self, scope: str, reason: str, time: float) -> None:
        times = self.keys[scope].strikes[reason]
        times.append(time)
        while times[0] < time - HOUR:
            times.popleft()
        if len(times) >= STRIKES[reason]:
            self._alarm(scope, reason, f"{len(times)} times within an hour")

    def _alarm(self, scope: str, reason: str, detail: str) -> None:
        if scope not in self.quarantined:
            self.alarms.setdefault(scope, (reason, detail))

    def held(self, scope: str) -> Values | None:
        """The quarantine that a key is under, if any."""
        return self.quarantined.get("all") or self.quarantined.get(scope)


def _told(result: Values) -> Values:
    """The numbers of an answer that a loop would act on: not those of its own question, nor every theory's."""
    return {key: each for key, each in result.items() if key in ("p", "median", "mean", "lower", "upper", "cautious")}
