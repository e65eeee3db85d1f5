"""`fathom eval`: the numbers are the model's own, each task's data is found or missed in a line, programs run confined."""

import json
import math
import os
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fathom.cli import main
from fathom.errors import UserError
from fathom.hf.evaluate import evaluate
from fathom.hf.sandbox import run_program
from fathom.hf.tasks import PAPER, own_task, passages
from fathom.inference.load import load_run
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.train.config import DataConfig, OptimConfig, RunConfig
from fathom.train.embedded import documents
from fathom.train.loop import train

CONTEXT = 256
pytestmark = pytest.mark.filterwarnings("ignore")  # lm-eval's and datasets' own


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("eval") / "run"
    model = ModelConfig(dim=16, num_layers=2, context=CONTEXT, residual=ResidualConfig(rule="block", num_blocks=2))
    train(
        RunConfig(
            model=model, data=DataConfig(batch=2), optim=OptimConfig(warmup=1), steps=3, eval_sequences=1, device="cpu"
        ),
        place,
    )
    return place


def test_held_out_perplexity_is_the_networks_own(run: Path) -> None:
    """The harness's windows: each predicts what no window before it did, the last one with as much context as fits."""
    scores, missing = evaluate(run, ["heldout"], limit=1, device="cpu")
    assert not missing
    model, tokenizer = load_run(run, torch.device("cpu"))
    text = next(document.text for document in documents() if document.split == "val")
    tokens = torch.tensor([model.end_of_text, *tokenizer.encode(text).ids])
    total = 0.0
    with torch.no_grad():
        for first in range(0, len(tokens) - 1, CONTEXT):
            end = min(first + CONTEXT, len(tokens) - 1)
            begin = max(0, end - CONTEXT)
            log = F.log_softmax(model.head(model.hidden(tokens[None, begin:end])[0]).double(), -1)
            picked = log.gather(1, tokens[begin + 1 : end + 1, None])[:, 0]
            total += picked[first - end :].sum().item()
    bits = -total / len(text.encode()) / math.log(2)
    assert scores["heldout"]["bits_per_byte"] == pytest.approx(bits, rel=1e-4)


def test_tasks_run_and_what_is_missing_is_a_line(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = [
        {"input": "1 + 1", "target_scores": {"2": 1, "3": 0}},
        {"input": "2 + 2", "target_scores": {"5": 0, "4": 1}},
    ]
    (tmp_path / "sums").mkdir()
    (tmp_path / "sums/task.json").write_text(json.dumps({"examples": examples}))
    monkeypatch.setenv("BIGBENCH", str(tmp_path))
    names = [
        "lastword",
        "humaneval",
        "reasoning_chain_sum",
        "bigbench_sums",
        "bigbench_none",
        "reasoning_none",
        "mmlu",
        "mlmu",
    ]
    assert main(["eval", str(run), "--tasks", *names, "--limit", "2", "--device", "cpu", "--json"]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert list(found["scores"]) == ["lastword", "humaneval", "reasoning_chain_sum", "bigbench_sums"]
    assert {"acc", "perplexity"} <= found["scores"]["lastword"].keys()
    assert all(0 <= found["scores"][task]["acc"] <= 1 for task in found["scores"])
    lines = {line.split(": ")[1]: line for line in captured.err.splitlines() if line.startswith("fathom eval: ")}
    assert list(lines) == ["bigbench_none", "reasoning_none", "mmlu", "mlmu"]
    assert "its data is not on this machine" in lines["mmlu"] and "cais/mmlu" in lines["mmlu"]
    assert "it is no task of Fathom or of" in lines["mlmu"]


def test_the_papers_benchmarks_have_names() -> None:
    assert len(PAPER) == 15 and PAPER["GPQA-Diamond"] == "gpqa_diamond_zeroshot"
    assert own_task("mmlu") is None and own_task("humaneval") is not None


def test_a_last_word_can_be_known_from_what_comes_before() -> None:
    found = passages()
    assert len(found) > 150
    assert all(each["word"].strip() in each["context"] and each["word"].startswith(" ") for each in found)


def test_a_bigbench_choice_is_the_best_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sums").mkdir()
    example = {"input": "2 + 2", "target_scores": {"5": 0, "4": 1, "22": 0.5}}
    (tmp_path / "sums/task.json").write_text(json.dumps({"examples": [example]}))
    monkeypatch.setenv("BIGBENCH", str(tmp_path))
    task = own_task("bigbench_sums")
    assert task is not None
    (doc,) = task["custom_dataset"]()["test"]
    assert doc == {"text": "Q: 2 + 2\nA: ", "choices": ["5", "4", "22"], "best": 1}
    (tmp_path / "sums/task.json").write_text(json.dumps({"examples": [{"input": "2", "target": "3"}]}))
    with pytest.raises(UserError, match="bigbench_sums is not multiple choice"):
        own_task("bigbench_sums")


def test_what_is_no_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(tmp_path)]) == 2
    assert "is not a model folder" in capsys.readouterr().err
    assert main(["eval", str(tmp_path), "--tasks"]) == 2
    assert "--tasks is empty" in capsys.readouterr().err
    with pytest.raises(UserError, match="limit is 0"):
        evaluate(tmp_path, ["heldout"], limit=0)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("assert 1 + 1 == 2", "passed"),
        ("assert 1 + 1 == 3", "AssertionError"),
        ("raise SystemExit(0)", "ended by itself"),
        ("import os; os._exit(0)", "ended by itself"),
        ("print('done', flush=True); raise SystemExit", "ended by itself"),
        ("x = [0] * 10**10", "MemoryError"),
        ("open('x', 'w').write('a' * 10**7)", "File too large"),
        ("import socket; socket.create_connection(('127.0.0.1', 22), timeout=1)", "Network is unreachable"),
        ("import os; os.kill(os.getppid(), 9)", ""),
        ("import os; assert 'HOME' not in os.environ and not os.listdir('.')", "passed"),
    ],
)
def test_a_program_is_confined(program: str, why: str) -> None:
    ending = run_program(program)
    assert why in ending.why and ending.passed == (why == "passed")


def test_a_program_and_all_that_it_started_end_in_time() -> None:
    marked = f"sleep 7{os.getpid()}"
    begin = time.monotonic()
    ending = run_program(
        f"import os\nif os.fork() == 0:\n os.setsid(); os.system('{marked}')\nwhile True: pass", seconds=2
    )
    assert ending.why == "timed out" and time.monotonic() - begin < 30
    time.sleep(0.2)
    assert not subprocess.run(["pgrep", "-f", f"^{marked}"], capture_output=True, check=False).stdout
