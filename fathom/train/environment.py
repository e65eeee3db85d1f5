"""What a run ran on: written to ``env.json`` so that a number can be traced to its machine and its code."""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fathom import __version__
from fathom.errors import UserError
from fathom.kernels import backend_for

# Dense bf16 peak of a GPU in FLOP/s (vendors' data sheets), for model FLOPs utilisation. Matched by the start of a word.
PEAK_FLOPS = {"H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12,
              "B200": 2250e12}  # fmt: skip


def pick_device(name: str) -> torch.device:
    """The device of ``name`` (auto, cpu, cuda, cuda:1 ...); ``UserError`` if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device is {name!r}: it must be auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device is {name!r}: it must be auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device is {name!r}, but torch sees {torch.cuda.device_count()} GPUs here")
    return device


def machine(device: torch.device) -> str:
    """``NVIDIA H100 80GB HBM3`` or ``2 CPU threads (x86_64)``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"


def peak_flops(device: torch.device) -> float | None:
    """The GPU's dense bf16 peak in FLOP/s; None where it is not known, and for a CPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine, code state and backend, as plain JSON values."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "machine": machine(device),
        "platform": platform.platform(),
        "fathom": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "threads": torch.get_num_threads(),
        "backend": backend_for(device),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed": None if changes is None else bool(changes),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }
