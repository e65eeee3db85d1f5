"""`fathom bench --pipeline`: what a pipeline's hops carry, naive against cached; how long a step would take; what it keeps."""

from pathlib import Path
from typing import Any

from fathom.bench import BenchOptions
from fathom.commands.output import columns, print_json
from fathom.errors import UserError
from fathom.train.config import from_dict, read_json

ARMS = ("prenorm", "naive", "cached")


def show_pipeline(
    options: BenchOptions, ranks: int, virtual: int, micro_batches: int, speeds: Path | None, *, as_json: bool
) -> None:
    """Print the split, every hop's bytes, simulated times, and what recomputation leaves of the activations.

    The bytes of small steps on few ranks are counted in gloo processes.
    """
    from fathom.parallel import simulate
    from fathom.parallel.config import check_micro_batches
    from fathom.parallel.footprint import footprints
    from fathom.parallel.plan import describe, make_plan
    from fathom.parallel.traffic import countable, table

    if ranks < 2:
        raise UserError(f"--ranks is {ranks}: a pipeline needs at least two")
    check_micro_batches(micro_batches, "1f1b", ranks, virtual)
    model, batch = options.model, options.batch
    given = simulate.Speeds() if speeds is None else from_dict(simulate.Speeds, read_json(speeds), str(speeds))
    plan = make_plan(model, ranks, virtual)
    counted = countable(model, ranks, micro_batches * batch * model.context)
    found = table(model, ranks, virtual, num_micro_batches=micro_batches, micro_batch=batch, run=counted)
    times = simulate.table(
        model, ranks, virtual, micro_batches_per_rank=max(1, micro_batches // ranks), micro_batch=batch, speeds=given
    )
    kept = footprints(model, ranks, virtual, batch)
    if as_json:
        print_json({**found, "simulated": {"speeds": vars(given), "rows": times}, "activations": kept})
        return
    print(columns(describe(plan, model)) + "\n")
    _print_hops(found, batch, model.context, micro_batches)
    _print_times(times, given.source)
    _print_activations(kept, batch, model.context)


def _print_hops(found: dict[str, Any], batch: int, context: int, micro_batches: int) -> None:
    rows = [["hop", "ranks", *ARMS]]
    for hop in found["hops"]:
        rows.append([
            f"into {hop['into']}", f"{hop['from_rank']} -> {hop['to_rank']}", *(f"{hop[arm]:,}" for arm in ARMS)
        ])  # fmt: skip
    rows.append(["largest", "", *(f"{max(hop[arm] for hop in found['hops']):,}" for arm in ARMS)])
    rows.append(["step", "", *(f"{found['step'][arm]:,}" for arm in ARMS)])
    print(columns(rows) + "\n")
    how = (
        "counted from what gloo processes sent" if found["counted"] else "computed: too large to start processes for it"
    )
    print(
        f"bytes of one micro-batch of {batch} x {context} in float32, one way; step: {micro_batches} micro-batches, "
        f"both ways; {how}\n"
    )


def _print_times(times: list[dict[str, Any]], source: str) -> None:
    rows = [["ranks", "micro-batches", "prenorm ms", "naive ms", "cached ms", "naive", "cached", "busy"]]
    for row in times:
        base = row["prenorm"]["ms"]
        rows.append([
            str(row["ranks"]), str(row["micro_batches"]), *(f"{row[arm]['ms']:,.3f}" for arm in ARMS),
            *(f"{row[arm]['ms'] / base - 1:+.1%}" for arm in ("naive", "cached")), f"{row['cached']['busy']:.0%}",
        ])  # fmt: skip
    print(columns(rows) + "\n")
    print(f"simulated steps, bf16 in the hops, with the speeds of {source}\n")


def _print_activations(kept: dict[str, dict[str, dict[int, int]]], batch: int, context: int) -> None:
    rows = [["recompute", "arm", *(f"rank {rank}" for rank in kept["prenorm"]["none"])]]
    for arm, by in kept.items():
        rows += [[level, arm, *(f"{size:,}" for size in sizes.values())] for level, sizes in by.items()]
    print(columns(rows) + "\n")
    print(
        f"bytes that a rank keeps of one micro-batch of {batch} x {context} from forward to backward, measured in float32"
    )
