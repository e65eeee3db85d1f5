"""The verbs of a served scientist as data: what each takes, as a JSON schema, and the method that answers. There is no other.

Requests are read strictly: no key twice, no NaN, no key that is not named here, no text that is not Unicode.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fathom.errors import UserError
from fathom.scientist.answer import Answer
from fathom.scientist.scientist import Scientist

Schema = dict[str, Any]
Values = dict[str, Any]
MAX_REQUEST, MAX_CANDIDATES, LARGEST = 64_000, 100, 1e100

_TEXT: Schema = {"type": "string", "minLength": 1, "maxLength": 2000}
_NUMBER: Schema = {"type": "number", "minimum": -LARGEST, "maximum": LARGEST}
_BATCH: Schema = {"type": "integer", "minimum": 1, "maximum": 16}
_NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 80}
_FRACTION: Schema = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}
_VALUE: Schema = {"anyOf": [_NUMBER, _NAME]}
_DESIGN: Schema = {
    "type": "object", "minProperties": 1, "maxProperties": 50, "propertyNames": _NAME, "additionalProperties": _VALUE,
}  # fmt: skip
_ROWS: Schema = {"type": "array", "minItems": 1, "maxItems": MAX_CANDIDATES, "items": _DESIGN}


@dataclass(frozen=True)
class Verb:
    says: str
    method: Callable[..., Answer]
    takes: dict[str, Schema]
    required: tuple[str, ...] = ()

    @property
    def schema(self) -> Schema:
        return {
            "type": "object",
            "properties": self.takes,
            "required": list(self.required),
            "additionalProperties": False,
        }


VERBS = {
    "prob": Verb(
        "P(event | given, world), with its Monte-Carlo error and what each theory says.", Scientist.prob,
        {"event": _TEXT, "given": _TEXT, "threshold": _FRACTION}, ("event",),
    ),
    "interval": Verb(
        "The median and central interval of a quantity.", Scientist.interval,
        {"expression": _TEXT, "level": _FRACTION}, ("expression",),
    ),
    "theories": Verb("How probable each theory of the world is.", Scientist.theories, {}),
    "predict": Verb(
        "The outcome of one more run at a design.", Scientist.predict, {"design": _DESIGN, "level": _FRACTION}, ("design",)
    ),
    "recommend": Verb(
        "Your own candidate runs, ranked by expected information per cost.", Scientist.recommend,
        {"candidates": _ROWS, "about": _TEXT, "cost": _NAME, "together": _NAME, "batch": _BATCH}, ("candidates",),
    ),
    "guard": Verb(
        "Bounds on the probability of harm of a run, and whether they admit it.", Scientist.guard,
        {"design": _DESIGN, "harm": _TEXT, "threshold": _FRACTION, "delta": _FRACTION},
        ("design", "harm", "threshold", "delta"),
    ),
    "why": Verb("Which rows of evidence moved an answer.", Scientist.why, {"of": _TEXT}, ("of",)),
    "score": Verb(
        "How well outcomes that the world has not seen were predicted.", Scientist.score, {"rows": _ROWS}, ("rows",)
    ),
}  # fmt: skip


def ask(scientist: Scientist, verb: str, arguments: Values) -> Answer:
    """Checked arguments to an answer.

    Raises:
        UserError: there is no such verb, or the arguments are not what it takes.
    """
    check(verb, arguments)
    return VERBS[verb].method(scientist, **arguments)


def check(verb: Any, arguments: Any) -> None:
    if not isinstance(verb, str) or verb not in VERBS:
        raise UserError(f"there is no such verb; there are {', '.join(VERBS)}")
    _check(VERBS[verb].schema, arguments, "arguments")


def read_request(body: bytes) -> tuple[str, Values]:
    """``{"verb": .., "arguments": {..}}`` as a verb and checked arguments.

    Raises:
        UserError: anything else.
    """
    if len(body) > MAX_REQUEST:
        raise UserError(f"a request may have {MAX_REQUEST:,} bytes")
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_once, parse_constant=_refuse)
    except UserError:
        raise
    except (ValueError, RecursionError):
        raise UserError("this is not JSON") from None
    if not isinstance(value, dict) or not {"verb"} <= value.keys() <= {"verb", "arguments"}:
        raise UserError("a request is an object of `verb` and `arguments`")
    arguments = value.get("arguments", {})
    check(value["verb"], arguments)
    return value["verb"], arguments


def _once(pairs: list[tuple[str, Any]]) -> Values:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise UserError("a key stands there twice")
    return result


def _refuse(constant: str) -> Any:
    raise UserError(f"{constant} is not a number")


def _check(schema: Schema, value: Any, where: str) -> None:
    """The few keywords of JSON Schema that stand above."""
    if "anyOf" in schema:
        return _check(schema["anyOf"][isinstance(value, str)], value, where)
    match schema["type"]:
        case "string":
            if not isinstance(value, str) or not schema.get("minLength", 0) <= len(value) <= schema["maxLength"]:
                raise UserError(f"{where} is a text of 1 to {schema['maxLength']} characters")
            if any(0xD800 <= ord(letter) < 0xE000 for letter in value):
                raise UserError(f"{where} is not Unicode text")
        case "number":
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
                raise UserError(f"{where} is a number up to {LARGEST:g}")
            low, high = schema.get("exclusiveMinimum", -math.inf), schema.get("exclusiveMaximum", math.inf)
            if not low < value < high:
                raise UserError(f"{where} lies between {low} and {high}, both excluded")
        case "integer":
            if (
                isinstance(value, bool)
                or not isinstance(value, int)
                or not schema["minimum"] <= value <= schema["maximum"]
            ):
                raise UserError(f"{where} is a whole number from {schema['minimum']} to {schema['maximum']}")
        case "array":
            if not isinstance(value, list) or not schema["minItems"] <= len(value) <= schema["maxItems"]:
                raise UserError(f"{where} is a list of 1 to {schema['maxItems']}")
            for index, each in enumerate(value):
                _check(schema["items"], each, f"{where}[{index}]")
        case "object":
            if not isinstance(value, dict):
                raise UserError(f"{where} is an object")
            if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", 50):
                raise UserError(f"{where} has 1 to 50 entries")
            if missing := [name for name in schema.get("required", ()) if name not in value]:
                raise UserError(f"{where} lacks {' and '.join(missing)}")
            known, others = schema.get("properties", {}), schema["additionalProperties"]
            for name, each in value.items():
                if name not in known and not others:
                    raise UserError(f"{where} takes {', '.join(known) or 'nothing'}")
                _check(schema.get("propertyNames", _NAME), name, f"a name in {where}")
                _check(known.get(name, others), each, f"{where}.{name}" if name in known else f"a value in {where}")
