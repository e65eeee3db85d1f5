"""`fathom finetune`: converted and original see the same data, queries may go first, what does not fit is one line."""

import importlib
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fathom.cli import main
from fathom.errors import UserError
from fathom.hf.checkpoints import convert_checkpoint, load_checkpoint
from fathom.hf.export import tokenizer_for
from fathom.hf.finetune import FinetuneConfig, finetune, make_optimizer
from fathom.models.config import ResidualConfig
from fathom.train.config import DataConfig, OptimConfig, to_dict
from fathom.train.embedded import embedded
from fathom.train.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A dataset, a small Llama with its tokenizer, and its conversion."""
    place = tmp_path_factory.mktemp("finetune")
    data = embedded(place)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place / "original")
    tokenizer, end = load_tokenizer(data / "tokenizer.json")
    tokenizer_for(tokenizer, end, 64).save_pretrained(place / "original")
    convert_checkpoint(
        place / "original", place / "converted", ResidualConfig(rule="block", num_blocks=2), num_tokens=16
    )
    return data, place / "original", place / "converted"


def config(data: Path, **settings: object) -> FinetuneConfig:
    given = {"steps": 4, "context": 32, "eval_every": 2, "eval_sequences": 2, "device": "cpu", **settings}
    return FinetuneConfig(
        data=DataConfig(folder=str(data), batch=4, micro_batch=2),
        optim=OptimConfig(lr=1e-2, depth_lr=0.05, warmup=1),
        **given,
    )  # type: ignore[arg-type]


def rows(folder: Path, kind: str) -> list[dict]:
    return [
        row for line in (folder / "metrics.jsonl").read_text().splitlines() if (row := json.loads(line))["kind"] == kind
    ]


def test_a_conversion_and_its_control_start_alike_and_both_learn(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    data, *models = folders
    found = [finetune(model, tmp_path / model.name, config(data)) for model in models]
    assert found[0]["val_loss_before"] == pytest.approx(found[1]["val_loss_before"], abs=1e-5)
    first = [rows(tmp_path / model.name, "train")[0]["loss"] for model in models]
    assert first[0] == pytest.approx(first[1], abs=1e-5)  # the same batch
    assert all(each["val_loss"] < each["val_loss_before"] for each in found)
    assert found[0]["val_loss"] != found[1]["val_loss"]
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert trained.stream.query[1:].abs().amax(-1).gt(0).all()
    assert [row["step"] for row in rows(tmp_path / "converted", "val")] == [0, 2, 4]
    about = json.loads((tmp_path / "converted/finetune.json").read_text())
    assert about["model"] == "converted" and str(data) == about["data"]["folder"]


def test_queries_can_go_first(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    data, _, converted = folders
    finetune(converted, tmp_path / "out", config(data, queries_first=4))
    before, after = load_checkpoint(converted), load_checkpoint(tmp_path / "out")
    moved = {name for name, value in after.named_parameters() if not torch.equal(value, before.get_parameter(name))}
    assert moved == {name for name in dict(after.named_parameters()) if name.startswith("stream.")}


def test_two_passes_are_one_batch(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    data, original, _ = folders
    whole = config(data, steps=1)
    whole = FinetuneConfig(**{**vars(whole), "data": DataConfig(folder=str(data), batch=4)})
    for name, each in (("parts", config(data, steps=1)), ("whole", whole)):
        finetune(original, tmp_path / name, each)
    losses = [rows(tmp_path / name, "train")[0]["loss"] for name in ("parts", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_queries_are_never_decayed_and_have_their_own_rate(folders: tuple[Path, Path, Path]) -> None:
    _, _, converted = folders
    model = load_checkpoint(converted)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, OptimConfig(lr=1e-3)).param_groups
    depth = next(group for group in groups if group["depth"])
    assert {names[id(p)] for p in depth["params"]} == {"stream.query", "stream.key_gain"}
    assert depth["weight_decay"] == 0 and depth["peak_lr"] == 0.128 / 32
    for group in groups:
        if not group["depth"]:
            assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] > 0} and group["peak_lr"] == 1e-3


def test_what_does_not_fit_is_one_line(
    folders: tuple[Path, Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, original, _ = folders
    with pytest.raises(UserError, match="the model has positions for 64 tokens"):
        finetune(original, tmp_path / "out", config(data, context=65))
    with pytest.raises(UserError, match="queries_first is -1"):
        config(data, queries_first=-1)
    small = LlamaForCausalLM(
        LlamaConfig(vocab_size=99, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    small.save_pretrained(tmp_path / "small")
    assert (
        main(
            ["finetune", str(tmp_path / "small"), str(tmp_path / "out"), "--data.folder", str(data), "--device", "cpu"]
        )
        == 2
    )
    assert "prepare it with --tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("finetune_smollm2")


def test_ctrl_c_ends_a_worker_of_the_benchmark(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its pool takes any exception for the end of one run, and begins the next."""
    monkeypatch.setattr(script, "finetune", Mock(side_effect=KeyboardInterrupt))
    monkeypatch.setattr(script.os, "_exit", Mock(side_effect=SystemExit))
    with pytest.raises(SystemExit):
        script.trained(tmp_path, tmp_path / "run", FinetuneConfig(), float("inf"))


def test_a_run_of_the_benchmark_with_other_settings_is_not_taken_for_this_one(
    script: ModuleType, tmp_path: Path
) -> None:
    config = FinetuneConfig(steps=5)
    (tmp_path / "summary.json").write_text('{"val_loss_before": 2, "val_loss": 1}')
    (tmp_path / "finetune.json").write_text(json.dumps({"model": "smollm2", **to_dict(config)}))
    assert script.trained(Path("smollm2"), tmp_path, config, 0)["val_loss"] == 1
    with pytest.raises(UserError, match="other settings"):
        script.trained(Path("smollm2"), tmp_path, replace(config, steps=6), 0)


def test_committed_numbers_follow_from_the_committed_runs(script: ModuleType) -> None:
    root = Path(__file__).parents[2]
    folder = root / "benchmarks/results/2026-11-22_smollm2-finetune"
    summaries = {
        arm: [json.loads((folder / f"runs/{arm}-seed{seed}/summary.json").read_text()) for seed in range(3)]
        for arm in script.ARMS
    }
    result = json.loads((folder / "result.json").read_text())
    assert json.loads(json.dumps(script.rows_of(summaries))) == result["rows"]
    assert result["rate"] == float(min(result["tuning"], key=result["tuning"].__getitem__))
    gain = next(row for row in result["rows"] if row["metric"] == "mean_gain")
    told = f"{-gain['median']:.4f} nats", f"interval {-gain['high']:.4f} to {-gain['low']:.4f}"
    for page in (folder / "README.md", root / "docs/hf.md", root / "docs/log.md"):
        assert all(each in " ".join(page.read_text().split()) for each in told), page
