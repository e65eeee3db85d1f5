"""Predicted bytes are the measured ones, the paper's figures come out, and what does not fit is refused with the numbers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fathom.cli import main
from fathom.errors import UserError
from fathom.inference.engine import Engine
from fathom.inference.memory import available, bank_bytes, check, measure, predict, size
from fathom.kernels import use_backend
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.kimi_linear import build
from fathom.models.sizes import micro
from fathom.models.transformer import Transformer

RESIDUALS = [
    ResidualConfig(rule="prenorm"),
    ResidualConfig(rule="block"),
    ResidualConfig(rule="block", block_size=4, gain=False),
    ResidualConfig(rule="block", block_size=4, schedule="single_pass"),
    ResidualConfig(rule="full"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("residual", RESIDUALS, ids=lambda r: f"{r.rule}-{r.block_size}-{r.schedule}")
def test_prediction_is_what_is_measured(residual: ResidualConfig, chunk: int | None, dtype: torch.dtype) -> None:
    settings: dict[str, Any] = {"dim": 32, "num_layers": 5, "num_heads": 4, "num_kv_heads": 2, "context": 12}
    for more in ({}, {"tie_embeddings": True, "qk_norm": False, "head_dim": 6}):
        config = ModelConfig(**settings, **more, residual=residual)
        engine = Engine(Transformer(config), slots=3, chunk=chunk, dtype=dtype)
        assert predict(config, slots=3, capacity=12, chunk=chunk, dtype=dtype) == measure(engine)


@pytest.mark.parametrize("rule", ["full", "block"])
def test_prediction_is_what_is_measured_with_kernels(rule: Any) -> None:
    """Full is then served as blocks of one; its last block keeps the output's read, whatever the schedule."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for schedule in ("two_phase", "single_pass"):
        residual = ResidualConfig(rule=rule, num_blocks=3 if rule == "block" else None, schedule=schedule)
        config = ModelConfig(dim=16, num_layers=2, num_heads=2, context=3, residual=residual)
        with use_backend("triton"):
            model = Transformer(config).to(device)
            predicted = predict(config, slots=2, capacity=3, dtype=torch.float32, device=device)
            assert predicted == measure(Engine(model, slots=2)), schedule


def test_two_sublayers_of_full_keep_no_read() -> None:
    """√2 is nearest to chunks of one, the single pass."""
    config = ModelConfig(dim=16, num_layers=1, num_heads=2, context=3, residual=ResidualConfig(rule="full"))
    assert predict(config, slots=2, capacity=3, dtype=torch.float32) == measure(Engine(Transformer(config), slots=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"full_rank_gate": True, "query_rank": 12, "mla_gate": True, "latent_dim": 16, "decay_floor": -5.0}]
)
def test_prediction_is_what_is_measured_of_kimi_linear(options: dict[str, Any], dtype: torch.dtype) -> None:
    for residual in (ResidualConfig(rule="prenorm"), ResidualConfig(rule="block", num_blocks=3)):
        config = replace(micro(), context=12, residual=residual, **options)
        engine = Engine(build(config), slots=3, chunk=5, dtype=dtype)
        predicted = predict(config, slots=3, capacity=12, chunk=5, dtype=dtype)
        assert predicted == measure(engine) and predicted["kda_state"] > 0


def test_the_bank_is_that_of_the_paper() -> None:
    """Section 4.2: 15 GB for 128K tokens and 8 blocks, 1.9 GB on each of 8 ranks, below 0.3 GB in chunks of 16K."""
    assert bank_bytes(8, 128 * 1024, 7168, 2) == 15_032_385_536
    assert bank_bytes(8, 128 * 1024, 7168, 2, ranks=8) == 1_879_048_192
    assert bank_bytes(8, 16 * 1024, 7168, 2, ranks=8) == 234_881_024


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_ranks_share_what_can_be_shared(ranks: int) -> None:
    config = ModelConfig(dim=64, num_layers=4, num_heads=8, num_kv_heads=4, context=96)
    parts = [predict(config, slots=2, capacity=96, ranks=ranks, rank=rank) for rank in range(ranks)]
    whole = predict(config, slots=2, capacity=96)
    assert sum(part["kv_cache"] for part in parts) == whole["kv_cache"]
    assert all(part["bank"] == 9 * (192 // ranks) * 64 * 2 for part in parts)
    twice = sum(part["weights"] for part in parts) - whole["weights"]
    counted = 2 * (2 * 1024 * 64 + 9 * 64 + 4 * 2 * 8) + 4 * 9 * 64
    assert twice == (ranks - 1) * counted


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    with pytest.raises(UserError, match=r"needs 3.5 GB \(weights 1.5 GB, kv cache 2 GB\), and 3 GB are free"):
        check({"weights": 1_500_000_000, "kv_cache": 2_000_000_000}, 3_000_000_000)
    check({"weights": 1}, 1)
    assert available(torch.device("cpu")) > 0
    model = Transformer(ModelConfig(context=2**20, dim=8, num_layers=1, num_heads=1))
    with pytest.raises(UserError, match=r"kv cache .* TB\), and .* are free"):
        Engine(model, slots=2**20)


@pytest.mark.parametrize(("count", "text"), [(999, "999 B"), (1500, "1.5 kB"), (2 * 10**6, "2 MB"), (10**12, "1 TB")])
def test_sizes_are_decimal(count: int, text: str) -> None:
    assert size(count) == text


def test_the_page_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--memory", "--batch", "4", "--device", "cpu"]) == 0
    page = Path(__file__).parents[2] / "docs/inference.md"
    assert f"$ fathom bench --memory --batch 4 --device cpu\n{capsys.readouterr().out}```" in page.read_text()


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--model.dim", "16", "--model.num-layers", "2", "--model.context", "32", "--batch", "2", "--device", "cpu"]
    assert main(["bench", "--memory", *tiny, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["predicted"] == result["measured"] and result["predicted"]["bank"] == 5 * 64 * 16 * 4
    assert main(["bench", "--memory", *tiny, "--ranks", "4", "--chunk", "8"]) == 0
    out = capsys.readouterr().out
    assert "chunks of 8 tokens, rank 0 of 4" in out and f"{5 * 4 * 16 * 4:,}" in out
    assert main(["bench", "--memory", "--size", "micro", "--batch", "2", "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["predicted"] == result["measured"] and result["predicted"]["kda_state"] > 0
    assert main(["bench", "--memory", "--size", "k3", "--device", "cpu"]) == 2
    assert "kda state" in capsys.readouterr().err
    for wrong, said in ((["--memory", "--size", "49b"], "--size is '49b': it must be one of micro"),
                        (["--size", "micro"], "it goes with --memory"),
                        (["--memory", "--size", "micro", "--ranks", "2"], "served by one rank")):  # fmt: skip
        assert main(["bench", *wrong]) == 2
        assert said in capsys.readouterr().err
    assert main(["bench", "--memory", *tiny, "--ranks", "0"]) == 2
    assert "ranks is 0" in capsys.readouterr().err
    assert main(["bench", "--memory", *tiny, "--model.context", str(2**40)]) == 2
    assert "are free" in capsys.readouterr().err
