"""Every residual rule by name: the one place that turns a ``ResidualConfig`` into a ``Stream``."""

from fathom.block import BlockAttnRes
from fathom.full import FullAttnRes
from fathom.models.config import GAIN, SWITCHES, ResidualConfig
from fathom.residuals.ablations import SwitchedAttnRes
from fathom.residuals.ddl import DeepDelta
from fathom.residuals.deepnorm import DeepNorm
from fathom.residuals.delta import DeltaAttnRes
from fathom.residuals.denseformer import DenseFormer
from fathom.residuals.highway import Highway
from fathom.residuals.hyper_connections import HyperConnections
from fathom.residuals.keel import Keel
from fathom.residuals.laurel import LAuReL
from fathom.residuals.layerscale import LayerScale
from fathom.residuals.lr_attnres import LRAttnRes
from fathom.residuals.mhar import MHAR
from fathom.residuals.mhc import MHC
from fathom.residuals.mhc_lite import MHCLite
from fathom.residuals.mrla import MRLA
from fathom.residuals.muddformer import MUDDFormer
from fathom.residuals.rezero import ReZero
from fathom.residuals.rule import Rule
from fathom.residuals.siamesenorm import SiameseNorm
from fathom.residuals.value_residual import ValueResidual
from fathom.stream import PreNorm, Stream

RECOMMENDED_BLOCKS = 8

RULES: dict[str, type[Rule]] = {
    "rezero": ReZero,
    "layerscale": LayerScale,
    "highway": Highway,
    "deepnorm": DeepNorm,
    "keel": Keel,
    "siamesenorm": SiameseNorm,
    "denseformer": DenseFormer,
    "laurel": LAuReL,
    "value_residual": ValueResidual,
    "muddformer": MUDDFormer,
    "hyper_connections": HyperConnections,
    "mhc": MHC,
    "mhc_lite": MHCLite,
    "ddl": DeepDelta,
    "mrla": MRLA,
    "delta": DeltaAttnRes,
    "lr_attnres": LRAttnRes,
    "mhar": MHAR,
}
"""The rules of this folder; each takes its settings of ``ResidualConfig`` as keywords of the same names."""


def make_stream(config: ResidualConfig, num_sublayers: int, dim: int) -> Stream:
    """The stream of ``config.rule`` for L sublayers of width D; raises ``UserError`` for a setting that does not fit."""
    options = config.options() | {"eps": config.eps}
    if config.rule == "prenorm":
        return PreNorm(num_sublayers, dim)
    if config.rule == "block" and config.num_blocks is None and config.block_size is None:
        options["num_blocks"] = min(RECOMMENDED_BLOCKS, num_sublayers)
    if config.rule in GAIN:
        options["gain"] = config.gain
    if config.rule in RULES:
        return RULES[config.rule](num_sublayers, dim, **options)
    if options.keys() & set(SWITCHES):
        return SwitchedAttnRes(num_sublayers, dim, **options)
    if config.rule == "full":
        return FullAttnRes(num_sublayers, dim, chunk=1 if config.schedule == "single_pass" else None, **options)
    return BlockAttnRes(num_sublayers, dim, schedule=config.schedule, **options)
