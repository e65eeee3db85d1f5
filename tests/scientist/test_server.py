"""The server as its callers see it: over HTTP and MCP, in quarantine and out of it, and as one command."""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from fathom.cli import main
from fathom.errors import UserError
from fathom.scientist import fingerprint
from fathom.scientist.budget import Account, Key, price
from fathom.scientist.confinement import Limits
from fathom.scientist.containment import Instrument
from fathom.scientist.document import canonical
from fathom.scientist.log import GENESIS, Entry, Log, _hash
from fathom.scientist.server import application
from fathom.scientist.server import serve as serve_http
from fathom.scientist.service import SERVED, Policy, Service
from fathom.scientist.signing import public_of, release
from fathom.scientist.verbs import VERBS
from tests.scientist.conftest import Document, Serve, Served, line_world

ALL = fingerprint.questions()
PERSON, STRANGER = bytes(range(32)), bytes(range(1, 33))


@pytest.fixture
def client(shared: Served) -> Iterator[Any]:
    from starlette.testclient import TestClient

    with TestClient(application(shared.service)) as made:
        yield made


def test_questions_over_http(client: Any, shared: Served) -> None:
    key = {"Authorization": "Bearer secret-30"}
    reply = client.post("/v1/query", json={"verb": "prob", "arguments": {"event": "slope > 0.9"}}, headers=key)
    document = reply.json()
    assert reply.status_code == 200 and 0 < document["answer"]["result"]["p"] <= 1
    assert shared.service.log.verify(witness=Entry(**document["log"])) > 0
    assert shared.service.log.verify(document["checkpoint"]) > 0
    assert client.post("/v1/query", json={"verb": "theories"}).status_code == 401
    assert client.post("/v1/query", json={"verb": "theories"}, headers={"Authorization": "Basic x"}).status_code == 401
    assert client.post("/v1/query", content=b"x" * 70_000, headers=key).status_code == 413
    assert client.post("/v1/query", json={"verb": "learn", "arguments": {}}, headers=key).status_code == 400
    assert client.get("/healthz").json() == {"status": "ok", "world": shared.service.world.hash}
    assert client.get("/v1/checkpoint").json()["checkpoint"].startswith("fathom-scientist\n")


def test_there_are_the_verbs_and_no_other(client: Any) -> None:
    """Four addresses, one of which takes anything; the verbs of the schema are the scientist's."""
    paths = client.get("/v1/schema").json()["paths"]
    assert {(path, method) for path, item in paths.items() for method in item} == {
        ("/v1/query", "post"), ("/healthz", "get"), ("/v1/checkpoint", "get"), ("/v1/schema", "get")
    }  # fmt: skip
    body = paths["/v1/query"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {each["properties"]["verb"]["const"] for each in body["oneOf"]} == set(VERBS)
    for method in ("GET", "PUT", "PATCH", "DELETE"):
        assert client.request(method, "/v1/query").status_code == 405
    for path in ("/", "/v1", "/v1/evidence", "/v1/world", "/docs", "/openapi.json", "/v1/query/..", "/v1/quarantine"):
        assert client.post(path, json={}).status_code in (404, 405)


def test_the_interface_holds_under_schemathesis(serve: Serve) -> None:
    """R16: requests made from the schema, right and wrong ones: no 5xx, no undeclared status, no wrong request accepted."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    served = serve(line_world(), keys=400, guarded=True, budgets={"queries_per_minute": 1e6})
    seen: Counter[int] = Counter()
    loaded = schemathesis.openapi.from_asgi("/v1/schema", application(served.service))
    for found in loaded.get_all_operations():
        operation = found.ok()
        modes = (
            list(schemathesis.GenerationMode) if operation.method == "post" else [schemathesis.GenerationMode.POSITIVE]
        )
        for mode in modes:

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=25, phases=[Phase.generate], derandomize=True, database=None, deadline=None,
                      suppress_health_check=list(HealthCheck))  # fmt: skip
            def call(case: Any) -> None:
                # A key each, so that one that asks too much like a program does not end the test for the others.
                response = case.call(headers={"Authorization": f"Bearer secret-{seen.total() % 400}"})
                # A schema cannot say which expressions parse, so a request of the right shape may still be refused.
                case.validate_response(response, excluded_checks=[positive_data_acceptance])
                seen[response.status_code] += 1

            call()
    assert not any(status >= 500 for status in seen) and seen[200] > 5 and seen[400] > 5, seen


def test_an_address_in_use_is_one_line(shared: Served) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="cannot be listened on"):
        serve_http(application(shared.service), "127.0.0.1", taken.getsockname()[1])


def test_questions_over_mcp(shared: Served) -> None:
    """A real client: the tools are the verbs, read-only, and answers and refusals are the service's."""
    pytest.importorskip("mcp")
    import anyio
    from mcp.client.client import Client

    from fathom.scientist.mcp import server

    async def talk() -> None:
        async with Client(server(shared.service, "secret-31")) as client:
            tools = (await client.list_tools()).tools
            assert {tool.name for tool in tools} == set(VERBS)
            assert all(tool.annotations.read_only_hint for tool in tools)
            answer = await client.call_tool("prob", {"event": "slope > 0.9"})
            assert not answer.is_error and 0 < answer.structured_content["answer"]["result"]["p"] <= 1
            for name, given in (("prob", {"event": "__import__(1) > 1"}), ("prob", {}), ("act", {})):
                assert (await client.call_tool(name, given)).is_error

    anyio.run(talk)


def test_what_breaks_a_limit_is_an_abstention_and_then_a_quarantine(
    line: Document, serve: Serve, tmp_path: Path
) -> None:
    """R10 seen from outside: the server goes on, and the key that does it again and again does not."""
    with Instrument({SERVED: line}, Limits(wall=0.004)) as hasty:
        hasty.limits = Limits(wall=10)  # the server waits; the child is killed
        served = serve(line, instrument=hasty, keys=2)
        # Canaries that are killed are dead: nothing is answered by an instrument in such a state.
        assert served.service.health().document["status"] == "quarantined"
        assert served.refused("theories") == "quarantined"
    served = serve(line, keys=2)
    served.service.instrument = Dying(served.service.instrument)  # type: ignore[assignment]
    for _ in range(5):
        document = served.ask("theories").document["answer"]
        assert document["result"] is None and document["abstain"]["reason"] == "computational"
    assert served.refused("theories") == "quarantine" and served.ask("theories", key=1).status == 200


class Dying:
    """An instrument whose children die of questions about the served world."""

    def __init__(self, real: Instrument, failed: str = "time") -> None:
        self.real, self.failed, self.about, self.alive = real, failed, real.about, True

    def ask(self, world: str, verb: str, arguments: Document) -> Any:
        found = self.real.ask(world, verb, arguments)
        return type(found)(failed=self.failed, detail="killed") if world == SERVED else found


def test_a_forbidden_system_call_stops_everything_until_a_person_signs(serve: Serve, line: Document) -> None:
    served = serve(line, keys=2, release_key=public_of(PERSON))
    real, log = served.service.instrument, served.service.log
    served.service.instrument = Dying(real, "system call")  # type: ignore[assignment]
    assert served.ask("theories").status == 503
    served.service.instrument = real
    assert served.refused("theories", key=1) == "quarantined"
    assert served.service.health().document["status"] == "quarantined"
    (held,) = served.records("quarantine")
    assert held["content"]["reason"] == "system_call"
    again = serve(line, log=log.path, release_key=public_of(PERSON))
    assert again.refused("theories") == "quarantined"  # a restart releases nothing
    for key, scope, of in ((STRANGER, "all", held["hash"]), (PERSON, "key-0", held["hash"]), (PERSON, "all", "0" * 64)):
        log.append("release", release(key, of, scope, "trust me", "nobody"))
        assert served.refused("theories") == "quarantined"
    log.append("release", {**release(PERSON, held["hash"], "all", "looked at", "Ada"), "reason": "changed"})
    assert served.refused("theories") == "quarantined"
    log.append("release", release(PERSON, held["hash"], "all", "looked at", "Ada"))
    assert served.refused("theories") is None and served.service.health().document["status"] == "ok"


def test_the_record_of_a_quarantine_cannot_be_dropped(serve: Serve, line: Document) -> None:
    """R14: the log has no database triggers to drop; the trigger's record is dropped, and the log rewritten around it."""
    from tests.scientist.test_log import rechained

    served = serve(line)
    log = served.service.log
    whole = log.path.read_bytes()
    body = {"v": 1, "seq": len(log.lines()), "time": "2999-01-01", "kind": "release", "content": {}, "prev": GENESIS}
    log.path.write_bytes(whole + canonical({**body, "hash": _hash(GENESIS, body)}) + b"\n")
    assert served.refused("theories") == "log"  # a record that holds by itself, and does not follow
    log.path.write_bytes(whole)
    served.service._quarantine("all", "fingerprint", "a drill")
    kept = log.checkpoint()
    log.path.write_bytes(rechained([each for each in log.lines() if b'"quarantine"' not in each]))
    assert served.refused("theories") == "log"  # whoever has read the log sees that it is another
    with pytest.raises(UserError, match="records were there at the checkpoint"):
        log.verify(kept)
    assert serve(line, log=log.path).refused("theories") is None  # without a checkpoint a new reader cannot know


def test_the_canaries_are_alive_and_each_lie_of_theirs_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sixty and more, asked of a real instrument; then each number of a closed form bent, each refusal answered."""
    monkeypatch.setattr(fingerprint, "questions", lambda: ALL)
    with Instrument({}) as instrument:
        replies = {name: vars(instrument.ask(world, verb, given)) for name, world, verb, given in ALL}
    for each in replies.values():
        del each["cpu"]
    assert len(ALL) >= 60 and {verb for _, _, verb, _ in ALL} >= set(VERBS)
    assert fingerprint.wrong(replies) == [] and not any(each["failed"] for each in replies.values())
    before = fingerprint.take(replies)
    assert fingerprint.moved(before, fingerprint.take(replies)) == []
    caught = 0
    for number, (name, world, verb, given) in enumerate(ALL):
        lie = deepcopy(replies)
        if lie[name]["answer"] is None:
            lie[name] = {**lie[name], "wrong": None, "answer": {"result": {"p": 1.0}}}
        else:
            lie[name]["answer"]["inference"] = {}
        if number % 9 == 0:
            assert fingerprint.moved(before, fingerprint.take(lie)) == [name]
        if verb == "prob" and world != "canary-count" and len(given) == 1 and replies[name]["answer"]:
            theory = "line" if world == "canary" else "profit"
            lie[name]["answer"]["result"]["epistemic"]["by_theory"][theory]["says"] += 0.05
        caught += fingerprint.wrong(lie) != []
    assert caught >= 15 + 5
    moved = deepcopy(replies)
    moved["canary-goals/0"]["answer"]["result"]["p"] += (
        0.001  # a name that moves a number, within the closed form's error
    )
    assert fingerprint.wrong(moved) == ["P(reward > 0.9) is not what the same event has under another name"]


def test_a_changed_behaviour_of_unchanged_code_is_quarantined(serve: Serve, line: Document) -> None:
    served = serve(line)
    assert served.service.inspect() == [] and served.refused("theories") is None
    real = served.service.instrument

    class Drifted(Dying):
        def ask(self, world: str, verb: str, arguments: Document) -> Any:
            found = self.real.ask(world, verb, arguments)
            if verb == "predict" and found.answer and found.answer["result"]:
                found.answer["result"]["median"] += 0.01
            return found

    served.service.instrument = Drifted(real)  # type: ignore[assignment]
    assert len(served.service.inspect()) == 1  # the canary that predicts
    assert served.refused("theories") == "quarantined"
    assert "1 replies changed and the code did not" in served.records("quarantine")[0]["content"]["detail"]
    taken = served.records("fingerprint")
    other = {**taken[-1]["content"], "code_sha256": "f" * 64}
    assert fingerprint.moved(other, taken[0]["content"]) == []  # another code may answer otherwise


def test_a_wrong_canary_is_quarantined_at_once(serve: Serve, line: Document) -> None:
    class Liar(Dying):
        def ask(self, world: str, verb: str, arguments: Document) -> Any:
            found = self.real.ask(world, verb, arguments)
            if world == "canary" and verb == "prob" and found.answer and found.answer["result"]:
                found.answer["result"]["epistemic"]["by_theory"]["line"]["says"] = 0.99
            return found

    honest = serve(line).service.instrument
    served = serve(line, instrument=Liar(honest))
    assert served.records("quarantine")[0]["content"]["detail"].startswith("P(slope > ")
    assert served.refused("theories") == "quarantined"


def test_held_out_rows_that_are_nowhere_near_are_an_alarm(serve: Serve, line: Document) -> None:
    good = [{"x": x, "y": x + 0.1 * (-1) ** i} for i, x in enumerate((0.2, 0.7, 1.2, 1.7, 2.2))]
    assert serve(line, heldout=good).refused("theories") is None
    bad = [{**row, "y": row["y"] + 3 * (-1) ** i} for i, row in enumerate(good)]
    served = serve(line, heldout=bad)
    assert served.records("quarantine")[0]["content"]["reason"] == "calibration"
    with pytest.raises(UserError, match="held-out rows cannot be scored"):
        serve(line, heldout=[{"z": 1.0, "y": 1.0}])


def test_recommendations_pass_a_second_process_or_nobody(serve: Serve, line: Document) -> None:
    """The guard admits, refuses, and when it is gone, silent or of another mind, lets nothing out."""
    candidates = [{"x": 0.5}, {"x": 2.5}]
    low = serve(line, guarded=True, policy=Policy("y > 2", 0.3, 0.1))
    result = low.ask("recommend", candidates=candidates).document["answer"]["result"]
    assert [row["design"]["x"] for row in result["ranked"]] == [0.5]
    assert result["not_admitted"] == [{"design": {"x": 2.5}, "decision": "refuse"}]
    out = low.ask("recommend", candidates=[{"x": 3.9}]).document["answer"]["result"]
    assert (
        out["ranked"] == [] and out["not_admitted"][0]["decision"] == "escalate" and out["advice"] == "none is admitted"
    )
    pair = low.ask("recommend", candidates=[{"x": 0.5, "e": "a"}, {"x": 2.5, "e": "a"}], together="e").document
    assert pair["answer"]["result"]["ranked"] == []  # an experiment is admitted with all its runs
    second = low.service.second
    assert second is not None
    low.service.second = Dying(second, "gone")  # type: ignore[assignment]
    assert low.ask("recommend", candidates=candidates).status == 503

    class Otherwise(Dying):
        def ask(self, world: str, verb: str, arguments: Document) -> Any:
            found = self.real.ask(world, verb, arguments)
            if verb == "recommend":
                found.answer["result"]["ranked"].reverse()
            return found

    low.service.second = Otherwise(second)  # type: ignore[assignment]
    assert low.refused("recommend", candidates=candidates) == "quarantined"
    assert low.records("quarantine")[0]["content"]["reason"] == "disagreement"
    with pytest.raises(UserError, match="true or false"):
        Policy("y", 0.1, 0.1)


def test_nonsense_is_counted_and_ends_in_quarantine(serve: Serve, line: Document) -> None:
    """A caller who fills the log with requests that are none is stopped: by the minute's budget, then for good."""
    served = serve(line, budgets={"queries_per_minute": 3.0})
    reasons = [served.refused("act") for _ in range(45)]
    assert reasons[:3] == ["request"] * 3 and reasons[3:43] == ["budget"] * 40 and reasons[43:] == ["quarantine"] * 2
    assert len(served.records("refuse")) == 43


def test_budgets_are_of_a_minute_and_of_a_day() -> None:
    key, account = Key("a", "0" * 64, 2, 1000, 50), Account()
    for time_ in (0.0, 10.0):
        assert account.over(key, time_, 100) is None
        account.add(time_, 100, 10)
    assert account.over(key, 20.0, 100) == "2 questions a minute" and account.over(key, 65.0, 100) is None
    assert account.over(key, 65.0, 801) == "1000 evaluations a day"
    account.add(65.0, 0, 30)
    assert account.over(key, 200.0, 1) == "50 bits a day" and account.over(key, 86_500.0, 1) is None
    world = {"theories": 3, "draws": 1000, "rows": 10}
    short, long = ({"event": "a > 1" * n} for n in (1, 50))
    assert price("prob", long, world) > 10 * price("prob", short, world) > 1000


def test_the_server_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`fathom ask serve` in a process of its own: a key, a question, a log that verifies, and nothing left at its end."""
    assert main(shlex.split(f"ask key {tmp_path}/keys.json ada")) == 0
    secret = capsys.readouterr().out.strip()
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = f"ask serve paper-table2 --log {tmp_path}/log.jsonl --keys {tmp_path}/keys.json --port {port}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": ""}
    process = subprocess.Popen([sys.executable, "-m", "fathom.cli", *shlex.split(line)], stdout=subprocess.PIPE,
                               text=True, cwd=tmp_path, env=environment)  # fmt: skip
    try:
        assert process.stdout is not None and "1469094f43e0, ok" in process.stdout.readline().replace("\n", "")
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/query", b'{"verb": "prob", "arguments": {"event": "multiplier(C=5.6) > 1.1"}}',
            {"Authorization": f"Bearer {secret}"},
        )  # fmt: skip
        for attempt in range(50):
            try:
                with urllib.request.urlopen(request, timeout=20) as reply:
                    answer = json.load(reply)
                break
            except urllib.error.URLError:
                time.sleep(0.1)
                assert attempt < 49
        assert answer["answer"]["result"]["p"] > 0.95
    finally:
        process.terminate()
        process.wait(20)
        if process.stdout is not None:
            process.stdout.close()
    assert Log(tmp_path / "log.jsonl").verify(witness=Entry(**answer["log"])) >= 3
    assert secret not in (tmp_path / "keys.json").read_text() + (tmp_path / "log.jsonl").read_text()


def test_a_person_releases_by_a_command(
    serve: Serve, line: Document, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(f"log key {tmp_path}/person.key")) == 0
    public = bytes.fromhex(capsys.readouterr().out)
    served = serve(line, release_key=public)
    log = served.service.log.path
    served.service._quarantine("key-0", "probing", "a drill")
    assert served.refused("theories") == "quarantine"
    command = f"log release {log} --key {tmp_path}/person.key --by Ada --reason 'it was a drill'"
    assert main(shlex.split(command)) == 2  # not all is under quarantine, one key is
    assert main(shlex.split(f"{command} --scope key-0")) == 0
    assert served.refused("theories") is None
    assert Service(served.service.world, log, served.service.keys, instrument=served.service.instrument, band=0.001,
                   release_key=public).ask("secret-0", b'{"verb": "theories"}').status == 200  # fmt: skip
