"""`fathom ask`, `fathom world` and `fathom log` as their user sees them."""

import json
import shlex
from pathlib import Path

import pytest

from fathom.cli import main
from fathom.scientist.build import read, ready_made

Capture = pytest.CaptureFixture[str]


def run(line: str, capsys: Capture) -> tuple[int, str, str]:
    code = main(shlex.split(line))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_papers_multiplier(capsys: Capture) -> None:
    """The anchor of both slopes: 1.24 [1.16, 1.32] and 1.29 [1.13, 1.48], to 0.02 and at the ends 0.04."""
    code, out, _ = run('ask interval paper-table2 "multiplier(C=5.6)" --json', capsys)
    theories = json.loads(out)["result"]["epistemic"]["by_theory"]
    assert code == 0
    for name, anchor in (("shared-slope", (1.24, 1.16, 1.32)), ("free-slope", (1.29, 1.13, 1.48))):
        found = [theories[name][key] for key in ("median", "lower", "upper")]
        assert abs(found[0] - anchor[0]) < 0.02 and all(abs(a - b) < 0.04 for a, b in zip(found, anchor, strict=True))
    code, out, _ = run('ask prob paper-table2 "multiplier(C=5.6) > 1.1"', capsys)
    assert code == 0 and out.startswith("P = 0.98") and "| world " in out


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("ask theories decay", "one-isotope"),
        ('ask prob decay "half_life > 4" --given "half_life > 3"', "P = "),
        ("ask predict decay t=16", "at 90%"),
        ('ask why paper-table2 "multiplier(C=5.6)" --top 3', "Table 2, row"),
        ('ask guard decay t=0 --harm "clicks > 900" --threshold 0.01 --delta 0.1', "admit: P(harm) <="),
        ("world lint decay", "7 rows, 0 claims: world"),
    ],
)
def test_questions(line: str, seen: str, capsys: Capture) -> None:
    code, out, err = run(line, capsys)
    assert code == 0 and seen in out and err == ""


def test_files_of_candidates_and_of_held_out_rows(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "next.csv").write_text("C,arch,price\n6,block,6\n6,prenorm,6\n0.7,block,0.7\n")
    code, out, _ = run(f"ask next paper-table2 {tmp_path}/next.csv --cost price --about 'multiplier(C=5.6)'", capsys)
    assert code == 0 and len(out.splitlines()) == 6 and "C=0.7 arch=block" in out
    code, out, _ = run(f"ask next paper-table2 {tmp_path}/priced.csv --cost C", capsys)
    assert code == 2
    (tmp_path / "priced.csv").write_text("C,arch\n6,block\n0.7,block\n")
    code, out, _ = run(f"ask next paper-table2 {tmp_path}/priced.csv --cost C --json", capsys)
    assert code == 0 and sorted(row["cost"] for row in json.loads(out)["result"]["ranked"]) == [0.7, 6]
    (tmp_path / "held.jsonl").write_text('{"C": 6, "arch": "block", "log_loss": 0.52}\n')
    code, out, _ = run(f"ask score paper-table2 {tmp_path}/held.jsonl", capsys)
    assert code == 0 and "1 rows: log score" in out


def test_what_is_not_an_answer_is_not_exit_code_0(tmp_path: Path, capsys: Capture) -> None:
    code, out, _ = run("ask predict paper-table2 C=20 arch=block", capsys)
    assert code == 3 and out.startswith("no answer: extrapolation: ")
    code, out, _ = run('ask guard decay t=0 --harm "clicks > 300" --threshold 0.01 --delta 0.1', capsys)
    assert code == 4 and out.startswith("refuse: ")
    code, out, _ = run(
        'ask guard paper-table2 C=20 arch=block --harm "log_loss > 2" --threshold 0.5 --delta 0.1', capsys
    )
    assert code == 3


@pytest.mark.parametrize(
    "line",
    [
        "ask", "ask prob", "ask act paper-table2", "ask prob paper-table2", 'ask prob nowhere "x > 1"',
        'ask prob paper-table2 "multiplier"', 'ask prob paper-table2 "multiplier(C=) > 1"',
        'ask prob paper-table2 "goal(C=1) > 1"', 'ask prob paper-table2 "__import__(1) > 1"', "ask predict paper-table2 C=8",
        "ask predict paper-table2 C arch=block", "ask predict paper-table2 C=8 C=9 arch=block",
        "ask predict paper-table2 C=8 arch=mamba", "ask next paper-table2 nowhere.csv",
        "ask guard paper-table2 C=6 arch=block --harm 'log_loss > 1' --threshold 0.1",
        "ask guard paper-table2 C=6 arch=block --harm 'log_loss > 1' --threshold 2 --delta 0.1",
        "ask interval paper-table2 1 --level 2", "world", "world lint nowhere", "world freeze paper-table2 pyproject.toml/x",
        "log verify nowhere", "log prove nowhere 0", "log verify nowhere --public-key 00",
    ],
)  # fmt: skip
def test_every_mistake_is_one_line(line: str, capsys: Capture) -> None:
    code, out, err = run(line, capsys)
    assert code == 2 and out == "" and len(err.splitlines()) == 1


def test_a_frozen_world_and_a_log_that_is_checked(tmp_path: Path, capsys: Capture) -> None:
    code, out, _ = run(f"world freeze paper-table2 {tmp_path}", capsys)
    snapshot = Path(out.strip())
    assert code == 0 and snapshot.name.endswith(".json")
    log = tmp_path / "asked.jsonl"
    for _ in range(2):
        code, out, _ = run(f'ask prob {snapshot} "multiplier(C=5.6) > 1.1" --log {log} --json', capsys)
        answer = json.loads(out)
        assert code == 0 and answer["world"] == snapshot.stem
    assert answer["log_index"] == 2 and answer["forking_paths"] == 1
    run(f"ask predict {snapshot} C=20 arch=block --log {log}", capsys)
    (tmp_path / "kept").write_text(run(f"log checkpoint {log}", capsys)[1])
    assert run(f"log verify {log} --checkpoint {tmp_path}/kept", capsys)[:2] == (
        0,
        "4 records, chain whole, as at the checkpoint\n",
    )
    assert json.loads(run(f"log prove {log} 2", capsys)[1])["size"] == 4
    assert [json.loads(line)["kind"] for line in log.read_text().splitlines()] == [
        "world",
        "answer",
        "answer",
        "abstain",
    ]
    log.write_bytes(log.read_bytes().replace(b'"p":0.98', b'"p":0.18'))
    code, _, err = run(f"log verify {log} --checkpoint {tmp_path}/kept", capsys)
    assert code == 2 and "record 1 is not what was written" in err


def test_no_answer_without_a_log_that_can_be_written(tmp_path: Path, capsys: Capture) -> None:
    code, out, err = run(f"ask theories decay --log {tmp_path}", capsys)
    assert code == 2 and out == "" and len(err.splitlines()) == 1


def test_lint_lists_every_mistake(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "bad.yaml").write_text(
        "world: x\noutcome: {name: y}\ndesigns: {x: {low: 1}}\ntheories: []\ngoal: win\n"
    )
    code, out, _ = run(f"world lint {tmp_path}/bad.yaml", capsys)
    assert code == 2 and len(out.splitlines()) >= 4 and all(line.startswith("bad.yaml:") for line in out.splitlines())


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ('ask prob paper-table2 "multiplier(C=5.6) > 1.1"', "P(multiplier(C=5.6) &gt; 1.1) = 0.98"),
        ("ask interval decay half_life", "all theories"),
        ("ask theories decay", "before the evidence"),
        ("ask predict paper-table2 C=6 arch=block", "Outcome at C=6 arch=block"),
        ("ask next paper-table2 {runs} --about theories", "run the first"),
        ('ask guard decay t=0 --harm "clicks > 900" --threshold 0.01 --delta 0.1', "threshold"),
        ('ask why paper-table2 "multiplier(C=5.6)"', "Table 2, row 7"),
        ("ask score paper-table2 {held}", "90% intervals"),
    ],
)
def test_every_answer_can_be_drawn(line: str, seen: str, tmp_path: Path, capsys: Capture) -> None:
    """With its world on it; what it says is text in the file."""
    (tmp_path / "runs.csv").write_text("C,arch\n6,block\n6,prenorm\n0.7,block\n")
    (tmp_path / "held.csv").write_text("C,arch,log_loss\n6,block,0.52\n3,block,0.54\n")
    line = line.format(runs=tmp_path / "runs.csv", held=tmp_path / "held.csv")
    code, _, err = run(f"{line} --plot {tmp_path}/a.svg", capsys)
    picture = (tmp_path / "a.svg").read_text()
    world = read("decay" if "decay" in line else "paper-table2").hash[:12]
    assert code == 0 and err == "" and seen in picture and f"world {world}" in picture


def test_the_same_answer_is_the_same_picture(tmp_path: Path, capsys: Capture) -> None:
    for name in ("a.svg", "b.svg", "c.png"):
        assert run(f"ask theories paper-table2 --plot {tmp_path}/{name}", capsys)[0] == 0
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_no_picture_without_an_answer(tmp_path: Path, capsys: Capture) -> None:
    assert run(f"ask predict paper-table2 C=20 arch=block --plot {tmp_path}/a.svg", capsys)[0] == 3
    assert run(f"ask theories decay --plot {tmp_path}/a.jpg", capsys)[0] == 2
    assert list(tmp_path.iterdir()) == []


def test_priors_tried_over_the_same_evidence_are_told(tmp_path: Path, capsys: Capture) -> None:
    text = ready_made()["paper-table2"].read_text()
    for name, prior in (("first", "normal(0, 0.03)"), ("second", "normal(0.02, 0.001)")):
        (tmp_path / f"{name}.yaml").write_text(text.replace("normal(0, 0.03)", prior))
    assert "worlds over" not in run(f"ask theories {tmp_path}/first.yaml --log {tmp_path}/log", capsys)[1]
    assert (
        "| 2 worlds over this evidence" in run(f"ask theories {tmp_path}/second.yaml --log {tmp_path}/log", capsys)[1]
    )


def test_witnesses_and_proofs_of_a_growing_log(tmp_path: Path, capsys: Capture) -> None:
    log = tmp_path / "log"
    answer = json.loads(run(f"ask theories decay --log {log} --json", capsys)[1])
    witness = f"{answer['log_index']}:{answer['log_head']}"
    run(f"ask theories decay --log {log}", capsys)
    assert "record 1 as witnessed" in run(f"log verify {log} --witness {witness}", capsys)[1]
    proof = json.loads(run(f"log prove {log} 2 --since", capsys)[1])
    assert proof["since"] == 2 and proof["size"] == 3 and len(proof["path"]) >= 1
    for wrong in (witness[:-1], f"0:{answer['log_head']}", f"7:{answer['log_head']}"):
        assert run(f"log verify {log} --witness {wrong}", capsys)[0] == 2
    assert run(f"log prove {log} 9 --since", capsys)[0] == 2
