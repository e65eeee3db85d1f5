"""What a training pass of a Kimi Linear keeps for its backward pass on a GPU, counted where there is none.

One layer of each kind, the stream and the head run on meta tensors, which have shapes and no data; every distinct storage that
autograd saves is added once. They are in bf16, as under autocast, and where a GPU has a kernel of its own, a stand-in saves what
that one saves: fla-core's KDA, attention that keeps no weights, grouped products, the fused norm. All of it but MLA's mask of
documents grows linearly with tokens, so that two short lengths tell any. Casts of weights are not counted.
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fathom.kernels import use_backend
from fathom.models.config import ResidualConfig
from fathom.models.kda import KDA
from fathom.models.kimi_config import KimiConfig
from fathom.models.layers import Context, RMSNorm
from fathom.models.mla import MLA
from fathom.models.moe import Dense, Experts, MoE, Router
from fathom.residuals import make_stream

SHORT = 64
"""Tokens of a piece of fla-core's KDA."""


class _FusedNorm(torch.autograd.Function):
    """torch's fused RMSNorm saves its input, its weight and a reciprocal norm of each row.

    On meta tensors ``F.rms_norm`` would be its plain operations, which save the input and the normalised rows in float32.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32))
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise AssertionError("there are no data")


class _Norm(RMSNorm):
    plain_rms_norm = True  # Fathom's kernels take it into a read, as they take what it stands for

    def forward(self, x: Tensor) -> Tensor:
        return _FusedNorm.apply(x, self.weight.to(x.dtype))


class _DeltaRule(torch.autograd.Function):
    """fla-core 0.6.0's chunk_kda: saves its inputs, the sums of the decays, and two matrices of a piece."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
        pairs = [query.new_empty(*query.shape[:3], SHORT) for _ in range(2)]
        ctx.save_for_backward(query, key, value, log_decay, torch.empty_like(log_decay), beta, *pairs)
        return torch.empty_like(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise AssertionError("there are no data")


class _KDA(KDA):
    @staticmethod
    def delta_rule(query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, beta: Tensor, *_: Any) -> Any:
        inputs = (query, key, value.contiguous(), log_decay.float(), beta.to(query.dtype))
        return _DeltaRule.apply(*inputs), None


class _MLA(MLA):
    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        attention = torch.ops.aten._scaled_dot_product_efficient_attention
        # A mask becomes numbers to add.
        bias = None if mask is None else torch.empty_like(mask, dtype=query.dtype).expand(-1, query.shape[1], -1, -1)
        return attention(query, key, value, bias, compute_log_sumexp=True, is_causal=mask is None)[0]


class _Router(Router):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.choose(x)


class _Experts(Experts):
    def sorted(self, x: Tensor, counts: Tensor) -> Tensor:
        return self.grouped(x, *self.weights(), counts)


def _stand_in(module: nn.Module) -> nn.Module:
    for each in module.modules():
        for plain, other in ((RMSNorm, _Norm), (Experts, _Experts), (Router, _Router), (KDA, _KDA), (MLA, _MLA)):
            if type(each) is plain:
                each.__class__ = other
        if isinstance(each, nn.Linear | RMSNorm | Experts | nn.Embedding):
            each.to(torch.bfloat16)
    return module


def _saved(module: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves in ``run``, but those of the parameters of ``module``."""
    own = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    found: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        found.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(tensor.untyped_storage().nbytes() for key, tensor in found.items() if key not in own)


def _tokens(shape: tuple[int, ...]) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)


def _sublayer(config: KimiConfig, kind: type[nn.Module], batch: int, tokens: int) -> int:
    sublayer, nothing = _stand_in(kind(config)), torch.empty(0)
    documents = torch.empty(batch, tokens, dtype=torch.int64) if config.document_mask else None
    context = Context(nothing, nothing, None, documents=documents)
    return _saved(sublayer, lambda: sublayer(_tokens((batch, tokens, config.dim)), context))


def _stream(config: KimiConfig, residual: ResidualConfig, tokens: int) -> int:
    stream = make_stream(residual, config.num_sublayers, config.dim)
    norm = _stand_in(RMSNorm(config.dim, config.norm_eps))

    def run() -> Tensor:
        state = stream.start(_tokens((tokens, config.dim)))
        for site in range(config.num_sublayers):
            x, state = stream.read(state, site, norm)
            state = stream.write(state, site, x.clone())
        return stream.finish(state, norm)

    return _saved(nn.ModuleList([stream, norm]), run)


def _head(config: KimiConfig, tokens: int) -> int:
    head = _stand_in(nn.Linear(config.dim, config.vocab_size, bias=False))
    targets = torch.empty(tokens, dtype=torch.int64)
    # The embedding keeps the tokens' numbers.
    kept = _saved(head, lambda: F.cross_entropy(head(_tokens((tokens, config.dim))).float(), targets))
    return targets.nbytes + kept


Linear = tuple[int, int, int]
"""Bytes of a pass, of each sequence, and of each token."""


def _by_token(count: Callable[[int], int]) -> Linear:
    one, two = count(SHORT), count(2 * SHORT)
    return 2 * one - two, 0, (two - one) // SHORT


def _all_sublayers(config: KimiConfig) -> Linear:
    kinds: list[tuple[type[nn.Module], int]] = [
        (KDA, config.num_layers - config.mla_layers), (MLA, config.mla_layers), (Dense, config.dense_layers),
        (MoE, config.num_layers - config.dense_layers),
    ]  # fmt: skip
    total = [0, 0, 0]
    for kind, number in kinds:
        if number:
            one, longer, two = (_sublayer(config, kind, b, t) for b, t in ((1, SHORT), (1, 2 * SHORT), (2, SHORT)))
            sequence = two - longer  # a convolution's zeros
            for n, share in enumerate((2 * one - longer - sequence, sequence, (longer - one) // SHORT)):
                total[n] += number * share
    return total[0], total[1], total[2]


@cache
def _parts(config: KimiConfig) -> dict[str, Linear]:
    block = config.residual if config.residual.rule == "block" else ResidualConfig(rule="block", num_blocks=8)
    with torch.device("meta"), use_backend("triton" if importlib.util.find_spec("triton") else "reference"):
        return {
            "sublayers": _all_sublayers(config),
            "head and loss": _by_token(lambda tokens: _head(config, tokens)),
            "prenorm": _by_token(lambda tokens: _stream(config, ResidualConfig(rule="prenorm"), tokens)),
            "block": _by_token(lambda tokens: _stream(config, block, tokens)),
        }


def gpu_activation_bytes(config: KimiConfig, batch: int, context: int) -> dict[str, int]:
    """Bytes by part: ``sublayers``, ``head and loss``, and the stream with its norms, ``prenorm`` and ``block`` (of ``config``,
    if that is its rule, otherwise of N = 8). Where triton is not installed the stream's are of the plain equations."""
    parts = _parts(config).items()
    found = {name: fixed + batch * (sequence + context * token) for name, (fixed, sequence, token) in parts}
    if config.document_mask:
        found["sublayers"] += batch * config.mla_layers * 2 * context**2
    return found
