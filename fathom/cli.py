"""The command `fathom`: finds which command is meant, lets tyro parse its flags, and says what is wrong in one line.

    exit code 0     done
    exit code 1     a training run diverged
    exit code 2     a mistake of the user: one line on standard error, never a traceback
    exit code 3     `fathom ask` gives no answer, and says why
    exit code 4     `fathom ask guard` refuses
    exit code 130   stopped by Ctrl-C
    exit code 141   whoever read the output has left, as `head` does

A bug keeps its traceback. What the commands do is in commands/, which is imported once one is chosen.
"""

import contextlib
import difflib
import errno
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from fathom import __version__
from fathom.errors import UserError


class Command(NamedTuple):
    sentence: str
    example: str


COMMANDS = {
    "quickstart": Command(
        "Train a small AttnRes decoder and its PreNorm twin on the text inside the package, and compare them.",
        "fathom quickstart",
    ),
    "data prepare": Command(
        "Turn text, JSON lines, Parquet or the corpus debian-docs into a dataset folder, tokenizer included.",
        "fathom data prepare notes/ data/notes --vocab-size 4096",
    ),
    "data pack": Command(
        "Put a dataset folder into one compressed file, to carry it elsewhere.",
        "fathom data pack data/notes notes.fathom",
    ),
    "data unpack": Command("Make the dataset folder of a packed file.", "fathom data unpack notes.fathom data/notes"),
    "data sample": Command("Show documents of a dataset, drawn at random.", "fathom data sample data/notes --count 3"),
    "train": Command(
        "Train a recipe into a run folder, any setting changed by its flag, or resume a run.",
        "fathom train quick --model.residual.rule full --steps 150 --out runs/full",
    ),
    "sample": Command(
        "Continue a text with the model of a run, as it comes.",
        'fathom sample runs/full --prompt "The state of the Union" --tokens 100',
    ),
    "report": Command(
        "Compare runs or sweeps in one interactive HTML page: losses, scaling laws, what each layer and token reads.",
        "fathom report runs/full runs/quick-prenorm-0 --out report.html",
    ),
    "residuals": Command(
        "List the residual rules: equation, parameters, memory, sources.", "fathom residuals --dim 1024 --layers 24"
    ),
    "sizes": Command(
        "List the Kimi Linear decoders of known size: parameters, arithmetic, bytes.", "fathom sizes --context 4096"
    ),
    "bench": Command(
        "Time the training step of every residual rule against PreNorm, in turns, once they agree.",
        "fathom bench --model.dim 128 --batch 4",
    ),
    "sweep": Command(
        "Train every run of a sweep (grid and seeds), several side by side, or continue one that was stopped.",
        "fathom sweep seeds --seeds 3 --out runs/seeds",
    ),
    "export": Command(
        "Write a run as a model folder of Transformers, bit for bit.", "fathom export runs/full models/full"
    ),
    "convert": Command(
        "Put a pretrained decoder of Transformers on a stream: the same function until it is trained.",
        "fathom convert models/smollm2 models/smollm2-block --num-blocks 8",
    ),
    "finetune": Command(
        "Train a model folder of Transformers further, converted or not.",
        "fathom finetune models/smollm2-block runs/tuned --data.folder data/debian-smollm2 --steps 300",
    ),
    "eval": Command(
        "Evaluate a run or a model folder on tasks of lm-evaluation-harness, offline.",
        "fathom eval runs/full --tasks heldout lastword",
    ),
    "lab scaling": Command(
        "Fit loss against compute and say what each rule is worth in compute, with intervals.",
        "fathom lab scaling paper",
    ),
    "lab ablations": Command(
        "Compare every arm of a sweep with a baseline over paired seeds, with intervals.",
        "fathom lab ablations runs/seeds",
    ),
    "lab depth-width": Command(
        "Map the loss over depth, width and heads at equal compute.", "fathom lab depth-width runs/depth-width"
    ),
    "lab dynamics": Command(
        "Summarise the training dynamics that runs recorded: magnitudes, updates, what is read.",
        "fathom lab dynamics runs/full",
    ),
    "lab pruning": Command(
        "Measure how much the loss rises when a layer writes nothing.", "fathom lab pruning runs/full"
    ),
    "lab evidence": Command(
        "Write a world of the scientist about your runs, and candidates for the next one.",
        "fathom lab evidence runs/scaling --world multiplier --out worlds/scaling",
    ),
    "lab mixing": Command(
        "Read a run as one matrix over depth, with its ranks; or print the paper's Table 5.",
        "fathom lab mixing runs/full",
    ),
    "probe train": Command(
        "Train a small decoder on a task whose questions need a set number of steps.",
        "fathom probe train --task.name hops --residual.rule block --layers 6 --out runs/probe-block",
    ),
    "probe test": Command(
        "Test trained probes: accuracy by number of steps, with intervals over seeds.", "fathom probe test runs/probe-*"
    ),
    "ask prob": Command(
        "The probability of an event, relative to the theories and evidence of a world.",
        'fathom ask prob paper-table2 "multiplier(C=5.6) > 1.1"',
    ),
    "ask interval": Command(
        "A quantity with its interval, over all theories and by theory.",
        'fathom ask interval paper-table2 "multiplier(C=5.6)"',
    ),
    "ask theories": Command("How probable each theory of a world is.", "fathom ask theories paper-table2"),
    "ask predict": Command("The outcome of one more run.", "fathom ask predict paper-table2 C=8 arch=block"),
    "ask next": Command(
        "Which of your candidate runs would teach most per cost.", "fathom ask next paper-table2 candidates.csv"
    ),
    "ask guard": Command(
        "Whether to admit a run, by bounds on the probability of harm.",
        'fathom ask guard paper-table2 C=8 arch=block --harm "log_loss > 0.6" --threshold 0.05 --delta 0.1',
    ),
    "ask why": Command(
        "Which rows of evidence moved an answer.", 'fathom ask why paper-table2 "multiplier(C=5.6) > 1.1"'
    ),
    "ask score": Command(
        "How well a world predicts outcomes that it has not seen.", "fathom ask score paper-table2 heldout.csv"
    ),
    "ask serve": Command(
        "Answer questions about one world over HTTP, each in a confined process, with keys, budgets and a log.",
        "fathom ask serve paper-table2 --log asked.jsonl --keys keys.json",
    ),
    "ask mcp": Command(
        "Offer the same questions as tools of the Model Context Protocol.",
        "fathom ask mcp paper-table2 --log asked.jsonl --keys keys.json",
    ),
    "ask key": Command("Add a key with budgets to a server's list.", "fathom ask key keys.json ada"),
    "world lint": Command("Say what is wrong with a world file, by line.", "fathom world lint world.yaml"),
    "world grow": Command(
        "Write the theories of a world's grammar out: all, or those that a trained sampler finds.",
        "fathom world grow grammar.yaml world.yaml",
    ),
    "world freeze": Command(
        "Write a world with its evidence as one snapshot, named by its hash.", "fathom world freeze paper-table2 worlds"
    ),
    "log verify": Command(
        "Check a log of questions, against a checkpoint that you kept.",
        "fathom log verify asked.jsonl --checkpoint kept",
    ),
    "log checkpoint": Command("Print the size and tree head of a log.", "fathom log checkpoint asked.jsonl"),
    "log prove": Command("Prove that a record is in a log.", "fathom log prove asked.jsonl 0"),
    "log key": Command("Make a key that signs checkpoints or releases.", "fathom log key person.key"),
    "log release": Command(
        "Release what a server holds in quarantine, by a person's signed word.",
        'fathom log release asked.jsonl --key person.key --reason "numpy was updated" --by Ada',
    ),
}


class UsageError(Exception):
    """A command line that cannot be parsed. The message is one line, the command's name included."""


def main(argv: list[str] | None = None) -> int:
    """Run one command line (``sys.argv`` if not given) and return its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character is no reason to stop; and who reads from a pipe sees each line as it comes.
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    try:
        code = _run(sys.argv[1:] if argv is None else list(argv))
        if sys.stdout is not None:  # closed by the caller: `fathom ... >&-`
            sys.stdout.flush()
        return code
    except UsageError as error:
        return _fail(str(error))
    except UserError as error:
        return _fail(f"fathom: {error}")
    except BrokenPipeError:
        _discard_output()
        return 141
    except OSError as error:
        if error.filename is None and error.errno == errno.ENOSPC:
            _discard_output()
            return _fail("fathom: the output cannot be written: its disk is full")
        if error.filename is None:
            raise
        return _fail(f"fathom: {error.filename}: {error.strerror}")
    except KeyboardInterrupt:
        _fail("fathom: interrupted")
        return 130


def _discard_output() -> None:
    """The interpreter flushes standard output once more at its end: let that go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


SECONDS_TO_SPEAK = 5.0


def _fail(message: str) -> int:
    if os.environ.get("RANK", "0") == "0":  # of the processes of one job one speaks
        print(" ".join(message.splitlines()), file=sys.stderr)
    else:
        # torchrun ends all processes when the first has failed, and that must not be before the one has spoken.
        time.sleep(SECONDS_TO_SPEAK)
    return 2


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(_help(COMMANDS))
        return 0
    if args[0] == "--version":
        print(f"fathom {__version__}")
        return 0
    name, rest = _find(args)
    if name not in COMMANDS:  # a group of commands, such as data
        group = {key: command for key, command in COMMANDS.items() if key.startswith(f"{name} ")}
        if rest and rest[0] in ("-h", "--help"):
            print(_help(group))
            return 0
        words = [key.removeprefix(f"{name} ") for key in group]
        if not rest:
            raise UsageError(f"fathom {name}: give one of {', '.join(words)}")
        raise UsageError(f"fathom {name}: {rest[0]!r} is not a command{_near(rest[0], words)}")

    from fathom import commands
    from fathom.commands import runs

    if name == "train" and any(word.partition("=")[0] == "--from" for word in rest):
        raise UsageError(
            "fathom train: --from is not a flag; `fathom finetune MODEL OUT` trains a model folder further"
        )
    if name == "train" and (not rest or not rest[0].startswith("-")):
        from fathom.train.recipes import RECIPES

        if not rest:
            raise UsageError(f"fathom train: give a recipe ({', '.join(RECIPES)}) or --resume RUN")
        if rest[0] not in RECIPES:
            raise UsageError(f"fathom train: {rest[0]!r} is not a recipe{_near(rest[0], RECIPES)}")
        return _parse(f"fathom train {rest[0]}", name, runs.train(rest[0]), rest[1:])
    return _parse(f"fathom {name}", name, commands.COMMANDS[name](), rest)


def _help(commands: dict[str, Command]) -> str:
    lines = ["fathom: attention over depth, trained, measured and studied.", ""]
    for name, command in commands.items():
        lines += [f"  fathom {name}", f"      {command.sentence}", f"      $ {command.example}"]
    return "\n".join(
        [*lines, "", "`fathom COMMAND --help` lists the flags of a command; `fathom --version` its version."]
    )


def _find(args: list[str]) -> tuple[str, list[str]]:
    """The command (or group of commands) that ``args`` starts with, and the arguments after it."""
    pair = " ".join(args[:2])
    if pair in COMMANDS:
        return pair, args[2:]
    names = [*COMMANDS, *{name.split()[0] for name in COMMANDS}]
    if args[0] in names:
        return args[0], args[1:]
    kind = "flag" if args[0].startswith("-") else "command"
    raise UsageError(f"fathom: {args[0]!r} is not a {kind}{_near(args[0], [*names, '--help', '--version'])}")


def _near(word: str, known: Iterable[str]) -> str:
    """``; did you mean ...?`` if something known is close, else what there is."""
    known = list(dict.fromkeys(known))
    if close := difflib.get_close_matches(word, known, n=1):
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(known)}" if len(known) <= 5 else "; see --help"


def _parse(prog: str, name: str, function: Callable[..., int | None], args: list[str]) -> int:
    """Let tyro parse ``args`` for ``function`` and call it; a command line that tyro refuses is a ``UsageError``."""
    import tyro

    # tyro's way to intercept its errors is private to it: pyproject.toml bounds its version, and tests hold the messages.
    from tyro import _errors
    from tyro.conf import PositionalMetavarFromFieldName

    config = (PositionalMetavarFromFieldName,)

    def known_flags() -> set[str]:
        with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
            tyro.cli(function, prog=prog, args=["--help"], config=config)
        return set(re.findall(r"--[a-z][\w.-]*", page.getvalue()))

    def refuse(event: Any) -> None:
        if reason := _reason(event, known_flags):
            raise UsageError(f"fathom {name}: {reason}")

    with _errors.on_parse_error(refuse):
        try:
            return tyro.cli(function, prog=prog, args=args, config=config) or 0
        except SystemExit as stop:  # --help, or an error of a kind that `refuse` does not know
            return stop.code if isinstance(stop.code, int) else 0


def _reason(event: Any, known_flags: Callable[[], set[str]]) -> str | None:
    """What is wrong, from one of the events of tyro._errors; None for a kind that is not known."""
    from tyro import _errors

    match event:
        case _errors.UnrecognizedArgs(tokens=[token, *_]) | _errors.MissingArgs(unrecognized_tokens=[token, *_]):
            flag = token.partition("=")[0]
            if re.match("-+[A-Za-z]", flag):
                return f"{flag} is not a flag{_near(flag.replace('_', '-'), known_flags())}"
            return f"{token!r} is not expected here; see --help"
        case _errors.MissingArgs():
            missing = [_flag(context.arg) for context in event.missing_arguments]
            return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; see --help"
        case _errors.InvalidChoice():
            return f"{_flag(event.argument)}: {event.value!r} is not one of {', '.join(event.choices)}"
        case _errors.BadValue():
            return f"{_flag(event.argument)}: its value is missing"
        case _errors.InstantiationFailure(argument=argument):
            if argument is None:
                return event.message
            # Python says `could not convert string to float: 'fast'`, and tyro ends with that for unions too.
            value = event.message.rsplit(": ", 1)[-1]
            kind = str(argument.lowered.metavar).replace("{None}|", "").lower().strip("[]")
            return f"{_flag(argument)}: {value} is not {'an' if kind[0] in 'aeiou' else 'a'} {kind}"
    return None


def _flag(argument: Any) -> str:
    """``--optim.lr``, or ``RUN`` for a positional argument."""
    if argument.is_positional():
        return str(argument.lowered.metavar)
    return str(argument.lowered.name_or_flags[-1])


if __name__ == "__main__":
    sys.exit(main())
