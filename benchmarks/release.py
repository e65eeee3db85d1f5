"""Make of a run the small folder that travels inside the package: bf16 weights, no optimizer, its measured report.

    python benchmarks/release.py RUN fathom/assets/models/NAME

The report's depth maps are measured first, so that `fathom report NAME` needs no data. Paths of the machine become names;
of the training's lines some 600 stay, evenly.
"""

import argparse
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from study import thinned

from fathom import sealed
from fathom.lab.report_measure import measure
from fathom.train.checkpoint import checkpoints, read_progress
from fathom.train.config import load_config, read_object, save_config

FILES = ("summary.json", "depth.json", "reads.json", "tokenizer.json")


def without_paths(value: Any) -> Any:
    """JSON ``value`` with the last name of each absolute path in its place."""
    if isinstance(value, dict):
        return {key: without_paths(each) for key, each in value.items()}
    if isinstance(value, list):
        return [without_paths(each) for each in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def release(run: Path, out: Path) -> Path:
    """Write ``out``, a run folder of the newest checkpoint of ``run``."""
    measure(run)
    newest = checkpoints(run)[-1]
    out.mkdir(parents=True)
    for name in FILES:
        shutil.copy(run / name, out / name)
    (out / "metrics.jsonl").write_text(thinned((run / "metrics.jsonl").read_text(), 600))
    for name in ("data.json", "env.json"):
        (out / name).write_text(json.dumps(without_paths(read_object(run / name)), indent=2) + "\n")
    config = load_config(run / "config.json")
    save_config(replace(config, data=replace(config.data, folder=Path(config.data.folder).name)), out / "config.json")
    target = out / "checkpoints" / newest.name
    sealed.hidden(target).mkdir(parents=True)
    weights = {name: value.to(torch.bfloat16) for name, value in load_file(newest / "model.safetensors").items()}
    file = sealed.hidden(target) / "model.safetensors"
    save_file(weights, file)
    file.chmod(0o644)  # safetensors writes for the owner alone
    sealed.publish(target, asdict(read_progress(newest)))
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    if not checkpoints(options.run):
        parser.error(f"{options.run} is no run folder with a checkpoint")
    if options.out.exists():
        parser.error(f"{options.out} exists")
    target = release(options.run, options.out)
    print(json.dumps({path.name: path.stat().st_size for path in sorted(target.iterdir())}))


if __name__ == "__main__":
    main()
