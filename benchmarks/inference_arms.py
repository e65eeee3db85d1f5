"""The arms of the inference benchmark: streams over one network, their engines, and the compilation of their kernels."""

import copy
import gc
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import peers
import torch
from arms import AddNorm, ListAttnRes, Unavailable, plain_read
from torch import Tensor

from fathom.inference.cache import KVCache
from fathom.inference.engine import Engine, served
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.layers import RMSNorm
from fathom.models.transformer import Transformer
from fathom.residuals import make_stream
from fathom.stream import Stream

QUERY_STD = 0.02
ARMS = ("prenorm", "block", "full", "single-pass", "naive", "fla")
COMPILE_SECONDS = 100
"""After this long what is not compiled yet is left to the arms' first calls."""


@dataclass(frozen=True)
class Shape:
    name: str
    config: ModelConfig
    block_size: int


def shapes(tiny: bool) -> list[Shape]:
    common: dict[str, Any] = {"context": 8192, "vocab_size": 32768, "head_std": 1.0}
    found = [
        # 0.97 B parameters, N = 8.
        Shape("d2048", ModelConfig(dim=2048, num_layers=16, num_heads=16, mlp_dim=5632, **common), 4),
        # The shape of Kimi Linear 48B's dense part: 27 decoder layers, S = 6.
        Shape("d2304", ModelConfig(dim=2304, num_layers=27, num_heads=18, mlp_dim=6336, **common), 6),
    ]
    if not tiny:
        return found
    small = {"dim": 64, "num_layers": 5, "num_heads": 2, "mlp_dim": 96, "context": 128, "vocab_size": 256}
    return [Shape(f"{shape.name}-tiny", replace(shape.config, **small), shape.block_size) for shape in found]


def network(shape: Shape) -> Transformer:
    return Transformer(replace(shape.config, residual=ResidualConfig(rule="prenorm")))


def queries(shape: Shape) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return QUERY_STD * torch.randn(shape.config.num_sublayers + 1, shape.config.dim, generator=generator)


def workload(shape: Shape, device: torch.device, block_size: int | None = None) -> Any:
    """What ``ListAttnRes`` takes of a workload."""
    config, rows = shape.config, queries(shape).to(device)
    case = SimpleNamespace(
        num_sublayers=config.num_sublayers, dim=config.dim, block_size=block_size or shape.block_size
    )
    return SimpleNamespace(case=case, queries=rows, gains=torch.ones_like(rows))


def stream(name: str, shape: Shape, device: torch.device) -> Stream:
    """The stream of one arm; ``Unavailable`` if it cannot run here."""
    if name == "fla":
        return fla_stream(workload(shape, device), device)
    if name == "naive":
        return ListAttnRes(workload(shape, device), plain_read, compiled_norms=False)
    blocks = ResidualConfig(rule="block", block_size=shape.block_size)
    residual = {
        "prenorm": ResidualConfig(rule="prenorm"),
        "block": blocks,
        "full": ResidualConfig(rule="full"),
        "single-pass": replace(blocks, schedule="single_pass"),
    }[name]
    found = make_stream(residual, shape.config.num_sublayers, shape.config.dim).to(device)
    if name != "prenorm":
        with torch.no_grad():
            cast(Tensor, found.query).copy_(queries(shape))
    return found


def streams(names: Iterable[str], shape: Shape, device: torch.device) -> dict[str, Stream]:
    """The streams of these arms, of those that can run here."""
    found = {}
    for name in names:
        try:
            found[name] = stream(name, shape, device)
        except Unavailable as reason:
            print(f"{name}: left out: {reason}")
    return found


def plain_streams(shape: Shape, device: torch.device) -> dict[str, Stream]:
    """The equations of every rule in plain PyTorch."""
    return {
        "prenorm": AddNorm(shape.config.num_sublayers, shape.config.dim, compiled=False),
        "full": ListAttnRes(workload(shape, device, 1), plain_read, compiled_norms=False),
        "block": ListAttnRes(workload(shape, device), plain_read, compiled_norms=False),
    }


def fla_stream(workload: Any, device: torch.device) -> ListAttnRes:
    if device.type != "cuda":
        raise Unavailable("its kernels need a GPU")
    fused_attnres = peers.load("fla.ops.attnres").fused_attnres

    def read(
        bank: tuple[Tensor, ...], partial: Tensor | None, output: Tensor, query: Tensor, gain: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        total = peers.add(partial, output)
        return total, fused_attnres(query, (*bank, total), gain, output_rms_weight=weight, rms_eps=1e-6)

    return ListAttnRes(workload, read, compiled_norms=False)


class SharingEngine(Engine):
    """An engine on the cache that it is given, of the same slots and capacity."""

    def __init__(self, model: Transformer, cache: KVCache | None, **settings: Any) -> None:
        self._given = cache
        super().__init__(model, **settings)

    def _make_cache(self) -> KVCache:
        return cast(KVCache, super()._make_cache()) if self._given is None else self._given


def engines(
    base: Transformer, found: dict[str, Stream], slots: int, capacity: int, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Engine]:
    """An engine of every arm, all on one network and one cache."""
    made: dict[str, Engine] = {}
    device, cache = base.embedding.weight.device, None
    # The engines before these may wait for the garbage collector, and the allocator keeps what they had.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    for name, stream in found.items():
        model = copy.copy(base)
        model._modules = dict(base._modules)
        model.stream = stream
        graphs = device.type == "cuda" and dtype == torch.bfloat16
        made[name] = SharingEngine(model, cache, slots=slots, capacity=capacity, dtype=dtype, cuda_graphs=graphs)
        cache = cast(KVCache, made[name].cache)
    return made


Job = tuple[Shape, str, int]
"""An arm's kernels for a number of tokens."""


def jobs(names: Iterable[str], shape: Shape) -> list[Job]:
    # A kernel is compiled apart for one token, and otherwise for multiples of sixteen; a few tokens take kernels of their own.
    found: list[Job] = [
        (shape, name, tokens)
        for name in names
        if name != "naive"
        for tokens in ((16,) if name == "fla" else (512, 16, 1))
    ]
    # The long ones first: flash-linear-attention compiles 48 to choose two.
    return sorted(found, key=lambda job: ("fla", "full", "block", "single-pass", "prenorm").index(job[1]))


@torch.inference_mode()
def compile_kernels(job: Job, device: torch.device) -> None:
    """Run a stream without sublayers, in a process of its own: Triton writes what it compiles to its cache on disk."""
    shape, name, tokens = job
    # flash-linear-attention must not keep what it times here, among other processes and on few tokens.
    os.environ["FLA_CACHE_RESULTS"] = "0"
    found = served(stream(name, shape, device), torch.bfloat16)
    x = torch.randn(tokens, 1, shape.config.dim, dtype=torch.bfloat16, device=device)
    norm = RMSNorm(shape.config.dim, shape.config.norm_eps).to(x)
    state = found.start(x)
    for each in range(shape.config.num_sublayers):
        x, state = found.read(state, each, norm)
        state = found.write(state, each, x)
    found.finish(state, norm)


@contextmanager
def compiling(names: Iterable[str], found: list[Shape], device: torch.device) -> Iterator[None]:
    """Compile the kernels of these arms while the block runs, and wait for the rest at its end."""
    if device.type != "cuda":
        yield
        return
    begin = time.monotonic()
    workers = max(1, (os.cpu_count() or 2) - 1)
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    futures = [pool.submit(compile_kernels, job, device) for shape in found for job in jobs(names, shape)]
    try:
        yield
        done, late = wait(futures, timeout=max(1, COMPILE_SECONDS - (time.monotonic() - begin)))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    failed = {str(error) for future in done if (error := future.exception())} or "none"
    print(f"{len(done)} jobs compiled in {time.monotonic() - begin:.0f} s, {len(late)} left; failures: {failed}")
