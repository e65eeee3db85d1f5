import json

import pytest

from fathom.cli import main
from fathom.models import sizes
from fathom.models.accounting import parameters
from fathom.models.sizes import SIZES, active_parameters


@pytest.mark.parametrize("name", SIZES)
def test_every_size_meets_its_own_counts(name: str):
    SIZES[name]()


def test_a_size_that_changes_is_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sizes, "active_parameters", lambda config: active_parameters(config) + 1)
    with pytest.raises(AssertionError, match="active"):
        sizes.micro()


def test_the_published_counts_are_met_or_said_to_be_missed():
    k3 = SIZES["k3"]()
    head = parameters(k3)["head"]
    assert round(sum(parameters(k3).values()) / 1e12, 2) == 2.78
    assert round((active_parameters(k3) + head) / 1e9, 1) == 104.2
    assert k3.mla_layers == 24 and k3.num_layers - k3.mla_layers == 69
    for name in ("194m", "241m", "296m", "436m", "528m"):
        short = 1 - active_parameters(SIZES[name]()) / (int(name[:-1]) * 1e6)
        assert f"{short:.1%}".replace("%", " % less") in sizes.PUBLISHED[name], short


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]):
    assert main(["sizes", "--context", "4096", "--json"]) == 0
    rows = {row["size"]: row for row in json.loads(capsys.readouterr().out)["sizes"]}
    assert rows["48b"]["mla_cache"] == 7 * 4096 * 576 * 2
    assert rows["48b"]["bank_bytes"] == 10 * 4096 * 2304 * 2
    assert rows["k3"]["kda_state"] == 69 * 96 * 128 * 128 * 4
    for row in rows.values():
        assert row["activation_bytes"]["prenorm"] < row["activation_bytes"]["block"]
    assert main(["sizes"]) == 0
    assert "104.2 B active" in capsys.readouterr().out
    assert main(["sizes", "--context", "0"]) == 2
