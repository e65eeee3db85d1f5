"""The instruments of calibration against what they must find, and the bet that the rows scatter as no theory says."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fathom.errors import UserError
from fathom.scientist import Scientist, World, read
from fathom.scientist.adequacy import scores, surprise
from fathom.scientist.calibration import band, departure, isotonic, ranks, reliability, simulate
from fathom.scientist.fitting import fit
from fathom.scientist.posterior import infer
from fathom.scientist.sampler import LADDER
from fathom.scientist.scientist import SURPRISE

Made = Callable[[Any], World]


def test_ranks_are_uniform_and_a_wrong_prior_is_seen(made: Made, line: dict[str, Any]) -> None:
    world = made(line)
    random = np.random.default_rng(0)
    found, failed = ranks(world, 0, 150, random)
    limit = band(150, simulations=400)
    assert failed == 0 and found.keys() == {"a", "b", "s"}
    assert all(departure(each) < 1.3 * limit for each in found.values())
    # Truths whose noise is four times what the fitted theory expects.
    narrow, wide = dict(line["theories"][0]), dict(line["theories"][0])
    wide["params"] = wide["params"] | {"s": "halfnormal(1.2)"}
    line["theories"][0] = wide
    other = made(line)
    line["theories"][0] = narrow
    below = []
    for _ in range(150):
        simulated, truth = simulate(other, 0, random)
        params, weights = fit(replace(world, y=simulated.y), 0, LADDER[0]).draws
        below.append(float(weights[params["s"] < truth["s"]].sum()))
    assert departure(np.array(below)) > limit


def test_uniforms_stay_in_their_band_as_often_as_it_says() -> None:
    random = np.random.default_rng(5)
    limit = band(60, simulations=600)
    assert 0.9 < np.mean([departure(random.random(60)) < limit for _ in range(300)]) < 0.99


def test_isotonic_by_hand() -> None:
    p, y = np.array([0.1, 0.4, 0.3, 0.9, 0.4]), np.array([0, 0, 1, 1, 1])
    np.testing.assert_allclose(isotonic(p, y), [0, 2 / 3, 2 / 3, 1, 2 / 3])


def test_reliability_tells_right_from_overconfident_probabilities() -> None:
    random = np.random.default_rng(1)
    p = random.random(600)
    y = random.random(600) < p
    right, sure = (reliability(each, y, 150) for each in (p, np.clip(1.6 * (p - 0.5) + 0.5, 0, 1)))
    assert right.reliable and not sure.reliable
    assert right.brier == pytest.approx(right.miscalibration - right.discrimination + right.uncertainty)


def test_rows_are_scored_without_themselves(made: Made, line: dict[str, Any]) -> None:
    """The closed form of a linear theory against reweighted draws of the same theory."""
    exact = infer(made(line))
    line["theories"][0]["mean"] = "a + log(exp(b))*x"
    sampled = infer(made(line))
    np.testing.assert_allclose(scores(exact, exact.world), scores(sampled, sampled.world), atol=0.12)


def test_the_bet_wins_against_wrong_scatter_only() -> None:
    world = read("multiplier")
    random = np.random.default_rng(2)
    c = np.repeat(np.geomspace(0.6, 18, 12), 2)
    arch = np.array(["prenorm", "block"] * 12, dtype=object)
    world = replace(world, data={"C": c, "arch": arch}, extra=np.zeros(24), sources=("",) * 24)
    law = 0.6 - 0.06 * np.log(c / 2) - 0.012 * (arch == "block")
    luck = np.repeat(0.02 * random.standard_normal(12), 2)
    truths = {
        "right": law + 0.003 * random.standard_normal(24), "shared": law + luck + 0.001 * random.standard_normal(24),
        "growing": law + 0.001 * 30 ** np.linspace(0, 1, 24) * random.standard_normal(24),
    }  # fmt: skip
    pays = {name: surprise(infer(replace(world, y=y))) for name, y in truths.items()}
    assert pays["right"] < 2 and pays["shared"] > SURPRISE and pays["growing"] > SURPRISE
    answer = Scientist(replace(world, y=truths["shared"])).prob("multiplier(C=5) > 1")
    assert answer.abstain is not None and answer.abstain["reason"] == "no_adequate_theory"
    assert "bet" in answer.abstain["detail"]


def law(**more: Any) -> dict[str, Any]:
    """A power law that bends where nobody has looked yet: an exponent of compute that fades."""
    c = np.geomspace(1, 1000, 24)
    y = 1 - 0.06 * np.log(c) + 0.004 * np.log(c) ** 2 + 0.001 * np.random.default_rng(0).standard_normal(24)
    return {
        "world": "law", "outcome": {"name": "y", "center": 1, "spread": 0.5, "noise": 0.01},
        "designs": {"C": {"low": 0.5, "high": 1e5, "log": True}},
        "theories": [{"id": "law", "params": {"a": "normal(1, 1)", "b": "normal(0, 0.2)", "s": "halfnormal(0.01)"},
                      "mean": "a - b*log(C)", "noise": "normal(s)"} | more],
        "evidence": [{"kind": "measured", "data": [{"C": float(x), "y": float(v)} for x, v in zip(c, y, strict=True)]}],
    }  # fmt: skip


def test_a_laws_own_past_widens_what_it_says_beyond_its_rows(made: Made) -> None:
    rigid, learned = (infer(made(law(**more))).fits[0] for more in ({}, {"beyond": {"budget": "C"}}))
    assert learned.edge is not None and rigid.edge is None
    rates, weights = learned.edge.rates
    assert (
        float(rates @ weights) > 0.033
    )  # 0.0235 before it is seen: the past of a bending law is worse than laws usually are
    inside, beyond = {"C": 100.0}, {"C": 20_000.0}

    def spread(found: Any, design: dict[str, float]) -> float:
        w, m, s = found.components([design], 2000)
        return float(np.sqrt(w @ (s[0] ** 2 + (m[0] - w @ m[0]) ** 2)))

    assert spread(learned, inside) == pytest.approx(spread(rigid, inside), rel=0.05)
    assert spread(learned, beyond) > 2 * spread(rigid, beyond)
    fixed = infer(made(law(beyond={"budget": "C", "per_decade": 0.5}))).fits[0]
    assert spread(fixed, beyond) == pytest.approx(0.5 * np.sqrt(np.log10(20)), rel=0.1)
    asked = Scientist(made(law(beyond={"budget": "C"})))
    if not asked._inadequate:
        assert asked.predict(beyond).abstain is None
        assert asked.prob("mean(C=20000) > 1").abstain is not None


@pytest.mark.parametrize("wrong", [{"budget": "q"}, {"budget": "3"}, {"budget": "C", "per_decade": 0}, {"along": "C"}])
def test_wrong_edges_are_named(made: Made, wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"world\.yaml:\d+"):
        made(law(beyond=wrong))
