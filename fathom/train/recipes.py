"""Recipes: named starting points of a run, each a function that returns a ``RunConfig``; its docstring is its help."""

from collections.abc import Callable

from fathom.models.config import ModelConfig
from fathom.train.config import DataConfig, OptimConfig, RunConfig


def quick() -> RunConfig:
    """A small decoder on the text inside the package: minutes on a laptop's CPU, no data to fetch."""
    return RunConfig()


def debian_50m() -> RunConfig:
    """24 decoder layers of width 384 on the Debian documentation (`fathom data prepare debian-docs`), for one GPU."""
    return RunConfig(
        model=ModelConfig(context=1024, dim=384, num_layers=24, num_heads=6),
        data=DataConfig(folder="data/debian-docs", batch=32),
        optim=OptimConfig(lr=2e-3, warmup=200),
        steps=2000,
        precision="bf16",
        compile=True,
        log_every=10,
    )


RECIPES: dict[str, Callable[[], RunConfig]] = {"quick": quick, "debian-50m": debian_50m}
