"""Folders that are whole or not there: filled under a hidden name, sealed with checksums, flushed to disk, renamed.

The seal is ``checkpoint.json``: values, the sha256 of every other file under ``sha256``, and that of all these under ``seal``.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from fathom.errors import UserError

NAME = "checkpoint.json"


def hidden(folder: Path) -> Path:
    """Where ``folder`` is filled."""
    return folder.with_name(f".{folder.name}.tmp")


def publish(folder: Path, values: dict[str, Any]) -> None:
    """Seal what lies in ``hidden(folder)`` with ``values``, flush all of it, and give it its name."""
    temporary = hidden(folder)
    sums = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
    values = {**values, "sha256": sums}
    (temporary / NAME).write_text(json.dumps({**values, "seal": _seal(values)}, indent=2) + "\n")
    for path in (*temporary.iterdir(), temporary):
        _flush(path)
    temporary.rename(folder)
    _flush(folder.parent)


def check(folder: Path) -> dict[str, Any]:
    """The values that ``folder`` was sealed with if its files are all there and unchanged; else a ``UserError`` naming one."""
    try:
        values = json.loads((folder / NAME).read_text())
        if values.pop("seal") != _seal(values):
            raise ValueError("its values are not the ones that were saved")
        sums = dict(values.pop("sha256"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / NAME} is missing or damaged ({error}); use another checkpoint") from None
    for file, expected in sums.items():
        path = folder / file
        if not path.is_file():
            raise UserError(f"{path} is missing; use another checkpoint")
        if _sha256(path) != expected:
            raise UserError(f"{path} is damaged: its checksum is not the one in {NAME}; use another checkpoint")
    return values


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
