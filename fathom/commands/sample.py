"""`fathom sample`: continue texts with the model of a run."""

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from fathom.commands.output import Function, Json, enough_memory, print_json
from fathom.errors import UserError

if TYPE_CHECKING:
    from fathom.inference.engine import Engine
    from fathom.inference.generate import Piece
    from fathom.inference.sampling import Sampling


@dataclass(frozen=True)
class Serving:
    """How the model is run; nothing here changes what is drawn, but by rounding."""

    slots: int = 8
    """Prompts of a file that are answered at a time."""
    chunk: int | None = None
    """Take prompts in in pieces of this many tokens; whole if not given."""
    checkpoint: int | None = None
    """The step of the checkpoint; the newest if not given."""
    device: str = "auto"
    """cpu, cuda, or auto for the GPU where there is one."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Of weights and cache; auto is bf16 on a GPU and float32 elsewhere."""
    cuda_graphs: Annotated[bool, FlagCreatePairsOff] = False
    """Decode by CUDA graphs, on a GPU."""


def sample() -> Function:
    from fathom.inference.sampling import Sampling

    default = Sampling(temperature=0.8)

    def run(
        run: Positional[Path],
        prompt: Annotated[str | None, arg(help="The text to continue; an empty one begins a document.")] = None,
        prompts: Annotated[Path | None, arg(help="A file of prompts, one a line, answered side by side.")] = None,
        interactive: Annotated[
            bool, FlagCreatePairsOff, arg(help="Continue each line of standard input, until its end.")
        ] = False,
        sampling: Annotated[Sampling, arg(name="")] = default,
        serving: Annotated[Serving, arg(name="")] = Serving(),
        as_json: Json = False,
    ) -> None:
        """Continue a text with the model of a run, as it comes; the speed goes to standard error.

        RUN is a run folder, or a checkpoint in it, or `debian-5m` or `sotu-1m`, the models that come with Fathom.
        """
        if (prompt is not None) + (prompts is not None) + interactive > 1:
            raise UserError("--prompt, --prompts and --interactive exclude one another: give one")
        if interactive and as_json:
            raise UserError("--interactive and --json exclude one another")
        texts = _read_prompts(prompts) if prompts else [prompt or ""]
        with enough_memory("give a smaller --slots, or a --chunk"):
            engine = _engine(run, serving, 1 if prompts is None else min(serving.slots, len(texts)))
            if interactive:
                _converse(engine, sampling)
                return
            printer = _Printer(texts, numbered=prompts is not None, quiet=as_json)
            _answer(engine, texts, sampling, printer)
        if as_json:
            print_json([vars(answer) for answer in printer.answers])

    return run


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from None
    if not lines:
        raise UserError(f"{path} is empty: it has no prompt")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise UserError(f"{path}:{number} is an empty prompt")
    return lines


def _engine(run: Path, serving: Serving, slots: int) -> "Engine":
    import torch

    from fathom.inference.engine import Engine
    from fathom.train.environment import pick_device
    from fathom.train.released import run_folder

    device = pick_device(serving.device)
    bf16 = serving.precision == "bf16" or (serving.precision == "auto" and device.type == "cuda")
    return Engine.load(
        run_folder(run), step=serving.checkpoint, device=device, slots=slots, chunk=serving.chunk,
        dtype=torch.bfloat16 if bf16 else torch.float32, cuda_graphs=serving.cuda_graphs,
    )  # fmt: skip


@dataclass
class _Text:
    prompt: str
    text: str = ""
    tokens: int = 0
    ending: str | None = None


@dataclass
class _Printer:
    """Prints the first answer that has not ended as it comes, and keeps the others back until it is their turn."""

    prompts: list[str]
    numbered: bool
    quiet: bool
    answers: list[_Text] = field(default_factory=list)
    _shown: int = 0

    def __post_init__(self) -> None:
        self.answers = [_Text(prompt) for prompt in self.prompts]

    def begin(self) -> None:
        answer = self.answers[self._shown]
        self._print((f"--- {self._shown + 1} ---\n" if self.numbered else "") + answer.prompt + answer.text)

    def _print(self, text: str, end: str = "") -> None:
        if not self.quiet:
            print(text, end=end, flush=True)

    def add(self, piece: "Piece") -> None:
        answer = self.answers[piece.prompt]
        answer.text += piece.text
        answer.tokens += piece.token is not None
        answer.ending = piece.ending
        if piece.prompt == self._shown:
            self._print(piece.text)
        while self._shown < len(self.answers) and self.answers[self._shown].ending:
            self._print("", end="\n")
            self._shown += 1
            if self._shown < len(self.answers):
                self.begin()


def _answer(engine: "Engine", texts: list[str], sampling: "Sampling", printer: _Printer) -> None:
    from fathom.inference.generate import generate

    begin, made = time.perf_counter(), 0
    pieces = generate(engine, texts, sampling)
    printer.begin()
    for piece in pieces:
        printer.add(piece)
        made += piece.token is not None
    seconds = time.perf_counter() - begin
    print(f"{made} tokens, {made / seconds:.1f} tokens/s", file=sys.stderr)


def _converse(engine: "Engine", sampling: "Sampling") -> None:
    for line in _lines():
        try:
            _answer(engine, [line], sampling, _Printer([line], numbered=False, quiet=False))
        except UserError as error:
            print(f"fathom sample: {error}", file=sys.stderr)


def _lines() -> Iterable[str]:
    """Lines of standard input, asked for where there is someone to ask."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    ask: Callable[[str], str] = input
    while True:
        try:
            yield ask("> ")
        except EOFError:
            print()
            return
