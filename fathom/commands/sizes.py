"""`fathom sizes`: what Kimi Linear decoders of known size count and take, without building one."""

from typing import Any

from fathom.commands.output import Function, Json, columns, print_json


def sizes() -> Function:
    def run(context: int | None = None, as_json: Json = False) -> None:
        """List the Kimi Linear decoders of known size: parameters, arithmetic, bytes; each checks its own counts.

        Args:
            context: Tokens of the sequence that all else is counted for; each size's own if not given.
        """
        from fathom.errors import UserError
        from fathom.inference.memory import bank_bytes, size
        from fathom.models.accounting import flops_per_token, parameters, source_counts
        from fathom.models.activations import gpu_activation_bytes
        from fathom.models.kimi_counts import cache_bytes
        from fathom.models.sizes import PUBLISHED, SIZES, active_parameters

        if context is not None and context < 1:
            raise UserError(f"context is {context}: it must be at least 1")
        rows: list[dict[str, Any]] = []
        for name, make in SIZES.items():
            config = make()
            tokens = context or config.context
            counts, kept = parameters(config), gpu_activation_bytes(config, 1, tokens)
            either = kept["sublayers"] + kept["head and loss"]
            rows.append({
                "size": name, "parameters": sum(counts.values()), "active": active_parameters(config),
                "active_with_head": active_parameters(config) + counts["head"], "context": tokens,
                "flops_per_token": sum(flops_per_token(config, tokens).values()),
                "weight_bytes": 2 * sum(counts.values()), **cache_bytes(config, tokens),
                "bank_bytes": bank_bytes(max(source_counts(config)), tokens, config.dim, 2),
                "activation_bytes": {rule: either + kept[rule] for rule in ("prenorm", "block")},
                "counts": counts, "published": PUBLISHED.get(name),
            })  # fmt: skip
        if as_json:
            print_json({"sizes": rows})
            return
        table = [["size", "parameters", "active", "with head", "GFLOP/token", "weights", "tokens", "KDA state", "MLA cache",
                  "bank", "PreNorm keeps", "Block keeps"]]  # fmt: skip
        for r in rows:
            table.append([
                r["size"], f"{r['parameters']:,}", f"{r['active']:,}", f"{r['active_with_head']:,}",
                f"{r['flops_per_token'] / 1e9:.3g}", size(r["weight_bytes"]), f"{r['context']:,}",
                size(r["kda_state"] + r["kda_tails"]), size(r["mla_cache"]), size(r["bank_bytes"]),
                *(size(r["activation_bytes"][rule]) for rule in ("prenorm", "block")),
            ])  # fmt: skip
        print(
            "active: what a token meets, embedding and head apart; arithmetic of a forward pass; bytes in bf16, the KDA\n"
            "state in float32; cache and bank of one sequence. Keeps: activations of a training micro-batch of one sequence,\n"
            "under PreNorm and under Block, with the kernels of a GPU; counted, not measured (docs/kimi-linear.md).\n"
        )
        print(columns(table) + "\n")
        print("\n".join(f"{r['size']:<6}  {r['published']}" for r in rows if r["published"]))

    return run
