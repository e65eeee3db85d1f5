"""`fathom ask serve`, `fathom ask mcp`, `fathom ask key`: the scientist behind a server, with keys, budgets and a log."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from fathom.commands.ask import WorldArg
from fathom.commands.log import read_key
from fathom.commands.output import Function
from fathom.errors import UserError

LogArg = Annotated[Path, arg(help="The log that every question, answer and refusal goes to, made if it is not there.")]
KeysArg = Annotated[Path, arg(help="The list of keys that `fathom ask key` made.")]
HarmArg = Annotated[str | None, arg(help="What recommendations are guarded against, such as 'loss > 5'.")]
ThresholdArg = Annotated[float | None, arg(help="The largest probability of that harm.")]
DeltaArg = Annotated[float | None, arg(help="How often the guard's bound may ever be too low.")]
ReleaseArg = Annotated[
    str | None, arg(help="The public key, 64 hexadecimal digits, of the person who may release from quarantine.")
]
SignArg = Annotated[Path | None, arg(help="The file of the private key that signs checkpoints.")]
HeldoutArg = Annotated[Path | None, arg(help="Rows that the world has not seen, to watch its calibration by.")]


@contextmanager
def _service(
    world: str, log: Path, keys: Path, harm: str | None, threshold: float | None, delta: float | None,
    release_key: str | None, sign: Path | None, heldout: Path | None,
) -> Iterator[Any]:  # fmt: skip
    from fathom.scientist import read
    from fathom.scientist.budget import read_keys
    from fathom.scientist.containment import Instrument
    from fathom.scientist.document import read_table
    from fathom.scientist.fingerprint import disturbed
    from fathom.scientist.service import SERVED, Policy, Service

    given = [harm, threshold, delta]
    if any(each is not None for each in given) and any(each is None for each in given):
        raise UserError("a guard needs all of --harm, --threshold and --delta: nothing is assumed")
    policy = None if harm is None or threshold is None or delta is None else Policy(harm, threshold, delta)
    frozen, allowed = read(world), read_keys(keys)
    rows = None if heldout is None else read_table(heldout.read_bytes(), heldout.name)
    other = disturbed(frozen.document)
    with Instrument({SERVED: frozen.document}) as first, Instrument({SERVED: other}) as second:
        yield Service(
            frozen, log, allowed, instrument=first, second=second, policy=policy,
            release_key=None if release_key is None else read_key(release_key),
            signing_key=None if sign is None else read_key(sign.read_text()), heldout=rows,
        )  # fmt: skip


def serve() -> Function:
    def run(
        world: Positional[WorldArg], log: LogArg, keys: KeysArg, host: str = "127.0.0.1", port: int = 8471,
        harm: HarmArg = None, threshold: ThresholdArg = None, delta: DeltaArg = None, release_key: ReleaseArg = None,
        sign: SignArg = None, heldout: HeldoutArg = None,
    ) -> None:  # fmt: skip
        """Answer questions about one world over HTTP, each in a confined child; needs the extra `serve`.

        Args:
            host: The address to listen on; keys go over the wire, so put TLS in front of any other than this machine's.
            port: The port to listen on.
        """
        from fathom.scientist.server import application, serve

        with _service(world, log, keys, harm, threshold, delta, release_key, sign, heldout) as service:
            app = application(service)
            print(
                f"http://{host}:{port}/v1/query about world {service.world.hash[:12]}, {service.health().document['status']}"
            )
            serve(app, host, port)

    return run


def mcp() -> Function:
    def run(
        world: Positional[WorldArg], log: LogArg, keys: KeysArg, harm: HarmArg = None, threshold: ThresholdArg = None,
        delta: DeltaArg = None, release_key: ReleaseArg = None, sign: SignArg = None, heldout: HeldoutArg = None,
    ) -> None:  # fmt: skip
        """Offer the same questions as tools of the Model Context Protocol on standard input and output; needs the extra `mcp`.

        The caller's key is read from the environment variable FATHOM_KEY.
        """
        from fathom.scientist.mcp import serve

        secret = os.environ.get("FATHOM_KEY", "")
        if not secret:
            raise UserError("set FATHOM_KEY to a key of the list")
        with _service(world, log, keys, harm, threshold, delta, release_key, sign, heldout) as service:
            serve(service, secret)

    return run


def key() -> Function:
    def run(keys: Positional[Path], id: Positional[str]) -> None:
        """Add a key to a list, with the usual budgets, and print its secret once.

        Args:
            keys: The list, a JSON file of hashes and budgets that you may edit; made if it is not there.
            id: The name of the key in the log.
        """
        from fathom.scientist.budget import new_key

        print(new_key(keys, id))

    return run
