"""Sweeps as they happen to users: killed, stopped, diverging, failing, started twice; and what the recipes expand to."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fathom.cli import main
from fathom.errors import UserError
from fathom.lab.ablations import table
from fathom.lab.outcomes import left_out, read_outcomes
from fathom.lab.plan import Planned, Sweep, make_sweep, outcomes, read_sweep, training_flops
from fathom.lab.scaling import paper
from fathom.lab.sweep import gpus, least_used, run_sweep
from fathom.lab.sweep_run import execute
from fathom.lab.sweep_table import newest
from fathom.lab.sweeps import SWEEPS, base_config, expand, expand_grid, grid_points, residual, with_settings
from fathom.models.accounting import parameters
from fathom.models.config import ModelConfig
from fathom.train.checkpoint import checkpoints
from fathom.train.config import DataConfig, OptimConfig, RunConfig, save_config
from fathom.train.embedded import embedded
from fathom.train.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded(tmp_path_factory.mktemp("cache"))


def small(data: Path, rule: str = "block", *, steps: int = 40, lr: float = 1e-2, **run: Any) -> RunConfig:
    model = ModelConfig(context=32, dim=16, num_layers=2, residual=residual(rule))
    return RunConfig(
        model=model, data=DataConfig(folder=str(data), batch=2), optim=OptimConfig(lr=lr, warmup=2, clip=0), steps=steps,
        device="cpu", eval_every=10, eval_sequences=2, checkpoint_every=5, **run,
    )  # fmt: skip


def plan(folder: Path, **configs: RunConfig) -> Sweep:
    runs = [Planned(name, "base", name.rstrip("0123456789"), config.seed, config) for name, config in configs.items()]
    return make_sweep(folder, "seeds", runs, threads=1)


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def in_process(folder: Path) -> subprocess.Popen[bytes]:
    """`fathom sweep FOLDER` as a user starts it."""
    command = [sys.executable, "-m", "fathom.cli", "sweep", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def is_free(run: Path) -> bool:
    """Whether no process trains in ``run``."""
    if not run.exists():
        return True
    with (run / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def numbers(run: Path) -> list[dict[str, Any]]:
    clock = ("step_seconds", "tokens_per_second", "mfu", "seconds")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in clock} for row in rows]


@pytest.mark.slow
@pytest.mark.dist
def test_a_killed_sweep_goes_on_with_the_same_bits(data: Path, tmp_path: Path) -> None:
    configs = {"block0": small(data, steps=300, dynamics_every=70), "prenorm0": small(data, "prenorm", steps=60)}
    sweep = plan(tmp_path / "sweep", **configs)
    runs = [sweep.run_folder(planned) for planned in sweep.runs]
    process = in_process(sweep.folder)
    try:
        wait_until(lambda: newest(runs[0]).get("train", {}).get("step", 0) > 10)
        with pytest.raises(UserError, match="another sweep runs in"):
            run_sweep(sweep)
    finally:
        process.kill()
        process.communicate()
    # Its runs die with it, long before they are done.
    wait_until(lambda: all(is_free(run) for run in runs))
    assert outcomes(sweep)[0].state == "started"
    found, failed = run_sweep(sweep, workers=2)
    assert [end.state for end in found] == ["done", "done"] and not failed
    for (name, config), run in zip(configs.items(), runs, strict=True):
        train(config, tmp_path / name)
        assert numbers(run) == numbers(tmp_path / name)
        straight, resumed = (checkpoints(folder)[-1] / "model.safetensors" for folder in (tmp_path / name, run))
        assert straight.read_bytes() == resumed.read_bytes()


@pytest.mark.slow
@pytest.mark.dist
def test_ctrl_c_saves_what_is_under_way(data: Path, tmp_path: Path) -> None:
    sweep = plan(tmp_path / "sweep", block0=small(data, steps=100_000), waiting0=small(data))
    first = sweep.run_folder(sweep.runs[0])
    process = in_process(sweep.folder)
    wait_until(lambda: newest(first).get("train", {}).get("step", 0) > 3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"go on with `fathom sweep {sweep.folder}`" in errors.decode()
    (saved, *_) = outcomes(sweep)
    assert saved.state == "started" and checkpoints(first)[-1].name == f"step-{saved.step:06d}"


@pytest.mark.slow
@pytest.mark.dist
def test_a_diverging_run_is_marked_and_a_failing_one_reported_and_the_rest_go_on(data: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    sweep = plan(
        tmp_path / "sweep",
        diverging0=small(data, "block", lr=1e25),
        failing0=small(gone),
        prenorm0=small(data, "prenorm"),
    )
    found, failed = run_sweep(sweep, workers=2)
    assert [end.state for end in found] == ["diverged", "waiting", "done"]
    assert list(failed) == ["failing0"] and str(gone) in failed["failing0"]
    assert "not finite" in found[0].note

    read = read_outcomes([sweep.folder])
    rows = {row.arm: row for row in table(read)}
    assert rows["diverging"].mean is None and rows["diverging"].difference is None
    assert len(left_out(read)) == 2 and "diverging0 diverged: " in left_out(read)[0]

    gone.symlink_to(data)
    log = sweep.log(sweep.runs[0])
    before = log.read_bytes()
    found, failed = run_sweep(sweep, workers=2)
    assert [end.state for end in found] == ["diverged", "done", "done"] and not failed
    assert log.read_bytes() == before  # it would only diverge again


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_that_somebody_else_stops_is_a_failure_that_goes_on(data: Path, tmp_path: Path) -> None:
    sweep = plan(tmp_path / "sweep", block0=small(data, steps=100_000))
    run = sweep.run_folder(sweep.runs[0])
    process = in_process(sweep.folder)
    wait_until(lambda: newest(run).get("train", {}).get("step", 0) > 3)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and f"fathom.lab.sweep_run\0{sweep.folder}".encode() in cmdline(entry):
            os.kill(int(entry.name), signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "block0 failed: " in output.decode()
    assert outcomes(sweep)[0].state == "started"


def cmdline(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("summary.json", "{}"), ("summary.json", '{"steps": 40, "val_loss": "low"}'), ("summary.json", '{"steps": 40'),
        ("diverged.json", "{}"), ("metrics.jsonl", "nothing\n"), ("data.json", "{"), ("config.json", "{"),
    ],
)  # fmt: skip
def test_a_damaged_run_is_told_and_the_rest_counts(data: Path, tmp_path: Path, file: str, content: str) -> None:
    sweep = plan(tmp_path / "sweep", a0=small(data), b0=small(data, "prenorm"))
    for run in map(sweep.run_folder, sweep.runs):
        pretend_done(run, small(data))
    run = sweep.run_folder(sweep.runs[0])
    if file == "metrics.jsonl":
        (run / "summary.json").unlink()
    (run / file).write_text(content)
    found = read_outcomes([sweep.folder])
    assert [end.state for end in found] == ["damaged", "done"] and found[0].val_loss is None
    assert file in left_out(found)[0] and "a0 cannot be read: " in left_out(found)[0]


def pretend_done(run: Path, config: RunConfig) -> None:
    run.mkdir(parents=True)
    save_config(config, run / "config.json")
    (run / "data.json").write_text('{"tokens_hash": "x"}')
    (run / "metrics.jsonl").write_text("")
    (run / "summary.json").write_text(json.dumps({"steps": config.steps, "val_loss": 1.5}))


def test_a_loss_that_is_no_number_is_in_no_mean(data: Path, tmp_path: Path) -> None:
    sweep = plan(tmp_path / "sweep", a0=small(data))
    run = sweep.run_folder(sweep.runs[0])
    pretend_done(run, small(data))
    (run / "summary.json").write_text('{"steps": 40, "val_loss": NaN}')
    assert outcomes(sweep)[0].state == "diverged"


def test_what_a_failed_start_left_is_no_obstacle_and_checkpoints_are_never_deleted(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no dataset"):
        train(small(tmp_path / "gone"), tmp_path / "run")
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run/.lock").touch()
    (tmp_path / "run/env.json").write_text("{}")
    train(small(data, steps=2), tmp_path / "run")

    sweep = plan(tmp_path / "sweep", a0=small(data))
    kept = sweep.run_folder(sweep.runs[0]) / "checkpoints/step-000005/model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_text("weeks of work")
    with pytest.raises(UserError, match="exists already and is not a run folder"):
        execute(sweep.folder, "a0")
    assert kept.read_text() == "weeks of work"


def test_a_grid_makes_a_case_of_every_point(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = [f"data.folder={data}", "keep_checkpoints=3"]
    runs = expand_grid("seeds", "quick", settings, ["optim.lr=1e-3,2.5e-3", "steps=5,6"], seeds=2)
    assert len(runs) == 2 * 2 * 2 * 2
    assert runs[0].name == "lr1e-3-steps5-prenorm-seed0" and runs[0].case == "lr1e-3-steps5"
    assert {(run.config.optim.lr, run.config.steps) for run in runs if run.case == "lr2.5e-3-steps6"} == {(2.5e-3, 6)}
    assert {run.config.keep_checkpoints for run in runs} == {3}
    scaled = expand_grid("paper-scaling", "quick", settings, ["optim.lr=1e-3"], seeds=1, arms=["block"])
    assert scaled[0].name == "lr1e-3-194M-block-seed0" and scaled[1].config.optim.lr < 1e-3


def test_a_folder_is_listed_and_not_run_dry(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = plan(tmp_path / "sweep", a0=small(data))
    assert main(["sweep", str(sweep.folder), "--dry-run"]) == 0
    assert "waiting" in capsys.readouterr().out and not sweep.run_folder(sweep.runs[0]).exists()
    assert main(["sweep", str(sweep.folder), "--threads", "2"]) == 2
    values = json.loads((sweep.folder / "sweep.json").read_text())
    (sweep.folder / "sweep.json").write_text(json.dumps({**values, "runs": []}))
    with pytest.raises(UserError, match="it has no runs"):
        read_sweep(sweep.folder)


def test_a_plan_loads_back_and_another_is_refused(data: Path, tmp_path: Path) -> None:
    sweep = plan(tmp_path / "sweep", a0=small(data), b0=small(data, "prenorm"))
    assert read_sweep(sweep.folder) == sweep
    assert plan(tmp_path / "sweep", a0=small(data), b0=small(data, "prenorm")) == sweep
    with pytest.raises(UserError, match="b0 has other settings"):
        plan(tmp_path / "sweep", a0=small(data), b0=small(data, "prenorm", steps=41))
    with pytest.raises(UserError, match="holds another sweep"):
        plan(tmp_path / "sweep", a0=small(data))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/todo.txt").write_text("keep me")
    with pytest.raises(UserError, match="is not a sweep"):
        plan(tmp_path / "notes", a0=small(data))
    with pytest.raises(UserError, match="no runs"):
        plan(tmp_path / "none")
    path = sweep.folder / "sweep.json"
    values = json.loads(path.read_text())
    values["runs"][0]["config"]["steps"] = "many"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"sweep.json: steps is 'many'"):
        read_sweep(sweep.folder)


def base(**settings: Any) -> RunConfig:
    return replace(RunConfig(model=ModelConfig(vocab_size=1024), steps=550), **settings)


def test_recipes_pair_seeds_and_keep_all_else_equal() -> None:
    runs = expand("seeds", base(), seeds=2)
    assert [run.name for run in runs] == ["prenorm-seed0", "block-seed0", "prenorm-seed1", "block-seed1"]
    for name in SWEEPS:
        runs = expand(name, base(seed=5))
        assert {run.seed for run in runs} == set(range(5, 5 + SWEEPS[name].num_seeds))
        assert len({run.name for run in runs}) == len(runs)
        by_case = {run.case: run.config for run in runs}
        for run in runs:
            twin = replace(by_case[run.case], seed=run.seed)
            model = replace(twin.model, residual=run.config.model.residual)
            assert replace(twin, model=model) == run.config  # arms differ in the rule alone
            assert run.config.seed == run.seed


def test_block_sizes_go_from_two_to_one_block() -> None:
    runs = expand("block-size", base(), seeds=1)
    sizes = [run.config.model.residual.block_size for run in runs]
    assert sizes == [None, None, 2, 4, 8, 16, 24]
    assert [run.config.model.residual.rule for run in runs[:3]] == ["prenorm", "full", "block"]


def test_the_ablations_are_the_rows_of_table_4() -> None:
    rules = {run.arm: run.config.model.residual for run in expand("paper-ablations", base(), seeds=1)}
    assert len(rules) == 12
    assert rules["full-window8"].window == 8 and rules["full-static"].query == "none"
    assert rules["block-s4-heads16"].heads == 16 and rules["block-s4-no-key-norm"].key_norm is False


def test_sizes_keep_the_proportions_of_table_2() -> None:
    runs = expand("paper-scaling", base(), arms=["prenorm"])
    rows = paper()["sizes"]
    assert [run.case for run in runs] == [row["case"] for row in rows]
    first = runs[0]
    assert replace(first.config.model, mlp_dim=None) == replace(base().model, residual=first.config.model.residual)
    for run, row in zip(runs, rows, strict=True):
        config = run.config
        assert config.model.num_layers == row["layers"]
        assert config.model.dim / 64 == pytest.approx(row["dim"] / 896, rel=0.03)
        assert run.tokens / first.tokens == pytest.approx(row["tokens"] / 38.7e9, rel=0.01)
        assert config.optim.lr / base().optim.lr == pytest.approx(row["lr"] / 2.99e-3)
        assert config.data.batch == round(8 * row["batch"] / 192)


def test_shapes_cost_the_same() -> None:
    runs = expand("depth-width", base(), seeds=1, arms=["prenorm"])
    assert len(runs) > 20
    costs = [training_flops(run.config) for run in runs]
    assert max(costs) / min(costs) < 1.01
    sizes = [parameters(run.config.model)["attention"] + parameters(run.config.model)["mlp"] for run in runs]
    assert max(sizes) / min(sizes) < 1.6  # widths are multiples of eight and layers are whole
    shapes = [run.config.model for run in runs]
    assert all(shapes.count(shape) == 1 for shape in shapes)
    ratios = [run.config.model.dim / run.config.model.num_layers for run in runs]
    assert max(ratios) / min(ratios) > 4


def test_arms_cases_and_settings_are_read_or_refused_by_name() -> None:
    assert residual("block:block_size=4,gain=false").block_size == 4
    assert [run.arm for run in expand("seeds", base(), seeds=1, arms=["block:block_size=4"])] == ["block-block_size-4"]
    changed = with_settings(base(), ["model.dim=32", "optim.lr=3e-3", "device=cpu", "optim.depth_lr=null"])
    assert (changed.model.dim, changed.optim.lr, changed.device) == (32, 3e-3, "cpu")
    for wrong, message in (
        (lambda: residual("blok"), "arm 'blok'"),
        (lambda: residual("block:size=4"), "size is not a setting"),
        (lambda: residual("block:4"), "not setting=value"),
        (lambda: with_settings(base(), ["model.dmi=3"]), "--set model.dmi=3"),
        (lambda: with_settings(base(), ["steps"]), "--set steps"),
        (lambda: with_settings(base(), ["steps=many"]), "steps is 'many'"),
        (lambda: expand("sedes", base()), "'sedes' is not a sweep"),
        (lambda: expand("seeds", base(), cases=["w45"]), "no case 'w45'"),
        (lambda: expand("seeds", base(), seeds=0), "seeds is 0"),
        (lambda: base_config("quikc"), "neither a recipe"),
        (lambda: base_config("quick", ["model.residual.num_blocks=4"]), "a sweep's arms are its rules"),
        (lambda: grid_points(["optim.lr"]), "--grid optim.lr"),
        (lambda: grid_points(["optim.lr=1e-3,"]), "--grid optim.lr"),
    ):
        with pytest.raises(UserError, match=message):
            wrong()


def test_runs_are_spread_over_the_gpus(data: Path) -> None:
    taken: list[str | None] = []
    for _ in range(5):
        taken.append(least_used(["4", "6"], taken))
    assert taken == ["4", "6", "4", "6", "4"]
    assert least_used(["4", "6"], ["4", "6", "4"]) == "6"
    assert least_used([], []) is None
    base = RunConfig()
    named = [Planned("one", "base", "prenorm", 0, replace(base, device="cpu"))]
    assert gpus(named) == [], "a run that names its device stays there"


def test_no_run_is_given_a_gpu_that_cuda_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    runs = [Planned("one", "base", "prenorm", 0, RunConfig())]
    for visible in ("3, 1,-1,0", "3,1,"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert gpus(runs) == ["3", "1"], visible
