"""What the pages say: their Python runs, their tables are the results, their links and names exist."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from statistics import median
from types import ModuleType

import numpy as np
import pytest

from fathom.train.config import DataConfig, OptimConfig, RunConfig
from fathom.train.loop import train
from fathom.train.recipes import RULES, quick, twin

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *RESULTS.glob("**/README.md")])
READ = [page for page in PAGES if not page.is_relative_to(RESULTS)]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def benchmark(module: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script of benchmarks/, imported as its siblings import it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, module, loaded)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs that the pages' examples speak of: runs/prenorm and runs/block, as small as can be."""
    place = tmp_path_factory.mktemp("docs")
    small = RunConfig(
        model=quick().model, data=DataConfig(batch=1), optim=OptimConfig(warmup=1), steps=1, eval_sequences=1, device="cpu"
    )  # fmt: skip
    for rule in RULES:
        train(twin(small, rule), place / "runs" / rule)
    return place


@pytest.mark.parametrize("page", [page for page in READ if "```python" in page.read_text()], ids=name)
def test_python_on_a_page_runs(page: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, name(page), "exec"), {"__name__": "__main__"})


def test_the_readme_example_is_there() -> None:
    assert "```python" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tables_are_the_results(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = page.read_text()
    assert benchmark("tables", monkeypatch).render(text) == text, "run `python benchmarks/tables.py`"
    assert len(re.findall("<!-- result:", text)) == len(re.findall("<!-- end of result", text))


def test_a_stale_table_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = benchmark("tables", monkeypatch)
    text = (ROOT / "README.md").read_text()
    table = re.search(r"<!-- result:.*?<!-- end of result -->", text, re.DOTALL)
    assert table is not None
    digits = re.compile(r"(\d\.\d\d)(\d)")
    assert digits.search(table[0])
    stale = digits.sub(lambda match: match[1] + str((int(match[2]) + 1) % 10), table[0], count=1)
    assert tables.render(stale) == table[0]


def test_results_follow_from_their_raw_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    summarize = benchmark("summarize", monkeypatch)
    for folder, head in summarize.RESULT_FILES.items():
        committed = json.loads((RESULTS / folder / "result.json").read_text())
        assert json.loads(json.dumps(head["rows"]())) == committed["rows"], folder
    seeds = benchmark("quickstart_seeds", monkeypatch)
    folder = RESULTS / "2026-11-22_quickstart"
    committed = json.loads((folder / "result.json").read_text())
    assert json.loads(json.dumps(seeds.measure(folder, len(committed["prenorm"])))).items() <= committed.items()


def test_rows_follow_the_schema() -> None:
    keys = {"case", "arm", "metric", "unit", "median", "low", "high", "n", "over_prenorm"}
    for path in RESULTS.glob("**/result.json"):
        result = json.loads(path.read_text())
        assert {"name", "date", "command", "machine", "versions", "rows"} <= result.keys(), path
        assert (path.parent / "README.md").is_file()
        for row in result["rows"]:
            assert row.keys() == keys, path
            assert row["low"] <= row["median"] <= row["high"] and row["n"] >= 1, row


def test_results_are_small_and_name_no_machine_path() -> None:
    for path in RESULTS.glob("**/*"):
        if path.is_file():
            assert path.stat().st_size <= 1_000_000, path
            assert not re.search(rb"/(work|root|home|tmp)/", path.read_bytes()), path


def test_the_package_ships_the_published_seeds() -> None:
    assert (ROOT / "fathom/assets/quickstart-seeds.json").read_bytes() == (
        RESULTS / "2026-11-22_quickstart/result.json"
    ).read_bytes()


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs/log.md"], ids=name)
def test_sentences_about_the_quick_start_are_its_result(page: Path) -> None:
    result = json.loads((RESULTS / "2026-11-22_quickstart/result.json").read_text())
    low, high = result["gain_interval_90"]
    text = " ".join(page.read_text().split())
    assert f"{result['gain']:.3f} nats per token over {len(result['prenorm'])} seeds" in text
    assert f"{low:.3f} to {high:.3f}" in text


@pytest.mark.parametrize("page", ["README.md", "docs/log.md", "benchmarks/results/2026-11-22_debian-50m/README.md"])
def test_sentences_about_55m_parameters_are_its_result(page: str) -> None:
    rows = json.loads((RESULTS / "2026-11-22_debian-50m/result.json").read_text())["rows"]
    (gain,) = (row for row in rows if row["metric"] == "gain")
    text = " ".join((ROOT / page).read_text().split())
    assert (
        re.search(rf"{gain['median']:.3f} (nats per token )?lower", text) and "in one seed" in text and gain["n"] == 1
    )


KERNELS = RESULTS / "2026-11-22_residual-path-h200"


def test_sentences_about_the_kernels_are_their_result() -> None:
    rows = json.loads((KERNELS / "result.json").read_text())["rows"]
    over = {(row["case"][:5], row["arm"], row["metric"]): row["over_prenorm"] for row in rows}
    step = f"{100 * over['model', 'fathom', 'forward_backward_ms'] - 100:.1f} %"
    stack = f"×{over['stack', 'fathom', 'forward_backward_ms']:.3f}"
    memory = f"×{over['model', 'fathom-recompute', 'peak_gib']:.4f}"
    for page in (ROOT / "docs/kernels.md", ROOT / "docs/log.md", KERNELS / "README.md"):
        text = page.read_text()
        assert step in text and stack in text and memory in text, page
    assert f"{step} over PreNorm in a model's step" in (ROOT / "docs/log.md").read_text()


def over_prenorm(folder: str) -> dict[tuple[str, str, str], float]:
    rows = json.loads((RESULTS / folder / "result.json").read_text())["rows"]
    return {(row["case"], row["arm"], row["metric"]): row["over_prenorm"] for row in rows}


def rounds(raw: Path, case: str, arm: str, metric: str) -> tuple[str, str]:
    """The median of ``arm``'s ratios to PreNorm over rounds in percent above, and the lowest and highest."""
    (found,) = (each["arms"] for each in json.loads(raw.read_text())["cases"] if each["case"]["name"] == case)
    pairs = zip(found[arm][metric], found["prenorm"][metric], strict=True)
    ratios = [100 * median(own) / median(prenorm) - 100 for own, prenorm in pairs]
    return f"{median(ratios):.1f} %", f"{min(ratios):.1f} to {max(ratios):.1f}"


def told(percent: str, span: str, text: str) -> bool:
    """Whether ``text`` says a percentage and, after it, its rounds."""
    return re.search(rf"{re.escape(percent)}[^.;%]* \((rounds )?{re.escape(span)}[);]", text) is not None


STEP, FORWARD, WALL, MEMORY = "forward_backward_ms", "forward_ms", "wall_ms", "peak_gib"
NEWEST, READS, PEERS = (f"2026-11-23_residual-path{part}" for part in ("", "-reads", "-peers"))


def plain(page: Path) -> str:
    return " ".join(page.read_text().split())


def test_sentences_about_the_later_runs_of_the_kernels_are_their_results() -> None:
    output, widths = "2026-11-22_residual-path-output", "2026-11-22_residual-path-widths"
    after, before = over_prenorm(output), over_prenorm(widths)
    wide = over_prenorm("2026-11-22_residual-path-d4096")
    kernels, log = plain(ROOT / "docs/kernels.md"), plain(ROOT / "docs/log.md")
    pages = {folder: plain(RESULTS / folder / "README.md") for folder in (output, widths)}
    raws = {"d2048": RESULTS / output / "raw-d2048.json", "before": RESULTS / widths / "raw-d2048.json",
            "again": RESULTS / widths / "again-d2048.json", "widths": RESULTS / widths / "raw-widths.json"}  # fmt: skip
    for raw, case, arm, metric, page in (
        ("d2048", "model-d2048", "fathom", STEP, output),
        ("d2048", "model-d2048", "fathom", FORWARD, output),
        ("d2048", "model-d2048", "fathom-recompute", STEP, output),
        ("d2048", "model-d2048", "fathom-recompute", FORWARD, output),
        ("before", "model-d2048", "fathom", STEP, widths),
        ("before", "model-d2048", "fathom", FORWARD, widths),
        ("again", "model-d2048", "fathom", STEP, widths),
        ("again", "model-d2048", "fathom", FORWARD, widths),
        ("widths", "model-d1024", "fathom", STEP, widths),
        ("widths", "model-d1024", "fathom", FORWARD, widths),
        ("widths", "model-d2304", "fathom", STEP, widths),
        ("widths", "model-d2304", "fathom", FORWARD, widths),
    ):
        assert told(*rounds(raws[raw], case, arm, metric), pages[page]), (raw, case, arm, metric)
    for case, arm, metric in (
        ("stack-d2048", "fathom", STEP), ("model-d4096", "fathom", STEP), ("model-d4096", "fathom", WALL),
        ("model-d4096", "fathom-recompute", STEP),
    ):  # fmt: skip
        assert f"×{after[case, arm, metric]:.3f}" in pages[output]
    for case, arm in (
        ("model-d2048", "fathom"),
        ("model-d2048", "fathom-recompute"),
        ("model-d4096", "fathom-recompute"),
    ):
        assert f"×{after[case, arm, MEMORY]:.4f}" in pages[output]
    for run in (before, after):
        assert f"×{run['stack-d2048', 'fathom', STEP]:.3f}" in log
        assert f"×{run['stack-d2048', 'fathom', STEP]:.3f}" in kernels
        assert f"×{run['model-d2048', 'fathom-recompute', MEMORY]:.4f}" in log
    for case in ("model-d1024", "model-d2304"):
        for arm in ("fla", "fathom-recompute"):
            assert f"×{before[case, arm, MEMORY]:.4f}" in pages[widths]
        for arm in ("fla", "liger"):
            assert f"{100 * before[case, arm, STEP] - 100:.1f} %" in pages[widths]
            assert before[case, arm, STEP] > before[case, "fathom-recompute", STEP]
    again = over_prenorm("2026-11-22_residual-path-h200-rerun")
    for run, metric in ((again, STEP), (wide, STEP), (wide, FORWARD)):
        assert f"{100 * run['model-d2048', 'fathom', metric] - 100:.1f} %" in log
    for case, metric in (("model-d4096", STEP), ("model-d4096", WALL), ("stack-d2048", STEP)):
        assert f"×{wide[case, 'fathom', metric]:.3f}" in log
    runs = (over_prenorm("2026-11-22_residual-path-h200"), again, wide, before, after)
    six = [100 * run["model-d2048", "fathom", STEP] - 100 for run in runs]
    six.append(float(rounds(raws["again"], "model-d2048", "fathom", STEP)[0].split()[0]))
    assert f"{min(six):.1f} to {max(six):.1f} % over PreNorm in six runs" in kernels
    page = (RESULTS / "2026-11-22_residual-path-d4096/README.md").read_text()
    for arm, metric in (("fathom", STEP), ("fathom", WALL), ("fathom", FORWARD), ("fathom-recompute", STEP),
                        ("fathom-recompute", MEMORY), ("fla", STEP), ("liger", STEP)):  # fmt: skip
        assert f"×{wide['model-d4096', arm, metric]:.3f}" in page


def test_sentences_about_the_newest_kernels_are_their_results() -> None:
    newest, reads, peers = (over_prenorm(folder) for folder in (NEWEST, READS, PEERS))
    widths = over_prenorm("2026-11-22_residual-path-widths")
    pages = {folder: plain(RESULTS / folder / "README.md") for folder in (NEWEST, READS, PEERS)}
    kernels, readme, changes, index, log = (
        plain(ROOT / page) for page in ("docs/kernels.md", "README.md", "CHANGELOG.md", "docs/index.md", "docs/log.md")
    )
    for folder, raw, case, arm, metric, texts in (
        (NEWEST, "d2048", "model-d2048", "fathom", STEP, (kernels, pages[NEWEST])),
        (NEWEST, "d2048", "model-d2048", "fathom", FORWARD, (kernels, pages[NEWEST])),
        (NEWEST, "d2048", "model-d2048", "fathom-recompute", STEP, (pages[NEWEST],)),
        (NEWEST, "d2304", "model-d2304", "fathom", STEP, (kernels, pages[NEWEST])),
        (NEWEST, "d2304", "model-d2304", "fathom", FORWARD, (pages[NEWEST],)),
        (NEWEST, "d2304", "model-d2304", "fathom-recompute", STEP, (kernels, pages[NEWEST])),
        (READS, "d2048", "model-d2048", "fathom", STEP, (pages[READS],)),
        (READS, "d4096", "model-d4096", "fathom", STEP, (kernels, pages[READS])),
        (READS, "d4096", "model-d4096", "fathom", WALL, (kernels, pages[READS])),
        (READS, "widths", "model-d2304", "fathom", STEP, (kernels, pages[READS])),
        (PEERS, "d2048", "model-d2048", "fathom", STEP, (pages[PEERS],)),
        (PEERS, "d2048", "model-d2048", "fathom", FORWARD, (pages[PEERS],)),
        ("2026-11-22_residual-path-widths", "widths", "model-d1024", "fathom", STEP, (kernels,)),
    ):
        for text in texts:
            found = rounds(RESULTS / folder / f"raw-{raw}.json", case, arm, metric)
            assert told(*found, text), (folder, case, arm, metric, found)

    def percent(run: dict[tuple[str, str, str], float], case: str, arm: str = "fathom", metric: str = STEP) -> str:
        return f"{100 * run[case, arm, metric] - 100:.1f} %"

    stack = f"×{newest['stack-d2048', 'fathom', STEP]:.3f}"
    assert all(stack in text for text in (kernels, readme, log, pages[NEWEST]))
    assert (
        f"×{reads['stack-d2048', 'fathom', STEP]:.3f}" in kernels
        and f"×{reads['stack-d2048', 'fathom', STEP]:.3f}" in log
    )
    at = {"2048": newest["model-d2048", "fathom", STEP], "2304": newest["model-d2304", "fathom", STEP],
          "4096": reads["model-d4096", "fathom", STEP], "1024": widths["model-d1024", "fathom", STEP]}  # fmt: skip
    at = {width: f"{100 * ratio - 100:.1f}" for width, ratio in at.items()}
    assert f"At width 2048 {at['2048']} % in a model" in readme and f"at width 4096 {at['4096']} %" in readme
    assert f"(54 sublayers of width 2304, blocks of 6) {at['2304']} %" in readme and f"at 1024 {at['1024']} %" in readme
    assert f"{at['2048']} % over PreNorm in a model's step at width 2048 and {at['2304']} % at 2304" in changes
    assert f"{at['4096']} % at 4096, {at['1024']} % at 1024" in changes
    others = sorted((at[width] for width in ("1024", "2304", "4096")), key=float)
    assert (
        f"{at['2048']} % over PreNorm in a model's step at width 2048, {others[0]} to {others[-1]} % at others,"
        in index
    )
    for run, case, arm in ((newest, "model-d2048", "fathom"), (newest, "model-d2048", "fathom-recompute"),
                           (newest, "model-d2304", "fathom-recompute"), (peers, "model-d2048", "fla"),
                           (reads, "model-d2304", "fla"), (reads, "model-d4096", "fathom-recompute"),
                           (widths, "model-d1024", "fla"), (widths, "model-d1024", "fathom-recompute")):  # fmt: skip
        assert f"×{run[case, arm, MEMORY]:.4f}" in kernels, (case, arm)
    assert f"×{newest['model-d2048', 'fathom-recompute', MEMORY]:.4f}" in readme
    for arm in ("fathom", "fla", "fast-attnres", "fathom-checkpoint", "flash-attn-res"):
        assert percent(peers, "model-d2048", arm) in kernels and percent(peers, "model-d2048", arm) in pages[PEERS]
        assert arm == "fla" or percent(peers, "model-d2048", arm) in log
        assert arm == "fla" or f"×{peers['stack-d2048', arm, STEP]:.3f}" in pages[PEERS]
    for run, case, arm in (
        (reads, "model-d2304", "fla"),
        (reads, "model-d2304", "liger"),
        (reads, "model-d2048", "liger"),
    ):
        assert percent(run, case, arm) in kernels and percent(run, case, arm) in pages[READS]
    for run in (newest, reads, peers):
        for (case, arm, metric), ratio in run.items():
            if metric in (STEP, FORWARD) and arm in ("fla", "liger", "fast-attnres", "flash-attn-res"):
                own = "fathom-checkpoint" if arm == "flash-attn-res" else "fathom"
                assert ratio > run[case, own, metric], "no peer is ahead in GPU time"


def test_shares_of_each_kernel_alone_are_their_result() -> None:
    """The table of docs/kernels.md, percent of the byte floor."""
    rows = json.loads((RESULTS / READS / "kernels.json").read_text())["rows"]
    share = {(row["case"], row["metric"]): row["median"] for row in rows}
    table = (ROOT / "docs/kernels.md").read_text().split("| operation | 1024 |")[1].split("\n\n")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert len(lines) == 10
    for operation, *cells in lines:
        for width, cell in zip((1024, 2048, 2304, 4096, 7168), cells, strict=True):
            pair = [share[f"{operation.strip('`')}-d{width}", f"{way}_floor"] for way in ("forward", "backward")]
            assert cell == " / ".join(f"{100 * each:.0f}" for each in pair), (operation, width)


def test_full_attnres_kernels_are_the_profiles() -> None:
    """The table of docs/kernels.md; its floors are passes over [16384, 384] at the bandwidth of the run beside it."""
    folder = RESULTS / "2026-11-22_residual-path-d4096"
    bandwidth = json.loads((folder / "raw-d2048.json").read_text())["cases"][0]["copy_bytes_per_second"]
    profile = (folder / "probes/full-attnres.txt").read_text()
    whole = re.search(r"kernels ([\d.]+) ms", profile)
    assert whole is not None
    lines = re.findall(r"^ +([\d.]+) ms +(\d+) +(\S+)", profile, re.MULTILINE)
    table = (ROOT / "docs/kernels.md").read_text().split("| kernels of Full's stack (launches) |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:6]] for line in table.splitlines()[2:]]
    assert rows[-1][3] == whole[1]
    for kernels, passes, floor, found, share in rows[:-2]:
        names, count = re.findall(r"`(\w+)`", kernels) or ["void"], re.findall(r"(\d+)\)", kernels)[0]
        picked = [line for line in lines if line[2] in names and (names != ["void"] or line[1] == count)]
        assert int(count) == sum(int(line[1]) for line in picked), kernels
        milliseconds = 1e3 * int(passes.replace(",", "")) * 2 * 16384 * 384 / bandwidth
        total = sum(float(line[0]) for line in picked)
        assert [floor, found, share] == [f"{milliseconds:.1f}", f"{total:.1f}", f"{100 * milliseconds / total:.0f} %"]
    assert rows[-2][3] == f"{float(whole[1]) - sum(float(row[3]) for row in rows[:-2]):.1f}"


def test_sentences_about_two_gpus_are_their_result() -> None:
    def below(folder: str) -> dict[tuple[str, str], float]:
        rows = json.loads((RESULTS / folder / "result.json").read_text())["rows"]
        return {
            (row["case"], row["arm"]): 100 - 100 * row["over_prenorm"]
            for row in rows if row["metric"] == "tokens_per_s"
        }  # fmt: skip

    first, cached = below("2026-11-22_pipeline"), below("2026-11-22_pipeline-cached")
    case = "pipeline-p2v4-d2048"
    shares = [f"{cached[at, arm]:.1f} %" for at in (case, f"{case}-compiled") for arm in ("cached", "naive")]
    for page in (RESULTS / "2026-11-22_pipeline-cached/README.md", ROOT / "docs/parallel.md"):
        assert all(share in page.read_text() for share in shares), page
    shares = [f"{first[case, arm]:.1f} %" for arm in ("cached", "naive")]
    shares += [f"{first['pipeline-fsdp2-d2048', 'fsdp']:.1f} %", f"{first['pipeline-tp2-d2048', 'tp']:.0f} %"]
    for page in (RESULTS / "2026-11-22_pipeline/README.md", ROOT / "docs/parallel.md", ROOT / "docs/log.md"):
        assert all(share in page.read_text() for share in shares), page
    plain, compiled = (f"{cached[at, 'cached']:.1f} %" for at in (case, f"{case}-compiled"))
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"caching makes {plain} fewer tokens per second than PreNorm's, and {compiled} fewer" in text
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"on two H200s: {plain} below PreNorm with the cache, {compiled} with compiled sublayers" in changes


def test_each_kernels_share_is_the_probes() -> None:
    table = re.findall(
        r"^\| (\w.*) \| (\d+) \| ([\d.]+) \| (\d+) % \|$", (KERNELS / "README.md").read_text(), re.MULTILINE
    )
    probe = (KERNELS / "probes/kernels-alone.txt").read_text()
    assert len(table) == 20
    for kernel, floor, passes, share in table:
        line = re.search(rf"^  {re.escape(kernel)} +[\d.]+ us +([\d.]+) passes of +([\d.]+) ", probe, re.MULTILINE)
        assert line is not None and (line[1], line[2]) == (passes, f"{floor}.0"), kernel
        assert round(100 * float(floor) / float(passes)) == int(share), kernel


def test_a_steps_passes_are_the_profiles() -> None:
    """The table of docs/kernels.md, from the kernels of one step of the stack: all but the 64 that scale."""
    _, stack = json.loads((RESULTS / NEWEST / "raw-d2048.json").read_text())["cases"]
    kernels = {arm: stack["arms"][arm]["kernels"] for arm in ("fathom", "prenorm")}
    passes = {arm: {name: ms / stack["pass_ms"] for name, n, ms in kernels[arm] if n != 64} for arm in kernels}
    own = [passes["fathom"][name] for name in ("_backward", "_forward", "_mix", "_gradients", "_scores")]
    fathom, prenorm = (sum(passes[arm].values()) for arm in ("fathom", "prenorm"))
    table = (ROOT / "docs/kernels.md").read_text().split("| kernels (launches) |")[1].split("\n\n")[0]
    cells = [[cell.strip() for cell in line.split("|")[2:5]] for line in table.splitlines()[2:]]
    floors = [float(floor or 0) for floor, _, _ in cells]
    assert sum(floors[:5]) == floors[6]
    for floor, found, cell in zip(floors, [*own, fathom - sum(own), fathom, prenorm], cells, strict=True):
        assert cell[1:] == [f"{found:.1f}", f"{100 * floor / found:.0f} %" if floor else ""]


def test_the_picture_is_of_the_committed_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = benchmark("picture", monkeypatch)
    for file, drawn in runs.pictures().items():
        saved = (ROOT / "docs/images" / file).read_text()
        curves = [re.findall(r' d="(M [^"]*)"', picture) for picture in (drawn, saved)]
        points = [np.array(re.findall(r"-?\d+\.?\d*", " ".join(each)), dtype=float) for each in curves]
        assert len(points[0]) > 100
        np.testing.assert_allclose(points[1], points[0], atol=1)  # a point's width: fonts shift the axes a little


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
    for link in links:
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / file)) if file else page
        assert target.exists(), f"{link} in {name(page)}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}, link


@pytest.mark.parametrize("page", READ, ids=name)
def test_names_in_backticks_exist(page: Path) -> None:
    """`path` from the root; `path::name` is defined there, and so are further `names` of that cell that begin with test_."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for cell in re.split(r"[|\n]", text):
        defined = ""
        for quoted in re.findall(r"`([^`\s]+)`", cell):
            path, _, member = quoted.partition("::")
            if re.match(r"(fathom|tests|benchmarks|docs|\.ci)/", path) and "*" not in path and "<" not in path:
                assert (ROOT / path).exists(), f"{quoted} in {name(page)}"
                defined = (ROOT / path).read_text() if path.endswith(".py") else ""
            elif quoted.startswith("test_"):
                member = quoted
            if member:
                assert re.search(rf"^ *(def|class) {member}\b", defined, re.MULTILINE), f"{quoted} in {name(page)}"
