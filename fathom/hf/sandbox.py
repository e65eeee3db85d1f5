"""Running a program that a model wrote: a process of its own with limits, in an empty folder, without a network.

Limits are the kernel's: seconds of CPU and of the clock, memory, file size. The program gets namespaces of its own, without
network interfaces and with its processes alone, which all end with it; where the kernel does not give them, it is not run.
Files of this user can still be *read*: run models that you do not trust as a user of their own.
"""

import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass

from fathom.errors import UserError

MEMORY, FILE_BYTES = 2**30, 2**20

_START = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
if libc.unshare(0x10000000 | 0x20000000 | 0x40000000):  # user, process and network namespaces
    sys.exit("no namespace: " + os.strerror(ctypes.get_errno()))
child = os.fork()  # the first process of its namespace, whose end is the end of all others in it
if child:
    os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 255)
libc.prctl(1, 9)  # killed with its parent
word, program = sys.stdin.readline(), sys.stdin.read()
sys.stdin = open(os.devnull)
exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
sys.__stdout__.write(word)
"""


@dataclass(frozen=True)
class Ending:
    """How a program ended."""

    passed: bool
    why: str
    """``passed``, ``timed out``, or the last line of its error."""


def run_program(program: str, *, seconds: float = 10.0) -> Ending:
    """Run ``program`` to its end; it passes if it raises nothing and does not exit by itself.

    Raises:
        UserError: this machine gives no namespace without a network, so nothing is run.
    """

    def limit() -> None:
        whole = int(seconds) + 1
        for what, value in (
            (resource.RLIMIT_CPU, whole), (resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_FSIZE, FILE_BYTES),
            (resource.RLIMIT_CORE, 0),
        ):  # fmt: skip
            resource.setrlimit(what, (value, value))

    word = f"{secrets.token_hex(16)}\n".encode()  # said at the end, which a program that stops early cannot
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _START], cwd=folder, env={}, preexec_fn=limit, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            output, errors = process.communicate(word + program.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return Ending(False, "timed out")
    lines = errors.decode(errors="replace").strip().splitlines()
    if lines and lines[-1].startswith("no namespace: "):
        raise UserError(f"programs cannot be run without a network here ({lines[-1][14:]}); leave humaneval out")
    if process.returncode == 0 and output.endswith(word):
        return Ending(True, "passed")
    return Ending(False, lines[-1] if lines else f"it ended by itself with {process.returncode}")
