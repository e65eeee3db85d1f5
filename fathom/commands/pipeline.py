"""`fathom bench --pipeline`: what a pipeline's hops carry, naive against cached."""

from fathom.bench import BenchOptions
from fathom.commands.output import columns, print_json
from fathom.errors import UserError


def show_traffic(options: BenchOptions, ranks: int, virtual: int, micro_batches: int, *, as_json: bool) -> None:
    """Print the split and every hop's bytes; up to ``MOST_RANKS`` ranks they are counted in gloo processes."""
    from fathom.parallel.config import check_micro_batches
    from fathom.parallel.plan import describe, make_plan
    from fathom.parallel.traffic import MOST_RANKS, table

    if ranks < 2:
        raise UserError(f"--ranks is {ranks}: a pipeline needs at least two")
    check_micro_batches(micro_batches, "1f1b", ranks, virtual)
    plan = make_plan(options.model, ranks, virtual)
    found = table(
        options.model,
        ranks,
        virtual,
        num_micro_batches=micro_batches,
        micro_batch=options.batch,
        run=ranks <= MOST_RANKS,
    )
    if as_json:
        print_json(found)
        return
    print(columns(describe(plan, options.model)) + "\n")
    arms = ("prenorm", "naive", "cached")
    rows = [["hop", "ranks", *arms]]
    for hop in found["hops"]:
        rows.append([
            f"into {hop['into']}", f"{hop['from_rank']} -> {hop['to_rank']}", *(f"{hop[arm]:,}" for arm in arms)
        ])  # fmt: skip
    rows.append(["largest", "", *(f"{max(hop[arm] for hop in found['hops']):,}" for arm in arms)])
    rows.append(["step", "", *(f"{found['step'][arm]:,}" for arm in arms)])
    print(columns(rows) + "\n")
    how = (
        "counted from what gloo processes sent"
        if found["counted"]
        else f"computed: above {MOST_RANKS} ranks none is started"
    )
    print(
        f"bytes of one micro-batch of {options.batch} x {options.model.context} in float32, one way; "
        f"step: {micro_batches} micro-batches, both ways; {how}"
    )
