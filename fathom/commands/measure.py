"""`fathom residuals` and `bench`: what a residual rule costs, counted and timed."""

from typing import Annotated, Any

from tyro.conf import arg

from fathom.commands.output import Function, Json, columns, enough_memory, print_json


def residuals() -> Function:
    def run(dim: int = 1024, layers: int = 24, as_json: Json = False) -> None:
        """List the residual rules: equation, source, and what each adds in parameters, arithmetic and memory.

        Args:
            dim: The width D.
            layers: Decoder layers, each of two sublayers.
        """
        from fathom.models.accounting import flops_per_token, parameters, source_counts, state_bytes
        from fathom.models.config import ModelConfig, ResidualConfig
        from fathom.residuals.catalogue import CATALOGUE

        rules: list[dict[str, Any]] = []
        for rule, entry in CATALOGUE.items():
            residual = ResidualConfig(rule=rule)  # type: ignore[arg-type]
            config = ModelConfig(
                dim=dim, num_layers=layers, num_heads=1, head_dim=dim + dim % 2, mlp_dim=1, residual=residual
            )
            counts = source_counts(config)
            rules.append({
                "rule": rule, "name": entry.name, "equation": entry.equation, "source": entry.source, "start": entry.start,
                "parameters": parameters(config)["residual rule"],
                "flops_per_token": flops_per_token(config, 1)["residual rule"],
                "state_bytes_per_token": state_bytes(config),
                "mean_sources": sum(counts) / len(counts) if max(counts) > 1 else None,
            })  # fmt: skip
        if as_json:
            print_json(rules)
            return
        rows = [
            ["rule", "parameters added", "FLOPs/token added", "state bytes/token", "sources/read", "at first", "arXiv"]
        ]
        for r in rules:
            numbers = [f"{r['parameters']:,}", f"{r['flops_per_token']:,.0f}", f"{r['state_bytes_per_token']:,}"]
            sources = "-" if r["mean_sources"] is None else f"{r['mean_sources']:.2f}"
            rows.append([r["rule"], *numbers, sources, r["start"], r["source"]])
        print(
            f"width {dim}, {2 * layers} sublayers; state: what is carried between sublayers, where it is most, in bf16\n"
        )
        print(columns(rows) + "\n")
        print("\n".join(f"{r['rule']:<17}  {r['equation']}" for r in rules))

    return run


def bench() -> Function:
    from fathom.bench import BenchOptions
    from fathom.bench import bench as run_bench

    def run(options: Annotated[BenchOptions, arg(name="")], as_json: Json = False) -> None:
        """Time the training step of every residual rule against PreNorm, in turns, once they agree at zero queries.

        Every number is of one optimizer step; low and high are the fastest and the slowest round.
        """
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
