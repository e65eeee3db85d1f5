"""Recipes: named starting points of a run, each a function that returns a ``RunConfig``; its docstring is its help."""

from collections.abc import Callable
from dataclasses import replace

from fathom.models.config import ModelConfig, ResidualConfig
from fathom.train.config import DataConfig, OptimConfig, RunConfig


def quick() -> RunConfig:
    """A small decoder on the text inside the package: minutes on a laptop's CPU, no data to fetch."""
    return RunConfig(model=ModelConfig(dim=64, num_layers=12, num_heads=2), optim=OptimConfig(lr=1.2e-2), steps=550)


def debian_50m() -> RunConfig:
    """24 decoder layers of width 384 on the Debian documentation (`fathom data prepare debian-docs`), for one GPU."""
    return RunConfig(
        model=ModelConfig(context=1024, dim=384, num_layers=24, num_heads=6),
        data=DataConfig(folder="data/debian-docs", batch=16),
        optim=OptimConfig(lr=2e-3, warmup=200),
        steps=3000,
        eval_every=250,
        checkpoint_every=1000,
        precision="bf16",
        compile="model",
        log_every=25,
    )


def debian_5m() -> RunConfig:
    """The larger model in the package: 14 decoder layers of width 128, 10 MB in bf16, on the Debian documentation; one GPU."""
    return RunConfig(
        model=ModelConfig(context=512, dim=128, num_layers=14, num_heads=4, tie_embeddings=True),
        data=DataConfig(folder="data/debian-docs", batch=64),
        optim=OptimConfig(lr=4e-3, warmup=300),
        steps=8000,
        eval_every=500,
        checkpoint_every=2000,
        precision="bf16",
        compile="layers",
        log_every=25,
    )


def kimi_micro() -> RunConfig:
    """A Kimi Linear of half a million parameters on the text inside the package: a minute or two on a CPU."""
    from fathom.models import sizes

    return RunConfig(model=sizes.micro(), optim=OptimConfig(lr=1e-2, warmup=20), steps=300)


def kimi_nano() -> RunConfig:
    """A Kimi Linear of 87 M active parameters on the Debian documentation, for one GPU."""
    from fathom.models import sizes

    return RunConfig(
        model=sizes.nano(),
        data=DataConfig(folder="data/debian-docs", batch=32),
        optim=OptimConfig(optimizer="muon", lr=2e-3, muon_lr=5e-3, warmup=200),
        steps=3000,
        eval_every=250,
        checkpoint_every=1000,
        precision="bf16",
        log_every=25,
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "quick": quick,
    "debian-50m": debian_50m,
    "debian-5m": debian_5m,
    "kimi-micro": kimi_micro,
    "kimi-nano": kimi_nano,
}

RULES = ("prenorm", "block")


def twin(config: RunConfig, rule: str) -> RunConfig:
    """``config`` under another rule, all else equal: PreNorm, or Block AttnRes with N = 8."""
    residual = ResidualConfig(rule="prenorm") if rule == "prenorm" else ResidualConfig(rule="block", num_blocks=8)
    return replace(config, model=replace(config.model, residual=residual))
