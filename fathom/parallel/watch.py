"""Who is still there: when a process of a job dies, all others end, and one line says which it was.

A process that waits for a dead one would wait for the time limit of its group. So each keeps a connection to the first, which
the system closes when the process dies, however it dies. The first process is the only one that speaks; if it dies itself,
the second does. Over a connection go lines:

    to the first      hello <secret> <number> <where>     once
                      failed <what>                       it will end by itself, and why
                      done                                all is well: the end of the connection means nothing
    from the first    end <number>                        that process has died or failed
                      done
"""

import contextlib
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal

GRACE = 3.0
"""Seconds for which a process that failed waits to hear that another one is the cause."""


class Watch:
    """One process's end of the watch.

    Args:
        number, size: this process, of how many.
        host: an address of the first process.
        from_first: gives the first process's value of its argument to all.
    """

    def __init__(self, number: int, size: int, host: str, from_first: Callable[[Any], Any]) -> None:
        self.number, self.size = number, size
        self.advice = ""
        """What the line that names a dead process ends with."""
        self._over = threading.Event()
        """Set when this process needs no watch any more: it ends by itself, or has been told that all end."""
        self._failing: Literal["", "first", "perhaps"] = ""
        """Whether this process has an error, of which it is the first cause or perhaps another one is."""
        self._error = threading.Event()
        """Set when it has one."""
        self._speaking = threading.Lock()
        self._peers: list[socket.socket] = []
        server = socket.create_server((host, 0), backlog=size) if number == 0 else None
        port, secret = from_first((server.getsockname()[1], secrets.token_hex(16)) if server else None)
        if server is not None:
            while len(self._peers) < size - 1:
                peer, _ = server.accept()
                file = peer.makefile("r")
                hello = file.readline().split(maxsplit=3)
                if hello[:2] == ["hello", secret]:
                    self._add(peer)
                    self._start(self._listen, file, int(hello[2]), hello[3].strip())
            server.close()
        else:
            first = socket.create_connection((host, port))
            first.sendall(f"hello {secret} {number} process {os.getpid()} on {socket.gethostname()}\n".encode())
            self._add(first)
            self._start(self._obey, first.makefile("r"), host)

    def _add(self, peer: socket.socket) -> None:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # for a machine that lost its power
        for option, seconds in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
            if hasattr(socket, option):
                peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
        self._peers.append(peer)

    def _start(self, target: Callable[..., None], *arguments: Any) -> None:
        threading.Thread(target=target, args=arguments, daemon=True).start()

    def _tell(self, line: str) -> None:
        for peer in self._peers:
            with contextlib.suppress(OSError):
                peer.sendall(f"{line}\n".encode())

    def _listen(self, file: Any, number: int, where: str) -> None:
        """The first process's thread for one other."""
        word, what = "", ""
        with contextlib.suppress(OSError):
            for line in file:
                word, _, what = line.strip().partition(" ")
                if word == "failed":
                    # Often all fail alike, of one setting: then the first process says it itself.
                    if not self._over.wait(GRACE + 1):
                        self._end(number, f"rank {number} ({where}) failed: {what}")
                    return
        if word != "done":
            self._end(number, f"rank {number} ({where}) died")

    def _obey(self, file: Any, host: str) -> None:
        """Another process's thread for the first."""
        with contextlib.suppress(OSError):
            for line in file:
                word, _, number = line.strip().partition(" ")
                if word == "end" and int(number) == 0:
                    self._error.wait(GRACE)  # often all fail alike, and each is to end as it would alone
                if word == "end" and int(number) != self.number and self._failing != "first":
                    os._exit(1)
                self._over.set()
                return
        self._end(0, f"rank 0 (on {host}) died", speak=self.number == 1)

    def _end(self, number: int, what: str, *, speak: bool = True) -> None:
        with self._speaking:  # until the process has ended: one voice
            if self._over.is_set():
                return
            if speak:
                clear = "\r\x1b[K" if sys.stderr.isatty() else ""
                os.write(2, f"{clear}fathom: {what}; the other ranks end{self.advice}\n".encode())
            self._tell(f"end {number}")
            os._exit(1)

    def fail(self, what: str, *, perhaps: bool) -> None:
        """This process has an error: see that all others end, and that one line is said.

        Args:
            what: the error, on one line.
            perhaps: it may be only that another process is gone; if so, this one ends here.
        """
        self._failing = "perhaps" if perhaps else "first"
        self._error.set()
        if self.number > 0:
            self._tell(f"failed {what}")
            self._over.wait(2 * GRACE + 2)
            return
        if perhaps:
            self._over.wait(GRACE)  # in which _listen may end this process
        with self._speaking:
            self._over.set()
        self._tell("end 0")

    def leave(self) -> None:
        """This process ends well."""
        self._over.set()
        self._tell("done")
