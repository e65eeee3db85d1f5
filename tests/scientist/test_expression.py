"""Expressions compute numbers, say where they are wrong, and can do nothing else."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.errors import UserError
from fathom.scientist.expression import FUNCTIONS, Call, Number, affine, calls, evaluate, is_event, names, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1 + 2*3", 7), ("-2**2", -4), ("2**-1", 0.5), ("2**3**2", 512), ("(1+2)*3 - 4/8", 8.5), ("1 - 2 - 3", -4), ("8/4/2", 1),
        ("min(x, 2) + max(x, 2)", 5), ("where(x > 2, 10, 20)", 10), ("not x > 2 or x == 3 and 1 < 2", 1), ("--x", 3),
        ("is(arm, 'block') + (arm == 'base')", 1), ("exp(log(x)) + sqrt(4) + abs(-1)", 6), ("logistic(0) + tanh(0)", 0.5),
        ("1e-3*1000", 1), (".5 + 5.", 5.5),
    ],
)  # fmt: skip
def test_values(text: str, value: float) -> None:
    assert float(evaluate(parse(text), {"x": 3.0, "arm": "block"})) == pytest.approx(value, abs=1e-12)


def test_arrays_broadcast() -> None:
    value = evaluate(
        parse("a*x + is(arm, 'b')"), {"a": np.ones((3, 1)), "x": np.arange(2.0), "arm": np.array(["a", "b"])}
    )
    np.testing.assert_array_equal(value, np.tile([0.0, 2.0], (3, 1)))


@pytest.mark.parametrize(
    "text",
    [
        "", "1 +", "(1", "1)", "1 2", "x.y", "x[0]", "().__class__", "__import__('os')", "a__b", "_x", "lambda: 1", "x = 1",
        "x if y else z", "1e999", "9**65", "2**1000000", "1 < 2 < 3", "f(a=1, a=2)", "f(a=1, 2)", "log()", "log(1, 2)", "min(1)",
        "'a", '"a"', "х + 1", "ⅼog(2)", "1\u00a0+ 2", "nan if 1", "x; y", "x\\y", "`x`", "{1}", "x:=1", "@x", "x%2", "x//2",
        "not", "or 1", "log", "log + 'a'", "nan", "inf", "True", "print(1)", "eval('1')", "'a' < 'b'", "'a' + 'b'", "is('a', 1)",
        "1" + "+1" * 500, "(" * 60 + "1" + ")" * 60, "-" * 60 + "1", "2**" * 60 + "1", "log(" * 60 + "1" + ")" * 60, "x" * 3000,
        "1+" * 1_000_000,
    ],
)  # fmt: skip
def test_anything_else_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(UserError) as error:
        evaluate(parse(text), {"x": 1.0, "y": 2.0, "z": 3.0})
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_a_mistake_names_its_column() -> None:
    with pytest.raises(UserError, match="'% 2' at column 3"):
        parse("x % 2")
    with pytest.raises(UserError, match="column 5"):
        parse("1 + )")


@settings(max_examples=1000, deadline=None)
@given(
    st.one_of(
        st.text(max_size=60),
        st.text(alphabet="x1.e()+-*/<>=,'_ abcdnot", max_size=60),
        st.binary(max_size=40).map(repr),
    )
)
def test_no_text_does_more_than_compute_or_fail(text: str) -> None:
    try:
        tree = parse(text)
        value = evaluate(tree, {"x": 2.0, "a": np.ones(3)})
    except UserError:
        return
    assert isinstance(value, (float, str, np.ndarray, np.generic))
    assert calls(tree) == set() and names(tree) <= {"x", "a"}


arithmetic = st.recursive(
    st.one_of(st.integers(0, 9).map(str), st.just("x")),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda part: f"({part[0]}{part[1]}{part[2]})"),
        inner.map(lambda text: f"-{text}"),
    ),
    max_leaves=20,
)


@settings(max_examples=300, deadline=None)
@given(arithmetic)
def test_arithmetic_is_pythons(text: str) -> None:
    assert float(evaluate(parse(text), {"x": 3.0})) == pytest.approx(eval(text, {"x": 3.0}), rel=1e-12, abs=1e-9)


@pytest.mark.parametrize(
    "text", ["a*log(x) - b/x + 2", "-(a + b*x)*3 + x", "x*(a - 2*b) - a", "where(x > 1, 2, 3)*a + is(arm, 'b')*b"]
)
def test_affine_parts_give_the_tree_back(text: str) -> None:
    tree = parse(text)
    parts = affine(tree, {"a", "b"})
    assert parts is not None
    values = {"x": 1.7, "arm": "b", "a": 0.3, "b": -1.1}
    total = sum(float(evaluate(part, values)) * values.get(name, 1.0) for name, part in parts.items())  # type: ignore[operator]
    assert total == pytest.approx(float(evaluate(tree, values)), abs=1e-12)


@pytest.mark.parametrize("text", ["a*b", "exp(a)", "1/a", "a**2", "max(a, 1)", "x + a*a"])
def test_what_is_not_affine_is_seen(text: str) -> None:
    assert affine(parse(text), {"a", "b"}) is None


def test_events_are_told_from_numbers() -> None:
    assert is_event(parse("x > 1 and not (x < 3 or is(arm, 'b'))"))
    assert not is_event(parse("x + 1")) and not is_event(parse("x > 1 and x")) and not is_event(parse("q(C=1)"))


def test_calls_of_the_worlds_own_are_passed_on() -> None:
    tree = parse("m(C=5.6, arm='b') + 1")
    assert calls(tree) == {"m"} and isinstance(tree, Call) and tree.arguments[1] == Number(1.0)
    seen = evaluate(tree, {}, lambda call, values: float(len(call.keywords)))
    assert seen == 3.0 and math.isfinite(seen) and "m" not in FUNCTIONS
