"""Parameter groups, optimizers and the learning-rate schedule.

| group  | parameters                                  | optimizer       | decayed |
|--------|---------------------------------------------|-----------------|---------|
| matrix | sublayers' 2-D weights                      | AdamW or Muon   | yes     |
| embedding | embedding (and head, where they are one) | AdamW           | yes     |
| head   | head                                        | AdamW           | yes     |
| vector | norms; the stream's scalars, scales and mixing weights | AdamW | no      |
| depth  | the stream's queries, key gains and gates   | AdamW           | no      |
| map    | the stream's linear maps of hidden vectors  | AdamW           | yes     |
| expert | the experts of a layer, [E, m, n]           | AdamW or Muon, each expert for itself | yes |

A step multiplies what AdamW decays by 1 - ``lr`` ``weight_decay``, in every group: an embedding with a rate of its own would else
forget rare tokens by it.

Muon takes a parameter as it is stored: gate and up matrices, or the queries of all heads, are orthogonalised as one, as
Moonlight does it (arXiv 2502.16982). With ``muon_per_head`` each head's block of a matrix that makes queries, keys or values is
a matrix of its own, its rate adjusted by the block's shape: Kimi K3's per-head Muon (arXiv 2607.24653, 2.5), for MLA's
up-projections GLM-5's Muon Split (arXiv 2602.15763). They find that heads of large gradients drown the others' updates else.

A depth query starts at zero and its size is how decided a read is: decay would pull every read back to a plain mean, and
orthogonalising a vector would only normalise it. The paper does not say how its queries are trained. Adam moves every
coordinate by about the learning rate, and a key has norm sqrt(D) with all coordinates of order one, so one step can move
a score by lr · D: the rate must fall as 1/D, as for any read-out vector (muP), whatever the rate of the matrices is. At
D = 64 the matrices like 1.6e-2, and queries at that rate cost Block its whole gain (docs/log.md, 2026-11-22).
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from fathom.models.kda import KDA
from fathom.models.layers import Attention
from fathom.models.mla import MLA
from fathom.train.config import OptimConfig
from fathom.train.muon import Muon, StackedMuon

DEPTH_LR_TIMES_DIM = 0.128

Groups = dict[str, list[tuple[str, nn.Parameter]]]


def parameter_groups(*parts: nn.Module) -> Groups:
    """Every trained parameter of a model, or of some stages, by group name, in the order of ``named_parameters``."""
    groups: Groups = {"matrix": [], "embedding": [], "head": [], "vector": [], "depth": [], "map": []}
    for name, parameter in (named for part in parts for named in part.named_parameters() if named[1].requires_grad):
        if name.startswith("stream."):
            # residuals/rule.py names parameters by how they train; one in a list is named stream.<name>.<number>.
            kind = name.split(".")[1]
            group = "depth" if kind.endswith(("query", "gain", "gate")) else "map" if kind.endswith("map") else "vector"
        elif name in ("embedding.weight", "head.weight"):
            group = name.split(".")[0]
        elif ".experts." in name:
            group = "expert"
        else:
            group = "matrix" if parameter.ndim == 2 else "vector"
        groups.setdefault(group, []).append((name, parameter))
    return groups


def head_rows(*parts: nn.Module) -> dict[nn.Parameter, int]:
    """Rows of a head, for each matrix of ``parts`` that makes queries, keys or values."""
    return {
        module.get_parameter(name): rows
        for part in parts
        for module in part.modules()
        if isinstance(module, Attention | KDA | MLA)
        for name, rows in module.head_rows().items()
    }


def make_optimizers(model: nn.Module | Sequence[nn.Module], config: OptimConfig) -> list[torch.optim.Optimizer]:
    """AdamW, after Muon if the config asks for it, for a model or for some stages of one.

    Each group keeps its peak rate as ``peak_lr``.
    """
    parts = [model] if isinstance(model, nn.Module) else model
    groups = {kind: [p for _, p in members] for kind, members in parameter_groups(*parts).items()}
    peak = dict.fromkeys(groups, config.lr)
    peak |= {"embedding": config.embedding_lr or config.lr, "head": config.head_lr or config.lr}
    if groups["depth"]:
        # A stage may have no embedding; its queries are as wide.
        dim = (groups["embedding"] or groups["depth"])[0].shape[-1]
        peak["depth"] = DEPTH_LR_TIMES_DIM / dim if config.depth_lr is None else config.depth_lr
    optimizers: list[torch.optim.Optimizer] = []
    if config.optimizer == "muon":
        rows = head_rows(*parts) if config.muon_per_head else {}
        matrices = groups.pop("matrix")
        # A matrix that lies on several ranks is put together by torch's own.
        kind = torch.optim.Muon if any(isinstance(p, DTensor) for p in matrices) else Muon
        muon = kind(
            [p for p in matrices if p not in rows], lr=config.muon_lr, weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )  # fmt: skip
        optimizers.append(muon)
        stacks = [
            {"params": [p for p in matrices if rows.get(p) == count], "rows": count}
            for count in sorted({*rows.values()})
        ]
        if experts := groups.pop("expert", []):
            stacks.insert(0, {"params": experts, "rows": None})
        if stacks:
            optimizers.append(StackedMuon(stacks, lr=config.muon_lr, weight_decay=config.weight_decay))
        for group in each_group(optimizers):
            group["peak_lr"] = config.muon_lr
    adamw = [
        {
            "params": parameters,
            "lr": peak[kind],
            "peak_lr": peak[kind],
            "weight_decay": config.weight_decay * config.lr / peak[kind]
            if kind in ("matrix", "embedding", "head", "map", "expert")
            else 0.0,
        }
        for kind, parameters in groups.items()
        if parameters
    ]
    # fused: one pass over each parameter; eps below the default because small models have small gradients.
    optimizers.append(torch.optim.AdamW(adamw, betas=(config.beta1, config.beta2), eps=1e-10, fused=True))
    return optimizers


def lr_share(config: OptimConfig, step: int, steps: int) -> float:
    """The learning rate of ``step`` (0-based, of ``steps``) as a share of its peak."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    if config.schedule == "cosine":
        progress = (step - config.warmup) / max(1, steps - 1 - config.warmup)
        return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    decay_steps = round(config.decay_fraction * steps)
    if decay_steps == 0:
        return 1.0
    return 1 - (1 - config.final_lr) * max(0, step + 1 - (steps - decay_steps)) / decay_steps


def set_lr(optimizers: list[torch.optim.Optimizer], share: float) -> None:
    for group in each_group(optimizers):
        group["lr"] = group["peak_lr"] * share


def each_group(optimizers: list[torch.optim.Optimizer]) -> Iterator[dict]:
    for optimizer in optimizers:
        yield from optimizer.param_groups
