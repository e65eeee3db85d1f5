"""MHAR, multi-head Attention Residuals (arXiv 2607.27230): H softmaxes over depth, each for its own D / H channels.

    α^h = softmax_i(w^h · RMSNorm(v_i)^h)          h_l^h = Σ_i α^h_i v_i^h

The query is split, and nothing is added to Full AttnRes's parameters; the key norm is over all channels. Published gains are best
at H = 4 to 8. It is the switch ``heads`` of ablations.py with H = 4. (arXiv 2603.15031 found that H = 16 hurts Block.)
"""

from fathom.depth_attention import EPS
from fathom.residuals.ablations import SwitchedAttnRes


class MHAR(SwitchedAttnRes):
    """Parameters: ``query`` [L+1, D], zeros at first; ``key_gain`` [L+1, D]."""

    def __init__(
        self,
        num_sublayers: int,
        dim: int,
        *,
        heads: int = 4,
        num_blocks: int | None = None,
        block_size: int | None = None,
        gain: bool = True,
        eps: float = EPS,
    ) -> None:
        super().__init__(
            num_sublayers, dim, heads=heads, num_blocks=num_blocks, block_size=block_size, gain=gain, eps=eps
        )
