"""A training run as a typed, frozen value: flags set it, ``config.json`` keeps it, ``load_config`` brings it back."""

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from fathom.errors import UserError
from fathom.models.config import SWITCHES, ModelConfig
from fathom.models.kimi_config import KimiConfig
from fathom.parallel.config import ParallelConfig, check_micro_batches

T = TypeVar("T")


@dataclass(frozen=True)
class DataConfig:
    """What is read, and in what pieces."""

    folder: str = "embedded"
    """A folder written by `fathom data prepare`, or `embedded` for the text inside the package."""
    batch: int = 8
    """Sequences of one optimizer step."""
    micro_batch: int | None = None
    """Sequences of one forward pass (gradient accumulation); if not given, all of a process's, or 1/pp of them."""


@dataclass(frozen=True)
class OptimConfig:
    """How parameters move. Groups: optimizers.py."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW for all, or Muon for the hidden matrices and AdamW for the rest."""
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon's matrices (scaled to match AdamW's update size)."""
    muon_per_head: bool = False
    """Muon: orthogonalise what makes queries, keys and values head by head, not all heads as one matrix."""
    embedding_lr: float | None = None
    """Peak learning rate of the embedding; lr if not given."""
    head_lr: float | None = None
    """Peak learning rate of an untied head; lr if not given."""
    depth_lr: float | None = None
    """Peak learning rate of depth queries and key gains; 0.128 / D if not given (optimizers.py says why)."""
    beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    beta2: float = 0.95
    """AdamW's decay of the squared gradient's mean."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norms, gains and queries are never decayed."""
    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Cosine, or warm-up, stable, (linear) decay."""
    warmup: int = 50
    """Steps of linear warm-up."""
    decay_fraction: float = 0.2
    """wsd: the share of all steps that decays."""
    final_lr: float = 0.1
    """Learning rate of the last step, as a share of the peak."""


@dataclass(frozen=True)
class RunConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    steps: int = 500
    """Optimizer steps."""
    seed: int = 0
    """Of initialisation and data order."""
    device: str = "auto"
    """cpu, cuda, or auto for the GPU where there is one."""
    precision: Literal["float32", "bf16"] = "float32"
    """bf16: autocast and a bf16 stream over float32 parameters, gradients and optimizer state."""
    compile: Literal["none", "layers", "model"] = "none"
    """torch.compile: the loss and each kind of sublayer once (starts in seconds), or the whole model (minutes to start)."""
    deterministic: bool = False
    """Deterministic GPU kernels, so that a resumed run equals an unbroken one bit for bit (a CPU run always does)."""
    eval_every: int = 50
    """Steps between validations; the last step always validates."""
    eval_sequences: int = 64
    """Validation sequences, the same ones each time."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    log_every: int = 1
    """Steps between metric lines; on a GPU a larger number spares synchronisations."""
    dynamics_every: int = 0
    """Steps between records of the training dynamics (`fathom lab dynamics`); 0 records none."""
    track: Literal["none", "tensorboard", "trackio"] = "none"
    """A second sink for the metrics beside metrics.jsonl."""

    def __post_init__(self) -> None:
        o, d = self.optim, self.data
        for name, value, least in (
            ("steps", self.steps, 1), ("eval_every", self.eval_every, 1), ("eval_sequences", self.eval_sequences, 1),
            ("checkpoint_every", self.checkpoint_every, 1), ("keep_checkpoints", self.keep_checkpoints, 1),
            ("log_every", self.log_every, 1), ("dynamics_every", self.dynamics_every, 0), ("data.batch", d.batch, 1),
            ("optim.warmup", o.warmup, 0), ("optim.weight_decay", o.weight_decay, 0), ("optim.clip", o.clip, 0),
            ("seed", self.seed, 0),
        ):  # fmt: skip
            if not value >= least:
                raise UserError(f"{name} is {value}: it must be at least {least}")
        if self.seed >= 2**63:
            raise UserError(f"seed is {self.seed}: it must be below 2^63")
        if o.muon_per_head and o.optimizer != "muon":
            raise UserError(f"optim.muon_per_head is of muon, but optim.optimizer is {o.optimizer}")
        if o.head_lr is not None and self.model.tie_embeddings:
            raise UserError(
                "optim.head_lr is of an untied head, but model.tie_embeddings is true: give optim.embedding_lr"
            )
        for name in ("lr", "muon_lr", "embedding_lr", "head_lr", "depth_lr"):
            rate = getattr(o, name)
            if rate is not None and not 0 < rate < float("inf"):
                raise UserError(f"optim.{name} is {rate}: it must be positive and finite")
        for name, share in (("beta1", o.beta1), ("beta2", o.beta2)):
            if not 0 <= share < 1:
                raise UserError(f"optim.{name} is {share}: it must be in [0, 1)")
        for name, share in (("decay_fraction", o.decay_fraction), ("final_lr", o.final_lr)):
            if not 0 <= share <= 1:
                raise UserError(f"optim.{name} is {share}: it must be in [0, 1]")
        if d.micro_batch is not None and (d.micro_batch < 1 or d.batch % d.micro_batch):
            raise UserError(f"data.micro_batch is {d.micro_batch}: it must divide data.batch, {d.batch}")
        self._check_parallel()

    @property
    def num_micro_batches(self) -> int:
        """Forward passes of a step on each process."""
        part = self.data.batch // self.parallel.dp
        return part // (self.data.micro_batch or max(1, part // self.parallel.pp))

    def _check_parallel(self) -> None:
        d, p = self.data, self.parallel
        if d.batch % p.dp:
            raise UserError(f"data.batch is {d.batch}: parallel.dp, {p.dp}, must divide it")
        part = d.batch // p.dp
        size = d.micro_batch or max(1, part // p.pp)
        if part % size:
            share = f"data.batch / parallel.dp, {part}"
            raise UserError(f"a micro-batch of {size} does not divide {share}: give another data.micro_batch")
        if p.pp > 1:
            check_micro_batches(part // size, p.schedule, p.pp, p.virtual)
        if p.size > 1 or p.recompute != "none":
            what = f"on {p.size} processes" if p.size > 1 else f"with parallel.recompute {p.recompute}"
            self._check_experts()
            if self.compile == "model":
                raise UserError(f"compile model does not work {what}: use layers")
            if self.dynamics_every:
                raise UserError(f"dynamics_every is {self.dynamics_every}: dynamics are not recorded {what}")
        if p.recompute != "none":
            self._check_rule(f"parallel.recompute is {p.recompute}")
            if self.model.tie_embeddings:
                raise UserError(
                    f"parallel.recompute is {p.recompute}: tied embeddings (model.tie_embeddings) do not go with it"
                )
        if p.tp > 1:
            self._check_tensor_parallel()

    def _check_tensor_parallel(self) -> None:
        model, tp = self.model, self.parallel.tp
        if isinstance(model, KimiConfig):
            raise UserError(
                f"parallel.tp is {tp}: KDA, MLA and experts are not cut over ranks; use parallel.dp, parallel.ep or parallel.pp"
            )
        for name, count in (
            ("model.num_heads", model.num_heads), ("the count of key/value heads", model.kv_heads),
            ("the width of the MLP", model.mlp_width), ("model.context", model.context),
        ):  # fmt: skip
            if count % tp:
                raise UserError(f"{name} is {count}: parallel.tp, {tp}, must divide it")
        self._check_rule(f"parallel.tp is {tp}")
        if self.optim.optimizer == "muon":
            raise UserError(
                f"parallel.tp is {tp}: muon orthogonalises whole matrices, of which each rank has a part; use adamw"
            )

    def _check_rule(self, setting: str) -> None:
        residual = self.model.residual
        given = [f"residual.{name}" for name in SWITCHES if getattr(residual, name) is not None]
        if residual.rule not in ("prenorm", "full", "block") or given:
            found = given[0] if given else f"residual.rule {residual.rule}"
            raise UserError(f"{setting}: it goes with prenorm, full and block without switches, not with {found}")

    def _check_experts(self) -> None:
        ranks, model = self.parallel.ep, self.model
        if ranks == 1:
            return
        if not isinstance(model, KimiConfig):
            raise UserError(f"parallel.ep is {ranks}: the model has no experts; leave it out")
        if model.num_experts % ranks:
            raise UserError(f"parallel.ep is {ranks}: it must divide model.num_experts, {model.num_experts}")
        replicas = self.parallel.dp // ranks
        for name, width in (("latent_dim" if model.latent_dim else "dim", model.latent_dim or model.dim),
                            ("expert_dim", model.expert_dim)):  # fmt: skip
            if (2 * width if name == "expert_dim" else width) % replicas:
                raise UserError(
                    f"parallel.dp / parallel.ep is {replicas}: these ranks shard experts by width, and model.{name} is {width}"
                )


def to_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON values."""
    return dataclasses.asdict(config)


def from_dict(kind: type[T], values: Any, where: str = "") -> T:
    """The config of type ``kind`` from plain JSON values; a wrong key or value is a ``UserError`` that names it."""
    if not isinstance(values, dict):
        raise UserError(f"{where or 'the config'} is {type(values).__name__}: it must be an object")
    fields = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    prefix = f"{where}." if where else ""
    for key in values:
        if key not in fields:
            raise UserError(f"{prefix}{key} is not a setting of {kind.__name__}; it has {', '.join(sorted(fields))}")
    return kind(**{key: _value(hints[key], value, f"{prefix}{key}") for key, value in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if hint is ModelConfig and isinstance(value, dict) and value.get("architecture") == "kimi_linear":
            hint = KimiConfig
        return from_dict(typing.cast(type, hint), value, where)
    options = typing.get_args(hint)
    if type(None) in options:
        if value is None:
            return None
        return _value(next(o for o in options if o is not type(None)), value, where)
    if typing.get_origin(hint) is Literal:
        if value not in options:
            raise UserError(f"{where} is {value!r}: it must be one of {', '.join(map(str, options))}")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise UserError(f"{where} is {value!r}: it must be of type {hint.__name__}")
    return value


def save_config(config: RunConfig, path: Path) -> None:
    """Write ``config`` to ``path``, whole or not at all."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(to_dict(config), indent=2) + "\n")
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The JSON value in ``path``; ``UserError`` naming the file and what is wrong in it."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: line {error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        raise UserError(f"{path} cannot be read: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; ``UserError`` as ``read_json``, and for another kind of value."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}: it must hold an object")
    return value


def load_config(path: Path) -> RunConfig:
    """The run config in ``path``; ``UserError`` naming the file and what is wrong in it."""
    values = read_json(path)
    try:
        return from_dict(RunConfig, values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
