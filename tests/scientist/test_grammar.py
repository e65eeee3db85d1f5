"""The grammar of theories against its enumeration, the sampler against exact weights, and probes against leaks."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fathom.cli import main
from fathom.errors import UserError
from fathom.scientist import Scientist, World, read
from fathom.scientist.gflownet import Policy, found, total_variation, train
from fathom.scientist.grammar import grammar, weigher
from fathom.scientist.posterior import infer
from fathom.scientist.probes import area, probe

Document = dict[str, Any]
Made = Callable[[Any], World]


def runs(rules: int, **more: Any) -> Document:
    random = np.random.default_rng(0)
    arms = ["base", *(f"r{k}" for k in range(rules))]
    data = [
        {"C": float(c), "arch": arm, "y": float(0.6 - 0.06 * math.log(c / 3) - 0.012 * (arm == "r0") + 0.003 * random.normal())}
        for c in np.geomspace(0.6, 18, 5) for arm in arms
    ]  # fmt: skip
    return {
        "world": "grown", "outcome": {"name": "y", "center": 0.6, "spread": 0.4, "noise": 0.003},
        "designs": {"C": {"low": 0.5, "high": 20, "log": True}, "arch": {"levels": arms}},
        "grammar": {"law": "C", "levels": "arch"} | more, "evidence": [{"kind": "measured", "data": data}],
    }  # fmt: skip


def test_a_grammar_is_enumerated_and_its_weights_are_the_worlds(made: Made) -> None:
    given = grammar(runs(1, drift=0.01))
    choices = list(given.choices())
    assert given.count == len(choices) == 4 * 3 * 2
    weight = weigher(given)
    posterior = infer(made(given.world(choices)))
    named = posterior.probabilities[:-1] / posterior.probabilities[:-1].sum()
    heights = np.array([weight(choice) for choice in choices])
    np.testing.assert_allclose(np.exp(heights - np.logaddexp.reduce(heights)), named, atol=1e-9)
    best = posterior.fits[int(np.argmax(named))].theory.id
    assert best == "power-r0+" and posterior.fits[0].theory.role == "null"


def test_the_sampler_draws_in_proportion_to_weights() -> None:
    """Weights with two far modes; the total variation to the exact distribution, and a sampler that is not trained fails."""
    sizes = [4, 3, 3, 2]

    def weight(choice: tuple[int, ...]) -> float:
        return float(
            np.logaddexp(-2.0 * sum(choice), 1.0 - 3.0 * sum(s - 1 - c for s, c in zip(sizes, choice, strict=True)))
        )

    exact = {choice: weight(choice) for choice in itertools.product(*map(range, sizes))}
    trained = train(sizes, weight, steps=350, batch=32)
    assert total_variation(trained.policy, exact) < 0.03
    assert total_variation(Policy(sizes), exact) > 0.3
    best, share = found(trained, 500, 0.9)
    assert best[0] == max(exact, key=lambda choice: exact[choice]) and share >= 0.9 and len(best) < 20
    drawn = trained.policy.draw(2000, torch.Generator().manual_seed(1)).tolist()
    frequency = drawn.count(list(best[0])) / 2000
    assert frequency == pytest.approx(math.exp(exact[best[0]] - np.logaddexp.reduce(list(exact.values()))), abs=0.04)
    assert train(sizes, weight, steps=5).weighed == train(sizes, weight, steps=5).weighed


def test_a_world_grows_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    (tmp_path / "small.yaml").write_text(yaml.safe_dump(runs(1)))
    assert main(["world", "grow", str(tmp_path / "small.yaml"), str(tmp_path / "world.yaml")]) == 0
    world = read(tmp_path / "world.yaml")
    assert "all 12 theories" in capsys.readouterr().out and len(world.theories) == 13
    (tmp_path / "large.yaml").write_text(yaml.safe_dump(runs(4, drift=0.01)))  # 648
    assert main(["world", "grow", str(tmp_path / "large.yaml"), str(tmp_path / "few.yaml"), "--steps", "60"]) == 0
    few = Scientist(read(tmp_path / "few.yaml"))
    assert "of 648 theories" in capsys.readouterr().out
    rows = few.theories()["theories"]
    assert max(rows, key=lambda row: row["p"])["id"].startswith("power-r0+") and len(rows) < 400
    assert main(["world", "grow", str(tmp_path / "large.yaml"), str(tmp_path / "few.yaml")]) == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"law": "D"}, "log: true"),
        ({"levels": "C"}, "levels"),
        ({"noises": ["cauchy"]}, "normal"),
        ({"laws": 1}, "laws"),
    ],
)
def test_wrong_grammars_are_one_line(wrong: Document, message: str) -> None:
    with pytest.raises(UserError, match=message):
        grammar(runs(1, **wrong))


def test_areas_by_hand() -> None:
    assert area(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1], bool)) == 0.75
    assert area(np.array([1.0, 1.0, 1.0, 2.0]), np.array([0, 1, 0, 1], bool)) == 0.75


def test_a_probe_finds_a_leak_and_only_that() -> None:
    """Who asked is added to a network's states in one case: then, and only then, a probe finds it."""
    random = np.random.default_rng(0)
    policy = Policy([3, 3, 3])
    choices = torch.tensor(random.integers(0, 3, (800, 3)))
    hidden = policy.hidden(choices, 2).detach().numpy()
    key = random.integers(0, 2, 800)
    assert not probe("key", hidden, key, random).found
    leaking = hidden + 0.3 * key[:, None] * random.standard_normal(hidden.shape[1])
    assert probe("key", leaking, key, random).found
    assert probe("first choice", hidden, (choices[:, 0] == 1).numpy().astype(int), random).auc > 0.9
