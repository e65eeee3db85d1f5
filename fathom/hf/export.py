"""`fathom export`: a run folder as a model folder of Transformers, with the very bits of its weights.

config.json, model*.safetensors, generation_config.json     as ``save_pretrained`` writes them
tokenizer.json, tokenizer_config.json                       the run's tokenizer
README.md                                                   the model card
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

from fathom.errors import UserError
from fathom.hf.card import export_card
from fathom.hf.config import FathomConfig
from fathom.hf.kimi import write_release
from fathom.hf.modeling import FathomForCausalLM
from fathom.inference.load import load_run
from fathom.models.kimi_config import KimiConfig
from fathom.models.transformer import Transformer


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder that becomes ``out`` if the block ends well, and otherwise leaves nothing behind."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already; give another folder, or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield made
        for path in (made, *made.iterdir()):  # mkdtemp and safetensors write for the owner alone
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
        if out.exists():
            out.rmdir()
        made.rename(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def from_native(model: Transformer) -> FathomForCausalLM:
    """The same decoder for Transformers; its parameters are ``model``'s own, not copies."""
    config = FathomConfig.from_model_config(model.config, eos_token_id=model.end_of_text, dtype=model.head.weight.dtype)
    with no_init_weights():
        exported = FathomForCausalLM(config)
    named = dict(model.named_parameters())
    weights = {name if name.startswith("head.") else f"model.{name}": value for name, value in named.items()}
    if config.tie_word_embeddings:
        weights["head.weight"] = named["embedding.weight"]
    exported.load_state_dict(weights, assign=True)
    exported.tie_weights()
    return exported.eval()


def tokenizer_for(tokenizer: Tokenizer, end_of_text: int | None, context: int) -> PreTrainedTokenizerFast:
    """``tokenizer`` for Transformers; the end of text also pads, on the left, as generation wants it."""
    end = None if end_of_text is None else tokenizer.id_to_token(end_of_text)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=end, pad_token=end, model_max_length=context, padding_side="left"
    )


def export(run: Path, out: Path, *, step: int | None = None) -> Path:
    """Write the newest checkpoint of ``run`` (or that of ``step``) as a model folder and return ``out``.

    A Kimi Linear run is written in its released form (kimi.py).

    Raises ``UserError`` as ``load_run`` does, or if ``out`` holds something already; nothing half-written stays.
    """
    model, tokenizer = load_run(run, torch.device("cpu"), step=step)
    if isinstance(model.config, KimiConfig):
        with new_folder(out) as folder:
            write_release(model, folder)
            tokenizer_for(tokenizer, model.end_of_text, model.config.context).save_pretrained(folder)
        return out
    exported = from_native(model)
    exported.config.architectures = [type(exported).__name__]
    exported.config.pad_token_id = exported.generation_config.pad_token_id = model.end_of_text
    exported.generation_config.eos_token_id = model.end_of_text
    with new_folder(out) as folder:
        exported.save_pretrained(folder)
        tokenizer_for(tokenizer, model.end_of_text, model.config.context).save_pretrained(folder)
        (folder / "README.md").write_text(export_card(run, model))
    return out
