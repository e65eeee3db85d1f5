"""`fathom residuals` and `bench`: what a residual rule costs, counted and timed."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import FlagCreatePairsOff, arg

from fathom.commands.output import Function, Json, columns, enough_memory, print_json

if TYPE_CHECKING:
    from fathom.bench import BenchOptions


def residuals() -> Function:
    def run(dim: int = 1024, layers: int = 24, as_json: Json = False) -> None:
        """List the residual rules: equation, source, and what each adds in parameters, arithmetic and memory.

        Args:
            dim: The width D.
            layers: Decoder layers, each of two sublayers.
        """
        from fathom.errors import UserError
        from fathom.models.accounting import flops_per_token, parameters, source_counts, state_bytes
        from fathom.models.config import ModelConfig, ResidualConfig
        from fathom.residuals.catalogue import CATALOGUE, SWITCHES

        rules: list[dict[str, Any]] = []
        for rule, entry in CATALOGUE.items():
            row: dict[str, Any] = {"rule": rule, "name": entry.name, "equation": entry.equation, "source": entry.source,
                                   "start": entry.start}  # fmt: skip
            rules.append(row)
            residual = ResidualConfig(rule=rule)  # type: ignore[arg-type]
            try:
                config = ModelConfig(
                    dim=dim, num_layers=layers, num_heads=1, head_dim=dim + dim % 2, mlp_dim=1, residual=residual
                )
                counts = source_counts(config)
                row |= {
                    "parameters": parameters(config)["residual rule"],
                    "flops_per_token": flops_per_token(config, 1)["residual rule"],
                    "state_bytes_per_token": state_bytes(config),
                    "added_bytes_per_token": state_bytes(config) - 2 * dim,
                    "mean_sources": sum(counts) / len(counts) if max(counts) > 1 else None,
                }
            except UserError as error:
                if rule == "prenorm":
                    raise
                row["refused"] = str(error)
        if as_json:
            print_json({"rules": rules, "switches": SWITCHES})
            return
        rows = [
            ["rule", "parameters added", "FLOPs/token added", "bytes/token added", "sources/read", "at first", "arXiv"]
        ]
        for r in rules:
            if "refused" in r:
                rows.append([r["rule"], "-", "-", "-", "-", r["start"], r["source"]])
                continue
            numbers = [f"{r['parameters']:,}", f"{r['flops_per_token']:,.0f}", f"{r['added_bytes_per_token']:,}"]
            sources = "-" if r["mean_sources"] is None else f"{r['mean_sources']:.2f}"
            rows.append([r["rule"], *numbers, sources, r["start"], r["source"]])
        print(
            f"width {dim}, {2 * layers} sublayers; bytes: what a token carries from sublayer to sublayer, where it is most, in "
            f"bf16, beyond PreNorm's {2 * dim:,}\n"
        )
        print(columns(rows) + "\n")
        for r in rules:
            if "refused" in r:
                print(f"{r['rule']} is not for this width: {r['refused']}\n")
        print("\n".join(f"{r['rule']:<17}  {r['equation']}" for r in rules) + "\n")
        print("Switches, as an arm of a sweep writes them (block:heads=4) or as --model.residual.heads 4:")
        print("\n".join(f"{switch:<23}  {meaning}" for switch, meaning in SWITCHES.items()))

    return run


def bench() -> Function:
    from fathom.bench import BenchOptions
    from fathom.bench import bench as run_bench
    from fathom.commands.pipeline import show_pipeline
    from fathom.errors import UserError

    def run(
        options: Annotated[BenchOptions, arg(name="")],
        memory: Annotated[bool, FlagCreatePairsOff] = False,
        ranks: int = 1,
        chunk: int | None = None,
        size: str | None = None,
        pipeline: Annotated[bool, FlagCreatePairsOff] = False,
        virtual: int = 2,
        micro_batches: int | None = None,
        speeds: Path | None = None,
        as_json: Json = False,
    ) -> None:
        """Time the training step of every residual rule against PreNorm, in turns, once they agree at zero queries.

        Every number is of one optimizer step; low and high are the fastest and the slowest round.

        Args:
            memory: Instead, say what serving --model takes in memory: --batch sequences of --model.context tokens.
            ranks: With --memory: over how many ranks the model is served. With --pipeline: ranks of the pipeline.
            chunk: With --memory: tokens of a prompt taken in at a time; the whole prompt if not given.
            size: With --memory: a Kimi Linear of `fathom sizes`, instead of --model.
            pipeline: Instead, show the bytes of every hop of a pipeline, naive against cached; --batch is a micro-batch.
            virtual: With --pipeline: stages of one rank.
            micro_batches: With --pipeline: micro-batches of one step; 8, or two for each rank, if not given.
            speeds: With --pipeline: a JSON file with the speeds of a rank and its links, for the simulated times.
        """
        if size is not None:
            from fathom.models.sizes import SIZES

            if not memory:
                raise UserError(f"--size is {size}: it goes with --memory")
            if size not in SIZES:
                raise UserError(f"--size is {size!r}: it must be one of {', '.join(SIZES)}")
            options = replace(options, model=SIZES[size]())
        if pipeline:
            show_pipeline(options, ranks, virtual, micro_batches or max(8, 2 * ranks), speeds, as_json=as_json)
            return
        if memory:
            _memory(options, ranks, chunk, as_json)
            return
        with enough_memory("give a smaller --batch, --model.dim or --model.context"):
            result = run_bench(options)
        if as_json:
            print_json(result)
            return
        versions, rows = result["versions"], result["rows"]
        print(
            f"{rows[0]['case']}, {rows[0]['n']} rounds; at zero queries all agree to {result['gate']['difference']:.0e}"
        )
        print(
            f"{result['machine']}, {versions['threads']} threads, backend {versions['backend']}, "
            f"torch {versions['torch']}, python {versions['python']}\n"
        )
        table = [["arm", "median ms", "low", "high", "over prenorm"]]
        table += [
            [r["arm"], *(f"{r[key]:.1f}" for key in ("median", "low", "high")), f"{r['over_prenorm']:.3f}"]
            for r in rows
        ]
        print(columns(table))

    return run


def _memory(options: "BenchOptions", ranks: int, chunk: int | None, as_json: bool) -> None:
    import torch

    from fathom.errors import UserError
    from fathom.inference import memory
    from fathom.inference.engine import Engine
    from fathom.models.kimi_linear import build
    from fathom.train.environment import pick_device

    for name, value in (("ranks", ranks), ("chunk", chunk)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")
    device, model = pick_device(options.device), options.model
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    slots, capacity = options.batch, model.context
    predicted = memory.predict(
        model, slots=slots, capacity=capacity, chunk=chunk, dtype=dtype, ranks=ranks, device=device
    )
    memory.check(predicted, memory.available(device))
    measured: memory.Bytes = {}
    if ranks == 1:
        with enough_memory("give a smaller --batch, --chunk or --model.context"):
            net = build(model, end_of_text=0).to(device)
            measured = memory.measure(Engine(net, slots=slots, chunk=chunk, dtype=dtype))
    if as_json:
        print_json({"predicted": predicted, "measured": measured or None})
        return
    pieces = "whole prompts" if chunk is None else f"chunks of {chunk:,} tokens"
    print(f"{model.residual.rule}, {slots:,} x {capacity:,} tokens, {pieces}, rank 0 of {ranks}, {options.precision}\n")
    table = [["", "predicted bytes", "measured bytes", "predicted"]]
    for name, count in (*predicted.items(), ("total", sum(predicted.values()))):
        found = f"{measured.get(name, sum(measured.values())):,}" if measured else "-"
        table.append([name.replace("_", " "), f"{count:,}", found, memory.size(count)])
    print(columns(table))
