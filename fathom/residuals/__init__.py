"""Every residual rule by name: the one place that turns a ``ResidualConfig`` into a ``Stream``."""

from fathom.block import BlockAttnRes
from fathom.full import FullAttnRes
from fathom.models.config import ResidualConfig
from fathom.stream import PreNorm, Stream

RECOMMENDED_BLOCKS = 8


def make_stream(config: ResidualConfig, num_sublayers: int, dim: int) -> Stream:
    """The stream of ``config.rule`` for L sublayers of width D; raises ``UserError`` for a setting that does not fit."""
    if config.rule == "prenorm":
        return PreNorm(num_sublayers, dim)
    if config.rule == "full":
        chunk = 1 if config.schedule == "single_pass" else None
        return FullAttnRes(num_sublayers, dim, gain=config.gain, eps=config.eps, chunk=chunk)
    num_blocks = config.num_blocks
    if num_blocks is None and config.block_size is None:
        num_blocks = min(RECOMMENDED_BLOCKS, num_sublayers)
    return BlockAttnRes(
        num_sublayers,
        dim,
        num_blocks=num_blocks,
        block_size=config.block_size,
        gain=config.gain,
        eps=config.eps,
        schedule=config.schedule,
    )
