"""Fathom inside Transformers: importing this folder registers its two kinds of models with the Auto classes.

FathomForCausalLM      Fathom's own decoder; `fathom export RUN OUT` writes one
ConvertedForCausalLM   a decoder of Transformers on a stream; `fathom convert CHECKPOINT OUT` writes one
"""

from fathom.errors import UserError

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
except ImportError as error:
    missing = error.name or "transformers"
    raise UserError(f"fathom.hf needs {missing}, which is not installed; pip install 'fathom-attnres[hf]'") from None

from fathom.hf.config import ConvertedConfig, FathomConfig
from fathom.hf.convert import ConvertedForCausalLM, convert
from fathom.hf.export import export
from fathom.hf.modeling import FathomForCausalLM, FathomModel

__all__ = [
    "ConvertedConfig",
    "ConvertedForCausalLM",
    "FathomConfig",
    "FathomForCausalLM",
    "FathomModel",
    "convert",
    "export",
]

for _config, _model in ((FathomConfig, FathomForCausalLM), (ConvertedConfig, ConvertedForCausalLM)):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
AutoModel.register(FathomConfig, FathomModel, exist_ok=True)
