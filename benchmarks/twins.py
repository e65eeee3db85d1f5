"""Train PreNorm and Block AttnRes twins from one recipe, one after the other, and write their report.

python benchmarks/twins.py debian-50m --data data/debian-docs --out OUT

A rate is tuned by short runs of PreNorm side by side: the same with --rules prenorm --steps 1000 --lr 1e-3 --out OUT/1e-3.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from fathom.lab.dynamics import write_depth
from fathom.train.loop import train
from fathom.train.recipes import RECIPES, RULES, twin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--data", default=None, help="a dataset folder, instead of the recipe's")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--lr", type=float, default=None, help="AdamW's peak rate, of both twins")
    parser.add_argument("--compile", choices=("none", "layers", "model"), default=None)
    parser.add_argument("--rules", nargs="+", choices=RULES, default=RULES)
    options = parser.parse_args()
    config = RECIPES[options.recipe]()
    config = replace(config, steps=options.steps or config.steps, compile=options.compile or config.compile)
    config = replace(config, optim=replace(config.optim, lr=options.lr or config.optim.lr))
    if options.data:
        config = replace(config, data=replace(config.data, folder=options.data))
    for rule in options.rules:
        run = options.out / rule
        print(json.dumps(train(twin(config, rule), run)), flush=True)
        write_depth(run)


if __name__ == "__main__":
    main()
