"""Checkpoints saved on 4 ranks load on 4 others, on 2 and on 1, bit for bit; a damaged one is refused."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fathom import sealed
from fathom.errors import UserError
from fathom.models.transformer import Transformer
from fathom.parallel.checkpoint import load, save
from tests.parallel.cases import LAYOUTS, batch, network
from tests.parallel.conftest import Ranks
from tests.parallel.worker import moments

pytestmark = pytest.mark.dist


@pytest.fixture
def saved(world2: Ranks, folder: Path) -> Path:
    """``step``, saved on 4 ranks, and ``again-<layout>``, loaded and saved again on 4 and on 2."""
    return folder


def loaded(folder: Path) -> tuple[Transformer, torch.optim.Optimizer]:
    """In this one process."""
    model = network(LAYOUTS["p4"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    optimizer = moments(model)
    load(folder, [model], [optimizer])
    return model, optimizer


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()} | {
        f"{name}.{key}": value for name, p in model.named_parameters() for key, value in optimizer.state[p].items()
    }


def test_equals_training_in_one_process(saved: Path) -> None:
    model = network(LAYOUTS["p4"])
    optimizer = moments(model)
    for _ in range(2):
        model.loss(*batch(LAYOUTS["p4"])).backward()
        optimizer.step()
        optimizer.zero_grad()
    expected, found = tensors(model, optimizer), tensors(*loaded(saved / "step"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9, msg=name)
    assert {float(value) for name, value in found.items() if name.endswith(".step")} == {2.0}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "p4"])
def test_no_bit_changes_by_loading_and_saving_elsewhere(layout: str, saved: Path) -> None:
    first, again = tensors(*loaded(saved / "step")), tensors(*loaded(saved / f"again-{layout}"))
    assert first.keys() == again.keys()
    for name, value in first.items():
        assert torch.equal(again[name], value), name


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "p4"])
def test_training_goes_on(layout: str, saved: Path, request: pytest.FixtureRequest) -> None:
    model, _ = loaded(saved / "step")
    expected = model.loss(*batch(LAYOUTS["p4"]))
    for rank in request.getfixturevalue(f"world{LAYOUTS[layout].world}"):
        torch.testing.assert_close(rank["reshard"][layout], expected.detach(), rtol=1e-10, atol=0)


def test_damage_is_refused(saved: Path, tmp_path: Path) -> None:
    parts = sorted(path.name for path in (saved / "step").iterdir() if path.name != sealed.NAME)
    for name in parts:
        copy = shutil.copytree(saved / "step", tmp_path / f"flipped-{name}")
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(UserError, match=re.escape(f"{copy / name} is damaged")):
            loaded(copy)
    copy = shutil.copytree(saved / "step", tmp_path / "missing")
    (copy / parts[-1]).unlink()
    with pytest.raises(UserError, match=re.escape(f"{copy / parts[-1]} is missing")):
        loaded(copy)
    with pytest.raises(UserError, match=r"checkpoint\.json is missing or damaged"):
        loaded(tmp_path / "nothing")


def test_another_network_is_refused(saved: Path) -> None:
    other = Transformer(LAYOUTS["p4"].config(), seed=1, end_of_text=0)
    other.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError, match=r"not a checkpoint of this network: .*model\.extra"):
        load(saved / "step", [other])


def test_nothing_is_overwritten_and_a_killed_save_is_cleared(tmp_path: Path) -> None:
    model = network(LAYOUTS["p4"])
    leftover = tmp_path / ".step.tmp"
    leftover.mkdir()
    (leftover / "half").write_text("written")
    save(tmp_path / "step", [model])
    assert not leftover.exists()
    with pytest.raises(UserError, match="exists already"):
        save(tmp_path / "step", [model])
