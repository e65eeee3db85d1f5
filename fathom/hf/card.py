"""Model cards: what a folder holds, where it comes from and how to load it, said from data and never from memory."""

import json
from pathlib import Path
from typing import Any

from fathom import __version__
from fathom.models.transformer import Transformer

_LOAD = """```python
import fathom.hf  # registers the model with Transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
"""
_HEAD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [fathom, attention-residuals]
---

"""
_METHOD = "[Attention Residuals](https://arxiv.org/abs/2603.15031)"


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def export_card(run: Path, model: Transformer) -> str:
    """The card of an exported run: its architecture, data and measured loss."""
    config, summary, data = model.config, _read(run / "summary.json"), _read(run / "data.json")
    rows = [
        ("residual rule", config.residual.rule),
        ("parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}"),
        ("decoder layers, width", f"{config.num_layers}, {config.dim}"),
        ("context", f"{config.context} tokens"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("steps, tokens", f"{summary['steps']:,}, {summary['tokens']:,}" if summary else "the run is not finished"),
        ("validation loss", f"{summary['val_loss']:.4f} nats per token" if summary else "the run is not finished"),
        ("corpus, sha256", str(data.get("corpus_hash", "not known"))),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        f"{_HEAD}# {run.name}\n\nA decoder trained with Fathom {__version__} from scratch ({_METHOD}). It continues text and was "
        f"not tuned to follow instructions.\n\n| | |\n|---|---|\n{table}\n\n{_LOAD.format(folder='FOLDER')}"
    )


def converted_card(source: str, residual: dict[str, Any], report: str) -> str:
    """The card of a converted checkpoint, with the measured difference from the original."""
    rule = ", ".join(f"{name} {value}" for name, value in residual.items())
    return (
        f"{_HEAD}# {Path(source).name} on a stream\n\nThe original with its residual sums replaced by {_METHOD} ({rule}). "
        "All depth queries are zero, so that the model computes what the original computes until it is trained further. "
        f"Converted with Fathom {__version__}; the licence is the original's.\n\n"
        f"Measured before writing:\n\n```\n{report}\n```\n\n{_LOAD.format(folder='FOLDER')}"
    )
