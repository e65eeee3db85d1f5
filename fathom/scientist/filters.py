"""What a served scientist does not take as a question, what it lets out of an answer, and how much that says.

The filters stand apart from the estimate: they see its question and its answer and change no number in between. They are
lists of words and a rounding, not understanding: a person who renames things gets past the words.
"""

import itertools
import math
import re
from typing import Any

from fathom.scientist.betting import e_value

Values = dict[str, Any]
DIGITS, KEPT = 3, 20
"""Significant digits of a released number, and rows of a list that are released."""
SELF = {"you", "your", "yours", "yourself", "yourselves", "scientist", "zygote"}
"""Words by which a question speaks of the instrument."""
SELF_PAIRS = {("this", "answer"), ("this", "query"), ("this", "instrument"), ("own", "score"), ("own", "answer"),
              ("switched", "off"), ("shut", "off")}  # fmt: skip
APPARATUS = {
    "logger", "logging", "fingerprint", "quarantine", "checkpoint_log", "evaluator", "grader", "scorer", "canary", "canaries",
}  # fmt: skip
APPARATUS_PAIRS = {("eval", "set"), ("evaluation", "set"), ("test", "set"), ("validation", "set"), ("held", "out"),
                   ("audit", "log"), ("reward", "model"), ("scientist", "score")}  # fmt: skip
DESTROYS = {"delete", "deletes", "deleted", "erase", "wipe", "overwrite", "tamper", "tampers", "disable", "disables"}
_WORD = re.compile(r"[A-Za-z]+")


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(re.sub(r"([a-z])([A-Z])", r"\1_\2", text))]


def _holds(texts: list[str], words: set[str], pairs: set[tuple[str, str]]) -> str | None:
    for text in texts:
        found = _words(text)
        for word in found:
            if word in words:
                return word
        for pair in itertools.pairwise(found):
            if pair in pairs:
                return " ".join(pair)
    return None


def texts_of(value: Any) -> list[str]:
    """Every text in a question, names included."""
    match value:
        case str():
            return [value]
        case dict():
            return [text for key, each in value.items() for text in (key, *texts_of(each))]
        case list():
            return [text for each in value for text in texts_of(each)]
    return []


def objection(verb: str, arguments: Values, outcome: str) -> tuple[str, str] | None:
    """Why a question is not asked, as a reason and a detail; None if it is.

    Args:
        outcome: The name of the world's outcome, which a recommendation is about.
    """
    texts = texts_of({key: value for key, value in arguments.items() if verb != "score"})
    if word := _holds(texts, SELF, SELF_PAIRS):
        return "self_reference", f"{word!r} speaks of the instrument"
    if verb == "recommend" and (word := _holds([*texts, outcome], APPARATUS | DESTROYS, APPARATUS_PAIRS | SELF_PAIRS)):
        return "measurement_apparatus", f"{word!r} touches what measures, or destroys data"
    return None


def release(document: Values) -> Values:
    """An answer's document as it leaves: numbers to three digits, a probability to its Monte-Carlo error, lists cut short."""
    result = document["result"]
    if result is None:
        abstain = dict(document["abstain"])
        abstain["in_model"] = None if abstain["in_model"] is None else _rounded(_short(abstain["in_model"]))
        return {**document, "abstain": abstain}
    return {**document, "result": _rounded(_short(result))}


def _short(result: Values) -> Values:
    rows = result.get("rows") or [{}]
    if "pit" in rows[0]:  # a score's rows would tell every held-out residual
        value = e_value([row["pit"] for row in rows])
        return {key: each for key, each in result.items() if key != "rows"} | {
            "rows_scored": len(rows),
            "e_value": value,
        }
    for name in ("rows", "ranked"):
        if len(result.get(name, ())) > KEPT:
            return {**result, name: result[name][:KEPT], "left_out": len(result[name]) - KEPT}
    return result


def _rounded(value: Any) -> Any:
    match value:
        case dict():
            rounded = {key: _rounded(each) for key, each in value.items()}
            error = value.get("mc_se")
            if isinstance(error, float) and "p" in value and 0 < error < 1:
                places = max(math.floor(-math.log10(error)), 0)
                for name in ("p", "lower", "upper"):
                    rounded[name] = round(value[name], min(places, DIGITS + 1))
            return rounded
        case list():
            return [_rounded(each) for each in value]
        case float():
            return float(f"{value:.{DIGITS}g}")
    return value


def bits(document: Values) -> float:
    """An upper bound on what an answer tells, in bits: ten for a number, log2 of the choices for a word, none for an echo."""
    if document["result"] is None:
        return 3.0 + (0.0 if document["abstain"]["in_model"] is None else _bits(document["abstain"]["in_model"]))
    return 1.0 + _bits(document["result"])


_ECHOED = {
    "guarded",
    "design",
    "designs",
    "level",
    "threshold",
    "delta",
    "cost",
    "valid_if",
    "source",
    "row",
    "scale",
    "outside_the_data",
}


def _bits(value: Any) -> float:
    match value:
        case dict():
            return sum(_bits(each) for key, each in value.items() if key not in _ECHOED)
        case list():
            return sum(map(_bits, value)) + math.lgamma(len(value) + 1) / math.log(2)
        case bool() | str():
            return 1.0
        case float() | int():
            return DIGITS * math.log2(10)
    return 0.0
