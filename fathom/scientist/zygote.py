"""The process that holds worlds and their posteriors and forks a child for every question.

    server --(a socket of its own for each question)--> child, forked from the zygote, which never reads the question

Its one argument is the number of its control socket. There the zygote is told its worlds once, as a JSON line of names and
documents, and says what they are. Then each message carries a socket: a child is forked, reads the question from it, answers
into it and exits, and the zygote says how it ended. It has one thread and keeps nothing of any question, so that no child can
find a trace of an earlier one.
"""

import contextlib
import json
import os
import signal
import socket
import sys
from typing import Any

from fathom.errors import UserError
from fathom.scientist import fingerprint, verbs
from fathom.scientist.build import build
from fathom.scientist.confinement import Limits, confine, die_with_parent, means
from fathom.scientist.document import Issues
from fathom.scientist.filters import release
from fathom.scientist.posterior import Budget
from fathom.scientist.scientist import Scientist

Values = dict[str, Any]


def prepare(documents: dict[str, Values], evals: int) -> dict[str, Scientist]:
    """A scientist of each world and of the canaries', with all that depends on the world alone computed beforehand."""
    scientists = {}
    for name, document in {**documents, **fingerprint.WORLDS}.items():
        issues = Issues(name, {})
        world = build(document, issues)
        issues.check()
        assert world is not None
        scientist = Scientist(world, Budget(evals))
        for fit in scientist.posterior.fits:
            _ = fit.draws
        scientists[name] = scientist
    # Whatever is imported late is imported now: a child can open no file.
    for (held, verb), arguments in {(held, verb): given for _, held, verb, given in fingerprint.questions()}.items():
        with contextlib.suppress(UserError):
            release(json.loads(verbs.ask(scientists[held], verb, arguments).bytes))
    return scientists


def child(scientists: dict[str, Scientist], fd: int, limits: Limits) -> bytes:
    """The reply to the question that ``fd`` holds."""
    pieces = []
    while piece := os.read(fd, 65_536):
        pieces.append(piece)
    try:
        question = json.loads(b"".join(pieces))
        answer = verbs.ask(scientists[question["world"]], question["verb"], question["arguments"])
        reply = json.dumps({"answer": release(json.loads(answer.bytes))}).encode()
        return reply if len(reply) <= limits.reply else b'{"failed": "reply"}'
    except UserError as error:
        return json.dumps({"wrong": str(error)[:1000]}).encode()
    except (MemoryError, RecursionError):
        return b'{"failed": "memory"}'
    except Exception as error:  # a bug of ours is no reason for the server to fall
        return json.dumps({"failed": "bug", "kind": type(error).__name__}).encode()


def fork(scientists: dict[str, Scientist], connection: int, limits: Limits) -> Values:
    """Fork the child that answers on ``connection`` and wait for its end; how it ended."""
    pid = os.fork()
    if pid == 0:
        try:
            die_with_parent()
            confine(limits, connection)
            reply = memoryview(child(scientists, connection, limits))
            while reply:
                reply = reply[os.write(connection, reply) :]
        finally:
            os._exit(0)
    os.close(connection)
    late = False

    def kill(*_: object) -> None:
        nonlocal late
        late = True
        os.kill(pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, kill)
    signal.setitimer(signal.ITIMER_REAL, limits.wall)
    _, status, usage = os.wait4(pid, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return {"signal": killed, "late": late, "cpu": usage.ru_utime + usage.ru_stime}


def main(fd: int) -> None:
    die_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
    control = socket.socket(fileno=fd)
    with control.makefile("rb") as lines:
        told = json.loads(lines.readline())
    limits = Limits(**told["limits"])
    try:
        scientists = prepare(told["worlds"], told["evals"])
    except UserError as error:
        control.sendall(json.dumps({"wrong": str(error)}).encode() + b"\n")
        return
    about = {name: _about(each) for name, each in scientists.items()}
    control.sendall(json.dumps({"worlds": about, "confinement": means(), "limits": told["limits"]}).encode() + b"\n")
    while True:
        message, passed, _, _ = socket.recv_fds(control, 1, 1)
        if not message:
            return
        how = fork(scientists, passed[0], limits)
        control.sendall(json.dumps(how).encode() + b"\n")


def _about(scientist: Scientist) -> Values:
    """What a server has to know of a world, to price a question before it is asked."""
    world, posterior = scientist.world, scientist.posterior
    return {
        "hash": world.hash, "rows": len(world.y), "theories": len(posterior.fits), "outcome": world.outcome,
        "draws": sum(len(fit.draws[1]) for fit in posterior.fits), "evals": posterior.evals,
    }  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
