"""mHC, manifold-constrained Hyper-Connections (Xie et al., arXiv 2512.24880): the mixing matrix is doubly stochastic.

    x = H_pre H          H ← H_res H + H_postᵀ f_l(norm(x))          H [n, D]
    H_pre = σ(a)     H_post = 2 σ(b)     H_res = Sinkhorn(exp(C))
    (a, b, C) = s ⊙ (h̃ Φ) + bias          h̃ = vec(H) / rms(vec(H)), Φ [nD, n² + 2n], one learned s for each of the three

Sinkhorn: 20 rounds of normalising columns, then rows. Mixing then neither amplifies nor loses, at any depth. s = 0.01 as
published; the biases are those of public nanoGPT code for both mHC and mHC-lite: stream l mod n is read and written with 1
and the others with -1, and C is 0 on the diagonal and -8 off it; Φ = 0. With equal biases the n streams stay equal and the
network is PreNorm.
"""

import torch
from torch import Tensor, nn

from fathom.depth_attention import EPS
from fathom.residuals.hyper_connections import SCALE, Streams
from fathom.residuals.rule import product

SINKHORN_ROUNDS = 20


def sinkhorn(logits: Tensor, rounds: int = SINKHORN_ROUNDS) -> Tensor:
    """The doubly stochastic scaling of exp(logits) [..., n, n]; rows sum to one exactly, columns nearly."""
    for _ in range(rounds):
        logits = logits - logits.logsumexp(-2, keepdim=True)
        logits = logits - logits.logsumexp(-1, keepdim=True)
    return logits.exp()


class MHC(Streams):
    """Parameters, for each sublayer: ``gate`` [nD, 2n + n²], ``bias`` [2n + n²], ``scale`` [3]."""

    gate: nn.Parameter
    bias: nn.Parameter
    scale: nn.Parameter

    def __init__(self, num_sublayers: int, dim: int, *, num_streams: int = 4, eps: float = EPS) -> None:
        super().__init__(num_sublayers, dim, num_streams=num_streams, eps=eps)
        self.setup()
        self.create()

    def setup(self) -> None:
        """What ``create`` needs to know."""

    def mixing_bias(self) -> Tensor:
        """The first bias of the mixing matrix's logits."""
        return -8 * (1 - torch.eye(self.num_streams)).flatten()

    def mixing(self, logits: Tensor) -> Tensor:
        """A doubly stochastic matrix [..., n, n] from its logits."""
        return sinkhorn(logits.unflatten(-1, (self.num_streams, self.num_streams)))

    def initial(self, generator: torch.Generator) -> dict[str, Tensor | list[Tensor]]:
        n, sites = self.num_streams, self.num_sublayers
        picked = 2 * torch.eye(n)[torch.arange(sites) % n] - 1
        bias = torch.cat((picked, picked, self.mixing_bias().expand(sites, -1)), dim=-1)
        return {
            "gate": torch.zeros(sites, n * self.dim, bias.shape[-1]),
            "bias": bias,
            "scale": torch.full((sites, 3), SCALE),
        }

    def maps(self, streams: Tensor, site: int) -> tuple[Tensor, Tensor, Tensor]:
        n = self.num_streams
        sizes = (n, n, self.bias.shape[-1] - 2 * n)
        scores = product(self.normalised(streams.flatten(-2)), self.gate[site])
        parts = zip(scores.split(sizes, -1), self.scale[site], self.bias[site].split(sizes), strict=True)
        read, write, mix = (score * scale + bias for score, scale, bias in parts)
        return torch.sigmoid(read), self.mixing(mix), 2 * torch.sigmoid(write)

    def map_flops(self) -> float:
        n = self.num_streams
        return n * self.dim * (2 * self.bias.shape[-1] + 4) + SINKHORN_ROUNDS * 4 * n * n
