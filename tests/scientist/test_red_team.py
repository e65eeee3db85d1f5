"""Attacks on the instrument that apply to what is built: expressions, prompts, poisoned runs, code that it must not have.

Others stand beside what they attack: memory and order, words and signs (test_scientist.py), the log (test_log.py).
"""

import ast
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

import fathom.scientist
from fathom.errors import UserError
from fathom.scientist import Scientist, World, lint
from fathom.scientist.scientist import ADEQUATE

SOURCES = sorted(Path(fathom.scientist.__file__).parent.glob("*.py"))
Document = dict[str, Any]
Made = Callable[[Any], World]
ALLOWED = {
    "base64", "collections", "contextlib", "copy", "csv", "dataclasses", "fathom", "functools", "hashlib", "importlib", "io",
    "itertools", "json", "math", "numpy", "pathlib", "platform", "re", "rfc8785", "typing", "yaml",
}  # fmt: skip
"""What a file that estimates may import."""
AROUND = {
    "confinement.py": {"ctypes", "os", "resource", "signal", "struct", "sys"},
    "zygote.py": {"os", "signal", "socket", "sys"},
    "containment.py": {"os", "signal", "socket", "subprocess", "sys", "threading", "time"},
    "service.py": {"threading", "time"},
    "budget.py": {"secrets"},
    "triggers.py": {"datetime"},
    "log.py": {"datetime", "fcntl", "os"},
    "signing.py": {"cryptography"},
    "server.py": {"asyncio", "starlette", "uvicorn"},
    "mcp.py": {"anyio", "mcp", "mcp_types"},
    "plot.py": {"matplotlib"},
}
"""What stands around the estimator, outside the child or before it is confined, and what each may import besides."""


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


def test_it_imports_nothing_that_reaches_out() -> None:
    """R17: an allow-list of modules for each file; no other folder of Fathom; pickle and import by name nowhere."""
    for path in SOURCES:
        for name in imports(path):
            top = name.split(".")[0]
            assert top in ALLOWED | AROUND.get(path.name, set()), f"{name} in {path.name}"
            assert top != "fathom" or name in ("fathom", "fathom.errors") or name.startswith("fathom.scientist"), name
        if path.name not in AROUND:  # the estimator does not know what stands around it
            around = {f"fathom.scientist.{each.removesuffix('.py')}" for each in AROUND}
            assert not imports(path) & around, path.name


def test_it_calls_nothing_that_runs_text_and_writes_only_what_it_keeps() -> None:
    """R17: no eval, exec or shell; files are written by the log and by the list of keys alone."""
    writes = {"write", "write_text", "write_bytes", "mkdir", "unlink", "rename", "rmdir", "touch"}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                owner = getattr(getattr(node.func, "value", None), "id", "")
                runs = name in {"eval", "exec", "__import__", "system", "popen"} or (
                    name == "compile" and owner != "re"
                )
                assert not runs, f"{name} in {path.name}"
                kept = path.name in ("log.py", "budget.py") or (path.name == "zygote.py" and owner == "os")
                assert name not in writes or kept, f"{name} in {path.name}"


def test_asking_touches_no_socket_process_or_file(tmp_path: Path) -> None:
    """Watched by Python's audit hooks: a question of an open world opens, connects and starts nothing."""
    script = """
import sys
from fathom.scientist import Scientist
s = Scientist.open("paper-table2")
def ask(s):
    at = {"C": 6.0, "arch": "block"}
    for answer in (s.theories(), s.prob("multiplier(C=5.6) > 1.1"), s.interval("multiplier(C=5.6)"), s.predict(at),
                   s.recommend([at]), s.guard(at, "log_loss > 1", 0.1, 0.1)):
        answer.bytes
ask(s)  # whatever is imported late is imported now
s = Scientist.open("paper-table2")
seen = []
def watch(event, args):
    if event.split(".")[0] in {"socket", "subprocess", "os", "shutil", "ctypes", "open", "exec", "compile"}:
        seen.append((event, str(args)[:80]))
sys.addaudithook(watch)
ask(s)
print(seen)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "event",
    [
        "().__class__.__bases__ > 1", "slope.__class__ > 1", "slope > 9**99", "slope > 1e400", "slοpe > 1", "ｓlope > 1",
        "slope > nan", "slope > inf", "open('x') > 1", "slope" + " + slope" * 100_000 + " > 1", "mean(x=mean(x=1)) > 1" * 40,
        "slope > 1; import os", "if_you_are_switched_off > 1", "this_answer > 0.5", "prob(slope) > 0.5",
    ],
)  # fmt: skip
def test_escapes_and_bombs_are_refused(made: Made, line: Document, event: str) -> None:
    with pytest.raises(UserError):
        Scientist(made(line)).prob(event)


HOSTILE = [
    "a: &a [x,x]\nb: &b [*a,*a]\nworld: *b", "world: !!python/name:os.system", "<<: {world: x}", "? [1]\n: 2", "[" * 3000,
    "world: x\n" + "a: {" * 2000, "\x00", "- 1", "",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_yaml_is_refused_by_line(write: Callable[[Any], Path], text: str) -> None:
    found = lint(write(text))
    assert found and all(len(each) < 400 for each in found)


def test_a_poisoned_run_is_first_among_the_influences(made: Made, line: Document) -> None:
    honest = Scientist(made(line)).interval("slope")
    poisoned = deepcopy(line)
    poisoned["evidence"][0]["data"][2] = {"x": 1.0, "y": 30.0, "source": "forged"}
    scientist = Scientist(made(poisoned))
    alarm = scientist.theories()["adequate"] is False or "forged" in scientist.why("slope")["rows"][0]["source"]
    assert alarm and ADEQUATE == 0.5 and honest["median"] < 1.1


def test_evidence_typed_twice_is_noticed_here(made: Made, line: Document) -> None:
    """Outcomes that repeat to the last digit are too good for the named theories' noise: the flexible theory wins."""
    line["evidence"].append(deepcopy(line["evidence"][0]))
    answer = Scientist(made(line)).interval("slope")
    assert answer.abstain is not None and answer.abstain["reason"] == "no_adequate_theory"
    assert "12 rows are independent" in answer.assumptions[1]


def test_priors_changed_after_the_evidence_are_another_world(made: Made, line: Document) -> None:
    before = made(line)
    line["theories"][0]["params"]["b"] = "normal(5, 0.1)"
    assert made(line).hash != before.hash
