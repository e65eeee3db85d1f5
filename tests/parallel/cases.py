"""What the gloo tests run: networks, how each is cut, and the batch that all of them see."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.transformer import Transformer
from fathom.parallel.config import Recompute

MICRO_BATCHES, MICRO_BATCH, LENGTH = 4, 2, 6


@dataclass(frozen=True)
class Case:
    """A network, and how it is cut."""

    world: int
    virtual: int
    residual: ResidualConfig
    num_layers: int
    firsts: tuple[int, ...] | None = None
    cache: bool = True
    schedule: str = "1f1b"
    document_mask: bool = False
    recompute: Recompute = "none"
    dp: int = 1
    """Pipelines side by side; with as many as ranks there is no pipeline, only FSDP2."""
    tp: int = 1
    """Ranks that share each sublayer."""

    @property
    def pp(self) -> int:
        return self.world // self.dp // self.tp

    def config(self) -> ModelConfig:
        return ModelConfig(
            vocab_size=17, context=LENGTH, dim=8, num_layers=self.num_layers, num_heads=4, num_kv_heads=2,
            head_std=1.0, document_mask=self.document_mask, residual=self.residual,
        )  # fmt: skip


def _block(size: int, **options: object) -> ResidualConfig:
    return ResidualConfig(rule="block", block_size=size, **options)  # type: ignore[arg-type]


STRADDLING = {2: (0, 5), 4: (0, 1, 5, 6)}
"""Uneven cuts inside blocks of 4; the block of sites 0-3 goes on over two hops where there are four stages."""

CASES = {
    f"{world}-{name}": case
    for world in (2, 4)
    for name, case in {
        "aligned-v1": Case(world, 1, _block(2), world),
        "straddling-v1": Case(world, 1, _block(4), 5, STRADDLING[world]),
        **{
            f"{name}-v{virtual}-{'cached' if cache else 'naive'}": Case(world, virtual, residual, layers, cache=cache)
            for virtual in (2, 3)
            for cache in (True, False)
            for name, residual, layers in (
                ("aligned", _block(2), world * virtual),
                ("straddling", _block(5), world * virtual + 1),
            )
        },
        "several-a-stage": Case(world, 2, _block(1), 2 * world + 1),
        "one-block": Case(world, 2, ResidualConfig(rule="block", num_blocks=1), 2 * world),
        "full": Case(world, 2, ResidualConfig(rule="full"), 2 * world),
        "prenorm": Case(world, 2, ResidualConfig(rule="prenorm"), 2 * world),
        "single-pass": Case(world, 2, _block(5, schedule="single_pass"), 2 * world + 1),
        "recompute": Case(world, 2, _block(5, recompute=True), 2 * world + 1),
        "recompute-full": Case(world, 2, _block(5), 2 * world + 1, recompute="full"),
        "no-gain": Case(world, 2, _block(5, gain=False), 2 * world + 1),
        "documents": Case(world, 2, _block(5), 2 * world + 1, document_mask=True),
        "gpipe": Case(world, 1, _block(3), 2 * world, schedule="gpipe"),
        "looped-bfs": Case(world, 2, _block(3), 2 * world, schedule="looped_bfs"),
    }.items()
} | {
    "2-recompute-selective": Case(2, 2, _block(5), 5, recompute="selective"),
    "2-recompute-prenorm": Case(2, 2, ResidualConfig(rule="prenorm"), 5, recompute="full"),
    "2-fsdp": Case(2, 1, _block(5), 5, dp=2),
    "4-fsdp-prenorm": Case(4, 1, ResidualConfig(rule="prenorm"), 3, dp=4),
    "4-fsdp-v1": Case(4, 1, _block(4), 5, (0, 5), dp=2),
    "4-fsdp-v2": Case(4, 2, _block(5), 5, dp=2),
    "4-fsdp-recompute": Case(4, 2, _block(5), 5, dp=2, recompute="full"),
    "4-fsdp-v2-naive": Case(4, 2, _block(5), 5, dp=2, cache=False),
    "2-tp-prenorm": Case(2, 1, ResidualConfig(rule="prenorm"), 3, tp=2),
    "2-tp-block": Case(2, 1, _block(3), 3, tp=2),
    "2-tp-full": Case(2, 1, ResidualConfig(rule="full"), 2, tp=2, document_mask=True),
    "2-tp-recompute": Case(2, 1, _block(3), 3, tp=2, recompute="full"),
    "4-tp-fsdp-prenorm": Case(4, 1, ResidualConfig(rule="prenorm"), 2, tp=2, dp=2),
    "4-tp-fsdp": Case(4, 1, _block(3), 3, tp=2, dp=2),
    "4-tp-fsdp-full": Case(4, 1, ResidualConfig(rule="full"), 2, tp=2, dp=2),
    "4-tp-prenorm": Case(4, 2, ResidualConfig(rule="prenorm"), 3, tp=2),
    "4-tp-v2": Case(4, 2, _block(5), 5, tp=2),
    "4-tp-full": Case(4, 1, ResidualConfig(rule="full"), 2, tp=2),
}  # fmt: skip


def network(case: Case) -> Transformer:
    """The network of ``case`` in float64, every depth query and gain away from its initial value."""
    model = Transformer(case.config(), seed=1, end_of_text=0).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.stream.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def batch(case: Case) -> tuple[Tensor, Tensor]:
    shape = (MICRO_BATCHES * MICRO_BATCH, LENGTH + 1)
    tokens = torch.randint(17, shape, generator=torch.Generator().manual_seed(3))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


LAYOUTS = {
    "p4": Case(4, 1, _block(5), 5),
    "p2-dp2": Case(4, 2, _block(5), 5, dp=2),
    "tp2-dp2": Case(4, 1, _block(5), 5, tp=2, dp=2),
    "p2-tp2": Case(4, 2, _block(5), 5, tp=2),
    "p2": Case(2, 2, _block(5), 5),
    "tp2": Case(2, 1, _block(5), 5, tp=2),
}
"""Cuts of one network, under which a checkpoint is saved (the first) and loaded (all)."""
