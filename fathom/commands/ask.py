"""`fathom ask` and `fathom world`: questions to the scientist about a world file, a snapshot or a ready-made world.

An answer is exit code 0, an abstention 3, a refusal of `fathom ask guard` 4: a script that wants an admission has to see 0.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from tyro.conf import Positional, arg

from fathom.commands.output import Function, Json, columns, print_json
from fathom.errors import UserError

WorldArg = Annotated[str, arg(help="A world file, a snapshot, or a ready-made world by name.")]
LogArg = Annotated[
    Path | None, arg(help="A log that the question and its answer are appended to, made if it is not there.")
]
PlotArg = Annotated[Path | None, arg(help="Draw the answer into this .svg, .png or .pdf file.")]
Given = Positional[tuple[str, ...]]
ABSTAINED, REFUSED = 3, 4


def _scientist(world: str) -> Any:
    from fathom.scientist import Scientist

    return Scientist.open(world)


def _design(pairs: tuple[str, ...]) -> dict[str, Any]:
    """``C=5.6 arch=block`` as a design."""
    design: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name or not value:
            raise UserError(f"{pair!r} is not a design: give name=value, as in C=5.6 arch=block")
        if name in design:
            raise UserError(f"{name} is given twice")
        try:
            design[name] = float(value)
        except ValueError:
            design[name] = value
    return design


def _rows(path: Path) -> list[dict[str, Any]]:
    from fathom.scientist.document import read_table

    return read_table(path.read_bytes(), path.name)


class Told(NamedTuple):
    """Where an answer goes besides standard output."""

    log: Path | None
    plot: Path | None
    as_json: bool


def _tell(scientist: Any, answer: Any, told: Told, show: Callable[[dict[str, Any]], str]) -> int:
    """Log an answer or an abstention, then print it and draw it: what cannot be logged is not said."""
    document = json.loads(answer.bytes)
    if told.log is not None:
        from fathom.scientist.log import Log

        log = Log(told.log)
        paths = log.announce(scientist.world)
        entry = log.append_answer(answer)
        document |= {"log_index": entry.index, "log_head": entry.head, "forking_paths": paths}
    if told.plot is not None and document["abstain"] is None:
        from fathom.scientist.plot import save

        save(document, told.plot)
    if told.as_json:
        print_json(document)
        return 0 if document["abstain"] is None else ABSTAINED
    if document["abstain"] is not None:
        print(f"no answer: {document['abstain']['reason'].replace('_', ' ')}: {document['abstain']['detail']}")
    else:
        print(show(document["result"]))
    print(f"| world {answer.world[:12]}")
    if document.get("forking_paths", 1) > 1:
        print(
            f"| {document['forking_paths']} worlds over this evidence in this log: theories or priors changed with it in view"
        )
    return 0 if document["abstain"] is None else ABSTAINED


def _theories(result: dict[str, Any], *names: str) -> str:
    rows = [["theory", "P(theory)", *names]]
    for name, each in result["epistemic"]["by_theory"].items():
        rows.append([name, f"{each['p']:.4f}", *(f"{each[key]:.4g}" for key in names)])
    if unsaid := result["epistemic"].get("unsaid"):
        rows.append(["(do not say)", f"{unsaid:.2g}", *[""] * len(names)])
    return columns(rows)


def prob() -> Function:
    def run(
        world: Positional[WorldArg], event: Positional[str], given: str | None = None, threshold: float | None = None,
        log: LogArg = None, plot: PlotArg = None, as_json: Json = False,
    ) -> int:  # fmt: skip
        """P(event | world): true or false, such as "multiplier(C=5.6) > 1.1".

        Args:
            event: An expression over the world's quantities.
            given: A premise, taken as true.
            threshold: Abstain if the probability cannot be told from this.
        """
        scientist = _scientist(world)
        answer = scientist.prob(event, given, threshold)
        return _tell(scientist, answer, Told(log, plot, as_json), lambda result: (
            f"P = {result['p']:.4f}, Monte-Carlo error {result['mc_se']:.1g}, "
            f"theories differ by {result['epistemic']['between_theories']:.2g}\n" + _theories(result, "says")
        ))  # fmt: skip

    return run


def interval() -> Function:
    def run(
        world: Positional[WorldArg],
        expression: Positional[str],
        level: float = 0.9,
        log: LogArg = None,
        plot: PlotArg = None,
        as_json: Json = False,
    ) -> int:
        """A quantity's median and central interval, such as "multiplier(C=5.6)".

        Args:
            expression: Over the world's quantities and mean(design=value, ..).
            level: Of the interval.
        """
        scientist = _scientist(world)
        answer = scientist.interval(expression, level)
        return _tell(scientist, answer, Told(log, plot, as_json), lambda result: (
            f"{result['median']:.4g} [{result['lower']:.4g}, {result['upper']:.4g}] at {level:.0%}, "
            f"Monte-Carlo error {result['mc_se']:.1g}\n" + _theories(result, "median", "lower", "upper")
        ))  # fmt: skip

    return run


def theories() -> Function:
    def run(world: Positional[WorldArg], log: LogArg = None, plot: PlotArg = None, as_json: Json = False) -> int:
        """Every theory's description length, prior, evidence and probability."""

        def show(result: dict[str, Any]) -> str:
            rows = [["theory", "bits", "prior", "log evidence", "P(theory)"]]
            for each in result["theories"]:
                values = (
                    f"{each['bits']:.0f}",
                    f"{each['prior']:.3g}",
                    f"{each['log_evidence']:.3f}",
                    f"{each['p']:.4f}",
                )
                rows.append([each["id"], *values])
            verdict = "" if result["adequate"] else "\nnone of the named theories is adequate"
            return f"{columns(rows)}\nnot known: {result['entropy']:.3f} nats{verdict}"

        scientist = _scientist(world)
        return _tell(scientist, scientist.theories(), Told(log, plot, as_json), show)

    return run


def predict() -> Function:
    def run(
        world: Positional[WorldArg],
        design: Given,
        level: float = 0.9,
        log: LogArg = None,
        plot: PlotArg = None,
        as_json: Json = False,
    ) -> int:
        """The outcome of one more run.

        Args:
            design: As name=value, every design of the world.
            level: Of the interval.
        """
        scientist = _scientist(world)
        answer = scientist.predict(_design(design), level)
        return _tell(scientist, answer, Told(log, plot, as_json), lambda result: (
            f"{result['median']:.4g} [{result['lower']:.4g}, {result['upper']:.4g}] at {level:.0%}; "
            f"theories differ by {result['epistemic']['between_theories']:.2g}\n" + _theories(result, "mean")
        ))  # fmt: skip

    return run


def next_run() -> Function:
    def run(
        world: Positional[WorldArg], candidates: Positional[Path], about: str = "theories", cost: str | None = None,
        together: str | None = None, batch: int = 1, top: int = 10, log: LogArg = None, plot: PlotArg = None,
        as_json: Json = False,
    ) -> int:  # fmt: skip
        """Which of your candidate runs would teach most, per unit of cost.

        Args:
            candidates: A .csv, .jsonl or .json file with a design a row, such as `fathom lab evidence` writes.
            about: theories, parameters, an event or a quantity.
            cost: The column of the file that holds each run's cost.
            together: A column: runs with the same value there are one experiment, and its information has two bounds.
            batch: How many experiments to choose one after another, each given those before it.
            top: How many to print.
        """
        scientist = _scientist(world)
        answer = scientist.recommend(_rows(candidates), about, cost, together, batch)

        def show(result: dict[str, Any]) -> str:
            rows = [["run", "nats", "of what is not known", "nats per cost", "outside the data"]]
            for each in result["ranked"][:top]:
                share = "" if each["share"] is None else f"{each['share']:.1%}"
                far = "a new level" if each["outside_the_data"] is None else f"{each['outside_the_data']:.2g}"
                rows.append([_experiment(each), _nats(each), share, f"{each['nats_per_cost']:.3g}", far])
            text = f"{columns(rows)}\n{result['advice']}"
            if not result["told_apart"]:
                text += "; the first two are not told apart"
            if steps := result.get("batch"):
                rows = [["batch, in this order", "nats together", "cost together"]]
                rows += [[_experiment(each), _nats(each), f"{each['cost']:.3g}"] for each in steps]
                text += f"\n\n{columns(rows)}"
            return text

        return _tell(scientist, answer, Told(log, plot, as_json), show)

    return run


def _experiment(row: dict[str, Any]) -> str:
    return " & ".join(
        " ".join(f"{k}={v:g}" if isinstance(v, float | int) else f"{k}={v}" for k, v in design.items())
        for design in row.get("designs", [row.get("design")])
    )


def _nats(row: dict[str, Any]) -> str:
    if row["lower"] == row["upper"]:
        return f"{row['nats']:.4f}"
    return f"{row['lower']:.4f} to {row['upper']:.4f} ± {row['mc_se']:.4f}"


def guard() -> Function:
    def run(
        world: Positional[WorldArg], design: Given, harm: str, threshold: float, delta: float,
        log: LogArg = None, plot: PlotArg = None, as_json: Json = False,
    ) -> int:  # fmt: skip
        """Whether to admit a run: bounds on the probability of harm. Exit code 0 admits; 3 and 4 do not.

        Args:
            design: As name=value, every design of the world.
            harm: An event over the outcome and quantities, such as "loss > 5".
            threshold: The largest probability of harm that is admitted.
            delta: How often the cautious bound may ever be too low.
        """
        scientist = _scientist(world)
        answer = scientist.guard(_design(design), harm, threshold, delta)
        code = _tell(scientist, answer, Told(log, plot, as_json), lambda result: (
            f"{result['decision']}: P(harm) <= {result['cautious']:.3g} by the cautious set "
            f"({', '.join(result['cautious_set'])}), {result['iid']:.3g} i.i.d., mean {result['posterior_mean']:.3g}\n"
            f"valid if {result['valid_if']}"
        ))  # fmt: skip
        return code or (0 if answer["decision"] == "admit" else REFUSED)

    return run


def why() -> Function:
    def run(
        world: Positional[WorldArg],
        of: Positional[str],
        top: int = 10,
        log: LogArg = None,
        plot: PlotArg = None,
        as_json: Json = False,
    ) -> int:
        """Which rows moved an answer: an event's probability or a quantity's median without each of them.

        Args:
            of: An event or a quantity.
            top: How many rows to print.
        """

        def show(result: dict[str, Any]) -> str:
            rows = [["without", "it would be", f"moved ({result['scale']})", "theories moved", ""]]
            for each in result["rows"][:top]:
                values = (f"{each['without_it']:.4g}", f"{each['moved']:+.3g}", f"{each['theories_moved']:.3f}")
                rows.append([each["source"], *values, "" if each["trusted"] else "not trusted"])
            return f"{result['value']:.4g} with all rows\n{columns(rows)}"

        scientist = _scientist(world)
        return _tell(scientist, scientist.why(of), Told(log, plot, as_json), show)

    return run


def score() -> Function:
    def run(
        world: Positional[WorldArg],
        rows: Positional[Path],
        log: LogArg = None,
        plot: PlotArg = None,
        as_json: Json = False,
    ) -> int:
        """How well the world predicts outcomes that it has not seen.

        Args:
            rows: A .csv, .jsonl or .json file with every design and the outcome.
        """
        scientist = _scientist(world)
        answer = scientist.score(_rows(rows))
        return _tell(scientist, answer, Told(log, plot, as_json), lambda result: (
            f"{len(result['rows'])} rows: log score {result['log_score']:.4g}, CRPS {result['crps']:.4g}\n"
            + "\n".join(f"{float(level):.0%} intervals hold {share:.0%}" for level, share in result["coverage"].items())
        ))  # fmt: skip

    return run


def lint() -> Function:
    def run(world: Positional[WorldArg], planned: Path | None = None) -> int:
        """Say everything that is wrong with a world file, each with its line, and which planned runs it leaves out.

        Args:
            planned: A table with a column `run`, a row for each run that was launched: those without evidence are named.
        """
        from fathom.scientist import lint, read

        found = lint(world)
        if found:
            print("\n".join(found))
            return 2
        frozen = read(world)
        print(
            f"{len(frozen.theories)} theories, {len(frozen.y)} rows, {len(frozen.claims)} claims: world {frozen.hash}"
        )
        if planned is None:
            return 0
        names = [row.get("run") for row in _rows(planned)]
        if not all(isinstance(name, str) and name for name in names):
            raise UserError(f"{planned} needs a column `run` with the name of each run")
        seen = {source.rpartition(", row ")[0] for source in frozen.sources}
        absent = sorted({str(name) for name in names} - seen)
        print(
            f"{len(absent)} of {len(set(names))} planned runs are no evidence"
            + "".join(f"\n  {name}" for name in absent)
        )
        return ABSTAINED if absent else 0

    return run


def freeze() -> Function:
    def run(world: Positional[WorldArg], out: Positional[Path]) -> None:
        """Write a world and its evidence as one snapshot, named by its hash.

        Args:
            out: A folder for HASH.json, or a file name that ends in .json.
        """
        from fathom.scientist import read

        frozen = read(world)
        path = out if out.suffix == ".json" else out / f"{frozen.hash}.json"
        if path.exists() and path.read_bytes() != frozen.snapshot:
            raise UserError(f"{path} exists and holds something else")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(frozen.snapshot)
        print(path)

    return run
