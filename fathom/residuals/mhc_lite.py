"""mHC-lite (arXiv 2601.05732): mHC whose mixing matrix is a convex combination of permutations, exact without iteration.

    H_res = Σ_k softmax(s (h̃ Φ) + bias)_k P_k          P_k: all n! permutations of n streams

By Birkhoff's theorem these are all doubly stochastic matrices. The bias is 0 for the identity and -8 for the others at first;
all else as in mhc.py. n! limits n: 4 streams have 24 permutations.
"""

from itertools import permutations

import torch
from torch import Tensor

from fathom.errors import UserError
from fathom.residuals.mhc import MHC

MOST_STREAMS = 5


class MHCLite(MHC):
    """Parameters, for each sublayer: ``gate`` [nD, 2n + n!], ``bias`` [2n + n!], ``scale`` [3]."""

    permutations: Tensor

    def setup(self) -> None:
        if self.num_streams > MOST_STREAMS:
            raise UserError(f"num_streams is {self.num_streams}: mhc_lite mixes n! permutations and takes at most 5")
        orders = torch.tensor(list(permutations(range(self.num_streams))))
        self.register_buffer("permutations", torch.eye(self.num_streams)[orders], persistent=False)

    def mixing_bias(self) -> Tensor:
        identity_first = torch.full((len(self.permutations),), -8.0)
        identity_first[0] = 0
        return identity_first

    def mixing(self, logits: Tensor) -> Tensor:
        return torch.einsum("...k,kij->...ij", logits.softmax(-1), self.permutations.to(logits.dtype))

    def map_flops(self) -> float:
        return self.num_streams * self.dim * (2 * self.bias.shape[-1] + 4) + 2 * self.permutations.numel()
