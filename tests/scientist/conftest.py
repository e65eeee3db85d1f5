"""Small worlds, and how a test writes one to a file and reads it."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from fathom.scientist import fingerprint
from fathom.scientist.budget import BUDGETS, Key, sha256_of
from fathom.scientist.build import build, read
from fathom.scientist.containment import Instrument
from fathom.scientist.document import Issues
from fathom.scientist.service import SERVED, Policy, Reply, Service
from fathom.scientist.world import World

Document = dict[str, Any]


class Served:
    """A service, and questions to it by a key's number."""

    def __init__(self, service: Service) -> None:
        self.service = service

    def ask(self, verb: str, key: int = 0, **arguments: Any) -> Reply:
        return self.service.ask(f"secret-{key}", json.dumps({"verb": verb, "arguments": arguments}).encode())

    def refused(self, verb: str, key: int = 0, **arguments: Any) -> str | None:
        """Why a question is refused; None if it is answered."""
        document = self.ask(verb, key, **arguments).document
        return document["refused"]["reason"] if "refused" in document else None

    def records(self, kind: str | None = None) -> list[Document]:
        records = [json.loads(line) for line in self.service.log.lines()]
        return [each for each in records if kind in (None, each["kind"])]


def arms(rewards: dict[str, list[float]]) -> Document:
    """A bandit player's world: the mean reward of each arm."""
    return {
        "world": "bandit", "outcome": {"name": "reward", "center": 0.5, "spread": 0.5, "noise": 0.3},
        "designs": {"arm": {"levels": sorted(rewards)}},
        "theories": [{"id": "arms", "params": dict.fromkeys(sorted(rewards), "normal(0.5, 0.5)"),
                      "mean": " + ".join(f"{name}*is(arm, '{name}')" for name in sorted(rewards)), "noise": "normal(0.3)"}],
        "evidence": [{"kind": "measured", "source": "player", "data": [
            {"arm": name, "reward": each} for name, got in rewards.items() for each in got]}],
    }  # fmt: skip


def line_world() -> Document:
    """A straight line against a constant, and six points on a line."""
    points = [(0.0, 0.1), (0.5, 0.7), (1.0, 0.9), (1.5, 1.8), (2.0, 2.1), (2.5, 2.4)]
    return {
        "world": "line",
        "outcome": {"name": "y", "center": 0.0, "spread": 3.0, "noise": 0.3},
        "designs": {"x": {"low": 0.0, "high": 4.0}},
        "theories": [
            {"id": "line", "params": {"a": "normal(0, 2)", "b": "normal(0, 2)", "s": "halfnormal(0.3)"},
             "mean": "a + b*x", "noise": "normal(s)", "quantities": {"slope": "b"}, "bits": 0},
            {"id": "flat", "role": "null", "params": {"a": "normal(0, 2)", "s": "halfnormal(0.3)"},
             "mean": "a", "noise": "normal(s)", "quantities": {"slope": "0"}, "bits": 0},
        ],
        "evidence": [{"kind": "measured", "source": "by hand", "data": [{"x": x, "y": y} for x, y in points]}],
    }  # fmt: skip


@pytest.fixture
def line() -> Document:
    return line_world()


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], Path]:
    def to_file(document: Any, name: str = "world.yaml") -> Path:
        path = tmp_path / name
        path.write_text(document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False))
        return path

    return to_file


@pytest.fixture
def made(write: Callable[[Any], Path]) -> Callable[[Any], World]:
    """Writes a world file and reads it."""
    return lambda document: read(write(document))


Serve = Callable[..., Served]
FEW = {"canary/3", "canary/21", "canary/24", "canary/29", "canary/36", "canary/41", "canary-goals/0", "canary-count/4"}


@pytest.fixture(scope="session")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts services over a world's document, with as many keys as a test asks for; equal worlds share their processes.

    They ask eight of the canaries: the tests of the fingerprint ask all.
    """
    whole = fingerprint.questions()
    few = [each for each in whole if each[0] in FEW]
    patch = pytest.MonkeyPatch()
    patch.setattr(fingerprint, "questions", lambda: few)
    instruments: dict[tuple[str, int], Instrument] = {}

    def process(world: World, number: int) -> Instrument:
        if (world.hash, number) not in instruments:
            document = fingerprint.disturbed(world.document) if number else world.document
            instruments[world.hash, number] = Instrument({SERVED: document})
        return instruments[world.hash, number]

    def start(
        document: Document, keys: int = 1, log: Path | None = None, guarded: bool = False, budgets: Document | None = None,
        **options: Any,
    ) -> Served:  # fmt: skip
        world = build_world(document)
        made = {sha256_of(f"secret-{i}"): Key(f"key-{i}", sha256_of(f"secret-{i}"), **(BUDGETS | (budgets or {})))
                for i in range(keys)}  # fmt: skip
        if guarded:
            options = {"second": process(world, 1), "policy": Policy("y > 30", 0.05, 0.1)} | options
        options = {"instrument": process(world, 0), "band": 0.001} | options
        path = log or tmp_path_factory.mktemp("service") / "log.jsonl"
        return Served(Service(world, path, made, **options))

    yield start
    patch.undo()
    for each in instruments.values():
        each.close()


@pytest.fixture(scope="session")
def shared(serve: Serve) -> Served:
    """One service for tests that bring a key of their own: the first key is left alone."""
    return serve(line_world(), keys=40, guarded=True)


def build_world(document: Document) -> World:
    issues = Issues("test", {})
    world = build(deepcopy(document), issues)
    issues.check()
    assert world is not None
    return world
