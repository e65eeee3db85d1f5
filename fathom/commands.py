"""What each command of `fathom` does: the signature is its flags, the docstring its help (parsed by tyro, see cli.py).

A command is made when it is chosen, so that a light one imports nothing heavy. Results go to standard output, for
people or, with `--json`, as one JSON value; all else goes to standard error.
"""

import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import FlagCreatePairsOff, Positional, arg

from fathom.errors import UserError

Function = Callable[..., int | None]
Json = Annotated[bool, FlagCreatePairsOff, arg(name="json", help="Print one JSON value on standard output.")]

EQUATIONS = {
    "prenorm": ("h_l = h_{l-1} + f_{l-1}(h_{l-1})", "section 2"),
    "full": ("h_l = Σ_{i<l} α_i v_i,  α = softmax(w_l·RMSNorm(v)),  v_0 = embedding, v_i = f_i(h_i)", "section 3.1"),
    "block": (
        "h_l = Σ_i α_i b_i over the embedding b_0, finished blocks b_n = Σ_{j∈block n} f_j(h_j), and the partial sum",
        "section 3.2",
    ),
}
"""A residual rule's equation and its place in arXiv 2603.15031."""


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _columns(rows: list[list[str]]) -> str:
    """Rows as aligned columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = (
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    )
    return "\n".join("  ".join(line) for line in cells)


@contextmanager
def _memory(advice: str) -> Iterator[None]:
    """Running out of memory is a matter of settings: a ``UserError`` with ``advice``."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        memory = ("out of memory", "allocate memory", "Storage size calculation overflowed")
        if isinstance(error, MemoryError) or any(phrase in text for phrase in memory):
            raise UserError(f"this needs more memory than there is; {advice}") from None
        raise


def quickstart() -> Function:
    from fathom.quickstart import QuickstartOptions
    from fathom.quickstart import quickstart as run_quickstart

    def run(options: Annotated[QuickstartOptions, arg(name="")], as_json: Json = False) -> None:
        """Train a small AttnRes decoder and its PreNorm twin on the text inside the package, and compare them."""
        result = run_quickstart(options)
        if as_json:
            _print_json(result)

    return run


def data_prepare() -> Function:
    from fathom.train.prepare import PrepareOptions, prepare

    def run(
        source: Positional[str],
        out: Positional[Path],
        options: Annotated[PrepareOptions, arg(name="")],
        as_json: Json = False,
    ) -> None:
        """Turn text into a dataset folder: token shards, tokenizer and manifest.

        Args:
            source: A file (.txt, .md, .jsonl, .parquet, .arrow, also .gz or .zst), a folder of them, or debian-docs.
            out: The dataset folder to make.
            options: How.
        """
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        manifest = prepare(source, out, options=options)
        if as_json:
            _print_json(manifest.to_json())
            return
        splits = ", ".join(
            f"{split} {manifest.total(split, 'tokens'):,} tokens in {manifest.total(split, 'documents'):,} documents"
            for split in manifest.splits
        )
        print(f"{out}: {splits}; vocabulary {manifest.vocab_size:,}")
        print(f"fathom train quick --data.folder {shlex.quote(str(out))}")

    return run


def data_pack() -> Function:
    from fathom.train.packing import pack

    def run(
        folder: Positional[Path],
        out: Positional[Path],
        max_tokens: int | None = None,
        limit_mib: float | None = None,
        name: str | None = None,
    ) -> None:
        """Put a dataset folder into one compressed file.

        Args:
            folder: The dataset.
            out: The file to write, NAME.fathom by custom.
            max_tokens: Pack only as many whole training shards as stay within this many tokens.
            limit_mib: Cut the file into parts of at most this many MiB.
            name: Name of the packed dataset; its own if not given.
        """
        for path in pack(folder, out, max_tokens=max_tokens, limit_mib=limit_mib, name=name):
            print(path)

    return run


def data_unpack() -> Function:
    from fathom.train.packing import unpack

    def run(file: Positional[Path], out: Positional[Path]) -> None:
        """Make the dataset folder of a packed file, every byte checked.

        Args:
            file: The packed file, or its first part.
            out: The dataset folder to make.
        """
        manifest = unpack(file, out)
        print(f"{out}: {manifest.name}, {manifest.total('train', 'tokens'):,} training tokens")

    return run


def data_sample() -> Function:
    from fathom.train.prepare import sample_documents

    def run(folder: Positional[Path], count: int = 5, seed: int = 0) -> None:
        """Show training documents of a dataset, drawn at random.

        Args:
            folder: The dataset.
            count: How many.
            seed: Of the draw.
        """
        if count < 1 or seed < 0:
            raise UserError(f"count is {count} and seed {seed}: they must be at least 1 and 0")
        for number, text in enumerate(sample_documents(folder, count, seed), 1):
            print(f"--- {number} ---\n{text}")

    return run


def train(recipe: str) -> Function:
    """The command `fathom train RECIPE`."""
    from fathom.train import loop
    from fathom.train.config import RunConfig
    from fathom.train.recipes import RECIPES

    default = RECIPES[recipe]()

    def run(
        out: Path | None = None, as_json: Json = False, config: Annotated[RunConfig, arg(name="")] = default
    ) -> int | None:
        """
        Args:
            out: The run folder to make; runs/<recipe>-<rule>-<seed> if not given.
        """
        folder = out or Path("runs") / f"{recipe}-{config.model.residual.rule}-{config.seed}"
        return _drive(folder, lambda: loop.train(config, folder), as_json)

    run.__doc__ = f"{RECIPES[recipe].__doc__}\n{run.__doc__}"
    return run


def train_resume() -> Function:
    from fathom.train import loop

    def run(resume: Path, as_json: Json = False) -> int | None:
        """Train a recipe with `fathom train RECIPE` (`fathom train RECIPE --help` lists its flags), or resume a run.

        Recipes: quick (the text inside the package, a CPU), debian-50m (a GPU; see `fathom data prepare debian-docs`).

        Args:
            resume: The run folder to continue from its newest checkpoint, with its own settings.
        """
        return _drive(resume, lambda: loop.resume(resume), as_json)

    return run


def _drive(run: Path, train: Callable[[], dict[str, Any]], as_json: bool) -> int | None:
    from fathom.train.loop import Diverged, Interrupted

    folder = shlex.quote(str(run))
    try:
        with _memory("give a smaller --data.micro-batch, --model.dim or --model.context"):
            summary = train()
    except Interrupted as stop:
        print(f"fathom train: {stop}; go on with `fathom train --resume {folder}`", file=sys.stderr)
        return 130
    except Diverged as error:
        print(f"fathom train: {error}", file=sys.stderr)
        return 1
    if as_json:
        _print_json({"run": str(run), **summary})
        return None
    print(
        f"{summary['rule']}: validation loss {summary['val_loss']:.4f} nats per token after {summary['steps']:,} steps "
        f"({summary['tokens']:,} tokens, {summary['parameters']:,} parameters) in {run}"
    )
    print(f"fathom sample {folder} --prompt ''")
    return None


def sample() -> Function:
    def run(
        run: Positional[Path],
        prompt: str = "",
        tokens: int = 200,
        temperature: float = 0.8,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        checkpoint: int | None = None,
        device: str = "auto",
    ) -> None:
        """Continue a text with the model of a run, as it comes; the speed goes to standard error.

        Args:
            run: The run folder.
            prompt: The text to continue; an empty one begins a document.
            tokens: How many tokens at most; the model may end its document earlier.
            temperature: 1 draws as the model predicts, less is bolder, 0 always takes the likeliest token.
            top_k: Draw only among this many likeliest tokens.
            top_p: Draw only among the fewest tokens that hold this share of the probability.
            seed: Of the draws.
            checkpoint: The step of the checkpoint; the newest if not given.
            device: cpu, cuda, or auto for the GPU where there is one.
        """
        from fathom.inference.sample import decode_stream, encode_prompt, generate, load_run
        from fathom.train.environment import pick_device

        model, tokenizer = load_run(run, pick_device(device), step=checkpoint)
        given = encode_prompt(tokenizer, prompt)
        made = 0

        def counted() -> Iterator[int]:
            nonlocal made
            settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
            for token in generate(model, given, count=tokens, seed=seed, **settings):  # type: ignore[arg-type]
                made += 1
                yield token

        begin = time.perf_counter()
        for piece in decode_stream(tokenizer, chain(given, counted())):
            print(piece, end="", flush=True)
        print()
        seconds = time.perf_counter() - begin
        print(f"{made} tokens, {made / seconds:.1f} tokens/s", file=sys.stderr)

    return run


def report() -> Function:
    from fathom.lab.dynamics import write_depth
    from fathom.lab.report import write_report
    from fathom.train.checkpoint import checkpoints

    def run(runs: Positional[tuple[Path, ...]], out: Path = Path("report.html"), as_json: Json = False) -> None:
        """Compare runs in one HTML page.

        What each layer reads is first measured on the newest checkpoint of a run, where that has not been done.

        Args:
            runs: The run folders.
            out: The page to write.
        """
        if not runs:
            raise UserError("report: give at least one run folder")
        for folder in runs:
            depth = folder / "depth.json"
            newest = checkpoints(folder)
            if newest and not (depth.is_file() and depth.stat().st_mtime >= newest[-1].stat().st_mtime):
                try:
                    write_depth(folder)
                except UserError as error:  # the page shows the rest of the run
                    print(f"fathom report: {folder} goes without depth maps: {error}", file=sys.stderr)
        page = write_report(list(runs), out)
        if as_json:
            _print_json({"report": str(page)})
        else:
            print(page)

    return run


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
            _print_json(rules)
            return
        rows = [["rule", "parameters added", "state bytes/token", "sources/read", "arXiv 2603.15031"]]
        for r in rules:
            numbers = [f"{r['parameters']:,}", f"{r['state_bytes_per_token']:,}", f"{r['mean_sources']:.2f}"]
            rows.append([r["rule"], *numbers, r["section"]])
        print(f"width {dim}, {2 * layers} sublayers; state: the sources that the widest read attends over, in bf16\n")
        print(_columns(rows) + "\n")
        print("\n".join(f"{r['rule']:<8}  {r['equation']}" for r in rules))

    return run


def bench() -> Function:
    from fathom.bench import BenchOptions
    from fathom.bench import bench as run_bench

    def run(options: Annotated[BenchOptions, arg(name="")], as_json: Json = False) -> None:
        """Time the training step of every residual rule against PreNorm, in turns, once they agree at zero queries.

        Every number is of one optimizer step; low and high are the fastest and the slowest round.
        """
        with _memory("give a smaller --batch, --model.dim or --model.context"):
            result = run_bench(options)
        if as_json:
            _print_json(result)
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
        print(_columns(table))

    return run


COMMANDS: dict[str, Callable[[], Function]] = {
    "quickstart": quickstart,
    "data prepare": data_prepare,
    "data pack": data_pack,
    "data unpack": data_unpack,
    "data sample": data_sample,
    "train": train_resume,
    "sample": sample,
    "report": report,
    "residuals": residuals,
    "bench": bench,
}
