"""Training is right: each step sees what it should, bad numbers stop a run at once, and what cannot work is refused."""

import contextlib
import json
import math
import re
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fathom.errors import UserError
from fathom.train.checkpoint import checkpoints
from fathom.train.config import RunConfig
from fathom.train.loop import Diverged, Trainer, resume, train
from fathom.train.metrics import read_metrics
from tests.train.conftest import AfterStep, Start, Tiny, files, numbers, wait_until


def test_a_run_folder_has_one_process(tiny: Tiny, tmp_path: Path, start: Start) -> None:
    run = tmp_path / "run"
    config = tiny(steps=1_000_000, checkpoint_every=10)
    process = start(train, config, run)
    wait_until(lambda: checkpoints(run))
    with pytest.raises(UserError, match=f"{run} is in use by another process"):
        resume(run)
    with pytest.raises(UserError, match=f"{run} exists already; resume it with `fathom train --resume {run}`"):
        train(config, run)
    assert process.is_alive()
    process.kill()
    process.join()
    trainer = Trainer(config, run, resume=True)
    with pytest.raises(UserError, match="in use"):
        Trainer(config, run, resume=True)
    trainer.close()


def test_what_is_there_is_never_overwritten(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(steps=1), tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("all of it")
    (tmp_path / "file").write_text("something")
    before = files(tmp_path)
    for name, message in (("run", "resume it"), ("mine", "not a run folder"), ("file", "not a run folder")):
        with pytest.raises(UserError, match=message):
            train(tiny(), tmp_path / name)
    for name in ("mine", "nothing"):
        with pytest.raises(UserError, match="it has no config"):
            Trainer(tiny(), tmp_path / name, resume=True)
    assert files(tmp_path) == before
    (tmp_path / "empty").mkdir()
    train(tiny(steps=1), tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": {"dim": 32}}, r"embedding.weight is of shape \(260, 16\), the model's is \(260, 32\)"),
        ({"model": {"num_layers": 3}}, r"sublayers.4.norm.weight is missing, the model's is \(16,\)"),
        ({"model": {"num_layers": 1}}, r"stream.query is of shape \(5, 16\), the model's is \(3, 16\)"),
        ({"model": {"tie_embeddings": True}}, r"head.weight is not a parameter of this model"),
        ({"rule": "prenorm"}, r"stream.(query|key_gain) is not a parameter of this model"),
        ({"optim": {"optimizer": "muon"}}, r"optimizer.safetensors: 0\.\d+\.\w+ belongs to none of this run's optimizers"),
    ],
)  # fmt: skip
def test_another_shape_is_refused_by_name(change: dict, named: str, tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(steps=1), tmp_path / "run")
    with pytest.raises(UserError, match=named):
        Trainer(tiny(**change), tmp_path / "run", resume=True)


def test_muon_does_not_go_on_as_adamw(tiny: Tiny, tmp_path: Path) -> None:
    train(tiny(steps=1, optim={"optimizer": "muon"}), tmp_path / "run")
    with pytest.raises(UserError, match="belongs to none of this run's optimizers"):
        Trainer(tiny(), tmp_path / "run", resume=True)


def test_other_data_is_refused(tiny: Tiny, corpus: Path, other_corpus: Path, tmp_path: Path) -> None:
    train(tiny(steps=1), tmp_path / "run")
    with pytest.raises(UserError, match=f"{other_corpus} holds other tokens than {tmp_path / 'run'} was trained on"):
        Trainer(tiny(data={"folder": str(other_corpus)}), tmp_path / "run", resume=True)
    # The same text, cut into other splits: its corpus hash is the same.
    moved = shutil.copytree(corpus, tmp_path / "moved")
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["splits"] = {"train": manifest["splits"]["val"], "val": manifest["splits"]["train"]}
    (moved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="holds other tokens"):
        Trainer(tiny(data={"folder": str(moved)}), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "data.json").read_text().count(manifest["corpus_hash"]) == 1


def poison(trainer: Trainer) -> None:
    with torch.no_grad():
        trainer.model.sublayers[1].down.weight[0, 0] = math.nan  # type: ignore[union-attr, index]


def spoil_gradient(trainer: Trainer) -> None:
    """The next loss is finite, its gradient is not."""
    trainer.model.final_norm.weight.register_hook(lambda gradient: gradient * math.inf)


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize(
    ("act", "after", "what"),
    [
        (poison, 5, "the loss of step 6 is not finite (sequences 20 to 23 of the order with seed 0)"),
        (poison, 7, "the loss of step 8 is not finite (sequences 28 to 31 of the order with seed 0)"),
        (poison, 8, "the validation loss of step 8 is not finite (sequences 28 to 31 of the order with seed 0)"),
        (poison, 10, "sublayers.1.down.weight of step 10 is not finite (sequences 36 to 39 of the order with seed 0)"),
        (spoil_gradient, 5, "the gradient norm of step 6 is not finite (sequences 20 to 23 of the order with seed 0)"),
        (spoil_gradient, 7, "the gradient norm of step 8 is not finite (sequences 28 to 31 of the order with seed 0)"),
    ],
)
def test_a_number_that_is_not_finite_stops_and_is_never_saved(
    act, after: int, what: str, log_every: int, tiny: Tiny, tmp_path: Path, after_step: AfterStep
) -> None:
    # Validations at 4, 8, 12; checkpoints at 2, 4, 6 ...
    run = tmp_path / "run"
    after_step(after, act)
    with pytest.raises(Diverged) as error:
        train(tiny(checkpoint_every=2, keep_checkpoints=9, log_every=log_every), run)
    saved = checkpoints(run)
    assert str(error.value).startswith(f"{what}; last good checkpoint: {saved[-1]};")
    bad = int(re.search(r"of step (\d+)", what)[1])  # type: ignore[index]
    assert [int(path.name[5:]) for path in saved] == list(range(2, bad, 2))
    for folder in saved:
        for file in ("model.safetensors", "optimizer.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(folder / file).values())
    assert all(math.isfinite(row["loss"]) for row in numbers(run))
    train(tiny(checkpoint_every=2), run, resume=True)  # the cure here: the cause is gone


def test_a_huge_rate_diverges(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny(optim={"lr": 1e38, "warmup": 0}, checkpoint_every=1, log_every=100)
    with pytest.raises(Diverged, match=r"no checkpoint had been written; a lower learning rate is the usual cure"):
        train(config, tmp_path / "run")
    assert checkpoints(tmp_path / "run") == []


def gradients(trainer: Trainer) -> tuple[dict[str, Tensor], float, float]:
    """What the optimizers see in the next step, and the loss and gradient norm that it reports."""
    seen: dict[str, Tensor] = {}

    def copy(*_: object) -> None:
        seen.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})

    hooks = [optimizer.register_step_pre_hook(copy) for optimizer in trainer.optimizers]
    result = trainer.step()
    for hook in hooks:
        hook.remove()
    return seen, result.loss.item(), result.grad_norm.item()


@contextlib.contextmanager
def double_trainer(config: RunConfig, run: Path) -> Iterator[Trainer]:
    """A trainer in float64, with a head and queries that are not zero so that every parameter has a gradient."""
    with contextlib.closing(Trainer(config, run)) as trainer:
        trainer.model.double()
        generator = torch.Generator().manual_seed(1)
        for parameter in (trainer.model.head.weight, trainer.model.stream.query):
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        yield trainer


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_accumulated_gradients_are_those_of_the_whole_batch(micro_batch: int, tiny: Tiny, tmp_path: Path) -> None:
    data = {"batch": 6}
    with double_trainer(tiny(data={**data, "micro_batch": None}, optim={"clip": 0}), tmp_path / "whole") as trainer:
        expected, loss, norm = gradients(trainer)
        inputs, targets = trainer.batches.get(0, 6)
    config = tiny(data={**data, "micro_batch": micro_batch}, optim={"clip": 0})
    with double_trainer(config, tmp_path / "parts") as trainer:
        found, part_loss, part_norm = gradients(trainer)
    with double_trainer(config, tmp_path / "again") as trainer:
        plain = trainer.model.loss(torch.from_numpy(inputs), torch.from_numpy(targets))
        plain.backward()
        assert loss == pytest.approx(plain.item(), rel=1e-12)
        assert found.keys() == expected.keys() == {name for name, _ in trainer.model.named_parameters()}
        for name, parameter in trainer.model.named_parameters():
            torch.testing.assert_close(expected[name], parameter.grad, rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-12, atol=1e-14)
    assert part_loss == pytest.approx(loss, rel=1e-12) and part_norm == pytest.approx(norm, rel=1e-12)


def test_clipping_bounds_the_global_norm_and_nothing_else(tiny: Tiny, tmp_path: Path) -> None:
    def global_norm(tensors: dict[str, Tensor]) -> float:
        return math.sqrt(sum(tensor.square().sum().item() for tensor in tensors.values()))

    with double_trainer(tiny(optim={"clip": 0}), tmp_path / "free") as trainer:
        free, _, norm = gradients(trainer)
    assert norm == pytest.approx(global_norm(free), rel=1e-12)
    with double_trainer(tiny(optim={"clip": norm / 10}), tmp_path / "clipped") as trainer:
        clipped, _, reported = gradients(trainer)
    assert reported == norm and global_norm(clipped) == pytest.approx(norm / 10, rel=1e-4)
    for name in free:
        torch.testing.assert_close(clipped[name] * 10, free[name], rtol=1e-4, atol=0)
    with double_trainer(tiny(optim={"clip": norm * 2}), tmp_path / "loose") as trainer:
        loose, _, _ = gradients(trainer)
    assert all(torch.equal(loose[name], free[name]) for name in free)


def test_every_step_takes_the_next_sequences_of_the_order(tiny: Tiny, tmp_path: Path, monkeypatch) -> None:
    with contextlib.closing(Trainer(tiny(), tmp_path / "run")) as trainer:
        asked = []
        real = trainer.batches.get
        monkeypatch.setattr(
            trainer.batches, "get", lambda first, count: asked.append((first, count)) or real(first, count)
        )
        for _ in range(3):
            trainer.step()
        assert asked == [(0, 2), (2, 2), (4, 2), (6, 2), (8, 2), (10, 2)]
        assert (trainer.progress.step, trainer.progress.consumed) == (3, 12)


def test_validation_is_the_mean_loss_of_the_first_sequences_in_order(tiny: Tiny, tmp_path: Path) -> None:
    with contextlib.closing(Trainer(tiny(eval_sequences=11), tmp_path / "run")) as trainer:  # 8 and 3: unequal batches
        trainer.model.double()
        torch.nn.init.normal_(trainer.model.head.weight)
        shards = trainer.batches.shards.__class__(trainer.batches.shards.folder, "val")
        tokens = torch.from_numpy(shards.read(0, 11 * 32 + 1))
        with torch.no_grad():
            expected = trainer.model.loss(tokens[:-1].view(11, 32), tokens[1:].view(11, 32)).item()
        assert trainer.validate() == pytest.approx(expected, rel=1e-12)
        assert trainer.validation_loss == read_metrics(trainer.run)[-1]["loss"] == trainer.validate()


def test_training_learns(tiny: Tiny, tmp_path: Path) -> None:
    summary = train(tiny(steps=60, optim={"lr": 2e-2}), tmp_path / "run")
    first = numbers(tmp_path / "run")[0]["loss"]
    assert first == pytest.approx(math.log(260), abs=1e-5) and summary["val_loss"] < first - 2


def test_losses_are_those_of_the_golden_file() -> None:
    """A change that is no change leaves these alone; one that means to change them runs tests/make_golden.py."""
    tests = Path(__file__).parents[1]
    expected = json.loads((tests / "golden" / "losses-30.json").read_text())
    found = runpy.run_path(str(tests / "make_golden.py"))["losses"]()
    assert found.keys() == expected.keys() and all(len(losses) == 30 for losses in found.values())
    for case, losses in expected.items():
        assert found[case] == pytest.approx(losses, rel=1e-9, abs=0), case
