"""Fathom: Attention Residuals (arXiv 2603.15031), trained, measured and studied.

The method is five short files, read in this order: depth_attention.py, stream.py, full.py, block.py, two_phase.py.
The equation itself is ``fathom.depth_attention.depth_attention``: the function has its file's name, so it is not repeated here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fathom.block import BlockAttnRes as BlockAttnRes
    from fathom.block import block_starts as block_starts
    from fathom.depth_attention import depth_attention_weights as depth_attention_weights
    from fathom.errors import UserError as UserError
    from fathom.full import FullAttnRes as FullAttnRes
    from fathom.kernels import inter_block as inter_block
    from fathom.models.config import ModelConfig as ModelConfig
    from fathom.models.config import ResidualConfig as ResidualConfig
    from fathom.models.transformer import Transformer as Transformer
    from fathom.residuals import make_stream as make_stream
    from fathom.stream import PreNorm as PreNorm
    from fathom.stream import Stream as Stream
    from fathom.two_phase import merge as merge

_HOME = {
    "depth_attention_weights": "fathom.depth_attention",
    "inter_block": "fathom.kernels",
    "merge": "fathom.two_phase",
    "Stream": "fathom.stream",
    "PreNorm": "fathom.stream",
    "FullAttnRes": "fathom.full",
    "BlockAttnRes": "fathom.block",
    "block_starts": "fathom.block",
    "make_stream": "fathom.residuals",
    "ModelConfig": "fathom.models.config",
    "ResidualConfig": "fathom.models.config",
    "Transformer": "fathom.models.transformer",
    "UserError": "fathom.errors",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `fathom --help` need not wait for torch."""
    if name == "depth_attention":
        return import_module("fathom.depth_attention")
    if name not in _HOME:
        raise AttributeError(f"module 'fathom' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
