"""The sweeps that ship: each turns one base run into cases (what is held equal) and arms (what is compared).

| sweep           | cases                                     | arms                            | arXiv 2603.15031  |
|-----------------|-------------------------------------------|---------------------------------|-------------------|
| seeds           | the base                                  | PreNorm, Block                  | names no seeds    |
| block-size      | the base                                  | PreNorm, Full, S = 2, 4, 8 .. L | Fig. 6            |
| paper-ablations | the base                                  | the rows of Table 4             | Table 4           |
| paper-scaling   | five sizes in the proportions of Table 2  | PreNorm, Block, Full            | Table 2, Fig. 4   |
| depth-width     | 5 x 5 shapes of equal compute             | PreNorm, Block                  | Fig. 7            |

The paper's networks are mixtures of experts; these are the base's dense decoder with the same depths and proportions. All
arms of a case share data, order, steps and rates: tune the rate on PreNorm first, as the paper did.
"""

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fathom.errors import UserError
from fathom.lab.plan import Planned, flops_of
from fathom.lab.scaling import paper
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.train.config import RunConfig, from_dict, load_config, to_dict
from fathom.train.data import Manifest
from fathom.train.loop import data_folder
from fathom.train.recipes import RECIPES

DEPTH_WIDTH_COLUMNS = (1 / 3, 2 / 3, 1, 4 / 3, 5 / 3)
"""Width over decoder layers, as a share of the base's: Fig. 7's 15, 30, 45, 60 and 75 for a base of 45."""
DEPTH_WIDTH_ROWS = (0.3, 0.4, 0.5, 0.6, 0.7)
"""Heads over decoder layers (Fig. 7's rows)."""


def residual(arm: str) -> ResidualConfig:
    """The rule of ``block``, or with settings ``block:block_size=4,gain=false``; a wrong one is a ``UserError``."""
    rule, _, settings = arm.partition(":")
    values: dict[str, Any] = {"rule": rule}
    for setting in filter(None, settings.split(",")):
        key, equals, value = setting.partition("=")
        if not equals:
            raise UserError(f"arm {arm!r}: {setting!r} is not setting=value")
        values[key] = _literal(value)
    try:
        return from_dict(ResidualConfig, values)
    except UserError as error:
        raise UserError(f"arm {arm!r}: {error}") from None


def _literal(text: str) -> Any:
    """``3``, ``1e-3``, ``true``, ``null`` as JSON has them; other words are strings."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def with_settings(config: RunConfig, settings: Iterable[str]) -> RunConfig:
    """``config`` with ``model.dim=32`` and the like changed; a key or value that does not fit is a ``UserError``."""
    values = to_dict(config)
    for setting in settings:
        key, equals, value = setting.partition("=")
        place: Any = values
        *sections, name = key.split(".")
        for section in sections:
            place = place.get(section) if isinstance(place, dict) else None
        if not equals or not isinstance(place, dict) or name not in place:
            raise UserError(f"--set {setting}: give setting=value, such as model.dim=32 or optim.lr=3e-3")
        place[name] = _literal(value)
    return from_dict(RunConfig, values)


def base_config(base: str, settings: Iterable[str] = ()) -> RunConfig:
    """The base run: a recipe's name or the config.json of a run, with ``settings`` changed and its data's vocabulary.

    Its rule is not used, since every arm is one; a run of a sweep keeps one checkpoint if ``settings`` do not say otherwise.
    """
    if base in RECIPES:
        config = RECIPES[base]()
    elif Path(base).is_file():
        config = load_config(Path(base))
    else:
        raise UserError(f"--base {base} is neither a recipe ({', '.join(RECIPES)}) nor a config.json")
    settings = list(settings)
    if ruled := next((setting for setting in settings if setting.startswith("model.residual.")), None):
        raise UserError(f"--set {ruled}: a sweep's arms are its rules; give --arms block:block_size=4 and the like")
    config = with_settings(replace(config, keep_checkpoints=1), settings)
    vocab_size = Manifest.load(data_folder(config)).vocab_size
    return replace(config, model=replace(config.model, vocab_size=vocab_size))


def grid_points(grid: Iterable[str]) -> list[tuple[str, ...]]:
    """``optim.lr=1e-3,2e-3`` and the like as every combination of ``setting=value``; ``[()]`` for no grid."""
    axes = []
    for axis in grid:
        key, equals, values = axis.partition("=")
        if not equals or not all(values.split(",")):
            raise UserError(f"--grid {axis}: give setting=value,value such as optim.lr=1e-3,2e-3,4e-3")
        axes.append([f"{key}={value}" for value in values.split(",")])
    return list(itertools.product(*axes))


def _model(config: RunConfig, **settings: Any) -> RunConfig:
    return replace(config, model=replace(config.model, **settings))


def one_case(base: RunConfig) -> dict[str, RunConfig]:
    return {"base": base}


def sizes(base: RunConfig) -> dict[str, RunConfig]:
    """Table 2's five sizes: layers, width, batch, tokens and rate in its proportions, the first being ``base``."""
    rows = paper()["sizes"]
    first = rows[0]
    made = {}
    for row in rows:
        multiple = 2 * base.model.num_heads
        dim = max(multiple, round(base.model.dim * row["dim"] / first["dim"] / multiple) * multiple)
        batch = round(base.data.batch * row["batch"] / first["batch"])
        micro = base.data.micro_batch and math.gcd(batch, base.data.micro_batch)
        tokens = base.steps * base.data.batch * row["tokens"] / first["tokens"]
        shaped = _model(
            base, dim=dim, num_layers=round(base.model.num_layers * row["layers"] / first["layers"]), head_dim=None, mlp_dim=None
        )  # fmt: skip
        made[row["case"]] = replace(
            shaped, steps=round(tokens / batch), data=replace(base.data, batch=batch, micro_batch=micro),
            optim=replace(base.optim, lr=base.optim.lr * row["lr"] / first["lr"]),
        )  # fmt: skip
    return made


def shapes(base: RunConfig) -> dict[str, RunConfig]:
    """Fig. 7's grid: about the base's number of layer parameters in each shape, and steps for equal FLOPs of PreNorm.

    A case is named ``w45-h0.3``: width over layers as asked for, heads over layers likewise. Both are rounded to what a
    decoder can have, coarsely where layers are few; a shape that rounds to an earlier one is left out.
    """
    volume = base.model.num_layers * base.model.dim**2
    budget = flops_of(_prenorm(base).model, base.model.context) * base.steps
    made: dict[str, RunConfig] = {}
    for column in (share * base.model.dim / base.model.num_layers for share in DEPTH_WIDTH_COLUMNS):
        layers = max(1, round((volume / column**2) ** (1 / 3)))
        dim = 8 * max(1, round(math.sqrt(volume / layers) / 8))
        for share in DEPTH_WIDTH_ROWS:
            heads = max(1, round(share * layers))
            head_dim = 2 * max(1, round(dim / heads / 2))
            shaped = _model(
                base, num_layers=layers, dim=dim, num_heads=heads, num_kv_heads=None, head_dim=head_dim, mlp_dim=None
            )
            steps = budget / flops_of(_prenorm(shaped).model, base.model.context)
            if shaped.model not in [other.model for other in made.values()]:
                made[f"w{column:.3g}-h{share}"] = replace(shaped, steps=max(1, round(steps)))
    return made


def _prenorm(config: RunConfig) -> RunConfig:
    return _model(config, residual=ResidualConfig(rule="prenorm"))


def twins(model: ModelConfig) -> dict[str, str]:
    return {"prenorm": "prenorm", "block": "block"}


def block_sizes(model: ModelConfig) -> dict[str, str]:
    """S = 1 is Full AttnRes; S = L is one block, the plain sum with the embedding kept apart."""
    powers = [2**k for k in range(1, model.num_sublayers.bit_length()) if 2**k < model.num_sublayers]
    blocks = {f"block-s{size}": f"block:block_size={size}" for size in [*powers, model.num_sublayers]}
    return {"prenorm": "prenorm", "full": "full", **blocks}


def three_rules(model: ModelConfig) -> dict[str, str]:
    return {"prenorm": "prenorm", "block": "block", "full": "full"}


ABLATIONS = {
    "prenorm": "prenorm",
    "denseformer": "denseformer",
    "mhc": "mhc",
    "full": "full",
    "full-input-query": "full:query=input",
    "full-static": "full:query=none",
    "full-sigmoid": "full:activation=sigmoid",
    "full-no-key-norm": "full:key_norm=false",
    "full-window8": "full:window=8",
    "block-s4": "block:block_size=4",
    "block-s4-heads16": "block:block_size=4,heads=16",
    "block-s4-no-key-norm": "block:block_size=4,key_norm=false",
}
"""Table 4's rows: its names here, and the rule."""


def ablations(model: ModelConfig) -> dict[str, str]:
    return ABLATIONS


@dataclass(frozen=True)
class SweepRecipe:
    """How a base run becomes a sweep."""

    sentence: str
    cases: Callable[[RunConfig], dict[str, RunConfig]]
    arms: Callable[[ModelConfig], dict[str, str]]
    """Arms by name, each as ``residual`` reads it."""
    num_seeds: int


SWEEPS = {
    "seeds": SweepRecipe("One configuration over several seeds: is a difference more than luck?", one_case, twins, 3),
    "block-size": SweepRecipe("Block AttnRes from S = 2 to one block, beside Full and PreNorm.", one_case, block_sizes, 2),
    "paper-ablations": SweepRecipe("The rows of the paper's Table 4.", one_case, ablations, 3),
    "paper-scaling": SweepRecipe("Five sizes in the proportions of the paper's Table 2.", sizes, three_rules, 1),
    "depth-width": SweepRecipe("The paper's Fig. 7: 25 shapes of equal compute.", shapes, twins, 1),
}  # fmt: skip


def arm_name(arm: str) -> str:
    """``block:block_size=4`` as part of a folder's name."""
    return re.sub(r"[^\w.-]+", "-", arm)


def point_name(point: Iterable[str]) -> str:
    """``("optim.lr=1e-3",)`` as part of a case's name: ``lr1e-3``."""
    settings = [setting.partition("=") for setting in point]
    return "-".join(arm_name(key.rpartition(".")[2] + value) for key, _, value in settings)


def expand_grid(name: str, base: str, settings: Iterable[str], grid: Iterable[str], **chosen: Any) -> list[Planned]:
    """``expand`` at every point of ``grid``, whose settings are part of the case: arms are compared at equal ones."""
    settings, runs = list(settings), []
    for point in grid_points(grid):
        for run in expand(name, base_config(base, [*settings, *point]), **chosen):
            prefix = f"{point_name(point)}-" if point else ""
            case = (point_name(point) if run.case == "base" else prefix + run.case) if point else run.case
            runs.append(replace(run, name=prefix + run.name, case=case))
    return runs


def expand(
    name: str, base: RunConfig, *, seeds: int | None = None, arms: Iterable[str] = (), cases: Iterable[str] = ()
) -> list[Planned]:
    """The runs of sweep ``name``: for each seed, every case, every arm, so that pairs are complete early.

    Args:
        name: of ``SWEEPS``.
        base: the base run; its seed is the first one.
        seeds: how many; the recipe's number if None.
        arms: only these: names of the recipe's arms, or rules as ``residual`` reads them. All of the recipe's if empty.
        cases: only these of the recipe's cases; all if empty.

    Raises:
        UserError: an unknown sweep, arm or case, or no seed.
    """
    if name not in SWEEPS:
        raise UserError(f"{name!r} is not a sweep; there are {', '.join(SWEEPS)}")
    recipe = SWEEPS[name]
    count = recipe.num_seeds if seeds is None else seeds
    if count < 1:
        raise UserError(f"seeds is {count}: it must be at least 1")
    made = recipe.cases(base)
    chosen_cases = list(cases) or list(made)
    for case in chosen_cases:
        if case not in made:
            raise UserError(f"sweep {name} has no case {case!r}; it has {', '.join(made)}")
    runs = []
    for seed in range(base.seed, base.seed + count):
        for case in chosen_cases:
            config = made[case]
            known = recipe.arms(config.model)
            for arm in list(arms) or list(known):
                run = replace(_model(config, residual=residual(known.get(arm, arm))), seed=seed)
                parts = [case] if len(made) > 1 else []
                runs.append(Planned("-".join([*parts, arm_name(arm), f"seed{seed}"]), case, arm_name(arm), seed, run))
    return runs
