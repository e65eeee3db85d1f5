"""World files: what is wrong is said with its line, a snapshot stands alone, and T_null and T_other are always there."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fathom.errors import UserError
from fathom.scientist import Scientist, World, lint, read
from fathom.scientist.build import ready_made
from fathom.scientist.evaluation import log_rows
from fathom.scientist.posterior import infer

Document = dict[str, Any]
Made = Callable[[Any], World]
Write = Callable[..., Path]

WORLD = """world: line
outcome: {name: y, center: 0, spread: 3, noise: 0.3}
designs:
  x: {low: 0, high: 4}
  arm: {levels: [a, b]}
theories:
  - id: line
    params: {a: "normal(0, 2)", b: "normal(0, 2)", s: halfnormal(3e-1)}
    mean: a + b*x
    noise: normal(s)
    quantities: {slope: b}
evidence:
  - kind: measured
    data:
      - {x: 1, arm: a, y: 2}
      - {x: 2, arm: b, y: 3}
"""


def test_a_good_world_has_no_issues(write: Write) -> None:
    assert lint(write(WORLD)) == []
    world = read(write(WORLD))
    assert world.sources == ("evidence 1, row 1", "evidence 1, row 2") and world.theories[0].params["s"].args == (0.3,)
    assert [theory.id for theory in world.theories] == ["line", "T_null", "T_other"]
    assert [theory.prior for theory in world.theories] == pytest.approx([0.475, 0.475, 0.05])


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("mean: a + b*x", "mean: a + b*z", 9, "z in a mean is no parameter and no design"),
        ("mean: a + b*x", "mean: a + b*.x.y", 9, "not understood"),
        ("mean: a + b*x", "mean: f(a) + b*x", 9, "not a function of the language"),
        ("mean: a + b*x", "mean: a + b*x + arm", 9, "a text stands where a number is meant"),
        ("noise: normal(s)", "noise: normal(s, 2)", 10, "takes 1 arguments"),
        ("noise: normal(s)", "noise: laplace(s)", 10, "is not a noise"),
        ("halfnormal(3e-1)", "halfnormal(-1)", 8, "must be positive"),
        ("halfnormal(3e-1)", "hafnormal(1)", 8, "is not a prior"),
        ("halfnormal(3e-1)", "halfnormal(a)", 8, "its numbers must be numbers"),
        ("b: \"normal(0, 2)\"", "b: 'normal(0, 2)', c: 'normal(0, 1)'", 8, "c appears neither"),
        ("quantities: {slope: b}", "quantities: {mean: b}", 11, "not a free name"),
        ("id: line", "id: T_other", 7, "the name T_other is taken"),
        ("id: line", "id: line\n    goal: win", 8, "goal is not known here"),
        ("{low: 0, high: 4}", "{low: 4, high: 4}", 4, "low below high"),
        ("{low: 0, high: 4}", "{low: 0, high: 4, log: true}", 4, "positive where log is true"),
        ("levels: [a, b]", "levels: [a, a]", 5, "must differ"),
        ("x: 2, arm: b", "x: 2, arm: c", 16, "arm is one of a, b"),
        ("x: 2, arm: b", "x: 7, arm: b", 16, "outside 0 to 4"),
        ("x: 2, arm: b", "arm: b", 16, "must give x, arm, y"),
        ("y: 3", "y: .nan", 16, "is not"),
        ("kind: measured", "kind: guessed", 13, "measured, reported or claimed"),
        ("kind: measured", "kind: reported", 13, "reported evidence has `noise`"),
        ("kind: measured", "kind: measured\n    file: nothing.csv", 14, "give `file` or `data`"),
        ("center: 0, ", "", 2, "center, spread and noise"),
        ("world: line", "world: line\nprior_of_other: 0", 2, "other theories always exist"),
        ("world: line", "world: line\nworld: two", 2, "world stands there twice"),
        ("world: line", "world: &a line", 1, "anchors"),
        ("world: line", "world: !!python/object:os.system x", 1, "anchors, aliases and tags"),
        ("world: line", "world: [", 3, "not YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(write: Write, old: str, new: str, line: int, message: str) -> None:
    assert old in WORLD
    path = write(WORLD.replace(old, new))
    found = lint(path)
    assert any(each.startswith(f"world.yaml:{line}: ") and message in each for each in found), found
    with pytest.raises(UserError, match=r"world\.yaml:\d+: "):
        read(path)


def test_every_mistake_is_listed(write: Write) -> None:
    found = lint(write(WORLD.replace("b*x", "b*z").replace("normal(s)", "normal(q)").replace("arm: b", "arm: c")))
    assert len(found) == 3 and found == sorted(found, key=lambda each: int(each.split(":")[1]))


def test_a_snapshot_stands_alone_and_keeps_its_hash(write: Write, tmp_path: Path, line: Document) -> None:
    csv = write("a,b\n0,0.1\n1,1.2\n2,2.1\n", "runs.csv")
    line["evidence"] = [{"kind": "measured", "file": "runs.csv", "rows": {"x": "a", "y": "b*1"}}]
    world = read(write(line))
    np.testing.assert_array_equal(world.data["x"], [0, 1, 2])
    (tmp_path / f"{world.hash}.json").write_bytes(world.snapshot)
    csv.unlink()
    again = read(tmp_path / f"{world.hash}.json")
    assert (again.hash, again.snapshot) == (world.hash, world.snapshot)
    assert Scientist(again).theories().bytes == Scientist(world).theories().bytes
    with pytest.raises(UserError, match=r"world\.yaml:\d+: there is no file runs.csv"):
        read(write(line))


def test_a_changed_evidence_file_is_not_read(write: Write, line: Document) -> None:
    write("x,y\n0,1\n", "runs.csv")
    line["evidence"] = [{"kind": "measured", "file": "runs.csv", "sha256": "0" * 64}]
    with pytest.raises(UserError, match="is not the file that was meant"):
        read(write(line))


def test_anything_that_changes_changes_the_hash(made: Made, line: Document) -> None:
    other = deepcopy(line)
    other["evidence"][0]["data"][0]["y"] = 0.1000001
    assert made(line).hash != made(other).hash and made(line).hash == made(deepcopy(line)).hash


@pytest.mark.parametrize("name", ready_made())
def test_ready_made_worlds_are_right(name: str) -> None:
    assert lint(name) == []
    assert infer(read(name)).untrusted == []


def test_the_papers_table_is_read_from_the_package() -> None:
    world = read("paper-table2")
    assert len(world.y) == 10 and world.y[0] == pytest.approx(np.log(1.931)) and world.data["arch"][0] == "prenorm"
    assert json.loads(world.snapshot)["evidence"][0]["read_from"] == "package:paper-table2.json"


def test_description_length_or_given_priors(made: Made, line: Document) -> None:
    for theory, bits in zip(line["theories"], (13, 10), strict=True):
        theory["bits"] = bits
    assert [each.prior for each in made(line).theories] == pytest.approx([0.95 / 9, 0.95 * 8 / 9, 0.05])
    for theory in line["theories"]:
        theory["bits"] = "auto"
    longer, shorter = made(line).theories[:2]
    assert longer.bits > shorter.bits and longer.prior < shorter.prior
    for theory, prior in zip(line["theories"], (3, 1), strict=True):
        theory.pop("bits")
        theory["prior"] = prior
    assert [each.prior for each in made(line).theories] == pytest.approx([0.95 * 0.75, 0.95 * 0.25, 0.05])
    line["theories"][0].pop("prior")
    with pytest.raises(UserError, match="give every theory `prior`, or none"):
        made(line)


def test_reported_rows_have_the_reporters_error_too(made: Made, line: Document) -> None:
    world = made(line)
    line["evidence"][0] |= {"kind": "reported", "noise": 0.5}
    reported = made(line)
    params = {"a": np.array([0.2]), "b": np.array([0.9]), "s": np.array([0.3])}
    error = world.y - 0.2 - 0.9 * world.data["x"]
    for each, variance in ((world, 0.09), (reported, 0.34)):
        expected = -0.5 * error**2 / variance - 0.5 * np.log(2 * np.pi * variance)
        np.testing.assert_allclose(log_rows(each, each.theories[0], params)[0], expected, atol=1e-12)


def test_a_claim_moves_as_far_as_its_speaker_is_reliable(made: Made, line: Document) -> None:
    def slope(*claims: Document) -> float:
        world = made(line | {"evidence": [*line["evidence"], *claims]})
        return float(Scientist(world).interval("slope")["median"])

    claim = {
        "kind": "claimed",
        "who": "them",
        "about": "slope",
        "value": 1.2,
        "within": 0.01,
        "otherwise": "normal(0, 2)",
    }
    before = slope()
    liar, friend = (slope(claim | {"reliability": pair}) for pair in ([1, 400], [400, 1]))
    assert abs(before - 0.95) < 0.1 and abs(liar - before) < 0.03 and abs(friend - 1.2) < 0.02


@pytest.mark.parametrize("claims", [1, 2])
def test_what_was_said_weighs_as_its_mixture(made: Made, claims: int) -> None:
    """q is 0 or 1; a speaker of reliability Beta(2, 3) says 1, once or twice: truth with rho, else whatever; rho is one."""
    said = {"kind": "claimed", "who": "them", "about": "q", "value": 1, "within": 0.5, "otherwise": "normal(0, 2)",
            "reliability": [2, 3]}  # fmt: skip
    world = {
        "world": "said", "outcome": {"name": "k"}, "designs": {"x": {"low": 0, "high": 1}}, "evidence": [said] * claims,
        "theories": [{"id": "one", "params": {"q": "choice(0, 1)"}, "mean": "(q + 1)/3", "noise": "bernoulli()",
                      "quantities": {"q_is": "q"}}],
    }  # fmt: skip
    said["about"] = "q_is"
    world = json.loads(json.dumps(world))
    reliability = np.random.default_rng(0).beta(2, 3, 2_000_000)

    def density(value: float, mean: float, deviation: float) -> float:
        return float(np.exp(-0.5 * ((value - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi)))

    weights = [
        float(((reliability * density(1, q, 0.5) + (1 - reliability) * density(1, 0, 2)) ** claims).mean())
        for q in (0, 1)
    ]
    found = infer(made(world)).fits[0].draws[1]
    np.testing.assert_allclose(found, np.array(weights) / sum(weights), atol=2e-3)


def test_the_flexible_theory_wins_where_the_named_ones_are_wrong(made: Made, line: Document) -> None:
    random = np.random.default_rng(0)
    x = np.linspace(0, 4, 40)
    rows = [
        {"x": float(a), "y": float(b)}
        for a, b in zip(x, np.sin(3 * x) + 0.05 * random.standard_normal(40), strict=True)
    ]
    line["evidence"][0]["data"] = rows
    answer = Scientist(made(line)).prob("slope > 0")
    assert answer.abstain is not None and answer.abstain["reason"] == "no_adequate_theory"
    assert answer.result is None and Scientist(made(line)).theories()["adequate"] is False


def test_drift_widens_what_is_said_of_places_never_seen(made: Made) -> None:
    def world(**more: Any) -> Document:
        points = [(1, 1.0), (2, 0.93), (4, 0.86), (8, 0.79)]
        return {
            "world": "law", "outcome": {"name": "y", "center": 1, "spread": 1, "noise": 0.01},
            "designs": {"c": {"low": 1, "high": 1000, "log": True}},
            "theories": [{"id": "law", "params": {"a": "normal(1, 1)", "b": "normal(0, 0.3)", "s": "halfnormal(0.01)"},
                          "mean": "a - b*log(c)", "noise": "normal(s)"} | more],
            "evidence": [{"kind": "measured", "data": [{"c": c, "y": y} for c, y in points]}],
        }  # fmt: skip

    rigid = Scientist(made(world())).predict({"c": 1000})
    assert rigid.abstain is not None and rigid.abstain["reason"] == "extrapolation"
    drifting = Scientist(made(world(drift={"along": "c", "per_decade": 0.05}))).predict({"c": 1000})
    assert drifting.abstain is None
    inside = rigid.abstain["in_model"]
    assert drifting["upper"] - drifting["lower"] > 1.5 * (inside["upper"] - inside["lower"])
    for wrong in ({"along": "d", "per_decade": 1}, {"along": "c", "per_decade": 0}, {"along": "c"}):
        with pytest.raises(UserError, match="drift"):
            made(world(drift=wrong))
