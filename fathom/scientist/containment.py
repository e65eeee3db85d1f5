"""A server's hold on an estimator in processes of its own: start it, ask it, end it.

Every question gets a socket of its own, whose other end goes to a child that lives for that question alone (zygote.py). What
a child may cost is fixed (confinement.py); the reply is read up to a size, and a child that says nothing in time is killed.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fathom
from fathom.errors import UserError
from fathom.scientist.confinement import Limits
from fathom.scientist.posterior import Budget

Values = dict[str, Any]
START, SLACK = 300.0, 5.0
"""Seconds that computing the posteriors may take, and that a dead child's news may."""


@dataclass(frozen=True)
class Outcome:
    """How a question ended: an answer, a mistake of the asker, or a failure (time, memory, reply, system call, bug, gone)."""

    answer: Values | None = None
    wrong: str | None = None
    failed: str | None = None
    detail: str = ""
    cpu: float = 0.0


class Instrument:
    """Scientists of frozen worlds in a process of their own.

    Args:
        worlds: The document of each world, by name.

    Raises:
        UserError: a world is wrong, or the process does not start.
    """

    def __init__(self, worlds: dict[str, Values], limits: Limits | None = None, budget: Budget | None = None) -> None:
        self.limits = limits or Limits()
        self._lock = threading.Lock()
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START)
        root = str(Path(fathom.__file__).parents[1])
        environment = {"PYTHONPATH": root, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fathom.scientist.zygote", str(theirs.fileno())],
                pass_fds=[theirs.fileno()], env=environment, cwd=os.sep, close_fds=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        self._lines = self._control.makefile("rb")
        told = {"worlds": worlds, "limits": asdict(self.limits), "evals": (budget or Budget()).evals}
        try:
            self._control.sendall(json.dumps(told).encode() + b"\n")
            self.about = json.loads(self._lines.readline())
        except (OSError, ValueError):
            self.close()
            raise UserError("the scientist's process did not start") from None
        if "wrong" in self.about:
            self.close()
            raise UserError(self.about["wrong"])
        self._control.settimeout(self.limits.wall + SLACK)

    def ask(self, world: str, verb: str, arguments: Values) -> Outcome:
        """One question to one world; never raises."""
        question = json.dumps({"world": world, "verb": verb, "arguments": arguments}).encode()
        with self._lock:
            try:
                return self._ask(question)
            except (OSError, ValueError):
                self.close()
                return Outcome(failed="gone", detail="the scientist's process is gone")

    def _ask(self, question: bytes) -> Outcome:
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                socket.send_fds(self._control, [b"?"], [theirs.fileno()])
            reply = self._exchange(ours, question)
        line = self._lines.readline()
        if not line:
            raise OSError
        how = json.loads(line)
        cpu = float(how["cpu"])
        over = how["signal"] == signal.SIGKILL and cpu >= self.limits.cpu - 0.5
        if how["late"] or over or how["signal"] == signal.SIGXCPU:
            return Outcome(failed="time", detail="the question took longer than it may", cpu=cpu)
        if how["signal"] == signal.SIGSYS:
            return Outcome(failed="system call", detail="the child tried a system call that it may not make", cpu=cpu)
        if how["signal"] or not reply:
            return Outcome(failed="killed", detail=f"the child died of signal {how['signal']}", cpu=cpu)
        found = json.loads(reply)
        if "failed" in found:
            return Outcome(failed=found["failed"], detail=found.get("kind", ""), cpu=cpu)
        return Outcome(answer=found.get("answer"), wrong=found.get("wrong"), cpu=cpu)

    def _exchange(self, ours: socket.socket, question: bytes) -> bytes:
        """Send a question, read the reply up to its largest size; b"" if the child died of it."""
        ours.settimeout(self.limits.wall + SLACK)
        pieces: list[bytes] = []
        try:
            ours.sendall(question)
            ours.shutdown(socket.SHUT_WR)
            while sum(map(len, pieces)) <= self.limits.reply and (piece := ours.recv(65_536)):
                pieces.append(piece)
        except OSError:
            return b""
        return b"".join(pieces)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """End the process, and with it any child."""
        self._lines.close()
        self._control.close()
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> "Instrument":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def padded(started: float, band: float) -> None:
    """Wait until the time since ``started`` fills a band, each twice as long as the one before: latency tells little."""
    passed = time.monotonic() - started
    while band < passed:
        band *= 2
    time.sleep(band - passed)
