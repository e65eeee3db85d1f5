"""What the tests of the zoo share: a stream of every rule and switch, and a small network of toy sublayers for it."""

from typing import Any

import torch
from torch import Tensor, nn

from fathom.models.config import OPTIONS, ResidualConfig
from fathom.models.layers import AttentionInput, AttentionOutput
from fathom.residuals import make_stream
from fathom.residuals.catalogue import CATALOGUE
from fathom.stream import Stream

L, D = 6, 8

SWITCHED: dict[str, dict[str, Any]] = {
    "full input query": {"rule": "full", "query": "input"},
    "full no query": {"rule": "full", "query": "none"},
    "full sigmoid": {"rule": "full", "activation": "sigmoid"},
    "full no key norm": {"rule": "full", "key_norm": False},
    "full heads": {"rule": "full", "heads": 4},
    "full window": {"rule": "full", "window": 2},
    "block heads": {"rule": "block", "block_size": 2, "heads": 2},
    "block sigmoid": {"rule": "block", "num_blocks": 2, "activation": "sigmoid"},
    "block no key norm": {"rule": "block", "block_size": 2, "key_norm": False, "gain": False},
    "block embedding inside": {"rule": "block", "block_size": 2, "isolate_embedding": False},
    "block embedding inside, no query": {"rule": "block", "num_blocks": 2, "isolate_embedding": False, "query": "none"},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "highway scalar": {"rule": "highway", "gate": "scalar"},
    "hyper_connections static": {"rule": "hyper_connections", "dynamic": False, "num_streams": 2},
    "ddl one": {"rule": "ddl", "num_streams": 1},
    "delta block": {"rule": "delta", "block_size": 2, "gain": False},
    "lr_attnres sliced": {"rule": "lr_attnres", "keys": "sliced", "key_dim": 4},
    "lr_attnres block": {"rule": "lr_attnres", "num_blocks": 3, "key_dim": 3},
    "mhar block": {"rule": "mhar", "num_blocks": 3, "heads": 2},
    "mrla heads": {"rule": "mrla", "heads": 2},
}
RULES = {rule: {"rule": rule} for rule in CATALOGUE}
CASES: dict[str, dict[str, Any]] = RULES | SWITCHED | VARIANTS
assert {name for case in CASES.values() for name in case} >= OPTIONS.keys() - {"alpha", "init", "rank", "recompute"}


def config(case: str, **more: Any) -> ResidualConfig:
    return ResidualConfig(**{**CASES[case], **more})


def stream_of(case: str, *, random: float = 0.0, length: int = L, **more: Any) -> Stream:
    """The float64 stream of a case, its parameters moved away from where they start by normal numbers of scale ``random``."""
    stream = make_stream(config(case, **more), length, D).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in stream.parameters():
            parameter += random * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return stream


class ToySublayer(nn.Module):
    """A nonlinear map with a norm; the three inputs of an attention, and the first one's values, all count."""

    def __init__(self, index: int, eps: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(100 + index)
        self.matrix = nn.Parameter(torch.randn(D, D, generator=generator, dtype=torch.float64) / D**0.5)
        self.norm = nn.RMSNorm(D, eps=eps, dtype=torch.float64)

    def forward(self, x: Tensor | AttentionInput) -> Tensor | AttentionOutput:
        if isinstance(x, Tensor):
            return torch.tanh(x @ self.matrix)
        own = values = x.value @ self.matrix
        if x.first is not None:
            values = x.mix[0] * x.first + x.mix[1] * own
        output = torch.tanh(values + x.query - x.key)
        return AttentionOutput(output, own) if x.hand_over else output


def network(length: int = L, eps: float = 1e-6) -> nn.ModuleList:
    return nn.ModuleList(ToySublayer(index, eps) for index in range(length))


def run(stream: Stream, sublayers: nn.ModuleList, embedding: Tensor, norm: Any = None) -> Tensor:
    state = stream.start(embedding)
    for site, sublayer in enumerate(sublayers):
        x, state = stream.read(state, site, sublayer.norm)
        state = stream.write(state, site, sublayer(x))
    return stream.finish(state, norm or (lambda h: h))
