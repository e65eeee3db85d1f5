"""What all commands share: their type, the flag --json, tables, and running out of memory as a user's mistake."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from tyro.conf import FlagCreatePairsOff, arg

from fathom.errors import UserError

Function = Callable[..., int | None]
"""A command: tyro reads its flags from the signature; it returns an exit code, None for 0."""
Json = Annotated[bool, FlagCreatePairsOff, arg(name="json", help="Print one JSON value on standard output.")]


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def first_process() -> bool:
    """Whether this process is the only one, or of those that `torchrun` started the one that speaks."""
    return os.environ.get("RANK", "0") == "0"


def tell(line: str) -> None:
    """Say ``line`` on standard error, once, however many processes come to say it."""
    if first_process():
        print(line, file=sys.stderr)


def columns(rows: list[list[str]]) -> str:
    """Rows as aligned columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = (
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    )
    return "\n".join("  ".join(line) for line in cells)


@contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Running out of memory is a matter of settings: a ``UserError`` with ``advice``."""
    try:
        yield
    except (RuntimeError, MemoryError, ValueError) as error:
        text = str(error)
        memory = (
            "out of memory",
            "allocate memory",
            "Storage size calculation overflowed",
            "Maximum allowed size exceeded",
        )
        if isinstance(error, MemoryError) or any(phrase in text for phrase in memory):
            raise UserError(f"this needs more memory than there is; {advice}") from None
        raise
