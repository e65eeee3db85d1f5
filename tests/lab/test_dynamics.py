"""The instruments of depth: known answers at zero queries, autograd's own gradient, counted sources, no footprints."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fathom.errors import UserError
from fathom.lab.dynamics import write_depth
from fathom.models.config import ModelConfig, ResidualConfig
from fathom.models.transformer import Transformer
from fathom.residuals import make_stream
from fathom.train import checkpoint
from fathom.train.config import RunConfig, save_config
from fathom.train.dynamics import measure_depth
from fathom.train.embedded import embedded

RULES = {
    "prenorm": ResidualConfig(rule="prenorm"),
    "block": ResidualConfig(rule="block", block_size=3),
    "full": ResidualConfig(rule="full"),
}


def make(rule: str, *, num_layers: int = 3, queries: float = 1.0) -> Transformer:
    """A small decoder whose head and depth queries are not zero, so that gradients and weights say something."""
    config = ModelConfig(vocab_size=37, context=16, dim=8, num_layers=num_layers, head_std=1.0, residual=RULES[rule])
    model = Transformer(config, seed=1)
    if rule != "prenorm":
        with torch.no_grad():
            generator = torch.Generator().manual_seed(2)
            model.stream.query.copy_(queries * torch.randn(model.stream.query.shape, generator=generator))
    return model


def text(*, rows: int = 2, length: int = 11, seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(37, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:]


def rms(tensor: Tensor) -> float:
    return tensor.detach().double().square().mean().sqrt().item()


def test_prenorm_is_the_hidden_state_and_its_autograd_gradient() -> None:
    model, (tokens, targets) = make("prenorm"), text()
    hidden = model.embedding(tokens)
    context, after = model._context(tokens), []
    for sublayer in model.sublayers:
        hidden = hidden + sublayer(sublayer.norm(hidden), context)
        hidden.retain_grad()
        after.append(hidden)
    logits = model.head(model.final_norm(hidden))
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()

    depth = measure_depth(model, [(tokens, targets)])
    assert depth["sites"] == []
    for layer, state in zip(depth["layers"], after[1::2], strict=True):
        assert layer["output_magnitude"] == pytest.approx(rms(state), rel=1e-6)
        assert layer["gradient_magnitude"] == pytest.approx(rms(state.grad), rel=1e-6)


@pytest.mark.parametrize("rule", ["block", "full"])
def test_output_and_gradient_by_finite_differences_and_by_hand(rule: str) -> None:
    """The running sum added up by hand, and the loss's answer to small shifts of one layer's MLP output."""
    model, (tokens, targets) = make(rule).double(), text(rows=1, length=3)
    outputs: list[Tensor] = []
    hooks = [s.register_forward_hook(lambda _m, _i, o: outputs.append(o)) for s in model.sublayers]
    depth = measure_depth(model, [(tokens, targets)])
    for hook in hooks:
        hook.remove()

    starts = [0, 3] if rule == "block" else range(6)
    for i, measured in enumerate(depth["layers"]):
        site = 2 * i + 1
        first = max(s for s in starts if s <= site)
        assert measured["output_magnitude"] == pytest.approx(rms(sum(outputs[first : site + 1])), rel=1e-9)

    # One batch row for each of the 3 · 8 numbers and each sign.
    layer, step = 1, 1e-6
    bumps = torch.cat((step * torch.eye(24), -step * torch.eye(24))).double().view(48, 3, 8)
    model.sublayers[2 * layer + 1].register_forward_hook(lambda _m, _i, output: output + bumps)
    logits = model(tokens.expand(48, -1))
    losses = torch.nn.functional.cross_entropy(logits.mT, targets.expand(48, -1), reduction="none").sum(1)
    gradient = (losses[:24] - losses[24:]) / (2 * step)
    assert depth["layers"][layer]["gradient_magnitude"] == pytest.approx(rms(gradient), rel=1e-6)


@pytest.mark.parametrize("rule", ["block", "full"])
def test_zero_queries_weigh_all_sources_alike(rule: str) -> None:
    depth = measure_depth(make(rule, queries=0.0), [text()])
    for site in depth["sites"]:
        n = len(site["sources"])
        assert site["weights"] == pytest.approx([1 / n] * n, rel=1e-6)
        assert site["entropy_nats"] == pytest.approx(math.log(n), abs=1e-6)
        assert site["effective_sources"] == pytest.approx(n, rel=1e-6)


@pytest.mark.parametrize("rule", ["block", "full"])
def test_weights_are_the_models_own_and_entropy_is_per_token(rule: str) -> None:
    model, (tokens, targets) = make(rule), text()
    depth = measure_depth(model, [(tokens, targets)])
    own = model.depth_weights(tokens)
    assert [site["name"] for site in depth["sites"]][2:] == [
        "layer 2 attention", "layer 2 mlp", "layer 3 attention", "layer 3 mlp", "output",
    ]  # fmt: skip
    for site, weights in zip(depth["sites"], own, strict=True):
        assert sum(site["weights"]) == pytest.approx(1, abs=1e-6)
        assert site["weights"] == pytest.approx(weights.mean((1, 2)).tolist(), rel=1e-5)
        entropy = -(weights * weights.log()).sum(0).mean().item()
        assert site["entropy_nats"] == pytest.approx(entropy, rel=1e-5, abs=1e-6)
    # The entropy of the mean weights is larger, and is not what is asked for.
    last = depth["sites"][-1]
    assert last["entropy_nats"] < -sum(w * math.log(w) for w in last["weights"]) - 1e-3


@pytest.mark.parametrize(("rule", "heads"), [("mhar", 2), ("full", 2), ("full", 1)])
def test_the_entropy_of_several_heads_is_the_mean_of_their_own(rule: str, heads: int) -> None:
    """Two heads that each read one source have no entropy, although their mean weights have."""
    settings = ResidualConfig(rule=rule, heads=heads, gain=False)  # type: ignore[arg-type]
    stream = make_stream(settings, 2, 4)
    sources = [torch.tensor([[2.0, 0.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 0.0, 2.0]])]
    with torch.no_grad():
        stream.query[1] = torch.tensor([100.0, 0.0, 0.0, 100.0])  # type: ignore[operator]
    norm = nn.RMSNorm(4)
    state = stream.write(stream.start(sources[0]), 0, sources[1])
    _, state = stream.read(state, 1, norm)
    mean = torch.special.entr(stream.weights(state, 1).double()).sum(0)
    torch.testing.assert_close(mean, torch.full((1,), math.log(2), dtype=torch.float64))
    expected = 0.0 if heads == 2 else math.log(2)
    torch.testing.assert_close(stream.entropy(state, 1), torch.full((1,), expected, dtype=torch.float64))


def test_source_counts_are_the_papers() -> None:
    """Block with S = 4 and 16 decoder layers: the row lengths of the paper's Fig. 8."""
    config = ModelConfig(vocab_size=37, context=16, dim=8, num_layers=16, residual=ResidualConfig(block_size=4))
    sites = measure_depth(Transformer(config), [text(rows=1, length=2)])["sites"]
    counts = [len(site["weights"]) for site in sites]
    assert counts == [len(site["sources"]) for site in sites]
    assert counts[0:32:2] == [1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9]
    assert counts[1:32:2] == [2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9]
    assert sites[32]["sources"] == ["embedding", *(f"block {n}" for n in range(1, 9))]


@pytest.mark.parametrize("rule", RULES)
def test_batches_of_different_sizes_count_by_token(rule: str) -> None:
    """Measured in one batch or in uneven pieces, the numbers are the same: means are over tokens, not over batches."""
    model, (tokens, targets) = make(rule), text(rows=4)
    whole = measure_depth(model, [(tokens, targets)])
    pieces = measure_depth(model, [(tokens[:3], targets[:3]), (tokens[3:], targets[3:])])
    assert whole["tokens"] == pieces["tokens"] == 44
    for a, b in zip(whole["layers"], pieces["layers"], strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for a, b in zip(whole["sites"], pieces["sites"], strict=True):
        assert a["weights"] == pytest.approx(b["weights"], rel=1e-5)
        assert a["entropy_nats"] == pytest.approx(b["entropy_nats"], rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_measuring_leaves_no_footprints(rule: str) -> None:
    """Bits, gradients and mode stay, and the caller's no_grad and autocast change nothing."""
    model, batch = make(rule).eval(), text()
    model.loss(*batch).backward()
    bits = {name: p.detach().clone() for name, p in model.named_parameters()}
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    alone = measure_depth(model, [batch])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert measure_depth(model, [batch]) == alone
    assert not model.training
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, bits[name])
        assert (parameter.grad is None) == (name not in grads)
        assert parameter.grad is None or torch.equal(parameter.grad, grads[name])


def test_no_text_is_a_user_error() -> None:
    with pytest.raises(UserError, match="at least one batch"):
        measure_depth(make("block"), [])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as training leaves it, with a checkpoint whose queries are not zero."""
    data = embedded(tmp_path / "cache")
    model = make("block")
    config = replace(model.config, vocab_size=1024)
    model = Transformer(config, seed=3)
    torch.nn.init.normal_(model.stream.query, generator=torch.Generator().manual_seed(0))
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(RunConfig(model=config, data=replace(RunConfig().data, folder=str(data))), folder / "config.json")
    manifest = json.loads((data / "manifest.json").read_text())
    (folder / "data.json").write_text(json.dumps({"corpus_hash": manifest["corpus_hash"]}))
    checkpoint.save(folder, checkpoint.Progress(7, 56, 0), model, [], keep=1)
    return folder


def test_write_depth_measures_the_checkpoint(run: Path) -> None:
    path = write_depth(run, sequences=6, device="cpu")
    depth = json.loads(path.read_text())
    assert path == run / "depth.json"
    assert (depth["rule"], depth["step"], depth["tokens"], len(depth["sites"])) == ("block", 7, 6 * 16, 7)
    # A model that the checkpoint was not loaded into has zero queries.
    assert depth["sites"][-1]["entropy_nats"] < math.log(3) - 0.01


def test_a_run_that_cannot_be_written_to_is_named(run: Path) -> None:
    (run / "depth.tmp").mkdir()
    with pytest.raises(UserError, match=r"depth\.json could not be written"):
        write_depth(run, sequences=1, device="cpu")


def test_write_depth_refuses_what_is_not_a_whole_run(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        write_depth(tmp_path / "nothing")
    with pytest.raises(UserError, match="at least 1"):
        write_depth(run, sequences=0)
    (run / "data.json").write_text('{"corpus_hash": "other"}')
    with pytest.raises(UserError, match="another corpus"):
        write_depth(run)
    (run / "data.json").write_text("{")
    with pytest.raises(UserError, match=r"data\.json is not valid JSON"):
        write_depth(run)
    (run / "checkpoints" / "step-000007").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no checkpoint"):
        write_depth(run)
