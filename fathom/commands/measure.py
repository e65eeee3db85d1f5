"""`fathom residuals` and `bench`: what a residual rule costs, counted and timed."""

from typing import Annotated, Any

from tyro.conf import arg

from fathom.commands.output import Function, Json, columns, enough_memory, print_json

EQUATIONS = {
    "prenorm": ("h_l = h_{l-1} + f_{l-1}(h_{l-1})", "section 2"),
    "full": ("h_l = Σ_{i<l} α_i v_i,  α = softmax(w_l·RMSNorm(v)),  v_0 = embedding, v_i = f_i(h_i)", "section 3.1"),
    "block": (
        "h_l = Σ_i α_i b_i over the embedding b_0, finished blocks b_n = Σ_{j∈block n} f_j(h_j), and the partial sum",
        "section 3.2",
    ),
}
"""A residual rule's equation and its place in arXiv 2603.15031."""


def residuals() -> Function:
    def run(dim: int = 1024, layers: int = 24, as_json: Json = False) -> None:
        """List the residual rules: equation, what each adds in parameters and keeps in memory, and what a read sees.

        Args:
            dim: The width D.
            layers: Decoder layers, each of two sublayers.
        """
        from fathom.models.accounting import parameters, source_counts
        from fathom.models.config import ModelConfig, ResidualConfig

        rules: list[dict[str, Any]] = []
        for rule, (equation, section) in EQUATIONS.items():
            residual = ResidualConfig(rule=rule)  # type: ignore[arg-type]
            config = ModelConfig(dim=dim, num_layers=layers, num_heads=1, head_dim=2, mlp_dim=1, residual=residual)
            counts = source_counts(config)
            rules.append({
                "rule": rule, "equation": equation, "section": section,
                "parameters": parameters(config)["depth attention"],
                "state_bytes_per_token": 2 * dim * max(counts),
                "mean_sources": sum(counts) / len(counts),
            })  # fmt: skip
        if as_json:
            print_json(rules)
            return
        rows = [["rule", "parameters added", "state bytes/token", "sources/read", "arXiv 2603.15031"]]
        for r in rules:
            numbers = [f"{r['parameters']:,}", f"{r['state_bytes_per_token']:,}", f"{r['mean_sources']:.2f}"]
            rows.append([r["rule"], *numbers, r["section"]])
        print(f"width {dim}, {2 * layers} sublayers; state: the sources that the widest read attends over, in bf16\n")
        print(columns(rows) + "\n")
        print("\n".join(f"{r['rule']:<8}  {r['equation']}" for r in rules))

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
