"""The expression language of worlds and questions: a grammar of its own over an allow-list, never Python.

    either    = both ("or" both)*              both  = negation ("and" negation)*
    negation  = "not" negation | relation      relation = sum (("<" | "<=" | ">" | ">=" | "==") sum)?
    sum       = product (("+" | "-") product)* product = sign (("*" | "/") sign)*
    sign      = "-" sign | power               power = atom ("**" sign)?
    atom      = number | 'text' | name | name "(" arguments ")" | "(" either ")"

A tree has four kinds of node; operators are calls. Values are NumPy arrays that broadcast, truth is 0 or 1. There are no
attributes, subscripts, assignments or loops, so an expression can compute a number and nothing else. Only ASCII is read:
letters that look alike cannot name different things.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from fathom.errors import UserError

MAX_LENGTH, MAX_NODES, MAX_DEPTH, MAX_NUMBER, MAX_EXPONENT = 2000, 400, 40, 1e100, 64


@dataclass(frozen=True)
class Number:
    value: float


@dataclass(frozen=True)
class Text:
    value: str


@dataclass(frozen=True)
class Name:
    id: str


@dataclass(frozen=True)
class Call:
    function: str
    arguments: "tuple[Node, ...]"
    keywords: "tuple[tuple[str, Node], ...]" = ()


Node = Number | Text | Name | Call
Value = Any
"""An array, a number, or a text (the level of a design)."""

FUNCTIONS: dict[str, tuple[int, Callable[..., Value]]] = {
    "+": (2, np.add), "-": (2, np.subtract), "*": (2, np.multiply), "/": (2, np.divide), "**": (2, np.power),
    "neg": (1, np.negative), "log": (1, np.log), "log10": (1, np.log10), "exp": (1, np.exp), "sqrt": (1, np.sqrt),
    "abs": (1, np.abs), "min": (2, np.minimum), "max": (2, np.maximum), "tanh": (1, np.tanh),
    "logistic": (1, lambda x: 0.5 * (1 + np.tanh(0.5 * x))),
    "where": (3, lambda condition, yes, no: np.where(np.asarray(condition) != 0, yes, no)),
    "is": (2, lambda left, right: np.equal(left, right) * 1.0), "==": (2, lambda left, right: np.equal(left, right) * 1.0),
    "<": (2, lambda left, right: np.less(left, right) * 1.0), ">": (2, lambda left, right: np.greater(left, right) * 1.0),
    "<=": (2, lambda a, b: np.less_equal(a, b) * 1.0), ">=": (2, lambda a, b: np.greater_equal(a, b) * 1.0),
    "and": (2, lambda left, right: np.asarray(left) * right), "not": (1, lambda value: 1.0 - np.asarray(value)),
    "or": (2, np.maximum),
}  # fmt: skip
"""What can be called: the number of arguments and what it computes."""
RELATIONS = ("<", "<=", ">", ">=", "==")
_WORDS = {"and", "or", "not"}
_TOKEN = re.compile(r"\s*(?:(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d{1,3})?)|(?P<name>[A-Za-z_]\w*)"
                    r"|'(?P<text>[^'\n]{0,80})'|(?P<sign>\*\*|<=|>=|==|[-+*/()<>,=]))", re.ASCII)  # fmt: skip


def parse(text: str, *, max_nodes: int = MAX_NODES) -> Node:
    """The tree of ``text``.

    Raises:
        UserError: anything outside the grammar, or too long, deep or large; the column is named.
    """
    return _Parser(text, max_nodes).whole()


class _Parser:
    def __init__(self, text: str, max_nodes: int) -> None:
        if not isinstance(text, str):
            raise UserError(f"an expression is a text: {text!r} is not")
        if max_nodes == MAX_NODES and len(text) > MAX_LENGTH:
            raise UserError(f"an expression may have {MAX_LENGTH} characters: this one has {len(text)}")
        self.tokens: list[tuple[str, str, int]] = []
        position, text = 0, text.rstrip(" \t\n")
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                position = len(text) - len(text[position:].lstrip())
                raise UserError(f"{text[position : position + 12]!r} at column {position + 1} is not understood")
            kind = str(match.lastgroup)
            self.tokens.append((kind, match[kind], match.start(kind) + 1))
            position = match.end()
        self.at, self.nodes, self.depth, self.max_nodes = 0, 0, 0, max_nodes

    def whole(self) -> Node:
        tree = self.either()
        if self.at < len(self.tokens):
            raise self.wrong()
        return tree

    def wrong(self) -> UserError:
        if self.at >= len(self.tokens):
            return UserError("the expression ends too early")
        _, word, column = self.tokens[self.at]
        return UserError(f"{word!r} at column {column} is not expected there")

    def take(self, *words: str) -> str | None:
        """The next token if it is one of these signs or words."""
        if self.at < len(self.tokens):
            kind, word, _ = self.tokens[self.at]
            if word in words and (kind == "sign" or word in _WORDS):
                self.at += 1
                return word
        return None

    def count(self, node: Node) -> Node:
        self.nodes += 1
        if self.nodes > self.max_nodes:
            raise UserError(f"an expression may have {self.max_nodes} terms: this one has more")
        return node

    def chain(self, below: Callable[[], Node], *words: str) -> Node:
        left = below()
        while word := self.take(*words):
            left = self.count(Call(word, (left, below())))
        return left

    def either(self) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UserError(f"an expression may be nested {MAX_DEPTH} deep: this one is deeper")
        tree = self.chain(lambda: self.chain(self.negation, "and"), "or")
        self.depth -= 1
        return tree

    def negation(self) -> Node:
        return self.prefix("not", "not", self.relation)

    def relation(self) -> Node:
        left = self.sum()
        word = self.take(*RELATIONS)
        return self.count(Call(word, (left, self.sum()))) if word else left

    def sum(self) -> Node:
        return self.chain(lambda: self.chain(self.sign, "*", "/"), "+", "-")

    def sign(self) -> Node:
        return self.prefix("-", "neg", self.power)

    def prefix(self, word: str, function: str, below: Callable[[], Node]) -> Node:
        times = 0
        while self.take(word):
            times += 1
            if times > MAX_DEPTH:
                raise UserError(f"an expression may be nested {MAX_DEPTH} deep: this one is deeper")
        node = below()
        for _ in range(times):
            node = self.count(Number(-node.value) if isinstance(node, Number) else Call(function, (node,)))
        return node

    def power(self) -> Node:
        base = self.atom()
        if not self.take("**"):
            return base
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UserError(f"an expression may be nested {MAX_DEPTH} deep: this one is deeper")
        exponent = self.sign()
        self.depth -= 1
        if isinstance(exponent, Number) and abs(exponent.value) > MAX_EXPONENT:
            raise UserError(f"an exponent may be {MAX_EXPONENT} at most: {exponent.value:g} is not")
        return self.count(Call("**", (base, exponent)))

    def atom(self) -> Node:
        if self.take("("):
            inner = self.either()
            if not self.take(")"):
                raise self.wrong()
            return inner
        if self.at >= len(self.tokens):
            raise self.wrong()
        kind, word, column = self.tokens[self.at]
        if kind == "number":
            if not abs(float(word)) <= MAX_NUMBER:
                raise UserError(f"{word!r} at column {column} is too large")
            self.at += 1
            return self.count(Number(float(word)))
        if kind == "text":
            self.at += 1
            return self.count(Text(word))
        if kind != "name" or word in _WORDS:
            raise self.wrong()
        if word.startswith("_") or "__" in word:
            raise UserError(
                f"{word!r} at column {column} is not a name: names start with a letter and hold no double _"
            )
        self.at += 1
        if not self.take("("):
            return self.count(Name(word))
        return self.count(self.call(word, column))

    def call(self, function: str, column: int) -> Call:
        arguments: list[Node] = []
        keywords: dict[str, Node] = {}
        while not self.take(")"):
            if (arguments or keywords) and not self.take(","):
                raise self.wrong()
            following = [token[:2] for token in self.tokens[self.at : self.at + 2]]
            if len(following) == 2 and following[0][0] == "name" and following[1] == ("sign", "="):
                if following[0][1] in keywords:
                    raise UserError(f"{function}(...) at column {column} names {following[0][1]} twice")
                self.at += 2
                keywords[following[0][1]] = self.either()
            elif keywords:
                raise self.wrong()
            else:
                arguments.append(self.either())
        if function in FUNCTIONS:
            expected = FUNCTIONS[function][0]
            if keywords or len(arguments) != expected:
                raise UserError(f"{function} at column {column} takes {expected} arguments: {len(arguments)} are given")
        return Call(function, tuple(arguments), tuple(sorted(keywords.items())))


def evaluate(
    node: Node, values: Mapping[str, Value], calls: Callable[[Call, Mapping[str, Value]], Value] | None = None
) -> Value:
    """The value of a tree; a division by zero or the log of a negative number gives inf or NaN, which callers refuse.

    Args:
        values: What each name stands for.
        calls: Evaluates a call of something that is not in ``FUNCTIONS``, such as a world's quantity.

    Raises:
        UserError: an unknown name or function, or a text where a number is meant.
    """
    match node:
        case Number(value) | Text(value):
            return value
        case Name(name):
            if name not in values:
                raise UserError(f"{name} is not known here; there are {', '.join(sorted(values)) or 'no names'}")
            return values[name]
        case Call(function, arguments):
            if function not in FUNCTIONS:
                if calls is None:
                    raise UserError(f"{function}(...) is not a function of the language")
                return calls(node, values)
            given = [evaluate(argument, values, calls) for argument in arguments]
            texts = sum(_is_text(value) for value in given)
            if texts and (function not in ("is", "==") or texts != 2):
                raise UserError(
                    f"{function} needs numbers, or two texts to compare; a text stands where a number is meant"
                )
            with np.errstate(all="ignore"):
                return FUNCTIONS[function][1](*given)
    raise TypeError(node)


def _is_text(value: Value) -> bool:
    return isinstance(value, str) or (isinstance(value, np.ndarray) and value.dtype.kind in "UO")


def names(node: Node) -> set[str]:
    """Every name in a tree, keywords of calls apart."""
    match node:
        case Name(name):
            return {name}
        case Call(_, arguments, keywords):
            return set().union(*map(names, arguments), *(names(value) for _, value in keywords))
    return set()


def calls(node: Node) -> set[str]:
    """Every function called in a tree that is not of the language itself."""
    if not isinstance(node, Call):
        return set()
    own = set() if node.function in FUNCTIONS else {node.function}
    return own.union(*map(calls, node.arguments), *(calls(value) for _, value in node.keywords))


def is_event(node: Node) -> bool:
    """Whether a tree is true or false rather than a number."""
    match node:
        case Call("and" | "or" | "not", arguments):
            return all(map(is_event, arguments))
        case Call(function):
            return function in RELATIONS or function == "is"
    return False


def bits(node: Node) -> float:
    """A description length: four bits an operation, name or text, eight a number (0 and 1 three)."""
    match node:
        case Number(value):
            return 3.0 if value in (0, 1) else 8.0
        case Call(_, arguments, keywords):
            return 4.0 + sum(map(bits, arguments)) + sum(4.0 + bits(value) for _, value in keywords)
    return 4.0


def affine(node: Node, unknowns: set[str]) -> dict[str, Node] | None:
    """``{"": offset, name: coefficient, ...}`` if a tree is affine in ``unknowns``, else None."""
    if not names(node) & unknowns:
        return {"": node}
    match node:
        case Name(name):
            return {name: Number(1.0)}
        case Call("neg", (inner,)):
            parts = affine(inner, unknowns)
            return parts and {name: Call("neg", (part,)) for name, part in parts.items()}
        case Call("+" | "-" as sign, (left, right)):
            first, second = affine(left, unknowns), affine(right, unknowns)
            if first is None or second is None:
                return None
            total = dict(first)
            for name, part in second.items():
                if name in total:
                    total[name] = Call(sign, (total[name], part))
                else:
                    total[name] = part if sign == "+" else Call("neg", (part,))
            return total
        case Call("*" | "/" as sign, (left, right)):
            if names(right) & unknowns:
                left, right = right, left
                if sign == "/" or names(right) & unknowns:
                    return None
            parts = affine(left, unknowns)
            return parts and {name: Call(sign, (part, right)) for name, part in parts.items()}
    return None
