"""Kimi Linear under PreNorm and under Block AttnRes, side by side: same data, seeds and steps, on one GPU.

    python benchmarks/kimi_nano.py --out OUT --data DATA --seconds 200      (kimi-nano, one GPU, fla-core on the path)
    python benchmarks/kimi_nano.py --out OUT --size micro --steps 30        (kimi-micro, the text inside the package, a CPU)

Both networks are in one process and take turns of a few steps, so that whatever drifts drifts for both; each one's peak memory is
counted without the other's. With --seconds the warm-up is timed, and as many steps are made as fit. DATA is a dataset folder or
a packed dataset, which is unpacked first. On a GPU a gate comes first (kimi_kernels.py); if fla-core's KDA fails or is wrong
there or later, the benchmark says so and begins again with the chunked path. OUT gets SEED/RULE (run folders without
checkpoints), result.json and curves.png, both written anew at every validation.
"""

import argparse
import datetime
import json
import os
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import matplotlib

matplotlib.use("Agg")

import kimi_kernels
import matplotlib.pyplot as plt
import torch
from summarize import row, seeds_rows

from fathom.errors import UserError
from fathom.models.config import ResidualConfig
from fathom.models.kda import backend_for
from fathom.train.config import RunConfig, save_config
from fathom.train.environment import machine, pick_device
from fathom.train.loop import Diverged, Trainer
from fathom.train.metrics import read_metrics
from fathom.train.packing import unpack
from fathom.train.recipes import RECIPES, RULES

COLORS = {"prenorm": "#888888", "block": "#1f6feb"}
TURN = 10
"""Steps of one turn."""
WARMUP = 40
"""Steps of rising rate where the number of steps is not known yet."""
BEGAN = float(os.environ.setdefault("KIMI_NANO_BEGAN", str(time.time())))
"""When the budget began, in a process that was begun again too."""


@dataclass
class Arm:
    """A rule's network, and what its turns took."""

    rule: str
    trainer: Trainer
    resident: int = 0
    """Bytes on the GPU that are its own, between turns."""
    peak: int = 0
    turns: list[float] = field(default_factory=list)
    """Seconds a step of each turn, the first one's compilation included."""

    def turn(self, count: int) -> None:
        device = self.trainer.device
        before = _allocated(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        begin = _clock(device)
        results = [(self.trainer.progress.step, self.trainer.step()) for _ in range(count)]
        self.turns.append((_clock(device) - begin) / count)
        self.trainer.record([(step + 1, result) for step, result in results], self.turns[-1])
        del results
        if device.type == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated(device) - before + self.resident)
            self.resident += _allocated(device) - before

    def steady(self) -> list[float]:
        """Seconds a step of the turns that compile nothing."""
        return self.turns[2:] or self.turns[-1:]

    def found(self) -> dict[str, Any]:
        lines = [line for line in read_metrics(self.trainer.run) if line["kind"] == "train"]
        tenth = max(1, len(lines) // 10)
        return {
            "val_loss": self.trainer.validation_loss,
            "step_ms": [1e3 * seconds for seconds in self.steady()],
            "tokens_per_s": [self.trainer.tokens_per_step / seconds for seconds in self.steady()],
            "peak_gib": self.peak / 2**30 if self.peak else None,
            "expert_load": statistics.mean(line["expert_load"] for line in lines[-tenth:]),
        }


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def config_of(options: argparse.Namespace, rule: str, seed: int) -> RunConfig:
    """The run of one rule and seed; all else equal. With a budget its steps are set after the warm-up."""
    config = RECIPES[f"kimi-{options.size}"]()
    residual = ResidualConfig(rule="prenorm") if rule == "prenorm" else config.model.residual
    batch = options.batch or config.data.batch
    # The chunked path keeps pairwise decays of every piece.
    thin = options.kda == "chunked" and options.size == "nano" and batch % 4 == 0
    data = replace(
        config.data, folder=options.data or config.data.folder, batch=batch, micro_batch=batch // 4 if thin else None
    )
    steps = options.steps or config.steps
    warmup = WARMUP if options.seconds else min(config.optim.warmup, steps // 5)
    return replace(
        config, model=replace(config.model, residual=residual), data=data, seed=seed, steps=steps,
        optim=replace(config.optim, warmup=warmup), compile=options.compile, device=options.device,
    )  # fmt: skip


def steps_within(arms: list[Arm], left: float) -> int:
    """How many steps both arms can have made in all when ``left`` seconds are over, a tenth kept for validation."""
    one = sum(arm.steady()[-1] for arm in arms)
    made = arms[0].trainer.progress.step
    return max(made + TURN, made + int(0.9 * left / one) // TURN * TURN)


def train_pair(options: argparse.Namespace, seed: int, deadline: float, report: Any) -> list[Arm]:
    """Both arms of a seed, in turns; ``report`` is called at every validation. Stops both at the deadline."""
    arms: list[Arm] = []
    for rule in RULES:
        before = _allocated(options.place)
        arms.append(Arm(rule, Trainer(config_of(options, rule, seed), options.out / f"seed-{seed}" / rule)))
        arms[-1].resident = _allocated(options.place) - before
        arms[-1].turn(1)
        print(f"seed {seed}, {rule}: first step {arms[-1].turns[0]:.1f} s", flush=True)
    for arm in arms:
        arm.turn(TURN - 1)
    if options.seconds:
        for arm in arms:
            arm.turn(TURN)
        steps = steps_within(arms, deadline - time.time())
        for arm in arms:
            arm.trainer.config = replace(arm.trainer.config, steps=steps)
            save_config(arm.trainer.config, arm.trainer.run / "config.json")
    steps = arms[0].trainer.config.steps
    print(f"seed {seed}: {steps} steps of {arms[0].trainer.tokens_per_step:,} tokens", flush=True)
    every = max(TURN, round(steps / 8 / TURN) * TURN)
    while (made := arms[0].trainer.progress.step) < steps:
        late = bool(options.seconds) and time.time() > deadline
        if not late:
            for arm in arms if made // TURN % 2 == 0 else arms[::-1]:
                arm.turn(min(TURN, steps - made))
            made = arms[0].trainer.progress.step
        if made % every == 0 or made == steps or late:
            for arm in arms:
                arm.trainer.validate()
                print(f"seed {seed}, {arm.rule}, step {made}: {arm.found()['val_loss']:.4f} nats per token", flush=True)
            report(arms)
        if late:
            print(f"the time is over after {made} of {steps} steps: the rate has not come down", flush=True)
            break
    for arm in arms:
        summary = arm.trainer.summarize() | {"peak_gib": arm.found()["peak_gib"]}
        (arm.trainer.run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        arm.trainer.close()
    return arms


def rows_of(case: str, found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    losses = {rule: [run["val_loss"] for run in found[rule]] for rule in RULES}
    if len(losses["prenorm"]) > 1:
        rows = seeds_rows(case, losses["prenorm"], losses["block"])
    else:
        rows = [row(case, rule, "val_loss", "nats per token", losses[rule]) for rule in RULES]
    units = {"step_ms": "ms", "tokens_per_s": "tokens/s", "peak_gib": "GiB", "expert_load": "largest over mean"}
    for metric, unit in units.items():
        values = {rule: _flat([run[metric] for run in found[rule]]) for rule in RULES}
        if None in values["prenorm"]:
            continue
        for rule in RULES:
            pairs = zip(values[rule], values["prenorm"], strict=True)
            over = None if rule == "prenorm" else statistics.median(a / b for a, b in pairs)
            rows.append(row(case, rule, metric, unit, values[rule], over_prenorm=over))
    return rows


def _flat(values: list[Any]) -> list[Any]:
    return [x for value in values for x in (value if isinstance(value, list) else [value])]


def draw(out: Path) -> None:
    figure, (losses, loads) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for rule in RULES:
        for number, run in enumerate(sorted(out.glob(f"seed-*/{rule}"))):
            lines = read_metrics(run)
            label = rule if number == 0 else None
            held_out = [(line["step"], line["loss"]) for line in lines if line["kind"] == "val"]
            trained = [line for line in lines if line["kind"] == "train"]
            steps = [line["step"] for line in trained]
            losses.plot(steps, [line["loss"] for line in trained], color=COLORS[rule], linewidth=0.4, alpha=0.5)
            losses.plot(*zip(*held_out, strict=True), color=COLORS[rule], label=label, marker="o", markersize=3)
            loads.plot(steps, [line["expert_load"] for line in trained], color=COLORS[rule], label=label, linewidth=0.8)
    losses.set(xlabel="step", ylabel="nats per token (points: held out)")
    loads.set(xlabel="step", ylabel="largest expert load over the mean")
    losses.legend()
    figure.savefig(out / "curves.png", dpi=150)
    plt.close(figure)


def begin_again(problem: BaseException) -> NoReturn:
    """A kernel that failed may have taken the process's GPU with it: the chunked path gets a process of its own."""
    print(
        f"fla-core's KDA failed ({type(problem).__name__}: {problem}); beginning again with the chunked path",
        flush=True,
    )
    os.environ["FATHOM_KDA"] = "chunked"
    os.execv(sys.executable, sys.orig_argv)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=("nano", "micro"), default="nano")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seconds", type=float, help="of all seeds, from the start of the process; instead of --steps")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--data", help="a dataset folder, or a packed dataset")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", choices=("none", "layers"), default="none")
    parser.add_argument("--tune", action="store_true", help="let fla-core time its kernels' variants: minutes")
    options = parser.parse_args(arguments)
    device = options.place = pick_device(options.device)
    options.kda = backend_for(device, torch.bfloat16)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.kda == "fla" and not options.tune:
        kimi_kernels.pin(options.out / "fla")
    if options.data and Path(options.data).is_file():
        folder = options.out / "data"
        if not folder.exists():
            unpack(Path(options.data), folder)
        options.data = str(folder)
    if any(options.out.glob("seed-*")):
        raise UserError(f"{options.out} holds runs already: give another --out")
    errors = {}
    if device.type == "cuda":
        try:
            errors = kimi_kernels.gate(RECIPES[f"kimi-{options.size}"]().model, device)  # type: ignore[arg-type]
        except Exception as problem:
            if options.kda != "fla" or isinstance(problem, UserError):
                raise
            begin_again(problem)
        print(f"gate passed after {time.time() - BEGAN:.0f} s: {errors}", flush=True)
    done: list[list[Arm]] = []

    def report(arms: list[Arm]) -> None:
        draw(options.out)
        found = {rule: [pair[number].found() for pair in (*done, arms)] for number, rule in enumerate(RULES)}
        result = {
            "name": f"kimi-{options.size}",
            "date": datetime.date.today().isoformat(),
            "command": f"python benchmarks/kimi_nano.py --out OUT --size {options.size} --seeds {options.seeds}"
            + "".join(
                f" --{name} {value:g}" for name in ("steps", "seconds", "batch") if (value := getattr(options, name))
            )
            + (f" --compile {options.compile}" if options.compile != "none" else ""),
            "machine": machine(device),
            "versions": {"torch": torch.__version__},
            "kda": options.kda,
            "gate": errors,
            "steps": [arms[0].trainer.progress.step, arms[0].trainer.config.steps],
            "rows": rows_of(f"kimi-{options.size}", found),
        }
        (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")

    for seed in range(options.seeds):
        left = (options.seconds or 0) - (time.time() - BEGAN)
        try:
            done.append(train_pair(options, seed, time.time() + left / (options.seeds - seed), report))
        except Exception as problem:
            known = isinstance(problem, UserError | Diverged | torch.OutOfMemoryError)
            if options.kda != "fla" or known or done:
                raise
            shutil.rmtree(options.out / f"seed-{seed}")
            begin_again(problem)


if __name__ == "__main__":
    main()
