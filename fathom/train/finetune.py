"""What decides a fine-tuning run (fathom/hf/finetune.py), apart from it: `fathom finetune --help` needs no Transformers."""

from dataclasses import dataclass, field
from typing import Literal

from fathom.errors import UserError
from fathom.train.config import DataConfig, OptimConfig


@dataclass(frozen=True)
class FinetuneConfig:
    """Everything that decides a fine-tuning run."""

    data: DataConfig = field(default_factory=DataConfig)
    """A dataset made with the model's tokenizer: `fathom data prepare SOURCE OUT --tokenizer MODEL/tokenizer.json`."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=1e-4, warmup=20))
    context: int = 1024
    """Tokens of a sequence."""
    steps: int = 300
    """Optimizer steps."""
    queries_first: int = 0
    """Steps in which only depth queries and key gains train."""
    seed: int = 0
    """Of the data order."""
    eval_every: int = 50
    """Steps from validation to validation."""
    eval_sequences: int = 64
    """Sequences of one validation, at most."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: autocast, with float32 weights."""
    device: str = "auto"
    """cpu, cuda, or auto for the GPU where there is one."""

    def __post_init__(self) -> None:
        for name, least in (
            ("context", 2),
            ("steps", 1),
            ("eval_every", 1),
            ("eval_sequences", 1),
            ("queries_first", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        micro = self.data.micro_batch or self.data.batch
        if micro < 1 or self.data.batch % micro:
            raise UserError(f"data.micro_batch is {micro}: it must divide data.batch, {self.data.batch}")
        if self.optim.optimizer != "adamw":
            raise UserError(f"optim.optimizer is {self.optim.optimizer}: fine-tuning is with adamw")
