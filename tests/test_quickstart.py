import json
import signal
from pathlib import Path

import pytest

from fathom.errors import UserError
from fathom.quickstart import QuickstartOptions, free_folder, published_seeds, quickstart, zero_query_identity
from fathom.train.loop import Interrupted
from fathom.train.recipes import quick


def test_the_identity_holds_and_is_measured_on_the_real_shape():
    loss, gradients = zero_query_identity(quick().model)
    assert loss < 1e-12
    assert 0 < gradients < 1e-11


@pytest.mark.slow
def test_the_quick_start_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    result = quickstart(QuickstartOptions(out=tmp_path / "run", steps=3))
    printed = capsys.readouterr().out
    for words in ("validation loss", "median step", "parameters", "At zero queries", "Report:"):
        assert words in printed
    assert result["block"]["parameters"] - result["prenorm"]["parameters"] == 2 * 25 * 64
    winner = "block" if result["gain"] > 0 else "prenorm"
    assert f"fathom sample {tmp_path / 'run' / winner} --prompt 'The people of'\n" in printed  # one line, to be copied
    assert result["gain"] == result["prenorm"]["val_loss"] - result["block"]["val_loss"]
    for rule in ("prenorm", "block"):
        rows = [json.loads(line) for line in (tmp_path / "run" / rule / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2, 3]
        assert (tmp_path / "run" / rule / "depth.json").exists()
    page = (tmp_path / "run" / "report.html").read_text()
    assert 'data-chart="loss"' in page and '"sentences":[{' in page  # Block's single tokens
    # Both saw the same first batch with the same weights, and zero queries make them one function.
    first = [
        json.loads((tmp_path / "run" / r / "metrics.jsonl").read_text().splitlines()[0]) for r in ("prenorm", "block")
    ]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], abs=1e-5)
    with pytest.raises(UserError, match="exists already"):
        quickstart(QuickstartOptions(out=tmp_path / "run", steps=3))


def test_ctrl_c_saves_both_twins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from fathom.train.loop import Trainer

    step = Trainer.step

    def step_and_interrupt(self: Trainer):
        if self.progress.step == 0 and self.config.model.residual.rule == "prenorm":
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(Trainer, "step", step_and_interrupt)
    with pytest.raises(Interrupted, match="both twins are saved"):
        quickstart(QuickstartOptions(out=tmp_path / "run", steps=3))
    for rule in ("prenorm", "block"):
        assert [path.name for path in (tmp_path / "run" / rule / "checkpoints").iterdir()] == ["step-000001"]


def test_a_second_quick_start_takes_the_next_folder(tmp_path: Path):
    assert free_folder(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / "a-2").mkdir()
    assert free_folder(tmp_path / "a") == tmp_path / "a-3"


def test_the_published_seeds_are_of_this_configuration():
    published = published_seeds()
    assert published["steps"] == quick().steps == QuickstartOptions().steps
    assert len(published["prenorm"]) == len(published["block"]) >= 3
    gains = [a - b for a, b in zip(published["prenorm"], published["block"], strict=True)]
    assert published["gain"] == pytest.approx(sum(gains) / len(gains))
