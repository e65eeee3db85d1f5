"""Worlds about one's own runs: `fathom lab evidence` writes them, and their theories find what is true of invented runs."""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fathom.cli import main
from fathom.commands.evidence import evidence
from fathom.errors import UserError
from fathom.scientist import Scientist, World, read
from fathom.scientist.build import ready_made
from fathom.scientist.document import read_document

SWEEP = Path(__file__).parents[2] / "benchmarks" / "results" / "2026-11-22_small-sweep"


@pytest.mark.parametrize(
    ("sweep", "name", "rows", "together"),
    [("sizes", "multiplier", 10, "case"), ("shapes", "depth-width", 24, "case"), ("rules", "block-size", 4, None)],
)
def test_a_world_about_runs_holds_their_losses(
    sweep: str, name: str, rows: int, together: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["lab", "evidence", str(SWEEP / sweep), "--world", name, "--noise", "0.02", "--out", str(tmp_path)]) == 0
    )
    assert f"{rows} runs as evidence, 0 planned runs without a loss" in capsys.readouterr().out
    world = read(tmp_path / "world.yaml")
    with (tmp_path / "runs.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    np.testing.assert_allclose(world.y, np.log(losses))
    assert len(world.y) == rows and len(world.theories) == len(read(name).theories)
    text = (tmp_path / "world.yaml").read_text()
    for old in ("9e-06", "0.003}", "C/2)", "shape/45", "normal(3.8", "shape=60", "low: 0.5,"):
        assert old not in text
    with (tmp_path / "candidates.csv").open() as file:
        found = [{k: v if k in ("arch", "case") else float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    answer = Scientist(world).recommend(found, cost="flops", together=together, batch=2)
    if name == "depth-width":  # these shapes differ in more than the world says, and the scientist notices
        assert answer.abstain is not None and answer.abstain["reason"] == "no_adequate_theory"
        return
    assert answer["ranked"][0]["lower"] <= answer["ranked"][0]["upper"] and len(answer["batch"]) == 2


def test_texts_that_the_command_replaces_stand_in_the_worlds() -> None:
    texts = {name: path.read_text() for name, path in ready_made().items()}
    for name, needles in {
        "multiplier": ["9e-06", "noise: 0.003", "[prenorm, block]", "'block'", "C/2", "\nevidence:"],
        "block-size": ["9e-06", "noise: 0.003", "  S: {", "low: 1, high: 64", "\nevidence:"],
        "depth-width": ["9e-06", "[prenorm, block]", "shape/45", "normal(3.8,", "shape=60", "shape=30", "\nevidence:"],
    }.items():
        for needle in needles:
            assert needle in texts[name], (name, needle)


def test_runs_that_belong_in_no_one_world_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no arm 'mla'; there are block, full, hyper_connections, prenorm"):
        evidence()((SWEEP / "rules",), tmp_path, arm="mla")
    with pytest.raises(UserError, match=r"one size of network; these runs are of w1.78-h0.3, "):
        evidence()((SWEEP / "shapes",), tmp_path, world="block-size")
    assert not list(tmp_path.iterdir())
    (tmp_path / "world.yaml").write_text("mine")
    with pytest.raises(UserError, match="not written over"):
        evidence()((SWEEP / "rules",), tmp_path)


def invented(tmp_path: Path, name: str, rows: list[dict[str, Any]]) -> Scientist:
    """A ready-made world with other rows."""
    document, _ = read_document(ready_made()[name])
    document["evidence"] = [{"kind": "measured", "data": rows}]
    import yaml

    path = tmp_path / "world.yaml"
    path.write_text(yaml.safe_dump(document))
    return Scientist(read(path))


def test_the_multiplier_world_finds_the_truth(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    rows = [
        {"C": c, "arch": arch,
         "log_loss": 0.6 - 0.06 * math.log(c * (1.4 if arch == "block" else 1) / 2) + 0.002 * random.normal()}
        for c in (0.6, 1.2, 2.5, 5.0, 10.0, 18.0) for arch in ("prenorm", "block")
    ]  # fmt: skip
    scientist = invented(tmp_path, "multiplier", rows)
    interval = scientist.interval("multiplier(C=5)")
    assert interval["lower"] < 1.4 < interval["upper"] and interval["upper"] - interval["lower"] < 0.2
    by_theory = {row["id"]: row["p"] for row in scientist.theories()["theories"]}
    assert by_theory["no-difference"] < 1e-3


def test_the_block_size_world_tells_a_step_from_a_slope(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    for name, cost in (("a-step", lambda s: 0.02 * (s > 1)), ("every-doubling-costs", lambda s: 0.006 * math.log2(s))):
        rows = [{"S": s, "log_loss": 0.6 + cost(s) + 0.001 * random.normal()} for s in (1, 1, 2, 4, 8, 16, 32)]
        posterior = invented(tmp_path, "block-size", rows).posterior
        best = max(zip(posterior.probabilities, posterior.fits, strict=True), key=lambda pair: pair[0])
        assert best[1].theory.id == name


Made = Callable[[Any], World]


def point_theories(shift: float) -> dict[str, Any]:
    """Two theories without a free parameter to speak of, ``shift`` apart."""
    theories = [
        {"id": name, "params": {"m": f"normal({center}, 1e-6)"}, "mean": "m", "noise": "normal(1)", "prior": 1,
         **({"role": "null"} if name == "one" else {})}
        for name, center in (("one", 0.0), ("two", shift))
    ]  # fmt: skip
    return {"world": "w", "outcome": {"name": "y", "center": 0, "spread": 1, "noise": 1}, "designs": {"x": {"low": 0, "high": 1}},
            "theories": theories, "evidence": [], "prior_of_other": 1e-9}  # fmt: skip


def test_several_outcomes_tell_as_one_of_a_larger_shift(made: Made) -> None:
    """Four outcomes half a deviation apart are one outcome a whole deviation apart: 0.11142 nats."""
    scientist = Scientist(made(point_theories(0.5)))
    rows = [{"x": x / 4, "run": 1} for x in range(4)]
    first = scientist.recommend(rows, together="run")["ranked"][0]
    assert first["lower"] <= 0.11142 + 3 * first["mc_se"] and first["upper"] >= 0.11142 - 3 * first["mc_se"]
    assert abs(first["upper"] - first["lower"]) < 1e-3 and first["mc_se"] < 0.02


def test_bounds_hold_the_linear_gaussians_information(made: Made) -> None:
    """About parameters: half log det(1 + X S X^T / s^2); the bounds hold it and close where it is small."""
    world = point_theories(0.0)
    world["theories"] = [{"id": "line", "params": {"a": "normal(0, 1)", "b": "normal(0, 1)"}, "mean": "a + b*x",
                          "noise": "normal(0.5)", "prior": 1, "role": "null"}]  # fmt: skip
    scientist = Scientist(made(world))
    x = np.array([[1.0, 0.0], [1.0, 1.0]])
    exact = 0.5 * np.linalg.slogdet(np.eye(2) + x @ x.T / 0.25)[1]
    rows = [{"x": value, "run": "pair"} for value in (0.0, 1.0)]
    first = scientist.recommend(rows, about="parameters", together="run")["ranked"][0]
    assert first["lower"] - 3 * first["mc_se"] < exact < first["upper"] + 3 * first["mc_se"]
    assert 0 < first["upper"] - first["lower"] < 0.3
    single = scientist.recommend([{"x": 1.0}], about="parameters")["ranked"][0]
    assert single["nats"] == pytest.approx(0.5 * math.log(1 + 2 / 0.25), abs=1e-3)


def test_a_batch_spreads_where_repeating_teaches_less(made: Made, line: dict[str, Any]) -> None:
    line["theories"][0]["prior"], line["theories"][1]["prior"] = 1, 1
    for theory in line["theories"]:
        theory.pop("bits")
    line["evidence"] = []
    scientist = Scientist(made(line))
    answer = scientist.recommend([{"x": x} for x in (0.0, 2.0, 4.0)], about="slope", batch=2)
    steps = answer["batch"]
    assert {steps[0]["design"]["x"], steps[1]["design"]["x"]} == {0.0, 4.0}
    assert steps[1]["nats"] > steps[0]["nats"] and steps[1]["cost"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [({"batch": 0}, "1 to 16"), ({"together": "run"}, "names each row's experiment"), ({"batch": True}, "1 to 16")],
)
def test_wrong_batches_are_one_line(made: Made, line: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Scientist(made(line)).recommend([{"x": 1.0}], **change)
