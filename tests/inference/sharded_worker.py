"""One rank of tests/inference/test_sharded.py: serves every case over its process group and compares with one process.

Prints one JSON line: per case the largest difference from the forward pass, and bytes of the bank, cache and weights.
"""

import json
import sys

import torch
import torch.distributed as dist

from fathom.inference.engine import Engine
from fathom.inference.generate import generate
from fathom.inference.sampling import Sampling
from fathom.inference.sharded import Shards
from tests.inference.test_engine import PROMPTS as FOUR
from tests.inference.test_engine import assert_decodes, build

PROMPTS = FOUR[:3]
"""Three rows: neither 2 nor 4 ranks divide what one decode step has."""
CASES = ["prenorm", "full", "block", "value_residual", "muddformer", "siamesenorm"]


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found: dict[str, dict[str, object]] = {}
    for case in CASES:
        reference = build(case)
        engine = Engine(build(case), slots=len(PROMPTS), chunk=4, shards=Shards())
        entry: dict[str, object] = {"difference": assert_decodes(engine, reference, PROMPTS, steps=4)}
        bank: list[int] = []

        def observe(site: int, state: object, output: object, bank: list[int] = bank) -> None:
            if output is None and hasattr(state, "bank"):
                bank.append(sum(source.nbytes for source in (*state.bank, state.pending)))

        engine.prefill(PROMPTS, observe=observe)
        entry["bank"] = bank
        entry["cache"] = engine.cache.nbytes
        sampling = Sampling(tokens=6, temperature=1.5, seed=4)
        entry["tokens"] = [piece.token for piece in generate(engine, PROMPTS, sampling)]
        entry["alone"] = [piece.token for piece in generate(Engine(build(case), slots=3, chunk=4), PROMPTS, sampling)]
        found[case] = entry
    gathered: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    if dist.get_rank() == 0:
        json.dump(gathered, sys.stdout)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
