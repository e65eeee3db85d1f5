"""`fathom bench --pipeline`: its table is the formula's, and what processes sent."""

import json

import pytest

from fathom.cli import main
from fathom.models.config import ModelConfig
from fathom.parallel.traffic import table

SMALL = ["--model.dim", "8", "--model.num-layers", "9", "--model.context", "4", "--batch", "1"]


def test_computed_for_many_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "--pipeline", "--ranks", "9", "--virtual", "2", "--micro-batches", "9", *SMALL]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not found["counted"] and len(found["hops"]) == 17
    assert found["source_bytes"] == 4 * 4 * 8
    assert {hop["prenorm"] for hop in found["hops"]} == {found["source_bytes"]}
    for arm in ("prenorm", "naive", "cached"):
        assert found["step"][arm] == 2 * 9 * sum(hop[arm] for hop in found["hops"])
    assert all(hop["cached"] == hop["naive"] for hop in found["hops"][:8])
    assert all(hop["cached"] < hop["naive"] for hop in found["hops"][8:])
    assert main(command) == 0
    page = capsys.readouterr().out
    assert "too large to start processes for it" in page and f"{found['step']['cached']:,}" in page


@pytest.mark.dist
def test_counted_on_two_ranks() -> None:
    config = ModelConfig(vocab_size=17, context=4, dim=8, num_layers=3)
    found = table(config, 2, 2, num_micro_batches=2, micro_batch=1, run=True)
    assert found["counted"] and found["step"]["prenorm"] == 2 * 2 * 3 * found["source_bytes"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks", "1"], "--ranks is 1: a pipeline needs at least two"),
        (["--ranks", "4", "--micro-batches", "9"], "9 micro-batches a step do not fit interleaved 1F1B on 4 ranks"),
        (["--ranks", "9", "--virtual", "3"], "27 stages cannot be cut from 18 sublayers"),
        (["--ranks", "2", "--virtual", "0"], "virtual is 0"),
    ],
)
def test_refused_in_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--pipeline", *flags, *SMALL]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
