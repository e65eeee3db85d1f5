"""The quick start: PreNorm and Block AttnRes twins, trained side by side on the text inside the package.

The twins share their initial weights and their batches, and their learning rate was tuned for each over the same grid
(benchmarks/results/2026-11-22_quickstart). Steps alternate, A B A B, so that the step times were taken under the same conditions.
"""

import json
import shlex
import statistics
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from fathom.errors import UserError
from fathom.inference.engine import Engine
from fathom.inference.generate import generate
from fathom.inference.sampling import Sampling
from fathom.lab.report import write_report
from fathom.lab.report_measure import measure
from fathom.models.config import ModelConfig
from fathom.models.transformer import Transformer
from fathom.train.config import RunConfig
from fathom.train.environment import machine, pick_device
from fathom.train.loop import Interrupted, Trainer, stop_on_signal
from fathom.train.metrics import ProgressLine, duration
from fathom.train.recipes import RULES, quick, twin

PROMPT = "My fellow citizens, the state of our union is"


@dataclass(frozen=True)
class QuickstartOptions:
    """The quick start's settings."""

    out: Path | None = None
    """Folder of the two runs and report.html; must not exist yet. If not given: runs/quickstart, or the next free number."""
    steps: int = 550
    """Optimizer steps of each twin."""
    seed: int = 0
    """Of initialisation and data order."""
    device: str = "auto"
    """cpu, cuda, or auto for the GPU where there is one."""


def zero_query_identity(config: ModelConfig, seed: int = 0) -> tuple[float, float]:
    """How far zero-query Block is from PreNorm in float64 with epsilon 0: in the loss, and in any gradient (relative).

    Both are rounding errors: AttnRes starts as the PreNorm network (paper, section 5).
    """
    results = []
    for rule in RULES:
        exact = twin(RunConfig(model=replace(config, norm_eps=0.0, head_std=1.0)), rule).model
        exact = replace(exact, residual=replace(exact.residual, eps=0.0))
        model = Transformer(exact, seed=seed).double()
        tokens = torch.randint(exact.vocab_size, (2, 33), generator=torch.Generator().manual_seed(seed))
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        gradients = {
            n: p.grad for n, p in model.named_parameters() if not n.startswith("stream.") and p.grad is not None
        }
        results.append((loss.item(), gradients))
    (prenorm, expected), (block, found) = results
    worst = max(((found[name] - g).norm() / g.norm()).item() for name, g in expected.items())
    return abs(block - prenorm), worst


def published_seeds() -> dict[str, Any]:
    """The committed three-seed result of this very configuration, made by benchmarks/quickstart_seeds.py."""
    return json.loads((files("fathom") / "assets/quickstart-seeds.json").read_text())


def free_folder(wanted: Path) -> Path:
    """``wanted``, or the first of wanted-2, wanted-3 ... that does not exist."""
    number, folder = 1, wanted
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def train_twins(options: QuickstartOptions, out: Path) -> list[dict[str, Any]]:
    """Train both in folders of ``out``, alternating; returns their summaries. Ctrl-C saves both and raises ``Interrupted``."""
    config = replace(quick(), steps=options.steps, seed=options.seed, device=options.device)
    with ExitStack() as stack:
        trainers = [stack.enter_context(closing(Trainer(twin(config, rule), out / rule))) for rule in RULES]
        stop = stack.enter_context(stop_on_signal())
        losses = [0.0, 0.0]
        line, begin = ProgressLine(), time.perf_counter()
        for step in range(1, options.steps + 1):
            for index, trainer in enumerate(trainers):
                mark = time.perf_counter()
                result = trainer.step()
                losses[index] = result.loss.item()  # waits for a GPU, so that the time is this twin's
                elapsed = time.perf_counter() - mark
                trainer.record([(step, result)], elapsed)
                if step % config.eval_every == 0 or step == options.steps:
                    trainer.validate()
                if stop or step == options.steps:
                    trainer.save()
            if stop:
                line.clear()
                raise Interrupted(f"stopped after step {step}; both twins are saved in {out}")
            left = (options.steps - step) * (time.perf_counter() - begin) / step
            shown = ", ".join(f"{rule} {loss:.3f}" for rule, loss in zip(RULES, losses, strict=True))
            line.show(f"step {step}/{options.steps}  training loss: {shown}  {duration(left)} left")
        line.clear()
        return [trainer.summarize() for trainer in trainers]


def quickstart(options: QuickstartOptions) -> dict[str, Any]:
    """Train the twins, compare them, sample from the better one and write ``report.html``; returns what was printed."""
    if options.out is not None and options.out.exists():
        raise UserError(f"{options.out} exists already; give another --out, or delete it")
    out = options.out or free_folder(Path("runs/quickstart"))
    console = Console(stderr=False, highlight=False)
    device = pick_device(options.device)
    config = quick().model
    console.print(
        f"[bold]Fathom quick start[/bold]  {config.num_layers} decoder layers, width {config.dim}, {options.steps} steps of "
        f"each twin on {machine(device)}. Ctrl-C saves and stops."
    )
    loss_error, gradient_error = zero_query_identity(config, options.seed)
    console.print(
        f"At zero queries Block AttnRes is PreNorm: in float64 the losses differ by {loss_error:.1e}, "
        f"the gradients by at most {gradient_error:.1e} (relative)."
    )
    prenorm, block = train_twins(options, out)
    for rule in RULES:
        measure(out / rule, device=options.device)
    report = write_report([out / rule for rule in RULES], out / "report.html")

    console.print(_table(prenorm, block))
    gain = prenorm["val_loss"] - block["val_loss"]
    winner = "block" if gain > 0 else "prenorm"
    console.print(
        f"Block AttnRes is [bold]{abs(gain):.3f} nats {'better' if gain > 0 else 'worse'}[/bold] here, with seed {options.seed}, "
        f"at equal steps."
    )
    published = published_seeds()
    if options.steps == published["steps"]:
        low, high = published["gain_interval_90"]
        seeds, spreads = len(published["block"]), [_spread(published[rule]) for rule in RULES]
        console.print(
            f"{seeds} seeds of this configuration: PreNorm {spreads[0]}, Block {spreads[1]}; "
            f"paired gain {published['gain']:.3f}, 90 % interval {low:.3f} to {high:.3f}."
        )
    console.print(f"[bold]{winner}[/bold] continues:", end=" ")
    console.print(PROMPT + _sample(out / winner, device), markup=False)
    # To be copied: not wrapped, and a bracket in a path is no markup.
    run = shlex.quote(str(out / winner))
    console.print(
        f"Report: {report}\nSample more: fathom sample {run} --prompt 'The people of'", markup=False, soft_wrap=True
    )
    return {"prenorm": prenorm, "block": block, "gain": gain, "identity": {"loss": loss_error, "gradients": gradient_error},
            "report": str(report)}  # fmt: skip


def _spread(losses: list[float]) -> str:
    return f"{statistics.mean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"


def _table(prenorm: dict[str, Any], block: dict[str, Any]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("", "PreNorm", "Block AttnRes", "difference"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row(
        "validation loss, nats per token", f"{prenorm['val_loss']:.4f}", f"{block['val_loss']:.4f}",
        f"{block['val_loss'] - prenorm['val_loss']:+.4f}",
    )  # fmt: skip
    times = [summary["tokens"] / summary["steps"] / summary["tokens_per_second"] for summary in (prenorm, block)]
    table.add_row(
        "median step, ms", f"{1e3 * times[0]:.0f}", f"{1e3 * times[1]:.0f}", f"{times[1] / times[0] - 1:+.1%}"
    )
    added = block["parameters"] - prenorm["parameters"]
    table.add_row(
        "parameters", f"{prenorm['parameters']:,}", f"{block['parameters']:,}",
        f"{added:+,} ({added / prenorm['parameters']:+.2%})",
    )  # fmt: skip
    return table


def _sample(run: Path, device: torch.device) -> str:
    pieces = generate(Engine.load(run, device=device), [PROMPT], Sampling(tokens=60, temperature=0.7))
    return "".join(piece.text for piece in pieces)
