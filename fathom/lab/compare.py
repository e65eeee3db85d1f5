"""When two runs may be compared, by how much they differ, and what a reader must know before believing it.

Losses are subtracted only where that means something: same corpus, tokenizer, validation sequences and training tokens.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fathom.lab.intervals import LEVEL, paired, percent
from fathom.lab.runs import Run

# What must agree before two validation losses measure the same thing, and how the page says that it does not.
MEASURE: dict[str, Callable[[Run], Any]] = {
    "data (corpus hash)": lambda run: str(run.data.get("corpus_hash"))[:12],
    "tokenizers (sha256)": lambda run: run.tokenizer[:12],
    "context lengths": lambda run: run.config.model.context,
    "numbers of validation sequences": lambda run: run.config.eval_sequences,
}


def measure(run: Run) -> tuple[Any, ...]:
    """Equal for runs whose validation losses can be compared."""
    return tuple(read(run) for read in MEASURE.values())


def baseline(run: Run, runs: list[Run]) -> Run | None:
    """The PreNorm run to hold ``run`` against: of its measure and number of tokens, and of its seed if there is one."""
    found = [
        other
        for other in runs
        if other.rule == "prenorm" and other.val_loss is not None and other.tokens == run.tokens
        if measure(other) == measure(run)
    ]
    same_seed = [other for other in found if other.config.seed == run.config.seed]
    return next(iter(same_seed or found), None)


def difference(run: Run, runs: list[Run]) -> float | None:
    """Validation loss of ``run`` minus its ``baseline``'s, nats per token; None for PreNorm and where there is none."""
    twin = baseline(run, runs)
    if run.rule == "prenorm" or run.val_loss is None or twin is None or twin.val_loss is None:
        return None
    return run.val_loss - twin.val_loss


def flags(runs: list[Run]) -> list[str]:
    """What a reader must know before comparing these runs, a sentence or two each."""
    notes = []
    for name, read in MEASURE.items():
        groups: dict[Any, list[str]] = {}
        for run in runs:
            groups.setdefault(read(run), []).append(run.label)
        if len(groups) > 1:
            held = "; ".join(f"{value}: {', '.join(labels)}" for value, labels in groups.items())
            notes.append(f"These runs have different {name}, so their losses cannot be compared across: {held}.")
    if len({run.tokens for run in runs}) > 1:
        notes.append(
            "These runs have seen different numbers of tokens: differences are given between equal numbers only."
        )
    if len({run.env.get("machine") for run in runs}) > 1:
        notes.append(
            "These runs were timed on different machines: step times and tokens per second are not comparable."
        )
    for run in runs:
        if run.steps < run.config.steps:
            notes.append(f"{run.label} is at step {run.steps:,} of the {run.config.steps:,} it was asked for.")
        if run.depth is not None and run.depth.get("step", run.steps) != run.steps:
            notes.append(
                f"The depth measurements of {run.label} are of step {run.depth['step']:,}, not of {run.steps:,}."
            )
    if len({run.config.seed for run in runs}) == 1 and any(difference(run, runs) is not None for run in runs):
        notes.append(
            f"All runs share seed {runs[0].config.seed}: only runs of other seeds can tell whether a small difference is "
            "the rule's doing or luck."
        )
    return notes


def headline(runs: list[Run]) -> str:
    """The result in a sentence: the lowest loss, how far its rule is from PreNorm, and how sure that is."""
    finished = [(run.val_loss, run) for run in runs if run.val_loss is not None]
    if not finished:
        return "No run has been validated after its last step yet."
    if len({measure(run) for _, run in finished}) > 1:
        return "These runs do not share one measure of loss, so none of them is called the best."
    loss, best = min(finished, key=lambda pair: pair[0])
    first = "has a validation loss of" if len(finished) == 1 else "has the lowest validation loss,"
    text = f"{best.label} {first} {loss:.4f} nats per token after {best.tokens:,} tokens"
    twin, gap = baseline(best, runs), difference(best, runs)
    if twin is None or gap is None:
        return f"{text}."
    found = paired([pair for run in runs if _alike(run, best) and (pair := _pair(run, runs)) is not None] or [gap])
    if found.low is None or found.high is None:
        return f"{text}, {-gap:.4f} below {twin.label}; one seed says nothing of how much of that is luck."
    sure = "" if found.high < 0 or found.low > 0 else ", which holds zero"
    return (
        f"{text}. Over {found.n} seeds its rule is {abs(found.mean):.4f} {'below' if found.mean < 0 else 'above'} PreNorm, "
        f"{percent(LEVEL)} interval of the difference {found.low:+.4f} to {found.high:+.4f}{sure}."
    )


def _alike(run: Run, best: Run) -> bool:
    """Whether the two differ in nothing but their seed."""
    same = replace(run.config, seed=best.config.seed, data=best.config.data) == best.config
    return same and run.tokens == best.tokens and measure(run) == measure(best)


def _pair(run: Run, runs: list[Run]) -> float | None:
    twin = baseline(run, runs)
    return difference(run, runs) if twin is not None and twin.config.seed == run.config.seed else None
