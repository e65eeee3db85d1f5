"""What the report measures and draws beside runs: single tokens' reads, mixing matrices, sweeps, the paper's figures."""

import base64
import json
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch

from fathom.errors import UserError
from fathom.lab.dynamics import load_newest
from fathom.lab.figures_paper import figure_4, write_figures
from fathom.lab.report import write_report
from fathom.lab.report_data import place
from fathom.lab.report_measure import measure
from fathom.lab.report_reads import LONGEST, READ, sentence
from fathom.lab.report_sweep import fit, read_given
from fathom.lab.runs import read_runs
from fathom.lab.scaling import Points, bands
from fathom.residuals.mixing import mixing_matrix
from fathom.train.tokenizer import load_tokenizer


@pytest.mark.parametrize("rule", ["block", "full"])
def test_tokens_reads_are_the_models_weights_at_that_token(made: Path, rule: str) -> None:
    reads = json.loads((made / rule / "reads.json").read_text())
    newest = load_newest(made / rule, sequences=2, device="cpu")
    tokenizer, _ = load_tokenizer(made / rule / "tokenizer.json")
    assert reads["step"] == 6 and len(reads["sentences"]) == 2
    for row, shown in zip(newest.arrays[0][0], reads["sentences"], strict=True):
        texts = [tokenizer.decode([token], skip_special_tokens=False) for token in row.tolist()]
        begin = next(at for at in range(len(texts)) if texts[at : at + len(shown["tokens"])] == shown["tokens"])
        with torch.no_grad():
            weights = newest.model.depth_weights(row[None])
        packed = np.frombuffer(base64.b64decode(shown["weights"]), np.uint8) / 255
        at = 0
        for site, sources in enumerate(reads["sources"]):
            size = len(shown["tokens"]) * len(sources)
            found = packed[at : at + size].reshape(len(shown["tokens"]), len(sources))
            wanted = weights[site][:, 0, begin : begin + len(shown["tokens"])].T
            np.testing.assert_allclose(found, wanted, atol=0.5 / 255 + 1e-6)
            at += size
        assert at == len(packed)
    matrix = mixing_matrix(newest.model, newest.arrays[0][0][:1, : reads["mixing"]["tokens"]])
    np.testing.assert_allclose(reads["mixing"]["matrix"], matrix, atol=1e-4)


def test_prenorm_has_a_mixing_matrix_and_no_sentences(made: Path) -> None:
    reads = json.loads((made / "prenorm" / "reads.json").read_text())
    assert reads["sources"] == reads["sentences"] == []
    np.testing.assert_allclose(reads["mixing"]["matrix"], np.tri(7), atol=1e-4)


def test_a_whole_sentence_is_shown() -> None:
    words = ["and", "so", "on", ".", "This", "is", "the", "whole", "of", "it", ".", "Then", "more"]
    assert words[sentence(words).start : sentence(words).stop] == ["This", "is", "the", "whole", "of", "it", "."]
    assert sentence(["word"] * READ) == range(32) and sentence(["a", "b"]) == range(2)
    far = ["."] + ["word"] * (LONGEST + 1) + ["."] + ["short"] * 6 + ["!"]
    assert sentence(far) == range(LONGEST + 3, LONGEST + 10)


def test_a_checkpoint_is_measured_once_and_again_when_it_is_newer(made: Path, tmp_path: Path) -> None:
    run = shutil.copytree(made / "block", tmp_path / "block")
    before = {file: (run / file).stat().st_mtime_ns for file in ("depth.json", "reads.json")}
    measure(run, device="cpu")
    assert {file: (run / file).stat().st_mtime_ns for file in before} == before
    (run / "reads.json").unlink()
    measure(run, device="cpu")
    assert (run / "reads.json").is_file() and (run / "depth.json").stat().st_mtime_ns == before["depth.json"]
    shutil.rmtree(run / "checkpoints")
    (run / "reads.json").unlink()
    measure(run)
    assert not (run / "reads.json").exists()
    (run / "reads.json").write_text('{"step": 6}')
    with pytest.raises(UserError, match=r"reads\.json is not a measurement of this run"):
        read_runs([run])
    reads = json.loads((made / "block" / "reads.json").read_text())
    reads["sentences"][0]["tokens"].append("more")
    (run / "reads.json").write_text(json.dumps(reads))
    with pytest.raises(UserError, match="delete it and measure again"):
        read_runs([run])


def test_sources_stand_in_the_column_of_the_block_that_they_become() -> None:
    first, second = ["embedding", "block 1"], ["embedding", "block 1", "block 2"]
    columns, places = place([["embedding"], ["embedding", "partial"], first, [*first, "partial"], second])
    assert columns == ["embedding", "block 1", "block 2"]
    assert places == [[0], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2]]
    window = [["embedding", "output 1"], ["embedding", "output 2"]]
    assert place(window) == (["embedding", "output 1", "output 2"], [[0, 1], [0, 2]])
    assert place([["embedding", "partial"]])[0] == ["embedding", "unfinished"]


def test_a_sweep_gives_its_laws_and_multipliers(sweep: Path, tmp_path: Path) -> None:
    given = read_given([sweep])
    assert len(given.runs) == 9 and [run.name for run in given.measured] == [
        "s96-prenorm-seed0", "s96-block-seed0", "s96-full-seed0"
    ]  # fmt: skip
    law = fit(given.outcomes)
    assert law is not None
    multiplier = law.fitted["block"].multiplier
    assert multiplier is not None and multiplier.value == pytest.approx(1.25, abs=1e-3)
    page = write_report([sweep], tmp_path / "report.html").read_text()
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert len(data["charts"]["scaling"]["bands"]) == 3 and "1.25×" in page and "1.50×" in page
    assert "one seed" in page and len([s for s in data["charts"]["loss"]["series"] if s["told"]]) == 9


def test_bands_are_the_law_without_scatter_and_hold_it_with() -> None:
    compute = np.array([1.0, 2, 4, 8])
    law = 3 * compute**-0.1
    exact = bands({"prenorm": Points(compute, law)}, irreducible=False, draws=200)["prenorm"]
    for edge in exact[1:]:
        assert edge == pytest.approx(3 * exact[0] ** -0.1, rel=1e-6)
    random = np.random.default_rng(0)
    scattered = {"prenorm": Points(compute, law + 0.01 * random.standard_normal(4))}
    at, low, high = bands(scattered, irreducible=False, draws=400)["prenorm"]
    assert np.all(high > low) and (at[0], at[-1]) == (1, 8)
    wider = bands(scattered, irreducible=False, draws=400, level=0.99)["prenorm"]
    assert np.all(wider[1] <= low) and np.all(wider[2] >= high)


def test_figures_come_in_the_papers_layout(made: Path, sweep: Path, tmp_path: Path) -> None:
    files = write_figures([made / "prenorm", made / "block", made / "full"], tmp_path / "one")
    names = ["figure-5", "figure-8", "mixing"]
    assert [path.name for path in files] == [f"{name}.{kind}" for name in names for kind in ("svg", "png")]
    for path in files:
        if path.suffix == ".svg":
            assert ET.parse(path).getroot().tag.endswith("svg")
        else:
            assert path.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "one/figure-5.svg").read_text().count("<!-- (") == 3
    law = fit(read_given([sweep]).outcomes)
    assert law is not None
    axes = figure_4(law).axes[0]
    for arm, band in zip(law.bands, axes.collections, strict=True):
        low, high = law.bands[arm][1:]
        assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(low.min()) and high.max() >= low.max()
    bare = shutil.copytree(made / "prenorm", tmp_path / "bare")
    for file in ("depth.json", "reads.json"):
        (bare / file).unlink()
    assert [path.name for path in write_figures([bare], tmp_path / "three")] == ["figure-5.svg", "figure-5.png"]
