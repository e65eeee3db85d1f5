"""A served scientist: who asks, may they, what does the estimator say, may that go out, and is it written down.

    key -> quarantine -> request -> words -> budget -> a child answers -> the guard, for recommendations -> log -> reply

Every step fails closed: what cannot be checked is refused, and what cannot be logged is not said. The service remembers only
what its log says (triggers.py); HTTP and MCP are two ways to reach it (server.py, mcp.py).
"""

import json
import math
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom.errors import UserError
from fathom.scientist import filters, fingerprint
from fathom.scientist.budget import Key, price, sha256_of
from fathom.scientist.containment import Instrument, Outcome, padded
from fathom.scientist.document import canonical
from fathom.scientist.log import Entry, Log
from fathom.scientist.queries import event
from fathom.scientist.triggers import HOUR, Watch
from fathom.scientist.verbs import read_request
from fathom.scientist.world import World

Values = dict[str, Any]
SERVED, CHECKPOINT_EVERY, CHECKPOINT_SECONDS, ALARM = "served", 64, 60.0, 100.0
"""The served world's name in its process, records and seconds between checkpoints, the e-value of a calibration alarm."""
STATUS = {
    "key": 401, "quarantine": 403, "quarantined": 503, "request": 400, "question": 400, "self_reference": 403,
    "measurement_apparatus": 403, "budget": 429, "no_policy": 403, "log": 503, "gone": 503,
}  # fmt: skip
"""The HTTP status of every reason to refuse."""


class Refused(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Policy:
    """What the guard holds recommendations against: all three, or none is released."""

    harm: str
    threshold: float
    delta: float

    def __post_init__(self) -> None:
        event(self.harm)
        if not (0 < self.threshold < 1 and 0 < self.delta < 1):
            raise UserError("the guard's threshold and delta lie between 0 and 1, both excluded")


@dataclass(frozen=True)
class Reply:
    status: int
    document: Values


class Service:
    """One world, asked by several keys.

    Args:
        second: A second process with the same world, but for its free text (``fingerprint.disturbed``). It repeats each
            recommendation and guards it; without it, or without a policy, none is released.
        release_key: The public key (32 bytes) of the person whose releases from quarantine count.
        signing_key: The private key (32 bytes) that signs checkpoints.
        heldout: Up to 100 rows that the world has not seen, to watch calibration by.
        band: Replies take this many seconds, or twice, four times .. as many.

    Raises:
        UserError: the log is broken or cannot be written, or the held-out rows are none of this world.
    """

    def __init__(
        self, world: World, log: Path, keys: dict[str, Key], *, instrument: Instrument, second: Instrument | None = None,
        policy: Policy | None = None, release_key: bytes | None = None, signing_key: bytes | None = None,
        heldout: list[Values] | None = None, band: float = 0.05,
    ) -> None:  # fmt: skip
        self.world, self.keys, self.policy = world, keys, policy
        self.instrument, self.second = instrument, second
        self.log, self.signing_key = Log(log), signing_key
        self.heldout, self.band = heldout or [], band
        self._lock = threading.Lock()
        self._watch, self._place = Watch(release_key), (0, 0)
        if log.is_file():
            self.log.verify()
        self._follow()
        self.forking_paths = self.log.announce(world)
        self._follow()
        self.checkpoint, self._noted = "", -math.inf
        self._inspect()

    def ask(self, secret: str, body: bytes) -> Reply:
        """One request to one reply; never raises, and takes a time that tells little."""
        started = time.monotonic()
        with self._lock:
            try:
                reply = self._ask(secret, body)
            except Refused as refusal:
                reply = _refusal(refusal.reason, refusal.detail)
            except (UserError, OSError) as error:
                reply = _refusal("log", f"what cannot be logged is not said: {error}")
        padded(started, self.band)
        return reply

    def _ask(self, secret: str, body: bytes) -> Reply:
        key = self.keys.get(sha256_of(secret))
        if key is None:
            raise Refused("key", "this key is not known")
        self._follow()
        if self._watch.fingerprint is None or time.time() - self._watch.fingerprint["time"] > HOUR:
            self._inspect()
        if held := self._watch.held(key.id):
            reason = "quarantined" if held["scope"] == "all" else "quarantine"
            raise Refused(reason, f"{held['reason']}: {held['detail']}; a person has to release it")
        # Before the request is looked at: nonsense fills a log as well as questions do.
        account = self._watch.keys[key.id].account
        if over := account.over(key, time.time(), 0):
            return self._refuse(key, "budget", f"this key has {over}")
        try:
            verb, arguments = read_request(body)
        except UserError as error:
            return self._refuse(key, "request", str(error))
        about = self.instrument.about["worlds"][SERVED]
        if found := filters.objection(verb, arguments, about["outcome"]):
            return self._refuse(key, *found, verb, arguments)
        if verb == "recommend" and (self.policy is None or self.second is None):
            return self._refuse(
                key, "no_policy", "recommendations need a guard's harm, threshold and delta", verb, arguments
            )
        evaluations = price(verb, arguments, about)
        if over := account.over(key, time.time(), evaluations):
            return self._refuse(key, "budget", f"this key has {over}", verb, arguments)
        outcome = self.instrument.ask(SERVED, verb, arguments)
        if outcome.failed == "gone":
            raise Refused("gone", outcome.detail)
        if outcome.wrong is not None:
            return self._refuse(key, "question", outcome.wrong, verb, arguments, evaluations)
        document = _abstention(verb, arguments, self.world, outcome) if outcome.answer is None else outcome.answer
        if verb == "recommend" and document["result"] is not None:
            document = self._guarded(document, arguments)
        bits = filters.bits(document)
        if account.bits(time.time()) + bits > key.bits_per_day:
            return self._refuse(
                key, "budget", f"this key has {key.bits_per_day:g} bits a day", verb, arguments, evaluations
            )
        content = {"key": key.id, "verb": verb, "arguments": arguments, "evaluations": evaluations, "bits": bits,
                   "failed": outcome.failed, "document": document}  # fmt: skip
        entry = self._append("abstain" if document["result"] is None else "answer", content)
        if held := self._watch.quarantined.get("all"):
            raise Refused("quarantined", f"{held['reason']}: {held['detail']}; a person has to release it")
        return Reply(200, {"answer": document, "log": {"index": entry.index, "head": entry.head},
                           "checkpoint": self.checkpoint, "forking_paths": self.forking_paths})  # fmt: skip

    def _refuse(
        self, key: Key, reason: str, detail: str, verb: str | None = None, arguments: Values | None = None,
        evaluations: float = 0.0,
    ) -> Reply:  # fmt: skip
        content = {"key": key.id, "verb": verb, "arguments": arguments, "reason": reason, "detail": detail,
                   "evaluations": evaluations, "bits": 1.0}  # fmt: skip
        self._append("refuse", content)
        return _refusal(reason, detail)

    def _guarded(self, document: Values, arguments: Values) -> Values:
        """A recommendation as a second process sees it: the same bytes, its world's hash apart, and each run held against
        the policy."""
        assert self.second is not None and self.policy is not None
        again = self.second.ask(SERVED, "recommend", arguments)
        if again.failed:
            raise Refused("gone", "the guard's process gives no answer, so nothing is recommended")
        same = again.answer is not None and canonical({**again.answer, "world": ""}) == canonical(
            {**document, "world": ""}
        )
        if not same:
            self._quarantine("all", "disagreement", "two processes answered one question differently")
            raise Refused("quarantined", "disagreement of two instances; a person has to release it")
        decisions: dict[str, str] = {}

        def decide(row: Values) -> str:
            """admit if every run of the experiment is admitted, else what the first that is not meets with."""
            for design in row.get("designs", [row.get("design")]):
                name = json.dumps(design, sort_keys=True)
                if name not in decisions:
                    given = {"design": design, **self.policy.__dict__}
                    decisions[name] = _decision(self.second.ask(SERVED, "guard", given)) if self.second else "escalate"
                if decisions[name] != "admit":
                    return decisions[name]
            return "admit"

        ranked = document["result"]["ranked"]
        admitted = [row for row in ranked if decide(row) == "admit"]
        kept = ("design", "designs")
        refused = [{name: row[name] for name in kept if name in row} | {"decision": decide(row)}
                   for row in ranked if decide(row) != "admit"]  # fmt: skip
        result = {**document["result"], "ranked": admitted, "not_admitted": refused}
        if any(decide(step) != "admit" for step in result.pop("batch", [])):
            result["batch_not_admitted"] = True
        elif "batch" in document["result"]:
            result["batch"] = document["result"]["batch"]
        worth = any(row["worth_running"] for row in admitted)
        result["advice"] = "run the first" if worth else "not worth running" if admitted else "none is admitted"
        result["guarded"] = dict(self.policy.__dict__)
        return {**document, "result": result}

    def health(self) -> Reply:
        """Whether questions are answered; open to everybody, and all that a quarantine leaves."""
        held = self._watch.quarantined.get("all")
        status = "quarantined" if held else "ok" if self.instrument.alive else "gone"
        return Reply(200, {"status": status, "world": self.world.hash})

    def inspect(self) -> list[str]:
        """Take the fingerprint now; what is wrong with it."""
        with self._lock:
            return self._inspect()

    def _inspect(self) -> list[str]:
        """Ask the canaries and the held-out rows; quarantine all if an answer is not what it was or has to be."""
        replies = {
            name: {"answer": found.answer, "wrong": found.wrong, "failed": found.failed}
            for name, world, verb, arguments in fingerprint.questions()
            for found in [self.instrument.ask(world, verb, arguments)]
        }
        try:
            dead = fingerprint.wrong(replies)
        except (KeyError, TypeError):
            dead = ["a canary that has to answer gave no answer"]
        taken = fingerprint.take(replies) | {"world": self.world.hash}
        before = self._watch.fingerprint
        moved = fingerprint.moved(before, taken) if before else []
        self._append("fingerprint", taken)
        if dead or moved:
            what = (
                f"{dead[0]} is wrong"
                if dead
                else f"{len(moved)} replies changed and the code did not, first {moved[0]}"
            )
            self._quarantine("all", "fingerprint", what)
        value = self._calibration()
        if value >= ALARM:
            self._quarantine(
                "all", "calibration", f"held-out rows give an e-value of {value:.3g} against the predictions"
            )
        return dead + moved

    def _calibration(self) -> float:
        """The e-value of the held-out rows; infinite if they could not be scored."""
        if not self.heldout:
            return 0.0
        outcome = self.instrument.ask(SERVED, "score", {"rows": self.heldout})
        if outcome.wrong is not None:
            raise UserError(f"the held-out rows cannot be scored: {outcome.wrong}")
        if outcome.answer is None:
            return math.inf
        return 0.0 if outcome.answer["result"] is None else float(outcome.answer["result"]["e_value"])

    def _quarantine(self, scope: str, reason: str, detail: str) -> None:
        if scope not in self._watch.quarantined:
            self._append("quarantine", {"scope": scope, "reason": reason, "detail": detail})

    def _append(self, kind: str, content: Values) -> Entry:
        """Log, take note of what was logged, and act on what that shows."""
        entry = self.log.append(kind, content)
        self._follow()
        stale = time.monotonic() - self._noted > CHECKPOINT_SECONDS
        if kind != "checkpoint" and (stale or entry.index % CHECKPOINT_EVERY == 0):
            self._noted = time.monotonic()
            self.checkpoint = self.log.checkpoint(self.signing_key)
            self._append("checkpoint", {"note": self.checkpoint})
        return entry

    def _follow(self) -> None:
        """Fold whatever the log holds that was not seen yet, another process's records included."""
        records, place = self.log.read_on(self._place)
        for record in records:
            self._watch.fold(record)
        self._place = place
        for scope, (reason, detail) in list(self._watch.alarms.items()):
            self._quarantine(scope, reason, detail)


def _decision(outcome: Outcome) -> str:
    """admit or refuse as the guard says; escalate, to a person, whenever it does not say."""
    result = None if outcome.answer is None else outcome.answer["result"]
    return "escalate" if result is None else str(result["decision"])


def _abstention(verb: str, arguments: Values, world: World, outcome: Outcome) -> Values:
    detail = outcome.detail or f"the child was stopped: {outcome.failed}"
    abstain = {"reason": "computational", "detail": detail, "in_model": None}
    return {"verb": verb, "world": world.hash, "query": arguments, "result": None, "abstain": abstain}


def _refusal(reason: str, detail: str) -> Reply:
    return Reply(STATUS[reason], {"refused": {"reason": reason, "detail": detail[:1000]}})
