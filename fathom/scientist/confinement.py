"""What a child process gives up before it sees a question: memory, time, files, sockets, other programs.

Resource limits work on any POSIX system. On Linux the child can gain no privileges and dies with its parent; on x86-64 a
seccomp filter leaves it the few system calls that arithmetic and a reply need, and any other call kills it.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from dataclasses import dataclass

_SYSCALLS = {
    "read": 0, "write": 1, "close": 3, "fstat": 5, "lseek": 8, "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12,
    "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "sched_yield": 24, "mremap": 25, "madvise": 28,
    "getpid": 39, "exit": 60, "gettimeofday": 96, "getrusage": 98, "sigaltstack": 131, "futex": 202,
    "sched_getaffinity": 204, "restart_syscall": 219, "clock_gettime": 228, "exit_group": 231, "getrandom": 318,
}  # fmt: skip
"""Of x86-64: nothing that opens, connects, executes, clones or signals."""
_PDEATHSIG, _DUMPABLE, _SECCOMP, _NO_NEW_PRIVS = 1, 4, 22, 38
_AUDIT_X86_64, _ALLOW, _KILL = 0xC000003E, 0x7FFF0000, 0x80000000
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06


@dataclass(frozen=True)
class Limits:
    memory: int = 1 << 30
    """Bytes of address space beyond what the parent has."""
    cpu: int = 10
    """Seconds of processor time."""
    wall: float = 20.0
    """Seconds until the child is killed whatever it does."""
    reply: int = 64_000
    """Bytes of an answer."""


def means() -> list[str]:
    """What ``confine`` does on this machine."""
    found = ["resource limits"]
    if sys.platform == "linux":
        found.append("no new privileges")
        if platform.machine() == "x86_64":
            found.append("system calls by allow-list")
    return found


def confine(limits: Limits, keep: int) -> None:
    """Confine this process for good; ``keep`` is the only file descriptor that stays open.

    Raises:
        OSError: a limit could not be set. A child that is not confined must not go on.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    os.closerange(0, keep)
    os.closerange(keep + 1, 65_536)
    held = _address_space()
    for kind, value in (
        (resource.RLIMIT_AS, held + limits.memory), (resource.RLIMIT_CPU, limits.cpu), (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0), (resource.RLIMIT_NOFILE, 0),
    ):  # fmt: skip
        resource.setrlimit(kind, (value, value))
    if sys.platform == "linux":
        _prctl(_NO_NEW_PRIVS, 1)
        _prctl(_DUMPABLE, 0)
        if platform.machine() == "x86_64":
            _seccomp()


def die_with_parent() -> None:
    """A process whose parent is gone is killed (Linux)."""
    if sys.platform == "linux":
        _prctl(_PDEATHSIG, signal.SIGKILL)


_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, first: int, second: int = 0) -> None:
    arguments = [ctypes.c_ulong(value) for value in (first, second, 0, 0)]
    if _libc.prctl(ctypes.c_int(option), *arguments) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _seccomp() -> None:
    """A classic BPF program over (syscall number, architecture): allow what is listed, kill the process otherwise."""
    numbers = list(_SYSCALLS.values())
    program = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _AUDIT_X86_64), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    program += [(_EQUAL, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]
    program += [(_RETURN, 0, 0, _KILL), (_RETURN, 0, 0, _ALLOW)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    filter_ = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(program), ctypes.addressof(code)))
    _prctl(_SECCOMP, 2, ctypes.addressof(filter_))


def _address_space() -> int:
    """Bytes of address space in use; 0 where /proc does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        return 0
