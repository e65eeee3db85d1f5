"""Run folders inside the package: models that `sample`, `report`, `export`, `eval` and `lab mixing` know by name.

A checkpoint of theirs holds bf16 weights and no optimizer, so that it is small: it is for looking at, not for training on.
"""

from importlib import resources
from pathlib import Path

RELEASED = Path(str(resources.files("fathom"))) / "assets" / "models"


def names() -> list[str]:
    """The released models."""
    return sorted(folder.name for folder in RELEASED.glob("*") if (folder / "config.json").is_file())


def run_folder(run: Path) -> Path:
    """``run``, or the folder in the package if there is no such path but a released model of this name."""
    return RELEASED / run.name if not run.exists() and str(run) in names() else run
