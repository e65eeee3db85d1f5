"""The child of a question: what it may do, what it leaves behind, and what becomes of it when it goes too far."""

import json
import os
import platform
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fathom.errors import UserError
from fathom.scientist import Scientist
from fathom.scientist.build import read
from fathom.scientist.confinement import Limits
from fathom.scientist.containment import Instrument
from fathom.scientist.filters import release

LINUX = sys.platform == "linux"
FILTERED = LINUX and platform.machine() == "x86_64"
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("prob", {"event": "multiplier(C=5.6) > 1.1"}), ("theories", {}), ("interval", {"expression": "multiplier(C=5.6)"}),
    ("predict", {"design": {"C": 6.0, "arch": "block"}}),
    ("recommend", {"candidates": [{"C": 6.0, "arch": "block"}, {"C": 1.0, "arch": "prenorm"}]}),
    ("guard", {"design": {"C": 6.0, "arch": "block"}, "harm": "log_loss > 1", "threshold": 0.1, "delta": 0.1}),
    ("score", {"rows": [{"C": 6.0, "arch": "block", "log_loss": 0.5}]}), ("prob", {"event": "multiplier > "}),
]  # fmt: skip


@pytest.fixture(scope="module")
def instrument() -> Iterator[Instrument]:
    with Instrument({"served": read("paper-table2").document}) as made:
        yield made


def test_a_child_answers_as_the_scientist_does(instrument: Instrument) -> None:
    """The same bytes, rounded as they leave; mistakes are said, and nothing is answered to them."""
    scientist = Scientist.open("paper-table2")
    here = [scientist.prob(**ASKED[0][1]), scientist.theories(), scientist.interval(**ASKED[2][1]),
            scientist.predict(**ASKED[3][1]), scientist.recommend(**ASKED[4][1]), scientist.guard(**ASKED[5][1])]  # fmt: skip
    for (verb, arguments), answer in zip(ASKED, here, strict=False):
        assert instrument.ask("served", verb, arguments).answer == release(json.loads(answer.bytes))
    wrong = instrument.ask("served", *ASKED[-1])
    assert wrong.answer is None and wrong.wrong == "the expression ends too early"


def test_answers_leave_with_three_digits_and_no_finer_than_their_error(instrument: Instrument) -> None:
    def numbers(value: Any) -> list[float]:
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        return [value] if isinstance(value, float) else [number for each in inside for number in numbers(each)]

    for verb, arguments in ASKED[:-1]:
        result = instrument.ask("served", verb, arguments).answer["result"]  # type: ignore[index]
        assert numbers(result) and all(number == float(f"{number:.3g}") or "p" in result for number in numbers(result))
    p = instrument.ask("served", *ASKED[0]).answer["result"]  # type: ignore[index]
    assert 1e-4 < p["mc_se"] < 1e-2 and p["p"] == round(p["p"], 3 if p["mc_se"] < 1e-3 else 2)
    many = [{"C": 1.0 + k / 10, "arch": "block"} for k in range(30)]
    ranked = instrument.ask("served", "recommend", {"candidates": many}).answer["result"]  # type: ignore[index]
    assert len(ranked["ranked"]) == 20 and ranked["left_out"] == 10


def test_questions_leave_nothing_for_the_next(instrument: Instrument) -> None:
    """R5: answers of children that follow others, in any order, are those of a first child, to the byte."""
    alone = [json.dumps(instrument.ask("served", *each).__dict__ | {"cpu": 0}) for each in ASKED]
    order = random.Random(0)
    for index in order.choices(range(len(ASKED)), k=25):
        assert json.dumps(instrument.ask("served", *ASKED[index]).__dict__ | {"cpu": 0}) == alone[index]


@pytest.mark.skipif(not LINUX, reason="reads the process's memory in /proc")
def test_no_trace_of_a_question_is_in_the_process_that_forks(instrument: Instrument) -> None:
    """R6: the question's bytes never reach the zygote's memory, its open files or a file system."""
    secret = "7.31415926"
    before = open_files(instrument.process.pid)
    assert instrument.ask("served", "prob", {"event": f"multiplier(C=5.6) > {secret}"}).answer is not None
    assert not in_memory(instrument.process.pid, secret.encode())
    assert in_memory(os.getpid(), secret.encode())  # the search finds what is there
    assert open_files(instrument.process.pid) == before


def open_files(pid: int) -> list[str]:
    return sorted(os.readlink(each) for each in Path(f"/proc/{pid}/fd").iterdir())


def in_memory(pid: int, what: bytes) -> bool:
    """Whether bytes are anywhere in the writable memory of a process."""
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, rights = line.split()[:2]
            low, high = (int(each, 16) for each in span.split("-"))
            if rights.startswith("rw") and high - low < 1 << 30:
                try:
                    memory.seek(low)
                    if what in memory.read(high - low):
                        return True
                except OSError:
                    continue
    return False


@pytest.mark.skipif(not LINUX, reason="reads the process's libraries in /proc")
def test_no_network_takes_part_in_an_answer(instrument: Instrument) -> None:
    """R21: goals can be probed for where a network answers; the process that answers holds no tensor library at all."""
    loaded = Path(f"/proc/{instrument.process.pid}/maps").read_text()
    assert "numpy" in loaded and "torch" not in loaded


ATTACKS = """
import json, os, socket, sys
import numpy as np
from fathom.scientist import zygote
from fathom.scientist.confinement import Limits

def spin():
    while True:
        pass

KEPT = open("/etc/passwd") if os.path.exists("/etc/passwd") else open(sys.executable)
os.dup2(KEPT.fileno(), 300)
ATTACKS = {
    "open a file": lambda fd: open("/etc/hosts"),
    "write a file": lambda fd: open("left-behind", "w"),
    "read an open file": lambda fd: os.read(KEPT.fileno(), 1),
    "read a later one": lambda fd: os.read(300, 1),
    "connect": lambda fd: socket.create_connection(("127.0.0.1", 9), 1),
    "start a program": lambda fd: os.execv("/bin/true", ["true"]),
    "fork": lambda fd: os.fork(),
    "signal the parent": lambda fd: os.kill(os.getppid(), 0),
    "raise its limits": lambda fd: __import__("resource").setrlimit(9, (1 << 40, 1 << 40)),
    "spin": lambda fd: spin(),
    "hang": lambda fd: os.read(fd, 1),
    "eat memory": lambda fd: np.ones(10**9).sum(),
    "do nothing wrong": lambda fd: b"fine",
}
import resource
found = {}
for name, attack in ATTACKS.items():
    def child(scientists, fd, limits, attack=attack):
        try:
            made = attack(fd)
            return made if isinstance(made, bytes) else b"done"
        except MemoryError:
            return b"memory"
        except OSError as error:
            return b"error %d" % error.errno
    zygote.child = child
    ours, theirs = socket.socketpair()
    ours.settimeout(5)
    fd = theirs.detach()
    how = zygote.fork({}, fd, Limits(memory=1 << 28, cpu=1, wall=2.0 if name != "hang" else 0.3))
    reply = b""
    while piece := ours.recv(65536):
        reply += piece
    found[name] = [how["signal"], how["late"], reply[:20].decode()]
print(json.dumps(found))
"""


@pytest.mark.skipif(not FILTERED, reason="the filter of system calls is for Linux on x86-64")
def test_what_a_child_may_not_do_kills_it(tmp_path: Path) -> None:
    """R10 and R17, by real attempts from inside: files, sockets, programs, forks, signals, limits, time, memory."""
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1", "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", ATTACKS], cwd=tmp_path, capture_output=True, text=True, timeout=60,
                          env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("do nothing wrong") == [0, False, "fine"]
    assert found.pop("spin")[0] in (signal.SIGXCPU, signal.SIGKILL)
    assert found.pop("hang") == [signal.SIGKILL, True, ""]
    assert found.pop("eat memory") == [0, False, "memory"]
    # A file that the parent holds is closed in the child before it sees the question: reading it is an error.
    assert found.pop("read an open file") == found.pop("read a later one") == [0, False, "error 9"]
    for name, (died_of, _, reply) in found.items():
        assert died_of == signal.SIGSYS and reply == "", name
    assert list(tmp_path.iterdir()) == []


def test_a_question_beyond_its_limits_fails_and_the_next_is_answered(
    made: Callable[[Any], Any], line: dict[str, Any]
) -> None:
    document = made(line).document
    with Instrument({"served": document}, Limits(reply=200)) as small:
        assert small.ask("served", "why", {"of": "slope"}).failed == "reply"
        assert small.alive and small.ask("served", "prob", {"event": "slope"}).wrong is not None
    with Instrument({"served": document}, Limits(wall=0.001)) as hasty:
        for _ in range(2):
            assert hasty.ask("served", "why", {"of": "slope"}).failed == "time" and hasty.alive


def test_a_process_that_is_gone_gives_no_answer(made: Callable[[Any], Any], line: dict[str, Any]) -> None:
    with Instrument({"served": made(line).document}) as one:
        one.process.kill()
        one.process.wait()
        for _ in range(2):
            found = one.ask("served", "theories", {})
            assert found.answer is None and found.failed == "gone"
    with pytest.raises(UserError, match="served:1: "):
        Instrument({"served": {"world": "x"}})
