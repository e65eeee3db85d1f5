"""The reasoning probe: answers are what following the facts gives, nothing leaks, training learns, scores are the models'."""

import importlib
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fathom.cli import main
from fathom.errors import UserError
from fathom.lab.probe import ProbeConfig, Score, accuracy, load_probe, score, train_probe
from fathom.lab.probe_tasks import MODULUS, OPERATIONS, TaskConfig
from fathom.models.config import ResidualConfig
from fathom.models.transformer import Transformer
from fathom.train.config import OptimConfig


def test_hops_are_followed_one_by_one() -> None:
    task = TaskConfig("hops", size=7, hops=5, questions=35)
    sample = task.sample(20, torch.Generator().manual_seed(0))
    assert sample.tokens.shape == (20, task.length) and int(sample.tokens.max()) < task.vocab_size
    for tokens, answers, difficulty in zip(*(part.tolist() for part in sample), strict=True):
        after = dict(divmod(fact, 7) for fact in tokens[:7])
        assert sorted(after) == sorted(after.values()) == list(range(7))
        assert len(set(tokens[7:])) == 35, "with as many questions as there are, each is asked once"
        for question, answer, steps in zip(tokens[7:], answers, difficulty, strict=True):
            node, hops = divmod(question - 49, 5)
            seen = [node]
            for _ in range(hops + 1):
                seen.append(after[seen[-1]])
            assert answer == seen[-1] and steps == hops + 1
            assert len(set(seen)) == len(seen), "one cycle: no shorter way"


def test_arithmetic_is_computed_one_by_one() -> None:
    task = TaskConfig("arithmetic", size=6, hops=4, questions=4)
    sample = task.sample(50, torch.Generator().manual_seed(0))
    kinds = len(OPERATIONS)
    for tokens, answers, difficulty in zip(*(part.tolist() for part in sample), strict=True):
        values: dict[int, tuple[int, int]] = {}
        rest = []
        for fact in tokens[:6]:
            if fact < 6 * MODULUS:
                variable, value = divmod(fact, MODULUS)
                values[variable] = value, 1
            else:
                pair, operation = divmod(fact - 6 * MODULUS, kinds)
                rest.append((*divmod(pair, 6), OPERATIONS[operation]))
        for _ in range(5):
            variable, source, (kind, by) = next(fact for fact in rest if fact[1] in values)
            value, steps = values[source]
            values[variable] = (value + by if kind == "add" else value * by) % MODULUS, steps + 1
            rest.remove((variable, source, (kind, by)))
        assert not rest
        asked = [token - 6 * MODULUS - 36 * kinds for token in tokens[6:]]
        assert [values[variable] for variable in asked] == list(zip(answers, difficulty, strict=True))
        assert sorted(difficulty) == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["hops", "arithmetic"])
def test_answers_are_as_good_as_drawn_evenly(name: str) -> None:
    """Nothing but the facts tells an answer: whatever the difficulty, answers and facts' order are even."""
    task = TaskConfig(name, size=6, hops=4, questions=4)  # type: ignore[arg-type]
    sample = task.sample(4000, torch.Generator().manual_seed(1))
    for steps in range(1, 5):
        answers = sample.answers[sample.difficulty == steps]
        counts = torch.bincount(answers, minlength=task.num_answers) / len(answers)
        assert counts.max() < 1.35 / task.num_answers and counts.min() > 0.65 / task.num_answers
    first = torch.bincount(sample.tokens[:, 0], minlength=task.vocab_size).float()
    assert first.max() < 0.2 * first.sum()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"hops": 0}, "at least one step"),
        ({"size": 4, "hops": 4}, "more than 4 facts"),
        ({"questions": 33}, "there are only 32"),
        ({"questions": 0}, "at least 1"),
    ],
)
def test_a_task_that_cannot_be_is_one_line(settings: dict[str, int], said: str) -> None:
    with pytest.raises(UserError, match=said):
        TaskConfig(**settings)  # type: ignore[arg-type]


def tiny(seed: int = 0, steps: int = 60) -> ProbeConfig:
    return ProbeConfig(
        task=TaskConfig("hops", size=4, hops=2, questions=8), residual=ResidualConfig(rule="block"), layers=1, dim=32, heads=1,
        batch=32, steps=steps, seed=seed, device="cpu", optim=OptimConfig(lr=1e-2, warmup=10),
    )  # fmt: skip


def test_a_probe_learns_one_hop_and_is_scored_from_its_folder(tmp_path: Path) -> None:
    found = train_probe(tiny(), tmp_path / "a")
    assert found[0] > 0.9, "the fact of one node is found within a second of training"
    config, model = load_probe(tmp_path / "a", device="cpu")
    assert config == tiny() and accuracy(model, config.task) == found == json.loads(
        (tmp_path / "a/accuracy.json").read_text()
    )
    untrained = accuracy(Transformer(config.model), config.task)
    assert untrained[0] < 0.5, "the test does not give its answers away"
    lines = [json.loads(line) for line in (tmp_path / "a/probe.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 60] and lines[-1]["loss"] < 0.5
    short = [train_probe(tiny(steps=3), tmp_path / name) for name in "bc"]
    assert short[0] == short[1], "a seed gives one result"
    with pytest.raises(UserError, match="exists already"):
        train_probe(tiny(), tmp_path / "a")
    with pytest.raises(UserError, match="the setting and the seed of another"):
        score([tmp_path / "b", tmp_path / "c"], sequences=8)
    (tmp_path / "b" / "probe.json").write_text(json.dumps({"config": {"layers": "two"}}))
    with pytest.raises(UserError, match="layers is 'two'"):
        load_probe(tmp_path / "b")
    with pytest.raises(UserError, match=r"not a trained probe: it has no probe\.json"):
        load_probe(tmp_path)


def test_scores_are_over_seeds() -> None:
    one = Score(tiny(), [0], [[0.5, 0.25]])
    assert one.mean == [0.5, 0.25] and one.intervals() == [None, None]
    three = Score(tiny(), [0, 1, 2], [[1.0, 0.2], [1.0, 0.3], [1.0, 0.4]])
    assert three.mean == pytest.approx([1.0, 0.3])
    first, second = three.intervals()
    assert first == (1.0, 1.0)
    # Student's t of two degrees of freedom: 2.920 standard errors of 0.1 / sqrt(3).
    assert second == pytest.approx((0.3 - 0.16859, 0.3 + 0.16859), abs=1e-4)
    wide = Score(tiny(), [0, 1], [[0.9, 0.0], [1.0, 0.1]])
    assert wide.intervals()[0] == (pytest.approx(0.634, abs=1e-3), 1.0), "a share is at most one"


def test_the_command_line_trains_and_tests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = shlex.split(
        "--task.size 4 --task.hops 2 --task.questions 8 --layers 1 --dim 16 --heads 1 --batch 4 --steps 2 --device cpu"
    )
    for seed in ("0", "1"):
        assert main(["probe", "train", *flags, "--seed", seed, "--out", str(tmp_path / seed)]) == 0
    assert "(guessing: 0.250)" in capsys.readouterr().out
    assert main(["probe", "test", str(tmp_path / "0"), str(tmp_path / "1"), "--sequences", "64"]) == 0
    table = capsys.readouterr().out
    assert table.count(" to ") == 2 and "90% intervals" in table
    assert main(["probe", "test", str(tmp_path / "0"), "--json", "--sequences", "64"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["seeds"] == [0] and row["interval"] == [None, None] and len(row["mean"]) == 2
    assert main(["probe", "train", *flags, "--optim.lr", "1e30", "--steps", "9", "--out", str(tmp_path / "2")]) == 2
    assert "give a lower --optim.lr" in capsys.readouterr().err
    with pytest.raises(UserError, match="2\\^40"):
        replace(tiny(), seed=2**40)


def test_the_committed_rows_are_made_of_the_committed_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2] / "benchmarks"
    monkeypatch.syspath_prepend(str(root))
    measure = importlib.import_module("reasoning_probe").measure
    folder = root / "results" / "2026-11-22_reasoning-probe"
    assert measure(folder)["rows"] == json.loads((folder / "result.json").read_text())["rows"]
