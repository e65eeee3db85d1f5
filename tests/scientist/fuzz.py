"""Random expressions against the parser and the scientist: none may do anything but give a number or a line of refusal."""

import random
from collections import Counter

import numpy as np

from fathom.errors import UserError
from fathom.scientist.evaluation import Unsaid
from fathom.scientist.expression import FUNCTIONS, bits, is_event, parse
from fathom.scientist.posterior import infer
from fathom.scientist.world import World

TOKENS = [
    *FUNCTIONS, *"()()[]{},=.:;#@%&|~^!-+'\"\\\n\t\x00", "'a'", "slope", "x", "mean(x=1)", "slope", "__class__", "1", "0.5",
    "1e308", "9" * 30, "1e-300", "nan", "inf", "lambda", "import os", "eval", "ｓlope", "\u202e", "if", "else", "for",
    "x.__globals__", "slοpe",
]  # fmt: skip


def expression(random_: random.Random, depth: int = 0) -> str:
    """A text of the grammar, now and then with a token where none belongs."""
    if depth > random_.randint(1, 7) or random_.random() < 0.25:
        return random_.choice(["slope", "x", "1", "0.5", "2", "mean(x=1)", "mean(x=slope)", "1e100", "goal"])
    inner = lambda: expression(random_, depth + 1)  # noqa: E731
    name = random_.choice([*FUNCTIONS, "neg-sign", "group"])
    if name in ("+", "-", "*", "/", "**", "<", ">", "<=", ">=", "==", "and", "or"):
        text = f"{inner()} {name} {inner()}"
    elif name == "not":
        text = f"not {inner()}"
    elif name == "neg-sign":
        text = f"-{inner()}"
    elif name == "group":
        text = f"({inner()})"
    else:
        text = f"{name}({', '.join(inner() for _ in range(FUNCTIONS[name][0]))})"
    if random_.random() < 0.02:
        place = random_.randint(0, len(text))
        text = text[:place] + random_.choice(TOKENS) + text[place:]
    return text


def fuzz(world: World, count: int, seed: int) -> Counter[str]:
    """How ``count`` random texts end: answered, unsaid or refused; anything else is raised as it comes."""
    random_, ends = random.Random(seed), Counter[str]()
    fit = infer(world).fits[0]
    few = {name: each[:64] for name, each in fit.draws[0].items()}
    from dataclasses import replace

    small = replace(fit, linear=None, make_draws=lambda: (few, np.full(64, 1 / 64)))
    for index in range(count):
        if index % 4 == 0:
            text = "".join(random_.choice(TOKENS) + random_.choice(["", " "]) for _ in range(random_.randint(0, 30)))
        else:
            text = expression(random_)
        try:
            tree = parse(text)
            is_event(tree)
            bits(tree)
            value = small.value(tree)
            assert value.shape == (64,) and value.dtype == float, text
            ends["answered"] += 1
        except UserError as error:
            assert "\n" not in str(error), text
            ends["refused"] += 1
        except Unsaid:
            ends["unsaid"] += 1
    return ends
