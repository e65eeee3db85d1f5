"""`fathom convert`: a model folder of Transformers in, its conversion out, nothing written before the difference is known."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from fathom.errors import UserError
from fathom.hf.card import converted_card
from fathom.hf.config import residual_values
from fathom.hf.convert import convert
from fathom.hf.difference import Difference, difference, table
from fathom.hf.export import new_folder
from fathom.models.config import ResidualConfig
from fathom.train.embedded import documents

LARGEST_GRADIENT, LARGEST_LOSS = 1e-6, 1e-9
"""What float64 may show, relative and in nats: rounding alone. A larger difference is a bug, and nothing is written."""
_KEEP = ("LICENSE", "LICENSE.txt", "NOTICE", "generation_config.json")


def load_checkpoint(folder: Path, dtype: torch.dtype | Literal["auto"] = "auto") -> PreTrainedModel:
    """The decoder in a model folder, in the dtype of its weights or another; ``UserError`` naming a missing or damaged file."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder of Transformers: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, KeyError, OSError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{folder / 'config.json'}: {_line(error)}") from None
    logging.disable_progress_bar()
    try:
        model, loading = cast(Any, AutoModelForCausalLM).from_pretrained(
            folder, config=config, dtype=dtype, output_loading_info=True
        )
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"{_damaged(folder)} cannot be loaded: {_line(error)}") from None
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{folder}: its weights lack {missing[0]} ({len(missing)} tensors in all)")
    return model.eval()


def _damaged(folder: Path) -> Path:
    """The first weight file of ``folder`` that cannot be read, or the folder itself."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError):
            return path
    return folder


def _line(error: BaseException) -> str:
    """What an error that may be pages long begins with, or what it was raised from."""
    lines = [line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def sample_text(text: Path | None) -> str:
    """The file, or a validation text inside the package."""
    if text is None:
        return next(document.text for document in documents() if document.split == "val")
    try:
        return text.read_text("utf-8")
    except OSError as error:
        raise UserError(f"{text} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{text} is not UTF-8 text") from None


def tokens_of(text: str, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, count: int) -> Tensor:
    """The first ``count`` tokens [1, T] of ``text``; its bytes, modulo the vocabulary, for a model without a tokenizer."""
    if tokenizer is None:
        return torch.tensor([[byte % vocab_size for byte in text.encode()[:count]]])
    found = tokenizer(text[: 20 * count], return_tensors="pt", add_special_tokens=True)["input_ids"][:, :count]
    if found.shape[1] < 2:
        raise UserError("the text to measure on has fewer than two tokens; give a longer one")
    return found


def convert_checkpoint(
    checkpoint: Path,
    out: Path,
    residual: ResidualConfig,
    *,
    text: Path | None = None,
    num_tokens: int = 128,
    tell: Callable[[str], None] | None = print,
) -> list[Difference]:
    """Convert ``checkpoint``, measure, tell, and write ``out``: the model, its tokenizer, its licence and a model card.

    Raises ``UserError`` for a checkpoint that cannot be loaded or converted, and if float64 shows more than rounding.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; give another folder, or delete it")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint) if list(checkpoint.glob("tokenizer*")) else None
    sentence = sample_text(text)
    found = []
    for dtype in (torch.float64, torch.bfloat16):
        original = load_checkpoint(checkpoint, dtype)
        converted = convert(original, residual)
        limit = getattr(original.config, "max_position_embeddings", num_tokens)
        sample = tokens_of(sentence, tokenizer, original.config.vocab_size, min(num_tokens, limit))
        found.append(difference(original, converted, sample))
        del original, converted
    report = table(found)
    if tell:
        tell(f"{checkpoint.name} on {sample.shape[1]} tokens:\n{report}")
    if found[0].loss > LARGEST_LOSS or found[0].gradient > LARGEST_GRADIENT:
        raise UserError(f"the conversion of {checkpoint} changes it by more than rounding: nothing was written")
    model = convert(load_checkpoint(checkpoint), residual)
    model.config.network_config()._name_or_path = checkpoint.name  # not the path on this machine
    with new_folder(out) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for name in _KEEP:
            if (checkpoint / name).is_file():
                shutil.copy(checkpoint / name, folder / name)
        (folder / "README.md").write_text(converted_card(str(checkpoint), residual_values(residual), report))
    return found
